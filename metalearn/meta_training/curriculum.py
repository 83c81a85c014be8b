"""Which domains meta-training draws its groups from: more often those on which the policy changes most.

What an episode returns depends on its task far more than on the policy, so that learning progress does not show in
returns as they come. Every second group of a domain therefore repeats the one before it: the same task, weights, noise,
horizon and interval. Between the two only the policy has changed, and the distance of their mean returns is the
domain's progress. Its absolute value counts: a domain that is being forgotten wants practice too (Portelas et al.,
2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from metalearn.meta_training.runner import Ended, RolloutRunner

SMOOTHING = 0.5
"""Weight of a domain's last progress in its moving average."""


class Pick(NamedTuple):
    """A group to run."""

    task: int
    """row of the pool"""
    seed: int
    """of everything else that is drawn for the group"""


@dataclass(kw_only=True)
class Curriculum:
    """Learning progress by "pool/domain"; simulated tasks of a pool are one domain.

    Args:
      progress: moving average of the distance of returns between a group and its repetition.
      waiting: groups that are to be repeated: task, seed, mean return.
    """

    progress: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, tuple[int, int, float]] = field(default_factory=dict)

    def picks(
        self, pool: int, names: Sequence[str], tasks: Sequence[int], *, share: float, rng: np.random.Generator
    ) -> list[Pick]:
        """Returns the groups of one pool in an iteration.

        Args:
          pool: index of the pool.
          names: domain of each of its tasks.
          tasks: what would be drawn without a curriculum.
          share: probability that a group is drawn by progress instead; 0 does without repetitions too.
          rng: of the draws.
        """
        known = {name: self.progress[key] for name in sorted(set(names)) if (key := f"{pool}/{name}") in self.progress}
        total = sum(known.values())
        picked: list[Pick] = []
        repeated: set[str] = set()
        for task, seed, by_progress in zip(
            tasks, rng.integers(2**31, size=len(tasks)).tolist(), rng.random(len(tasks)) < share, strict=True
        ):
            if by_progress and total > 0.0:
                domain = rng.choice([*known], p=np.array([*known.values()]) / total)
                task = int(rng.choice(np.flatnonzero(np.array(names) == domain)))
            key = f"{pool}/{names[task]}"
            if share and key in self.waiting and key not in repeated:
                repeated.add(key)
                task, seed, _ = self.waiting[key]
            picked.append(Pick(task, seed))
        return picked

    def observe(self, runner: RolloutRunner, groups: Sequence[Ended]) -> None:
        """Takes in groups that ended: repetitions tell progress, and any other waits for its own."""
        for chunk, returns in groups:
            task, seed, value = int(chunk.spec.task[0]), int(chunk.spec.initialization[0]), float(np.mean(returns))
            key = f"{chunk.pool}/{runner.pools[chunk.pool].names[task]}"
            if not np.isfinite(value):
                continue
            before = self.waiting.pop(key, None)
            if before is None or (before[0], before[1]) != (task, seed):
                self.waiting[key] = task, seed, value
                continue
            distance = abs(value - before[2])
            self.progress[key] = distance + (1.0 - SMOOTHING) * (self.progress.get(key, distance) - distance)

    def as_dict(self) -> dict[str, dict]:
        """Returns JSON-ready values."""
        return {
            "progress": dict(self.progress),
            "waiting": {key: list(group) for key, group in self.waiting.items()},
        }

    @classmethod
    def from_dict(cls, content: dict[str, dict]) -> Curriculum:
        """Inverts `as_dict`."""
        waiting = {key: (int(task), int(seed), float(value)) for key, (task, seed, value) in content["waiting"].items()}
        return cls(progress={key: float(value) for key, value in content["progress"].items()}, waiting=waiting)
