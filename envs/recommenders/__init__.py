"""Recommenders in PyTorch: the learners of `envs.learners`, as a practitioner would write and train them."""

from collections.abc import Mapping

from envs.recommenders.click_model import ClickModel, LabelledSampler
from envs.recommenders.evaluation import Evaluator
from envs.recommenders.graph_convolution import GraphConvolution
from envs.recommenders.matrix_factorization import MatrixFactorization
from envs.recommenders.recommender import Recommender
from envs.recommenders.sampling import Sampler, TripleSampler
from envs.recommenders.self_attention import SelfAttention, SequenceSampler
from envs.recommenders.two_tower import PositiveSampler, TwoTower

RECOMMENDERS: Mapping[str, type[Recommender]] = {
    "matrix_factorization": MatrixFactorization,
    "self_attention": SelfAttention,
    "graph_convolution": GraphConvolution,
    "two_tower": TwoTower,
    "click_model": ClickModel,
}
"""By name, the same names as `envs.learners.LEARNERS`."""

__all__ = [
    "RECOMMENDERS",
    "ClickModel",
    "Evaluator",
    "GraphConvolution",
    "LabelledSampler",
    "MatrixFactorization",
    "PositiveSampler",
    "Recommender",
    "Sampler",
    "SelfAttention",
    "SequenceSampler",
    "TripleSampler",
    "TwoTower",
]
