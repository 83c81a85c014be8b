"""Recommenders in PyTorch: the learners of `envs.learners`, as a practitioner would write and train them."""

from envs.recommenders.evaluation import Evaluator
from envs.recommenders.matrix_factorization import MatrixFactorization
from envs.recommenders.sampling import TripleSampler

__all__ = ["Evaluator", "MatrixFactorization", "TripleSampler"]
