"""Fits the outcome model: an ensemble in Flax, stopped early and calibrated on domains that it has not learnt from.

A deep ensemble (Lakshminarayanan et al., 2017). Each member learns its mean from its own random share of the domains,
and its deviations from the others: on domains that the mean has seen they would come out far too small, since some tens
of domains are soon known one by one. Each is held near to where it was initialized (Pearce et al., 2020), so that
members disagree where there are no data. The likelihood is that of all runs of a task together; see
`metalearn.controller.outcome`, whose function this is.

Shape legend: N episode, T decision, I input, K ensemble member, B block, M episode of a block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from metalearn.controller.checkpoint import flatten
from metalearn.controller.config import ControllerConfig
from metalearn.controller.outcome import (
    FIRST_DESCRIPTOR,
    MIN_STD,
    PREFIX,
    OutcomeConfig,
    OutcomeModel,
)
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.calibration import calibration_of, choose_temperatures, equal_weight
from metalearn.meta_training.outcome_rows import OutcomeRows, outcome_rows, withhold_floor
from metalearn.meta_training.rollout import Episode, Prior
from metalearn.meta_training.runner import CHUNK


@dataclass(frozen=True, kw_only=True)
class OutcomeFitConfig:
    """Settings of the fit.

    Args:
      learning_rate: of Adam.
      blocks: in a minibatch, for the mean and as many for the deviations; a block is up to eight runs of one task, all
        at the same decision.
      steps_per_evaluation: updates between evaluations on the validation domains.
      max_evaluations: the most of them.
      patience: evaluations without a gain for any member before the fit stops.
      validation_share: of the domains, where none are named.
      mean_share: of the training domains, those that a member's mean learns from; its deviations learn from the others.
      start_share: weight of the prediction before the first signal, one of a run's many.
      floor_withheld_share: share of blocks in which the floor of popularity is unknown.
      descriptor_noise: on the scaled descriptors, so that domains are not recognised one by one.
      anchor: strength of the prior at initialization; 1 is that of its variances, were an episode one observation.
    """

    learning_rate: float = 1e-3
    blocks: int = 32
    steps_per_evaluation: int = 50
    max_evaluations: int = 100
    patience: int = 8
    validation_share: float = 0.2
    mean_share: float = 0.7
    start_share: float = 0.25
    floor_withheld_share: float = 0.5
    descriptor_noise: float = 0.25
    anchor: float = 0.1


class Member(nn.Module):
    """One network of the ensemble: mean, and own and shared deviation before they are made positive.

    The head reads the inputs beside the last hidden layer. The deviations do not shape the hidden layers.
    """

    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        hidden = inputs
        for index, size in enumerate(self.hidden_sizes):
            hidden = nn.silu(nn.Dense(size, name=f"hidden_{index}")(hidden))
        head = nn.Dense(3, name="head")
        mean = head(jnp.concatenate([hidden, inputs], axis=-1))[..., :1]
        deviations = head(jnp.concatenate([jax.lax.stop_gradient(hidden), inputs], axis=-1))[..., 1:]
        return jnp.concatenate([mean, deviations], axis=-1)


def apply_member(config: OutcomeConfig, params: Any, inputs: Any) -> tuple[Any, Any, Any]:
    """Returns one member's mean, own and shared deviation of standardised outcomes, each [...].

    Args:
      config: architecture of the ensemble.
      params: of the member, without the leading axis of members.
      inputs: [..., I].
    """
    output = cast(jax.Array, Member(config.hidden_sizes).apply({"params": params}, inputs))
    return output[..., 0], MIN_STD + nn.softplus(output[..., 1]), MIN_STD + nn.softplus(output[..., 2])


def block_terms(mean: Any, own: Any, shared: Any, outcome: Any, mask: Any) -> tuple[Any, Any]:
    """Returns the two terms of -2 log likelihood of the runs of one task, per run: the square and the logarithm.

    The runs are normal with covariance diag(own²) + shared sharedᵀ, inverted by the Woodbury identity.

    Args:
      mean, own, shared, outcome: [..., M].
      mask: [..., M], 0 for padding.
    """
    precision = mask / jnp.square(own)
    residual = outcome - mean
    spread = 1.0 + (jnp.square(shared) * precision).sum(-1)
    square = (jnp.square(residual) * precision).sum(-1) - jnp.square((residual * shared * precision).sum(-1)) / spread
    logarithm = (mask * jnp.log(2.0 * np.pi * jnp.square(own))).sum(-1) + jnp.log(spread)
    count = jnp.maximum(mask.sum(-1), 1.0)
    return square / count, logarithm / count


def fit_outcome(
    episodes: Episode,
    domains: Sequence[str],
    controller: ControllerConfig,
    prior: Prior,
    *,
    config: OutcomeConfig | None = None,
    settings: OutcomeFitConfig | None = None,
    validation_domains: Collection[str] | None = None,
    seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Fits an outcome model to episodes.

    Every member keeps the parameters that did best on the validation domains; the temperatures, one of the start and
    one of the run, make the ensemble's intervals cover what they say on the validation domains.

    Args:
      episodes: NumPy, concatenated; with various configurations on each task, or differences are not learnt.
      domains: of each episode, from `episode_domains`; episodes of one domain are never on both sides.
      controller: architecture that the episodes were run with.
      prior: base and normalizer that the controller ships with.
      config: architecture of the ensemble.
      settings: of the fit.
      validation_domains: domains to stop and calibrate by; by default a random share of them.
      seed: of every draw.

    Returns:
      Flat parameters "outcome/<module>/<parameter>", float32, for `OutcomeModel`; and a JSON-ready record of the fit,
      with the calibration on the validation domains (temperatures were chosen on them: unseen ones do a little worse).

    Raises:
      InvalidArgumentError: names and episodes differ in number, or there is no domain on one side.
    """
    config, settings = config or OutcomeConfig(), settings or OutcomeFitConfig()
    names = np.asarray(domains)
    if len(names) != len(episodes.score):
        raise InvalidArgumentError(
            f"`domains` must name the domain of each of {len(episodes.score)} episodes, got {len(names)} names"
        )
    rng = np.random.default_rng([seed, 21])
    if validation_domains is None:
        distinct = np.unique(names)
        count = max(1, round(settings.validation_share * len(distinct)))
        validation_domains = rng.permutation(distinct)[:count].tolist()
    validation_domains = sorted(validation_domains or ())
    held_out = np.isin(names, validation_domains)
    if held_out.all() or not held_out.any():
        raise InvalidArgumentError(
            f"`validation_domains` must hold some of the domains, and not all, got {validation_domains} of "
            f"{sorted(set(domains))}"
        )
    rows = outcome_rows(episodes, controller, prior)
    outcome = rows.outcome[~held_out]
    target = np.array([outcome.mean(), max(float(outcome.std()), 1e-6)], np.float32)
    standardized = (rows.outcome - target[0]) / target[1]
    params, record = _fit_members(rows, standardized, names, held_out, controller, config, settings, rng, seed)
    flat = {f"{PREFIX}{name}": value for name, value in flatten(params).items()}
    flat |= {f"{PREFIX}target": target, f"{PREFIX}temperature": np.ones(2, np.float32)}
    validation = OutcomeRows(*(leaf[held_out] for leaf in rows))
    flat[f"{PREFIX}temperature"] = choose_temperatures(OutcomeModel(flat), validation, names[held_out])
    return flat, {
        "seed": seed,
        "model": asdict(config),
        "settings": asdict(settings),
        "episodes": {"training": int((~held_out).sum()), "validation": int(held_out.sum())},
        "domains": {"training": len(set(names[~held_out])), "validation": len(set(names[held_out]))},
        **record,
        "temperature": dict(zip(("start", "run"), flat[f"{PREFIX}temperature"].tolist(), strict=True)),
        "calibration": calibration_of(OutcomeModel(flat), validation),
    }


def _blocks(task: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the given rows into blocks of up to CHUNK of one task; returns indices and mask, each [B, CHUNK]."""
    index, mask = [], []
    for one in np.unique(task[rows]):
        own = rng.permutation(rows[task[rows] == one])
        for first in range(0, len(own), CHUNK):
            part = own[first : first + CHUNK]
            index.append(np.resize(part, CHUNK))
            mask.append(np.arange(CHUNK) < len(part))
    return np.array(index), np.array(mask, np.float32)


def _fit_members(
    rows: OutcomeRows,
    outcome: np.ndarray,
    names: np.ndarray,
    held_out: np.ndarray,
    controller: ControllerConfig,
    config: OutcomeConfig,
    settings: OutcomeFitConfig,
    rng: np.random.Generator,
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    """Trains the members, each until the validation domains gain no more from it; returns the best of each."""
    index, mask = _blocks(rows.task, np.flatnonzero(~held_out), rng)
    validation_index, validation_mask = _blocks(rows.task, np.flatnonzero(held_out), rng)
    num_members, num_decisions = config.num_members, rows.inputs.shape[1]
    distinct, domain = np.unique(names[index[:, 0]], return_inverse=True)
    if len(distinct) < 2:
        raise InvalidArgumentError(
            "`domains` must hold at least 2 beside the validation domains, for the mean and for the deviations, "
            f"got {distinct.tolist()}"
        )
    order = np.stack([rng.permutation(len(distinct)) for _ in range(num_members)])
    of_mean = (order < np.clip(round(settings.mean_share * len(distinct)), 1, len(distinct) - 1))[:, domain]
    weight = equal_weight(names[validation_index[:, 0]])

    keys = jax.random.split(jax.random.key(seed), num_members)
    member = Member(config.hidden_sizes)
    anchor = jax.vmap(lambda key: member.init(key, jnp.zeros(rows.inputs.shape[-1]))["params"])(keys)
    advance, validate = _programs(config, settings, len(controller.descriptors))
    data = jnp.asarray(rows.inputs), jnp.asarray(outcome, jnp.float32)
    held = *data, jnp.asarray(validation_index), jnp.asarray(validation_mask), jnp.asarray(weight, jnp.float32)
    prior_weight = jnp.float32(settings.anchor / (~held_out).sum())

    params = best = anchor
    state = jax.vmap(_optimizer(settings).init)(params)
    best_loss, best_evaluation = np.asarray(validate(params, *held)), np.zeros(num_members, int)
    size = settings.steps_per_evaluation, settings.blocks
    evaluation = 0
    while evaluation < settings.max_evaluations and evaluation - best_evaluation.max() < settings.patience:
        evaluation += 1
        picked = np.stack(
            [
                np.concatenate([rng.choice(np.flatnonzero(part), size) for part in (mine, ~mine)], axis=1)
                for mine in of_mean
            ],
            axis=1,
        )
        start = rng.random(picked.shape) < settings.start_share
        decision = np.where(start, 0, rng.integers(1, num_decisions, picked.shape))
        withheld = rng.random(picked.shape) < settings.floor_withheld_share
        batches = index[picked], mask[picked], decision, withheld
        key = jax.random.fold_in(jax.random.key(seed), evaluation)
        params, state = advance(params, state, anchor, prior_weight, *data, jax.tree.map(jnp.asarray, batches), key)
        loss = np.asarray(validate(params, *held))
        gained = loss < best_loss
        best_loss, best_evaluation = np.minimum(loss, best_loss), np.where(gained, evaluation, best_evaluation)
        best = jax.tree.map(
            lambda new, old, gained=gained: jnp.where(gained.reshape(-1, *[1] * (new.ndim - 1)), new, old), params, best
        )
    return jax.tree.map(np.asarray, best), {
        "evaluations": evaluation,
        "steps": (best_evaluation * settings.steps_per_evaluation).tolist(),
        "validation_loss": best_loss.tolist(),
    }


def _optimizer(settings: OutcomeFitConfig) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(settings.learning_rate))


@cache
def _programs(config: OutcomeConfig, settings: OutcomeFitConfig, num_descriptors: int) -> tuple[Any, Any]:
    """Compiles the updates between two evaluations, and the evaluation."""
    optimizer = _optimizer(settings)
    descriptors = slice(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + num_descriptors)

    held = jax.lax.stop_gradient

    def from_anchor(params: Any, anchor: Any) -> Any:
        """‖θ - θ₀‖² over the variances of the initialization, 1 / fan-in."""
        layers = [(params[name], anchor[name]) for name in params]
        return sum(
            one["kernel"].shape[0] * (jnp.square(one[part] - other[part])).sum()
            for one, other in layers
            for part in ("kernel", "bias")
        )

    def objective(params: Any, anchor: Any, prior_weight: Any, inputs: Any, outcome: Any, mask: Any) -> Any:
        mean, own, shared = apply_member(config, params, inputs)
        for_mean = sum(block_terms(mean, held(own), held(shared), outcome, mask))
        for_deviations = sum(block_terms(held(mean), own, shared, outcome, mask))
        loss = 0.5 * jnp.where(jnp.arange(len(mask)) < settings.blocks, for_mean, for_deviations).mean()
        return loss + 0.5 * prior_weight * from_anchor(params, anchor)

    @jax.jit
    def advance(
        params: Any, state: Any, anchor: Any, prior_weight: Any, inputs: Any, outcome: Any, batches: Any, key: Any
    ) -> tuple[Any, Any]:
        """Takes the optimizer steps of some batches."""

        def update(carry: Any, batch: Any) -> tuple[Any, None]:
            """Takes one optimizer step."""
            params, state = carry
            (index, mask, decision, withheld), key = batch
            picked = inputs[index, decision[..., None]]
            picked = jnp.where(withheld[..., None, None], withhold_floor(picked), picked)
            clean = picked[..., descriptors]
            noise = settings.descriptor_noise * jax.random.normal(key, (*clean.shape[:-2], 1, num_descriptors))
            # Zero is the median, and what an unknown descriptor becomes: it stays exactly zero.
            picked = picked.at[..., descriptors].set(jnp.where(clean == 0.0, 0.0, clean + noise))
            gradient = jax.vmap(jax.grad(objective), in_axes=(0, 0, None, 0, 0, 0))(
                params, anchor, prior_weight, picked, outcome[index], mask
            )
            updates, state = jax.vmap(optimizer.update)(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, batches[0].shape[0])
        return jax.lax.scan(update, (params, state), (batches, keys))[0]

    @jax.jit
    def validate(params: Any, inputs: Any, outcome: Any, index: Any, mask: Any, weight: Any) -> Any:
        """Returns the loss of each member at its best temperatures, which are chosen later, domains alike."""
        rows = jnp.moveaxis(inputs[index], 2, 0)

        def of_member(params: Any) -> Any:
            """Returns one member's loss."""

            def at_decision(rows: Any) -> Any:
                both = jnp.stack([rows, withhold_floor(rows)])
                terms = block_terms(*apply_member(config, params, both), outcome[index], mask)
                return tuple((term.mean(0) * weight).sum() for term in terms)

            square, logarithm = jax.lax.map(at_decision, rows)

            def tempered(part: slice) -> Any:
                # min over T of (square / T² + logarithm + log T²) / 2
                return 0.5 * (1.0 + jnp.log(square[part].mean()) + logarithm[part].mean())

            start_share = settings.start_share
            return start_share * tempered(slice(0, 1)) + (1.0 - start_share) * tempered(slice(1, None))

        return jax.lax.map(of_member, params)

    return advance, validate
