"""Families of recommenders in JAX: pure, hyperparameters traced, each with a PyTorch twin in `envs.recommenders`."""

from collections.abc import Mapping

from envs.learners.click_model import ClickModel
from envs.learners.graph_convolution import GraphConvolution
from envs.learners.learner import Learner, Shape, TrainingData
from envs.learners.matrix_factorization import MatrixFactorization
from envs.learners.optimizers import OPTIMIZERS, Hyperparameters
from envs.learners.self_attention import SelfAttention
from envs.learners.two_tower import TwoTower

LEARNERS: Mapping[str, type[Learner]] = {
    "matrix_factorization": MatrixFactorization,
    "self_attention": SelfAttention,
    "graph_convolution": GraphConvolution,
    "two_tower": TwoTower,
    "click_model": ClickModel,
}
"""By name, the same names as `envs.recommenders.RECOMMENDERS`."""

__all__ = ["LEARNERS", "OPTIMIZERS", "Hyperparameters", "Learner", "Shape", "TrainingData"]
