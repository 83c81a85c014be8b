"""Raw ids stay in the interactions: no profile, log, report, state or snapshot of a run holds one."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from metalearn import Interactions, profile_domain
from metalearn.audit import write_report
from metalearn.safety.drift import DriftConfig
from metalearn.safety.rollback import RollbackConfig
from metalearn.torch import MetaScheduler

MARK = "raw-id-7f3a"


def test_a_run_on_recognisable_ids_leaves_none_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    caplog.set_level(logging.DEBUG)
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 30, 400), rng.integers(0, 20, 400)
    rows = Interactions.from_arrays(
        [f"{MARK}-user-{user}" for user in users],
        [f"{MARK}-item-{item}" for item in items],
        timestamp=np.sort(rng.random(400)) * 1e7,
        rating=rng.integers(1, 6, 400),
    )
    assert MARK in str(rows.user_ids([0])[0])
    profile = profile_domain(rows)
    table = torch.nn.Embedding(30, 4)
    optimizer = torch.optim.AdamW(table.parameters())
    scheduler = MetaScheduler(
        optimizer,
        model=table,
        domain=profile,
        horizon=40,
        interval=4,
        decision_log=tmp_path / "run.log",
        name="run",
        rollback=RollbackConfig(place="disk", folder=str(tmp_path / "snapshots"), every=1),
        drift=DriftConfig(),
    )
    for step in range(30):
        loss = table(torch.as_tensor(rows.user[step : step + 8].astype(np.int64))).square().mean()
        (loss * (float("nan") if step == 17 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss * (float("nan") if step == 17 else 1.0))
        if scheduler.should_validate:
            scheduler.report(0.1 + step / 100)
            scheduler.observe_profile(profile_domain(rows.select(np.arange(100 + 5 * step))))
    assert scheduler.rollbacks
    write_report(tmp_path / "run.log", tmp_path / "run.html")
    state = io.BytesIO()
    torch.save(scheduler.state_dict(), state)
    left = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"run.log", "run.log.head", "run.html", "snapshot.pt"} <= set(left)
    left |= {"profile": profile.to_json().encode(), "shown": repr(profile).encode(), "state": state.getvalue()}
    left["explanation"] = repr(scheduler.decision.explain()).encode()
    left["printed"] = (caplog.text + capsys.readouterr().out).encode()
    assert [name for name, content in left.items() if MARK.encode() in content] == []
