"""Incidents at work in a training loop: what they do to batches, losses, gradients, metrics, memory and time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from envs.recommenders import Recommender
from envs.sandbox.cells import Cell
from envs.sandbox.incidents import Episode, Incident
from metalearn.interactions import Interactions

ABSURD: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1e30": -1e30,
    "1e30": 1e30,
    "text": "n/a",
}
ENLARGED = 4
"""Times the batch that no longer fits into memory."""
CONCEPT_SHARE = 0.15
"""Share of the run in which items mean others."""


class Feed:
    """Batches of a cell: a sampler with a position, whose data may drift and whose batches may be made larger.

    Args:
      cell: whose training rows.
      model: whose family's batches.
      seed: of order and draws.
      drift: of the data, or None.
    """

    def __init__(self, cell: Cell, model: Recommender, seed: int, drift: Incident | None) -> None:
        size, steps = cell.budget.batch_size, cell.budget.steps
        parts = [cell.domain.train] if drift is None else drifted(cell.domain.train, drift.variant, seed)

        def sampler(rows: Interactions, batch_size: int) -> Any:
            domain = dataclasses.replace(cell.domain, train=rows)
            return model.sampler(domain, min(batch_size, len(rows)), seed=seed)

        self._samplers = [sampler(part, size) for part in parts]
        self._large = sampler(cell.domain.train, ENLARGED * size)
        self._starts = _starts(drift, steps)
        self.position = 0
        """batches drawn"""
        self.enlarged = False
        """whether batches are larger now"""

    def next(self) -> tuple[torch.Tensor, ...]:
        """Returns the next batch."""
        stage = sum(self.position >= start for start in self._starts) % len(self._samplers)
        self.position += 1
        return (self._large if self.enlarged else self._samplers[stage]).next()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and the size of batches."""
        samplers = [sampler.state_dict() for sampler in (*self._samplers, self._large)]
        return {"position": self.position, "enlarged": self.enlarged, "samplers": samplers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.position, self.enlarged = int(state["position"]), bool(state["enlarged"])
        for sampler, held in zip((*self._samplers, self._large), state["samplers"], strict=True):
            sampler.load_state_dict(held)


def drifted(train: Interactions, variant: str, seed: int) -> list[Interactions]:
    """Returns the rows of each stage: the earlier half and the later one, or all rows and all with items exchanged."""
    if variant == "abrupt":
        times = np.arange(len(train)) if train.timestamp is None else train.timestamp
        order = np.argsort(times, kind="stable")
        return [train.select(np.sort(half)) for half in np.array_split(order, 2)]
    exchange = np.random.default_rng(seed).permutation(train.num_items).astype(train.item.dtype)
    return [train, dataclasses.replace(train, item=exchange[train.item])]


def _starts(drift: Incident | None, steps: int) -> tuple[int, ...]:
    """Returns the batches at which a stage begins; after the last the first one does again."""
    if drift is None:
        return ()
    if drift.variant == "abrupt":
        return (steps // 2,)
    middle = 0.5 * (1.0 - CONCEPT_SHARE)
    return round(middle * steps), round((middle + CONCEPT_SHARE) * steps)


class Faults:
    """What strikes one run. An incident strikes by what was ever tried, or if it recurs by the position in the data.

    Args:
      episode: its incidents.
      feed: of the run.
      steps: of the run.
    """

    def __init__(self, episode: Episode, feed: Feed, steps: int) -> None:
        self._episode, self._feed, self._steps = episode, feed, steps
        self._refused = 0
        self._enlarged = False
        self.tries = 0
        """batches tried, of those that were rolled back too"""

    def window(self, incident: Incident) -> range:
        """Returns the batches, counted from 0, in which an incident is at work."""
        first = round(incident.at * self._steps)
        return range(first, first + incident.lasts)

    def striking(self, name: str) -> Incident | None:
        """Returns the incident of this name if it strikes the batch that was drawn last."""
        incident = self._episode.find(name)
        if incident is None:
            return None
        count = self._feed.position if incident.recurs else self.tries
        return incident if count - 1 in self.window(incident) else None

    def before_batch(self) -> None:
        """Counts a try, waits for a late loader or slow hardware, and enlarges the batch where that is the incident."""
        self.tries += 1
        for name in ("loader_stall", "slower_hardware"):
            if (incident := self.striking(name)) is not None:
                time.sleep(incident.size)
        memory = self._episode.find("out_of_memory")
        due = memory is not None and memory.variant == "batch_size" and self.tries - 1 >= self.window(memory).start
        if due and not self._enlarged:
            self._feed.enlarged = self._enlarged = True

    def allocate(self, place: str) -> None:
        """Raises the error of an accelerator that has no memory left, if that is the incident.

        Args:
          place: "forward" or "step".
        """
        memory = self._episode.find("out_of_memory")
        if memory is None:
            return
        if memory.variant == "batch_size":
            full = place == "forward" and self._feed.enlarged
        else:
            started = self.tries - 1 >= self.window(memory).start
            full = place == memory.variant and started and self._refused < memory.lasts
            self._refused += full
        if full:
            raise torch.OutOfMemoryError("the sandbox's memory is full")

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss as it is, or struck."""
        if (incident := self.striking("nonfinite_loss")) is not None:
            loss = loss * float(incident.variant)
        if (incident := self.striking("loss_spike")) is not None:
            loss = loss * incident.size
        return loss

    def gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Spoils one gradient in place."""
        incident = self.striking("nonfinite_gradient")
        if incident is not None:
            gradient = next(p.grad for p in parameters if p.grad is not None)
            gradient.view(-1)[0] = float(incident.variant)

    def metric(self, value: float) -> Any:
        """Returns what is reported instead of a validation metric; None if nothing is."""
        if self.striking("lost_validation") is not None:
            return None
        incident = self.striking("absurd_metric")
        return value if incident is None else ABSURD[incident.variant]
