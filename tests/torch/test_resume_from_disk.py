"""Resuming from a snapshot on disk: after kill -9 a run goes on, to the bit as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from envs.domains import Domain
from metalearn.audit import read_records, verify, write_report
from metalearn.errors import SessionError
from metalearn.safety.rollback import RollbackConfig
from metalearn.torch import MetaScheduler
from tests.torch.killed_run import INTERVAL
from tests.torch.runs import start

ROOT = Path(__file__).parents[2]
STEPS = 33


def live(folder: Path, kill_at: int = 0) -> int:
    command = [sys.executable, "-m", "tests.torch.killed_run", str(folder), str(kill_at), str(STEPS)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode


def test_a_killed_run_ends_as_one_that_was_not_killed(tmp_path: Path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert live(tmp_path / "whole") == 0
    assert live(tmp_path / "killed", kill_at=23) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "end.pt").exists()
    assert live(tmp_path / "killed") == 0
    whole, resumed = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "killed"))
    assert (whole["resumed"], resumed["resumed"]) == (False, True)
    assert 23 - INTERVAL <= resumed["first"] < 23
    for ours, theirs in zip(resumed["weights"], whole["weights"], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(resumed["random"], whole["random"])
    assert resumed["rates"] == whole["rates"] and resumed["decision"] == whole["decision"]
    log = tmp_path / "killed" / "run.log"
    verify(log)
    kinds = [record.kind for record in read_records(log)]
    assert kinds.count("profile") == 1 and kinds.count("rollback") == 1
    assert write_report(log, tmp_path / "run.html").exists()


def on_disk(folder: Path) -> RollbackConfig:
    return RollbackConfig(every=1, place="disk", folder=folder)


def test_without_a_snapshot_the_run_begins_anew(domain: Domain, controller, tmp_path: Path):
    scheduler = start(domain, controller=controller, rollback=on_disk(tmp_path), interval=4).scheduler
    before = scheduler.decision.as_dict()
    assert scheduler.resume_from_disk() is False
    assert scheduler.steps == 0 and scheduler.decision.as_dict() == before


def test_rollbacks_of_the_process_before_are_known(domain: Domain, controller, tmp_path: Path):
    first = start(domain, controller=controller, rollback=on_disk(tmp_path), interval=4)
    first.advance(9)
    with torch.no_grad():
        next(first.model.parameters()).fill_(float("nan"))
    first.advance(4)
    assert len(first.scheduler.rollbacks) == 1
    first.advance(12)
    second = start(domain, controller=controller, rollback=on_disk(tmp_path), interval=4, seed=5).scheduler
    assert second.resume_from_disk()
    assert second.rollbacks == first.scheduler.rollbacks
    assert second.steps > 8


def test_it_is_refused_where_it_cannot_be(domain: Domain, controller, tmp_path: Path):
    off = start(domain, controller=controller).scheduler
    with pytest.raises(SessionError, match="rollback is off"):
        off.resume_from_disk()
    in_memory = start(domain, controller=controller, rollback=RollbackConfig()).scheduler
    with pytest.raises(SessionError, match="folder"):
        in_memory.resume_from_disk()
    late = start(domain, controller=controller, rollback=on_disk(tmp_path), interval=4)
    late.advance(9)
    with pytest.raises(SessionError, match="9 steps were made already"):
        late.scheduler.resume_from_disk()


def test_a_snapshot_of_another_run_is_refused_and_nothing_is_touched(domain: Domain, controller, tmp_path: Path):
    start(domain, controller=controller, rollback=on_disk(tmp_path), interval=4).advance(9)
    table = torch.nn.Embedding(7, 3)
    before = table.weight.clone()

    other = MetaScheduler(
        torch.optim.AdamW(table.parameters()),
        model=table,
        domain=domain.profile,
        controller=controller,
        rollback=on_disk(tmp_path),
    )
    decision = other.decision.as_dict()
    with pytest.raises(SessionError, match=r"shapes .* this one has \[\(7, 3\)\]"):
        other.resume_from_disk()
    assert torch.equal(table.weight, before) and other.steps == 0 and other.decision.as_dict() == decision


def test_a_broken_file_is_refused_by_name(domain: Domain, controller, tmp_path: Path):
    start(domain, controller=controller, rollback=on_disk(tmp_path), interval=4).advance(9)
    path = tmp_path / "snapshot.pt"
    path.write_bytes(path.read_bytes()[:1000])
    scheduler = start(domain, controller=controller, rollback=on_disk(tmp_path), interval=4).scheduler
    with pytest.raises(SessionError, match=r"snapshot\.pt is not a snapshot"):
        scheduler.resume_from_disk()
