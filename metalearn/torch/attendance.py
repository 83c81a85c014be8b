"""Notices, in a run of several processes, that one waits in `report` while another trains on: neither would ever end.

A process that trains on waits for the others' gradients, one that reports for their statistics. So each says which it
is about to do, then looks whether another has said the contrary: one of the two must find it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from metalearn.errors import SessionError
from metalearn.torch.sharding import is_sharded

_REPORTS, _TRAINS = "reports", "trains"


class Attendance:
    """Watches, between the end of an interval and the decision, what this process does.

    Hooks are there only in that time. A process that trains on before it reports as the others do (gradients of another
    loss, say) is no cause for alarm.

    Args:
      name: of the run, the same in all processes.
      rank: of this process.
      params: whose gradients tell that it trains.
      model: whose forward pass tells it where parameters are sharded; without it nothing does.
    """

    def __init__(self, name: str, *, rank: int, params: Sequence[torch.Tensor], model: torch.nn.Module | None) -> None:
        # There is no public way to the store that every process group is made by.
        self._store = distributed.distributed_c10d._get_default_store()
        self._name, self._rank = name, rank
        self._params = [p for p in params if p.requires_grad and not is_sharded(p)]
        self._model = model if any(map(is_sharded, params)) else None
        self._interval = 0
        self._hooks: list[Any] = []
        self._trains = False

    def begin(self) -> None:
        """Watches from here on: an interval has ended."""
        self._interval += 1
        self._trains = False
        self._hooks = [p.register_hook(self._gradient) for p in self._params]
        if self._model is not None:
            self._hooks.append(self._model.register_forward_pre_hook(self._forward, prepend=True))

    def end(self) -> None:
        """Stops watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def report(self) -> None:
        """Takes note that this process waits for the others' statistics.

        Raises:
          SessionError: another one trains on.
        """
        if not self._trains:
            self._say(_REPORTS, _TRAINS)

    def _gradient(self, gradient: torch.Tensor) -> None:
        self._train_on()

    def _forward(self, module: torch.nn.Module, arguments: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._train_on()

    def _train_on(self) -> None:
        self.end()
        if not self._trains:
            self._trains = True
            self._say(_TRAINS, _REPORTS)

    def _say(self, mine: str, contrary: str) -> None:
        """Says what this process does, then looks whether another does the contrary."""
        self._store.set(f"{self._name}/{mine}", f"{self._interval} {self._rank}")
        if not self._store.check([f"{self._name}/{contrary}"]):
            return
        interval, other = map(int, self._store.get(f"{self._name}/{contrary}").split())
        if interval == self._interval:
            who = (self._rank, other) if mine == _REPORTS else (other, self._rank)
            raise SessionError(
                "rank {} waits in report() while rank {} trains on; at the end of an interval, when `should_validate` "
                "is true, call report() in every process, with None where there is no metric".format(*who)
            )
