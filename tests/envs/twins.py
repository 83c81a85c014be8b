"""Holds a JAX learner and its PyTorch twin together: the same weights, the same batches, step by step.

Two conventions make it work for every family: the leaves of a learner's params come in the order of the parameters in
the recommender's `parameter_groups()`, and the fields of its batch are the arguments of `forward`, then `keep`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from envs.domains import Domain, make_domain
from envs.learners import OPTIMIZERS, Hyperparameters, Learner
from envs.recommenders import RECOMMENDERS, Recommender
from envs.simulated import SimulatedPrior, simulate
from envs.vectorized import Bucket, make_task

DIM, BATCH = 8, 32


def small_domain(seed: int = 0, content: int = 6) -> Domain:
    """A simulated domain with item content drawn at random."""
    prior = SimulatedPrior(users=(90, 90), items=(60, 60), history=(12.0, 12.0))
    interactions = simulate(prior, seed=seed)
    vectors = np.random.default_rng(seed).normal(size=(interactions.num_items, content)).astype(np.float32)
    return make_domain(interactions, name="simulated", split="leave-last-out", item_content=vectors)


def exact_bucket(name: str, domain: Domain, **options: Any) -> Bucket:
    """A bucket without any padding: what a recommender in PyTorch has."""
    content = 0 if domain.item_content is None else domain.item_content.shape[1]
    return Bucket(
        users=domain.num_users,
        items=domain.num_items,
        interactions=len(domain.train),
        dim=DIM,
        batch=BATCH,
        evaluated=64,
        learner=name,
        history=10,
        content=content,
        **options,
    )


def parameters(model: Recommender) -> list[torch.Tensor]:
    """The model's parameters in the order of its groups."""
    return [parameter for group in model.parameter_groups() for parameter in group["params"]]


def make_twins(name: str, domain: Domain, *, seed: int = 0, dropout: float = 0.0):
    """Returns (learner, training data, params, model) with the same weights on both sides."""
    bucket = exact_bucket(name, domain)
    learner = bucket.make_learner()
    data = jax.tree.map(jnp.asarray, make_task(domain, bucket).data)
    params = learner.init(data, key=jax.random.key(seed))
    options: dict[str, Any] = {"history": bucket.history} if "history" in learner.needs else {}
    model = RECOMMENDERS[name].for_domain(domain, dim=DIM, dropout=dropout, **options)
    copy_weights(params, model)
    return learner, data, params, model


def copy_weights(params: Any, model: Recommender) -> None:
    """Copies the leaves of params into the model."""
    with torch.no_grad():
        for mine, theirs in zip(parameters(model), jax.tree.leaves(params), strict=True):
            mine.copy_(torch.from_numpy(np.array(theirs)).reshape(mine.shape))


def draw(learner: Learner, data: Any, key: jax.Array):
    """Draws a batch without dropout; returns it for both sides."""
    batch = learner.draw(data, jax.random.uniform(key, (learner.num_uniforms,)), jnp.ones(learner.num_keep))
    return batch, arguments(batch)


def arguments(batch: Any) -> list[torch.Tensor]:
    """Returns what `forward` takes of a learner's batch."""
    fields = [torch.from_numpy(np.array(value)) for value in batch[:-1]]
    return [field.long() if field.dtype == torch.int32 else field for field in fields]


def largest_difference(params: Any, model: Recommender) -> float:
    """Returns the largest difference of any weight."""
    pairs = zip(jax.tree.leaves(params), parameters(model), strict=True)
    return max(float(np.abs(np.asarray(a).ravel() - b.detach().numpy().ravel()).max()) for a, b in pairs)


def train_both(
    name: str, optimizer: str, domain: Domain, *, steps: int = 100, rate: float = 0.01
) -> tuple[float, float]:
    """Trains both under changing hyperparameters; returns the largest difference of losses and of weights."""
    learner, data, params, model = make_twins(name, domain)
    rule = OPTIMIZERS[optimizer]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    theirs = kind(model.parameter_groups(), lr=rate)
    groups = learner.groups(params)
    count = learner.num_groups

    @jax.jit
    def step(params, state, batch, hyperparameters):
        loss, gradient = learner.loss_and_gradient(params, data, batch)
        return *rule.update(params, gradient, state, hyperparameters, groups), loss

    state, worst = rule.init(params), 0.0
    for index in range(steps):
        batch, tensors = draw(learner, data, jax.random.key(index))
        rates = rate * (1 + np.cos(index / 30)) * np.linspace(1.0, 0.5, count)
        decay, beta1 = np.linspace(0.1, 0.4, count) * (1.0 if optimizer == "adamw" else 0.01), np.full(count, 0.8)
        beta1 = beta1 + 0.001 * index
        values = Hyperparameters(*(jnp.asarray(value, jnp.float32) for value in (rates, decay, beta1)))
        params, state, loss = step(params, state, batch, values)
        for group, param_group in enumerate(theirs.param_groups):
            momentum = {"betas": (beta1[group], 0.999)} if optimizer == "adamw" else {"momentum": beta1[group]}
            param_group.update(lr=rates[group], weight_decay=decay[group], **momentum)
        theirs.zero_grad()
        other = model(*tensors)
        other.backward()
        theirs.step()
        worst = max(worst, abs(float(loss) - other.item()))
    return worst, largest_difference(params, model)
