"""A run of several processes: what they have measured is put together once an interval, the first of them decides.

Shape legend: W process, S optimizer step of an interval, G parameter group.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed

from metalearn.controller.decision import Decision
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.safety.rollback import RollbackConfig
from metalearn.session import Session
from metalearn.torch.attendance import Attendance
from metalearn.torch.metric import Losses
from metalearn.torch.monitor import NUM_SUMS, Measured
from metalearn.torch.recovery import Condition
from metalearn.torch.sharding import is_sharded

_HEAD = (
    *("reports", "steps", "standing", "validation", *Losses._fields),
    *("seconds", "ready", "finite", "trained", "memory"),
)
"""First entries of what a process sends at the end of an interval; losses [S] and sums [10, G] follow."""


class Standing(NamedTuple):
    """Where a run is, which must be the same in all its processes."""

    decision: Decision
    reports: bool
    """whether it has come to `report`, not to the next `step`"""


class Ranks:
    """The processes of one run.

    Each measures its own losses, and its part of weights and gradients. At the end of an interval all send that to
    all, in one collective, and make the same statistics of it: a step's loss is the mean over processes, squares, dot
    products and rows add up, the slowest process counts for time. Process 0 decides, and sends the others what came
    of it, which they take over as it is.

    Args:
      group: of the processes.
      optimizer, model: of the run.
    """

    def __init__(self, group: Any, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
        self._group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        params = [p for of in optimizer.param_groups for p in of["params"]]
        self._optimizer, self._params = optimizer, params
        self.sharded = any(map(is_sharded, params))
        for p in params:
            if is_sharded(p) and p.device_mesh.size() != self.size:
                raise InvalidArgumentError(
                    f"parameters are sharded over {p.device_mesh.size()} processes, but `process_group` has "
                    f"{self.size}; pass the group of all processes that train the model"
                )
        host = "cpu:" in str(distributed.get_backend_config(group))
        self._device = torch.device("cpu") if host or not params else params[0].device
        name = self.share(os.urandom(8).hex())
        self._attendance = Attendance(name, rank=self.rank, params=params, model=model)

    @property
    def leads(self) -> bool:
        """Whether this process decides."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Returns what process 0 has passed; a collective."""
        content = [value if self.leads else None]
        distributed.broadcast_object_list(content, group=self._group, group_src=0)
        return content[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns what each process has passed; a collective."""
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def begin(self, session: Session) -> None:
        """Has all sessions start as that of process 0; a collective."""
        state = self.share(session.state_dict() if self.leads else None)
        if not self.leads:
            session.load_state_dict(state)

    def agree(self, arguments: Mapping[str, Any], *, batch_size: int | None) -> int | None:
        """Compares what a MetaScheduler is made with, and adds up the batch sizes.

        Args:
          arguments: that must be the same in all processes; None, numbers and what has a telling `repr`.
          batch_size: samples per step of this process.

        Returns:
          Samples per step of all processes.

        Raises:
          InvalidArgumentError: processes differ; raised in all of them.
        """
        groups = [
            (len(of["params"]), sum(p.numel() for p in of["params"]), of.get("role"))
            for of in self._optimizer.param_groups
        ]
        mine = {
            **{name: repr(value) for name, value in arguments.items()},
            "optimizer": type(self._optimizer).__name__,
            "parameter groups (parameters, numbers, role)": repr(groups),
            "whether `batch_size` is given": repr(batch_size is not None),
        }
        everybody = self.gather((mine, batch_size))
        for name in mine:
            values = [told[name] for told, _ in everybody]
            if len(set(values)) > 1:
                which = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
                raise InvalidArgumentError(
                    f"the processes of this run differ in {name}: {which}; make the MetaScheduler with the same "
                    "arguments in each, or pass a `process_group` of those that train together"
                )
        return None if batch_size is None else sum(int(size) for _, size in everybody)

    def own_rollback(self, config: RollbackConfig | None) -> RollbackConfig | None:
        """Returns a config whose folder, if it has one, is this process's own."""
        if config is None or config.folder is None:
            return config
        return replace(config, folder=Path(config.folder) / f"rank-{self.rank}")

    def await_report(self) -> None:
        """Takes note that an interval has ended: from now on this process must report, or train on as all others do."""
        self._attendance.begin()

    def meet(
        self, mine: Measured, condition: Condition, standing: Standing, *, interval: int
    ) -> tuple[Measured, Condition]:
        """Puts together what all processes have measured, in one collective.

        Args:
          mine: what this process has.
          condition: of this process.
          standing: of this process.
          interval: optimizer steps of an interval, at least S.

        Returns:
          What all have, the same in each.

        Raises:
          SessionError: they are not at the same point of the run, raised in all of them; or this process is about to
            wait for others that train on.
        """
        self._attendance.end()
        if standing.reports:
            self._attendance.report()
        head = [
            standing.reports,
            len(mine.losses),
            _checksum(standing.decision),
            mine.validation,
            *mine.losses_reported,
            mine.seconds,
            condition.ready,
            condition.state_finite,
            condition.seconds,
            condition.memory_bytes,
        ]
        sent = np.concatenate([head, np.resize(mine.losses, interval), mine.sums.reshape(-1)])
        rows = self._gather_numbers(sent)
        heads: dict[str, np.ndarray] = dict(zip(_HEAD, rows[:, : len(_HEAD)].T, strict=True))
        self._compare(heads, standing)
        losses = rows[:, len(_HEAD) :][:, : len(mine.losses)]
        sums = rows[:, len(_HEAD) + interval :].sum(0).reshape(NUM_SUMS, -1)
        with np.errstate(all="ignore"):
            reported = Losses(*(_mean(heads[name]) for name in Losses._fields))
            measured = Measured(losses.mean(0), sums, heads["seconds"].max(), _mean(heads["validation"]), reported)
        return measured, Condition(
            state_finite=bool(heads["finite"].all()),
            seconds=float(heads["trained"].max()),
            memory_bytes=float(heads["memory"].max()),
            ready=bool(heads["ready"].all()),
        )

    def _gather_numbers(self, sent: np.ndarray) -> np.ndarray:
        """Returns float64 [W, ...]; every process adds up in the same order, whatever the network does."""
        tensor = torch.from_numpy(sent).to(self._device)
        received = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(received, tensor, group=self._group)
        return torch.stack(received).cpu().numpy()

    def _compare(self, heads: Mapping[str, np.ndarray], standing: Standing) -> None:
        if len(set(heads["reports"])) > 1:
            absent = [rank for rank, reports in enumerate(heads["reports"]) if not reports]
            raise SessionError(
                f"an interval has ended, and ranks {absent} did not call report() while others did; call it in every "
                "process, with None where there is no metric"
            )
        if len(set(heads["steps"])) > 1 or len(set(heads["standing"])) > 1:
            steps = heads["steps"].astype(int).tolist()
            raise SessionError(
                f"the processes of this run are at different points of it: steps of this interval by rank {steps}, "
                f"decision {standing.decision.index} here; call step, override, switch, observe_profile and "
                "load_state_dict in every process alike, and resume all of them from the same checkpoint"
            )

    def led(self, act: Callable[[], None], outcome: Callable[[], Any], adopt: Callable[[Any], None]) -> None:
        """Has process 0 act, and the others take over what came of it; a collective.

        Args:
          act: called in process 0.
          outcome: called there afterwards.
          adopt: called in the others with that.

        Raises:
          SessionError: process 0 could not act.
        """
        if not self.leads:
            told = self.share(None)
            if "error" in told:
                raise SessionError(f"rank 0 could not decide: {told['error']}; see there")
            adopt(told["outcome"])
            return
        try:
            act()
            told = {"outcome": outcome()}
        except Exception as error:
            self.share({"error": f"{type(error).__name__}: {error}"})
            raise
        self.share(told)

    def part_of_state(self, monitor: Any, *, of_all: bool, averages: bool) -> dict[str, Any]:
        """Returns what makes a state that of a run of several processes; a collective if it is to be of all.

        Raises:
          SessionError: it cannot be of all, since averaged weights are sharded.
        """
        if of_all and self.sharded and averages:
            raise SessionError(
                "averaged weights are sharded, so that a state of all ranks would hold the whole model; save the "
                "state_dict() of each process, or leave out `averaging` and pass a `horizon`"
            )
        return {"here": [self.rank, self.size], "measured": self.gather(monitor) if of_all else None}

    @contextmanager
    def no_survivor(self) -> Iterator[None]:
        """Says what to do when this process runs out of memory: it cannot go back alone, the others wait for it.

        Raises:
          SessionError: in place of the error.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise SessionError(
                f"rank {self.rank} of {self.size} ran out of memory, and the others wait for its gradients: a run of "
                "several processes cannot survive that; restart all from the last checkpoint (torchrun "
                f"--max-restarts), with a smaller batch: {error}"
            ) from error

    def release(self) -> None:
        """Lets go of parameters and model."""
        self._attendance.end()


def join(process_group: Any, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> Ranks | None:
    """Returns the processes that train together; None if this one trains alone.

    Args:
      process_group: of torch.distributed; None for the default one, if there is any.
      optimizer, model: of the run.

    Raises:
      InvalidArgumentError: this process is not in the group, the group is not of those that hold the parameters, or
        the model is sharded by FSDP1.
    """
    initialized = distributed.is_available() and distributed.is_initialized()
    if process_group is not None and not isinstance(process_group, distributed.ProcessGroup if initialized else ()):
        raise InvalidArgumentError(
            f"`process_group` must be a group of torch.distributed that this process is in, got {process_group!r}; "
            "pass None for all processes"
        )
    if not initialized or distributed.get_world_size(process_group) == 1:
        return None
    kinds = {
        kind.__name__ for module in (model.modules() if model is not None else ()) for kind in type(module).__mro__
    }
    if "FullyShardedDataParallel" in kinds:
        raise InvalidArgumentError(
            "`model` is sharded by FullyShardedDataParallel, whose flat parameters cannot be told apart; shard it by "
            "torch.distributed.fsdp.fully_shard"
        )
    return Ranks(process_group, optimizer, model)


def own_part(state: Mapping[str, Any], ranks: Ranks | None) -> Mapping[str, Any]:
    """Returns a MetaScheduler's state with what this process has measured.

    In another process's state that is missing. Then this interval is judged by what that one has seen of it so far, and
    how far weights have moved since the last interval is not measured once.

    Args:
      state: from `state_dict`.
      ranks: None in a run of one process.

    Raises:
      SessionError: it holds another process's part of averaged weights.
    """
    saved = state.get("ranks")
    here = [0, 1] if ranks is None else [ranks.rank, ranks.size]
    there = [0, 1] if saved is None else saved["here"]
    if saved is not None and saved["measured"] is not None and there[1] == here[1]:
        return {**state, "monitor": saved["measured"][here[0]]}
    if there == here:
        return state
    if ranks is not None and ranks.sharded and state["average"] is not None:
        raise SessionError(
            f"state_dict is of rank {there[0]} of {there[1]}, this is rank {here[0]} of {here[1]}, and averaged "
            "weights are sharded; save and load the state of each process, in as many"
        )
    if state["monitor"]["steps"] > 0:
        warnings.warn(
            f"rank {here[0]} of {here[1]} resumes from a state of rank {there[0]} of {there[1]}, saved within an "
            "interval, which is judged by what that one has seen; call state_dict(of_all_ranks=True) in every process",
            RuntimeWarning,
            stacklevel=3,
        )
    return {**state, "monitor": {**state["monitor"], "sample": None, "sums": None, "probing": False}}


def _checksum(decision: Decision) -> int:
    """Returns a number that two decisions share if they set the same."""
    content = [decision.index, [dict(group) for group in decision.groups], dict(decision.run), decision.mode]
    return zlib.crc32(json.dumps(content).encode())


def _mean(validations: Sequence[float] | np.ndarray) -> float:
    """Returns the mean of what was reported, itself if that is one number; NaN if nothing was."""
    reported = [float(value) for value in validations if not math.isnan(value)]
    if not reported:
        return math.nan
    return reported[0] if len(set(reported)) == 1 else float(np.mean(reported))
