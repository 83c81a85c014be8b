"""Optimizers of the inner learners in JAX, with values per parameter group, in torch's order of operations.

Shape legend: G parameter group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BETA2 = 0.999
EPSILON = 1e-8


class Hyperparameters(NamedTuple):
    """Traced values of one step, each [G]."""

    learning_rate: Any
    """schedule included"""
    weight_decay: Any
    """decoupled for AdamW, w -= rate · decay · w; added to the gradient for SGD"""
    beta1: Any
    """of AdamW; the momentum of SGD"""


class OptimizerState(NamedTuple):
    """Moments shaped like params, and steps done."""

    first: Any
    second: Any
    """empty for SGD"""
    count: Any
    """float32"""


Update = Callable[[Any, Any, OptimizerState, Hyperparameters, Any], tuple[Any, OptimizerState]]


class Optimizer(NamedTuple):
    """`init(params) -> state` and `update(params, gradient, state, hyperparameters, groups) -> (params, state)`."""

    init: Callable[[Any], OptimizerState]
    update: Update


def _adamw_init(params: Any) -> OptimizerState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return OptimizerState(zeros, zeros, jnp.zeros(()))


def _adamw(
    params: Any, gradient: Any, state: OptimizerState, hyperparameters: Hyperparameters, groups: Any
) -> tuple[Any, OptimizerState]:
    """Takes one step of AdamW (Loshchilov and Hutter, 2019), as torch.optim.AdamW does.

    m = m + (1 - β1)(g - m);  v = β2 v + (1 - β2) g²
    w = w (1 - rate · decay) - rate / (1 - β1^t) · m / (√v / √(1 - β2^t) + ε)
    """
    count = state.count + 1.0
    correction2 = jnp.sqrt(1.0 - BETA2**count)

    def leaf(w: Any, m: Any, v: Any, g: Any, group: int) -> tuple[Any, Any, Any]:
        rate, decay, beta1 = (value[group] for value in hyperparameters)
        m = m + (1.0 - beta1) * (g - m)
        v = BETA2 * v + (1.0 - BETA2) * g * g
        denominator = jnp.sqrt(v) / correction2 + EPSILON
        return w * (1.0 - rate * decay) - (rate / (1.0 - beta1**count)) * (m / denominator), m, v

    params, first, second = _map(leaf, 3, params, state.first, state.second, gradient, groups)
    return params, OptimizerState(first, second, count)


def _sgd_init(params: Any) -> OptimizerState:
    return OptimizerState(jax.tree.map(jnp.zeros_like, params), (), jnp.zeros(()))


def _sgd(
    params: Any, gradient: Any, state: OptimizerState, hyperparameters: Hyperparameters, groups: Any
) -> tuple[Any, OptimizerState]:
    """Takes one step of SGD with momentum, as torch.optim.SGD does: g += decay · w; m = β m + g; w -= rate · m."""

    def leaf(w: Any, m: Any, g: Any, group: int) -> tuple[Any, Any]:
        rate, decay, momentum = (value[group] for value in hyperparameters)
        m = momentum * m + (g + decay * w)
        return w - rate * m, m

    params, first = _map(leaf, 2, params, state.first, gradient, groups)
    return params, OptimizerState(first, (), state.count + 1.0)


def _map(function: Callable[..., tuple[Any, ...]], width: int, *trees: Any) -> list[Any]:
    """Maps a function with several results over trees, and returns a tree of each."""
    structure = jax.tree.structure(trees[0])
    rows = [function(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
    return [jax.tree.unflatten(structure, [row[index] for row in rows]) for index in range(width)]


OPTIMIZERS: Mapping[str, Optimizer] = {"adamw": Optimizer(_adamw_init, _adamw), "sgd": Optimizer(_sgd_init, _sgd)}
"""By name."""
