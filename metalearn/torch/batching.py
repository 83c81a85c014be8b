"""Batches whose size may change in mid-epoch: no sample is lost or repeated, and a resumed epoch goes on exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Sampler

from metalearn.errors import InvalidArgumentError, SessionError

Batch = TypeVar("Batch")


class ResizableBatchSampler(Sampler[list[int]]):
    """Draws batches of indices for a `DataLoader`; `batch_size` may be set at any time, also in mid-epoch.

    An epoch is one permutation of the samples, made of seed and epoch alone. A batch is cut from where the last one
    ended, at the size of that moment, so that whatever sizes there were, an epoch holds each sample once.

    Loader workers draw batches ahead of the loop. What counts as done are therefore batches that the loop was given,
    which `track` counts; a new size reaches the loop after the batches that are in flight already. Without workers a
    batch is drawn when the loop asks for it, and `track` is not needed.

    With several ranks each draws its share of the same batches, every rank `batch_size` samples: set the same size on
    all ranks at the same step. An epoch whose samples the ranks cannot share evenly begins with its first ones again,
    fewer than there are ranks.

    Args:
      num_samples: of the dataset.
      batch_size: samples of a rank's batch.
      seed: of the permutations.
      shuffle: False takes the samples in their order.
      drop_last: leaves out what would be a smaller batch at the end of an epoch.
      rank, world_size: which share this process draws.

    Raises:
      InvalidArgumentError: an argument is out of range.

    Example:
      >>> sampler = ResizableBatchSampler(8, 2, shuffle=False)
      >>> batches = iter(sampler)
      >>> next(batches), len(sampler)
      ([0, 1], 4)
      >>> sampler.batch_size = 5
      >>> len(sampler), list(batches)
      (3, [[2, 3, 4, 5, 6], [7]])
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("seed", seed, 0),
            ("world_size", world_size, 1),
        ):
            _check_whole(name, value, least)
        if not 0 <= rank < world_size:
            raise InvalidArgumentError(f"`rank` must be in [0, {world_size - 1}], got {rank}")
        self._about = {
            "num_samples": int(num_samples),
            "seed": int(seed),
            "shuffle": bool(shuffle),
            "drop_last": bool(drop_last),
            "world_size": int(world_size),
        }
        self._rank, self._world_size, self._drop_last = rank, int(world_size), bool(drop_last)
        self._total = -(-int(num_samples) // self._world_size) * self._world_size
        _check_whole("batch_size", batch_size, 1)
        self._batch_size = int(batch_size)
        self._epoch = 0
        self._consumed = self._drawn = 0
        """positions in the epoch's order, of all ranks together, that the loop was given, and that were drawn"""
        self._num_batches = 0
        """of this epoch that the loop was given"""
        self._in_flight: deque[tuple[int, int]] = deque()
        """course and size of batches that were drawn and not yet given to the loop, where that is tracked"""
        self._again: deque[int] = deque()
        """sizes of batches that were in flight when the epoch was broken off: unless another size is set before that,
        they are drawn again as they were, so that a resumed run has the batches of one that was not"""
        self._course = self._iteration = 0
        """how often it was loaded, and iterated"""
        self._tracked = False
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def batch_size(self) -> int:
        """Samples of a rank's batch."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        _check_whole("batch_size", value, 1)
        if value != self._batch_size:
            self._again.clear()
        self._batch_size = int(value)

    @property
    def epoch(self) -> int:
        """Epochs completed; a loop is to go on `while sampler.epoch < epochs`, so that it may resume and go back."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch; within the one that runs nothing happens, so that a resumed one goes on.

        Frameworks call it before each epoch.
        """
        _check_whole("epoch", epoch, 0)
        if epoch != self._epoch:
            self._begin(int(epoch))

    def __len__(self) -> int:
        """Batches of this epoch: those that were, and those to come at the present size."""
        sizes = self._sizes_in_flight()
        left, full = self._total - self._consumed - sum(sizes), self._batch_size * self._world_size
        return self._num_batches + len(sizes) + (left // full if self._drop_last else -(-left // full))

    def __iter__(self) -> Iterator[list[int]]:
        """Draws the batches that are left of the epoch; an iteration that ran before draws no more."""
        self._iteration += 1
        iteration = self._iteration
        self._again = deque(self._sizes_in_flight())
        self._in_flight.clear()
        self._drawn = self._consumed
        while iteration == self._iteration and (size := self._next_size()):
            # Everything is looked up anew: since the last batch the size may have changed, or a state been loaded.
            positions = self._permutation()[np.arange(self._drawn, self._drawn + size) % self._about["num_samples"]]
            self._drawn += size
            if self._tracked:
                self._in_flight.append((self._course, size))
            else:
                self._count(size)
            yield positions[self._rank :: self._world_size].tolist()
        if iteration == self._iteration and not self._tracked:
            self._begin(self._epoch + 1)

    def track(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches that are left of the epoch from a loader with workers, and counts them.

        If a state is loaded meanwhile, as a rollback does, the batches in flight are passed over.

        Args:
          loader: a `DataLoader` whose `batch_sampler` is this one, and that keeps their order (`in_order`, as it does).

        Raises:
          SessionError: the loader draws its batches from elsewhere.
        """
        self._tracked = True
        try:
            while self._is_left():
                before = self._num_batches, self._course
                for batch in loader:
                    if not self._in_flight:
                        raise SessionError(
                            "`loader` yielded a batch that this sampler did not draw; pass the DataLoader that has it "
                            "as `batch_sampler`"
                        )
                    course, size = self._in_flight.popleft()
                    if course == self._course:
                        self._count(size)
                        yield batch
                if before == (self._num_batches, self._course):
                    raise SessionError("`loader` yielded no batch; pass the DataLoader that has this `batch_sampler`")
        finally:
            self._tracked = False
        self._begin(self._epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the batch that the loop was given last; plain values."""
        return {
            **self._about,
            "epoch": self._epoch,
            "consumed": self._consumed,
            "num_batches": self._num_batches,
            "batch_size": self._batch_size,
            "in_flight": self._sizes_in_flight(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; an iteration that runs goes on from there.

        Raises:
          SessionError: the state is of a sampler with other arguments.
        """
        for name, mine in self._about.items():
            if state.get(name) != mine:
                raise SessionError(
                    f"state_dict has {name}={state.get(name)!r}, this sampler {mine!r}; make it with the arguments of "
                    "the saved one"
                )
        self._begin(int(state["epoch"]))
        self._consumed = self._drawn = int(state["consumed"])
        self._num_batches = int(state["num_batches"])
        self._batch_size = int(state["batch_size"])
        self._again = deque(map(int, state["in_flight"]))

    def _begin(self, epoch: int) -> None:
        self._epoch, self._consumed, self._drawn, self._num_batches = epoch, 0, 0, 0
        self._again.clear()
        self._course += 1

    def _count(self, size: int) -> None:
        self._consumed += size
        self._num_batches += 1

    def _next_size(self) -> int:
        """Returns the size of the next batch to draw, over all ranks; 0 at the end of the epoch."""
        left, full = self._total - self._drawn, self._batch_size * self._world_size
        if self._again:
            return min(self._again.popleft(), left)
        return 0 if self._drop_last and left < full else min(full, left)

    def _is_left(self) -> bool:
        """Returns whether the loop is still to be given a batch of this epoch."""
        return len(self) > self._num_batches

    def _sizes_in_flight(self) -> list[int]:
        return [size for course, size in self._in_flight if course == self._course] + list(self._again)

    def _permutation(self) -> np.ndarray:
        if self._order is None or self._order[0] != self._epoch:
            count, seed = self._about["num_samples"], self._about["seed"]
            mixed = self._about["shuffle"]
            order = np.random.default_rng((seed, self._epoch)).permutation(count) if mixed else np.arange(count)
            self._order = (self._epoch, order)
        return self._order[1]


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InvalidArgumentError(f"`{name}` must be an int of at least {least}, got {value!r}")
