"""Runs that are killed and resumed: processes of their own, ended by kill -9 in a phase, and started again.

A run saves its state to a file at the end of each interval: the guarded one beside the file, synced and then renamed;
its unguarded twin over the file, as loops do. The guarded one's snapshots lie on disk too, and are to be readable.
"""

from __future__ import annotations

import copy
import io
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.sandbox.arms import Guarding, Outcome, Run, finish, make_run
from envs.sandbox.cells import Cell
from envs.sandbox.incidents import Episode, Incident
from metalearn.controller.controller import Controller
from metalearn.controller.runtime import NumpyNetwork
from metalearn.profiles import DomainProfile
from metalearn.torch import MetaScheduler

PATIENCE = 1800.0
"""Seconds after which a process counts as one that does not end."""
_SLOW = ("torch._dynamo",)
"""What the first optimizer of a process imports: dear, and needed in each."""
STATE, PROGRESS, OUTCOME = "state.pt", "progress", "outcome.json"


@dataclass(frozen=True, kw_only=True)
class Life:
    """One process of a run.

    Args:
      episode, cell, controller, guarded, others: as of `envs.sandbox.arms.run_episode`.
      folder: of the run's files.
      dies: whether it is killed, else it resumes.
    """

    episode: Episode
    cell: Cell
    controller: Controller
    guarded: bool
    others: Sequence[DomainProfile]
    folder: str
    dies: bool


def run_killed(
    episode: Episode,
    cell: Cell,
    controller: Controller,
    *,
    guarded: bool,
    others: Sequence[DomainProfile],
    folder: Path,
) -> Outcome:
    """Trains one arm of an episode in a process that is killed, and in another that resumes it.

    Args:
      episode: with a kill.
      cell, controller, guarded, others: as of `envs.sandbox.arms.run_episode`.
      folder: empty; for the run's files.

    Returns:
      What became of the run; lost if it could not be resumed, or lost more steps than an interval has.
    """
    context = get_context("forkserver")  # its server has no threads, which a fork would leave hanging
    context.set_forkserver_preload([__name__, *_SLOW])
    cell = replace(cell)  # without its evaluators, whose tensors would travel through shared memory
    folder.mkdir(parents=True, exist_ok=True)
    for dies in (True, False):
        life = Life(
            episode=episode,
            cell=cell,
            controller=controller,
            guarded=guarded,
            others=others,
            folder=str(folder),
            dies=dies,
        )
        process = context.Process(target=live, args=(life,))
        process.start()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            return Outcome(metric=None, finite=True, error=f"no end after {PATIENCE:.0f} seconds")
        if dies and process.exitcode != -signal.SIGKILL:
            return Outcome(metric=None, finite=True, error=f"the phase was not reached: exit code {process.exitcode}")
    try:
        return Outcome(**json.loads((folder / OUTCOME).read_text()))
    except (OSError, ValueError) as error:
        return Outcome(metric=None, finite=True, error=f"the resumed process left no outcome: {error}")


def live(life: Life) -> None:
    """Runs one process, to its death or to its end."""
    torch.set_num_threads(1)
    folder, kill = Path(life.folder), life.episode.find("kill")
    assert kill is not None
    death = Death(kill, life) if life.dies else None
    guarding = Guarding(folder=life.folder if life.guarded else None)

    def make(controller: Controller) -> Run | Outcome:
        return make_run(
            life.episode, life.cell, controller, guarded=life.guarded, others=life.others, guarding=guarding
        )

    if not life.dies and life.guarded and (broken := _broken_snapshot(make(life.controller))) is not None:
        _write_outcome(folder, broken)
        return
    run = make(life.controller if death is None else death.watched(life.controller))
    if isinstance(run, Outcome):
        _write_outcome(folder, run)
        return
    lost = 0
    if death is not None:
        death.watch(run)
    else:
        reached = int((folder / PROGRESS).read_text())
        try:
            _load(run, folder / STATE)
        except Exception as error:
            _write_outcome(folder, Outcome(metric=None, finite=True, error=f"not resumed: {error}"[:300]))
            return
        lost = reached - run.scheduler.steps
    progress = os.open(folder / PROGRESS, os.O_CREAT | os.O_WRONLY)
    run.on_step = lambda: _note(progress, run.scheduler.steps)
    run.on_interval = lambda: _save(run, folder / STATE, death, careful=life.guarded)
    _write_outcome(folder, finish(run, guarded=life.guarded, lost_by_restart=lost))


class Death:
    """Kills its own process when a run is in a phase, the first time after the incident's onset.

    Args:
      kill: the incident.
      life: of the process.
    """

    def __init__(self, kill: Incident, life: Life) -> None:
        # An unguarded run takes no snapshots.
        self._phase = kill.variant if life.guarded or kill.variant != "snapshot" else "training"
        self._first = round(kill.at * life.cell.budget.steps)
        self._share = 0.5 if life.episode.seed % 2 else 1.0
        self._run: Run | None = None

    def strike(self, phase: str) -> None:
        """Kills the process, if this is the phase and the time has come."""
        if phase == self._phase and self._run is not None and self._run.scheduler.steps >= self._first:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, controller: Controller) -> Controller:
        """Returns the controller with a policy that may die in the middle of a decision."""
        twin = copy.copy(controller)
        twin.network = _Watched(controller.network, lambda: self.strike("report"))
        return twin

    def watch(self, run: Run) -> None:
        """Watches a run's steps and its snapshots."""
        self._run = run
        run.optimizer.register_step_pre_hook(lambda *_: self.strike("training"))
        save = torch.save

        def watched_save(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
            if isinstance(file, io.BytesIO):
                save(content, file, *arguments, **options)
            else:
                self.write(_serialized(content, save), file, "snapshot")

        torch.save = watched_save  # in this process only, which is about to end

    def write(self, data: bytes, file: Any, phase: str) -> None:
        """Writes a file, of which half or all is written when the process dies."""
        share = round(self._share * len(data))
        file.write(data[:share])
        file.flush()
        self.strike(phase)
        file.write(data[share:])


class _Watched(NumpyNetwork):
    def __init__(self, network: NumpyNetwork, strike: Callable[[], None]) -> None:
        self.__dict__.update(network.__dict__)
        self._strike = strike

    def act(self, *arguments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        outputs = super().act(*arguments)
        self._strike()
        return outputs


def _save(run: Run, path: Path, death: Death | None, *, careful: bool) -> None:
    assert isinstance(run.scheduler, MetaScheduler)
    data = _serialized(
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "feed": run.feed.state_dict(),
            "random": torch.get_rng_state(),
            "tries": run.faults.tries,
        },
        torch.save,
    )
    target = path.with_suffix(".part") if careful else path
    with target.open("wb") as file:
        if death is None:
            file.write(data)
        else:
            death.write(data, file, "state")
        if careful:
            file.flush()
            os.fsync(file.fileno())
    if careful:
        target.replace(path)


def _load(run: Run, path: Path) -> None:
    """Resumes a run; where nothing was saved yet it begins anew."""
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    assert isinstance(run.scheduler, MetaScheduler)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.feed.load_state_dict(state["feed"])
    torch.set_rng_state(state["random"])
    run.faults.tries = state["tries"]


def _broken_snapshot(run: Run | Outcome) -> Outcome | None:
    """Returns what became of a run that cannot resume from its snapshot on disk; uses up the run that it is given."""
    if isinstance(run, Outcome):
        return run
    assert isinstance(run.scheduler, MetaScheduler)
    try:
        run.scheduler.resume_from_disk()
    except Exception as error:
        return Outcome(metric=None, finite=True, error=f"the snapshot on disk is broken: {error}"[:300])
    return None


def _serialized(content: Any, save: Callable[..., Any]) -> bytes:
    buffer = io.BytesIO()
    save(content, buffer)
    return buffer.getvalue()


def _note(file: int, steps: int) -> None:
    os.pwrite(file, f"{steps:8d}".encode(), 0)


def _write_outcome(folder: Path, outcome: Outcome) -> None:
    (folder / OUTCOME).write_text(json.dumps(asdict(outcome)))
