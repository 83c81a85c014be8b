"""Last-good copies of a run, in memory held for them or in a file: what a rollback returns to.

Everything is copied on saving and on restoring; nothing is shared between a snapshot and the run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.safety.rollback import Place
from metalearn.torch.copies import (
    Held,
    Pairs,
    all_finite,
    by_reference,
    copy_looking,
    copy_pairs,
    fresh,
    hold,
    num_bytes,
    put,
    put_all,
)
from metalearn.torch.sharding import local
from metalearn.torch.tracked import is_data, optimizer_state, random_state, reader, restore_tracked, set_random_state

FREE_SHARE = 0.25
"""Share of the free memory that snapshots may take."""
NUM_SLOTS = 2
"""While one snapshot is being made, the last good one is kept."""
FORMAT_VERSION = 1
FILE_NAME = "snapshot.pt"
_PARTS = frozenset({"step", "extra", "parameters", "buffers", "optimizers", "tracked", "random"})
_SCHEDULED = ("lr", "betas", "momentum")
"""What learning-rate schedulers write into parameter groups."""


class Snapshots:
    """Keeps the last good copy of a run.

    Two slots take turns, so that an error during `save` leaves the snapshot before it; on disk a temporary file is
    synced and renamed, so that a kill does. Memory is allocated when first needed, and used again.

    Tensors are restored in place: whoever holds a parameter, a buffer, a parameter group or a moment goes on holding
    the right one. State that did not exist at the snapshot vanishes. Gradients are dropped.

    Args:
      modules: parameters and buffers, also those that are not persistent.
      optimizers: parameters, state and groups. The groups' learning rate and momentum go back only if a scheduler of
        the optimizer is among `tracked`; else they are their owner's.
      tracked: anything with `state_dict` and `load_state_dict`, and generators (torch, NumPy, `random.Random`).
        Among them what is no scheduler and no GradScaler counts as a position in the data.
      place: see `RollbackConfig`.
      limit_bytes: the most that both slots may take.
      folder: for `disk`. A snapshot that an earlier process left there can be restored.

    Example:
      >>> layer = torch.nn.Linear(2, 1)
      >>> optimizer = torch.optim.AdamW(layer.parameters())
      >>> snapshots = Snapshots(modules=[layer], optimizers=[optimizer])
      >>> snapshots.save(0)
      >>> before = layer.weight.clone()
      >>> layer(torch.ones(2)).sum().backward()
      >>> optimizer.step()
      >>> snapshots.restore()
      >>> torch.equal(layer.weight, before), len(optimizer.state)
      (True, 0)
    """

    def __init__(
        self,
        *,
        modules: Sequence[torch.nn.Module] = (),
        optimizers: Sequence[torch.optim.Optimizer] = (),
        tracked: Sequence[Any] = (),
        place: Place = "auto",
        limit_bytes: int | None = None,
        folder: str | Path | None = None,
    ) -> None:
        for index, thing in enumerate(tracked):
            if reader(thing) is None:
                raise InvalidArgumentError(
                    f"`tracked[{index}]` must have state_dict and load_state_dict, or be a random generator, "
                    f"got {type(thing).__name__}"
                )
        self._modules = [*modules, *(t for t in tracked if isinstance(t, torch.nn.Module))]
        self._optimizers = [*optimizers, *(t for t in tracked if isinstance(t, torch.optim.Optimizer))]
        self._tracked = [t for t in tracked if not isinstance(t, torch.nn.Module | torch.optim.Optimizer)]
        self._wanted: Place = place
        self._limit = limit_bytes
        self._folder = None if folder is None else Path(folder)
        self._place: Place | None = None
        self._planned = 0
        self._slots: list[Any] = [None] * NUM_SLOTS
        self._sizes = [0] * NUM_SLOTS
        """bytes of tensors in each"""
        self._good: int | None = None
        self._ahead: dict[int, tuple[torch.Tensor, int]] = {}
        """of the tensors in the next slot that hold a copy already, what was copied, and in which version"""
        self.grew = False
        """Whether the last `save` had to allocate memory."""

    @property
    def place(self) -> Place | None:
        """Where snapshots are kept; None before the first."""
        return self._place

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the slots hold."""
        return sum(self._sizes)

    @property
    def exists(self) -> bool:
        """Whether there is something to restore."""
        return self._good is not None or (self._path is not None and self._path.exists())

    @torch.no_grad()
    def all_finite(self, *, copying: bool = False) -> bool:
        """Returns whether every parameter and every moment of the optimizers is finite.

        Args:
          copying: `save` is likely to follow before anything is trained. Both are copied into its memory while they are
            looked at, if there is any yet; it then copies what has changed since.
        """
        parameters = self._parameters()
        if copying and self._good is not None:
            live = {"parameters": parameters, "optimizers": [optimizer_state(o) for o in self._optimizers]}
            if num_bytes(live) <= self._planned:
                return self._copy_ahead(live)
        states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
        moments = [v for s in states if isinstance(s, dict) for v in s.values() if isinstance(v, torch.Tensor)]
        return all_finite(map(local, [*parameters, *moments]))

    def _copy_ahead(self, live: dict[str, Any]) -> bool:
        """Copies a part of what is to be saved; returns whether it is finite."""
        pairs: Pairs = []
        former, slot = self._slots[self._next_slot], self._next_slot
        self._slots[slot] = {**(former or {}), **hold(live, former, pairs, on_host=self._place == "host")}
        self._ahead = {}
        finite = copy_looking(pairs)
        self._ahead = {id(into): (value, value._version) for into, value in pairs if not value.is_inference()}
        return finite

    def _has_copy(self, into: torch.Tensor, value: torch.Tensor) -> bool:
        copied, version = self._ahead.get(id(into), (None, 0))
        return copied is not None and copied.data_ptr() == value.data_ptr() and version == value._version

    @torch.no_grad()
    def save(self, step: int, extra: Any = None) -> None:
        """Copies everything; should it fail, the last good snapshot stays.

        Args:
          step: optimizer steps done.
          extra: more to be kept, of tensors, plain values, lists and dicts; `extra()` returns a copy.

        Raises:
          InvalidArgumentError: there is no room for it; the message says how much is needed.
        """
        live = self._live(step, extra)
        self._choose_place(live)
        if self._place == "disk":
            self._write(live)
            self._slots, self._sizes, self._good, self.grew = [None] * NUM_SLOTS, [0] * NUM_SLOTS, None, False
            return
        slot = self._next_slot
        pairs: Pairs = []
        self._slots[slot] = hold(live, self._slots[slot], pairs, on_host=self._place == "host")
        copy_pairs([(into, value) for into, value in pairs if not self._has_copy(into, value)])
        self._ahead = {}
        size = num_bytes(self._slots[slot])
        self.grew, self._sizes[slot] = size > self._sizes[slot], size
        self._good = slot

    @property
    def _next_slot(self) -> int:
        return 0 if self._good is None else (self._good + 1) % NUM_SLOTS

    @torch.no_grad()
    def extra(self) -> Any:
        """Returns a copy of what was handed to `save`, as long as there is a snapshot."""
        return fresh(self._last()["extra"])

    @torch.no_grad()
    def restore(self, *, rewind: bool = True) -> None:
        """Puts everything back.

        Args:
          rewind: False leaves the position in the data, and the random generators, where they are.

        Raises:
          SessionError: there is no snapshot, its file cannot be read, or the run has other parameters than it had.
        """
        last, self._ahead = self._last(), {}
        pairs: Pairs = []
        parameters = self._parameters()
        if len(parameters) != len(last["parameters"]) or len(self._tracked) != len(last["tracked"]):
            raise SessionError(
                f"the run has {len(parameters)} parameters and {len(self._tracked)} tracked objects, the snapshot "
                f"{len(last['parameters'])} and {len(last['tracked'])}; make the Snapshots anew after changing the run"
            )
        for parameter, held in zip(parameters, last["parameters"], strict=True):
            live = parameter.data
            if (restored := put(live, held, pairs)) is not live:
                parameter.data = restored
        self._restore_buffers(last["buffers"], pairs)
        for optimizer, held in zip(self._optimizers, last["optimizers"], strict=True):
            self._restore_optimizer(optimizer, held, pairs)
        copy_pairs(pairs)
        for thing, held in zip(self._tracked, last["tracked"], strict=True):
            if rewind or not is_data(thing):
                restore_tracked(thing, fresh(held))
        if rewind:
            set_random_state(fresh(last["random"]))
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def check_fits(self) -> None:
        """Checks that the snapshot, which an earlier process may have left, is of a run like this one.

        Raises:
          SessionError: its parameters have other shapes, there is none, or its file cannot be read.
        """
        held = [tuple(parameter.tensor.shape) for parameter in self._last()["parameters"]]
        own = [tuple(local(parameter).shape) for parameter in self._parameters()]
        if held != own:
            raise SessionError(
                f"the snapshot in {self._folder} is of a run with parameters of shapes {held}, this one has {own}; "
                "pass another `folder`, or set the run up as it was"
            )

    def drop(self) -> None:
        """Forgets the snapshot in memory, and frees what was held."""
        self._slots, self._sizes, self._good = [None] * NUM_SLOTS, [0] * NUM_SLOTS, None
        self._place, self._planned, self._ahead = None, 0, {}

    def _live(self, step: int, extra: Any) -> dict[str, Any]:
        """Returns everything there is to save, by reference."""
        return {
            "version": FORMAT_VERSION,
            "step": step,
            "extra": extra,
            "parameters": self._parameters(),
            "buffers": [dict(module._buffers) for module in self._parts()],
            "optimizers": [optimizer_state(optimizer) for optimizer in self._optimizers],
            "tracked": [reader(thing)() for thing in self._tracked],  # type: ignore[misc]
            "random": random_state(),
        }

    def _parameters(self) -> list[torch.Tensor]:
        """Returns every parameter of modules and optimizers once."""
        of_modules = [p for module in self._modules for p in module.parameters()]
        of_optimizers = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        return list({id(p): p for p in of_modules + of_optimizers}.values())

    def _parts(self) -> list[torch.nn.Module]:
        return [part for module in self._modules for part in module.modules()]

    def _restore_buffers(self, held: Sequence[dict[str, Any]], pairs: Pairs) -> None:
        for part, buffers in zip(self._parts(), held, strict=True):
            put_all(part._buffers, buffers, pairs)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, held: dict[str, Any], pairs: Pairs) -> None:
        if "own" in held:
            optimizer.load_state_dict(fresh(held["own"]))
            return
        scheduled = any(getattr(thing, "optimizer", None) is optimizer for thing in self._tracked)
        for group, values in zip(optimizer.param_groups, held["groups"], strict=True):
            kept = {"params": group["params"]} | ({} if scheduled else {n: group[n] for n in _SCHEDULED if n in group})
            put_all(group, values | dict.fromkeys(kept), pairs)
            group.update(kept)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, state in zip(parameters, held["state"], strict=True):
            if state is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = put(optimizer.state.get(parameter), state, pairs)

    def _last(self) -> dict[str, Any]:
        if self._good is not None:
            return self._slots[self._good]
        if self._path is None or not self._path.exists():
            raise SessionError("there is no snapshot to go back to; call save first")
        return _read(self._path)

    @property
    def _path(self) -> Path | None:
        in_file = self._folder is not None and self._place in (None, "disk")
        return self._folder / FILE_NAME if in_file else None  # type: ignore[operator]

    def _write(self, live: dict[str, Any]) -> None:
        path = self._path
        assert path is not None
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                torch.save(by_reference(live), file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # without it the renaming may be lost with the power
        finally:
            os.close(folder)

    def _choose_place(self, live: dict[str, Any]) -> None:
        """Chooses where snapshots are kept, for two of them; anew when the run has grown."""
        needed = num_bytes(live)
        if self._place is not None and needed <= self._planned:
            return
        if self._place is None and not any(o.state for o in self._optimizers):
            needed += 2 * num_bytes(live["parameters"])  # Adam's moments are still to come
        cuda = next((p.device for p in live["parameters"] if p.is_cuda), None)
        own = self.nbytes
        room: dict[Place, float] = {}
        if cuda is not None:
            room["device"] = torch.cuda.mem_get_info(cuda)[0] * FREE_SHARE + own * (self._place == "device")
        room["host"] = _available_memory() * FREE_SHARE + own * (self._place == "host")
        if cuda is None:
            room["device"] = room["host"]
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_stale_parts(self._folder)
            room["disk"] = shutil.disk_usage(self._folder).free * FREE_SHARE
        total = NUM_SLOTS * needed
        fitting: list[Place] = [self._wanted]
        if self._wanted == "auto":
            fitting = [p for p in room if total <= room[p]]
        if not fitting or (self._limit is not None and total > self._limit):
            raise InvalidArgumentError(
                f"snapshots need {total} bytes, but `limit_bytes` is {self._limit} and a quarter of what is free is "
                f"{ {p: int(r) for p, r in room.items()} }; pass a larger limit, or a `folder` to keep them on disk"
            )
        self._place, self._planned = fitting[0], needed


def _remove_stale_parts(folder: Path) -> None:
    """Removes what processes that were killed while they wrote have left of snapshots."""
    for part in folder.glob(f"{Path(FILE_NAME).stem}.*.part"):
        try:
            os.kill(int(part.suffixes[0].removeprefix(".")), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            continue  # somebody else's process, or not a file of ours


def _read(path: Path) -> dict[str, Any]:
    """Reads a file; nothing in it is executed."""
    kinds = [type(np.dtype(code)) for code in ("u4", "u8", "i8", "f4", "f8")]
    rebuilt = [np._core.multiarray._reconstruct, np._core.multiarray.scalar]  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.serialization.safe_globals([Held, np.ndarray, np.dtype, *rebuilt, *kinds]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        version, missing = content["version"], _PARTS - content.keys()
    except Exception as error:  # an altered file leads torch, pickle and numpy to raise nearly anything
        raise SessionError(f"{path} is not a snapshot that can be restored: {error}") from error
    if version != FORMAT_VERSION:
        raise SessionError(f"{path} has snapshot version {version}, this metalearn reads {FORMAT_VERSION}")
    if missing:
        raise SessionError(f"{path} is not a snapshot that can be restored: it lacks {sorted(missing)}")
    return content


def _available_memory() -> int:
    """Returns the bytes of host memory that can be had without swapping, as far as the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:  # a container's limit; without one the first of these files is missing, or holds "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return available
    return min(available, limit - used)
