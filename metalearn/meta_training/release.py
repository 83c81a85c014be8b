"""From a meta-training run to the checkpoint that is released."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from metalearn.controller.checkpoint import Checkpoint, flatten
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.cues import FIELDS
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.config import KNOWN, ChosenBase, MetaTrainConfig
from metalearn.meta_training.runner import CHUNK

if TYPE_CHECKING:
    from metalearn.meta_training.loop import MetaTrainState


def with_bases(bases: np.ndarray, controller: ControllerConfig, chosen: Sequence[ChosenBase]) -> np.ndarray:
    """Returns bases [1 + families, 2, S], in unit ranges, with those that were chosen put in."""
    bases = bases.copy()
    for family, known, values in chosen:
        encoded = [controller.space[name].encode(value) for name, value in zip(CONTROLLED, values, strict=True)]
        bases[controller.family_index(family), int(known)] = encoded
    return bases


def check_at_rest(checkpoint: Checkpoint, families: Iterable[str]) -> None:
    """Checks that the policy of a checkpoint acts on none of some families.

    Raises:
      InvalidArgumentError: it does, and was trained around their base.
    """
    acting = {*families} - {*checkpoint.config.at_rest}
    if acting:
        raise InvalidArgumentError(
            f"the policy of this checkpoint acts on {', '.join(sorted(acting))}, whose base it was trained with; "
            f"choose bases for families at rest in it: {', '.join(checkpoint.config.at_rest) or 'there is none'}"
        )


def rebased(checkpoint: Checkpoint, chosen: Sequence[ChosenBase]) -> Checkpoint:
    """Returns a released checkpoint with other bases for families that are at rest in it.

    Args:
      checkpoint: as it is.
      chosen: families, whether the horizon is known, and values.

    Raises:
      InvalidArgumentError: the policy acts on one of the families.
    """
    check_at_rest(checkpoint, (family for family, *_ in chosen))
    return replace(
        checkpoint,
        base=with_bases(checkpoint.base, checkpoint.config, chosen),
        provenance={
            **checkpoint.provenance,
            "rebased": [[family, known, list(values)] for family, known, values in chosen],
        },
    )


IN_RUN_HEADS = ("group_head/", "run_head/")
"""Parameters that the in-run actions are proportional to, before tanh."""


def tempered(checkpoint: Checkpoint, *, decay_to: float, policy_share: float, **provenance: Any) -> Checkpoint:
    """Returns a released checkpoint with another schedule, and with in-run actions that are a share of what they were.

    A policy answers the schedule that it was trained under: under another one less of it may be right.

    Args:
      checkpoint: as it is.
      decay_to: see `ControllerConfig`.
      policy_share: 1 leaves the policy as it is, 0 leaves the start alone.
      provenance: on what grounds; kept in the checkpoint.

    Raises:
      InvalidArgumentError: the share is out of range.
    """
    if not 0.0 <= policy_share <= 1.0:
        raise InvalidArgumentError(f"`policy_share` must be between 0 and 1, got {policy_share}")
    share = np.float32(policy_share)
    return replace(
        checkpoint,
        config=replace(checkpoint.config, decay_to=decay_to),
        network={
            name: share * tensor if name.startswith(IN_RUN_HEADS) else tensor
            for name, tensor in checkpoint.network.items()
        },
        provenance={
            **checkpoint.provenance,
            "tempered": {"decay_to": decay_to, "policy_share": policy_share, **provenance},
        },
    )


def with_cues(
    checkpoint: Checkpoint,
    families: Sequence[str],
    *,
    moves: str = "learning_rate",
    at: float | None = None,
    **provenance: Any,
) -> Checkpoint:
    """Returns a released checkpoint in which some families at rest go by a cue, and no others by that one.

    Args:
      checkpoint: as it is.
      families: those; see `metalearn.controller.cues`.
      moves: the cue's hyperparameter, learning rate or weight decay.
      at: threshold of the cue, see `ControllerConfig`; by default its own.
      provenance: on what grounds; kept in the checkpoint.

    Raises:
      InvalidArgumentError: one of the families is not at rest, or the threshold is out of range.
    """
    field, threshold = FIELDS[moves]
    set_to = {field: tuple(families), threshold: getattr(ControllerConfig, threshold) if at is None else at}
    return replace(
        checkpoint,
        config=replace(checkpoint.config, **set_to),  # type: ignore[arg-type]
        provenance={**checkpoint.provenance, field: {"families": list(families), **provenance}},
    )


def with_harmed_at_rest(controller: ControllerConfig, validation: dict[str, float]) -> ControllerConfig:
    """Puts at rest the families that did worse than their base on validation domains.

    Args:
      controller: architecture.
      validation: mean gains over the base, by whether the horizon was known, family and size of the pool.
    """

    def gain(family: str, horizon: str) -> float:
        of_pools = [
            gain for name, gain in validation.items() if name.startswith(f"validation/gain/{horizon}/{family}/")
        ]
        return float(np.mean(of_pools)) if of_pools else np.inf

    harmed = [f for f in controller.families if KNOWN * gain(f, "known") + (1 - KNOWN) * gain(f, "unknown") < 0.0]
    return replace(controller, at_rest=tuple(dict.fromkeys((*controller.at_rest, *harmed))))


def released(
    state: MetaTrainState, config: MetaTrainConfig, controller: ControllerConfig, provenance: dict[str, Any]
) -> Checkpoint:
    """Makes a checkpoint of the iteration that validated best."""
    controller = with_harmed_at_rest(controller, state.best_log)
    resting = [chosen for chosen in config.resting_bases if chosen[0] in controller.at_rest]
    return Checkpoint(
        config=controller,
        network=flatten(jax.tree.map(np.asarray, state.best.network)),
        base=with_bases(np.asarray(state.prior.base), controller, resting),
        normalizer=jax.tree.map(np.asarray, state.prior.normalizer),
        provenance={
            **provenance,
            "meta_training": asdict(config),
            "best_iteration": state.best_iteration,
            "episodes": state.best_iteration * CHUNK * sum(config.groups_per_pool),
            "validation": state.best_log,
        },
    )
