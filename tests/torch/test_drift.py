"""A MetaScheduler that responds to drift: once to each change, in its degree, and the same after a resume."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metalearn import Controller, Decision
from metalearn.audit import AuditLog, read_records, write_report
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.safety.drift import DriftConfig, DriftReport, Loosening
from metalearn.torch import MetaScheduler, RollbackConfig
from tests.intervals import make_profile

NOISE = 0.002
"""Of the validations and losses that the loop reports."""
NOW = make_profile(2, size=14.0)
WATCHED = DriftConfig()


class Loop:
    """A loop of two steps an interval whose validations and losses are made up, and fall and rise where they shall."""

    def __init__(self, controller: Controller, *, seed: int = 0, drift: DriftConfig | None = WATCHED, **options):
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(6, 2)
        self.optimizer = torch.optim.AdamW(self.table.parameters())
        self.scheduler = MetaScheduler(
            self.optimizer,
            model=self.table,
            domain=make_profile(),
            controller=controller,
            interval=2,
            drift=drift,
            **options,
        )
        self.noise = np.random.default_rng(seed).standard_normal((500, 2)) * NOISE
        self.index = 0
        """of the interval, which a rollback does not turn back: what is reported is of the data that come in"""

    def interval(self, fall: float = 0.0, rise: float = 0.0) -> Decision:
        """Train for an interval, and report."""
        fell, rose = self.noise[self.index]
        level = 1.0 / (1.0 + self.index / 10)
        for _ in range(2):
            self.table.weight.square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step(level + rose + rise)
        self.index += 1
        with self.scheduler.averaged_parameters():
            metric = 0.3 - 0.2 * level + fell - fall
        return self.scheduler.report(metric)

    def until_response(self, count: int, **change: float) -> Decision:
        """Go on until more is done about drift than to ask for a profile, at most so many intervals; return that."""
        for _ in range(count):
            before = len(self.scheduler.decisions)
            self.interval(**change)
            for decision in self.scheduler.decisions[before:]:
                if decision.response not in (None, "re_profile"):
                    return decision
        raise AssertionError(f"no response in {count} intervals")

    def responses(self, *, asking: bool = False) -> list[Any]:
        """Return what was done about drift, without the mere asking for a profile that a fall begins with."""
        mild = (None,) if asking else (None, "re_profile")
        return [decision.response for decision in self.scheduler.decisions if decision.response not in mild]


def settled(controller: Controller, quiet: int = 60, **options: Any) -> Loop:
    """Return a run of so many quiet intervals."""
    loop = Loop(controller, **options)
    for _ in range(quiet):
        loop.interval()
    assert loop.responses(asking=True) == []
    return loop


def weights(loop: Loop) -> torch.Tensor:
    return loop.table.weight.detach().clone()


def test_without_drift_there_is_no_response_and_nothing_is_changed(controller: Controller):
    watched, plain = Loop(controller), Loop(controller, drift=None)
    for loop in (watched, plain):
        for _ in range(200):
            loop.interval()
    assert watched.responses(asking=True) == []
    assert watched.scheduler.decisions == plain.scheduler.decisions
    assert torch.equal(weights(watched), weights(plain))
    assert plain.scheduler.drift is None and not plain.scheduler.awaits_profile


def test_a_severe_fall_is_rolled_back_once_and_then_met_otherwise(controller: Controller, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    loop = settled(controller, rollback=RollbackConfig(every=10), decision_log=AuditLog(log, name="run"))
    response = loop.until_response(4, fall=0.02)
    assert response.response == "roll_back"
    assert "validation: down at once since update" in response.reasons[0]
    assert loop.scheduler.rolled_back
    (record,) = loop.scheduler.rollbacks
    assert record.to_step == 2 * 60 == loop.scheduler.steps
    assert record.reason == response.reasons[0]
    assert "rolled back" in [decision.status for decision in loop.scheduler.decisions[-2:]]
    assert loop.scheduler.drift is not None and loop.scheduler.drift.degree == "severe"
    # It falls again: it was not the run.
    again = loop.until_response(4, fall=0.02)
    assert again.response == "loosen" and loop.scheduler.awaits_profile
    assert again.reasons[1] == "not rolled back, since going back to the last snapshot has not helped"
    assert len(loop.scheduler.rollbacks) == 1
    for _ in range(30):
        loop.interval(fall=0.02)
    assert loop.responses() == ["roll_back", "loosen"]
    kinds = [record.kind for record in read_records(log)]
    back = kinds.index("rollback")
    assert kinds[back - 2 : back + 2] == ["drift", "decision", "rollback", "decision"]
    page = write_report(log, tmp_path / "run.html").read_text()
    assert re.search(r"step 1\d\d: severe: drift: validation: down at once [^<]*; response: roll back<", page)
    assert "to drift: roll_back" in page and "to drift: loosen" in page


def test_no_more_is_lost_to_drift_than_lies_between_snapshots(controller: Controller):
    loop = settled(controller, rollback=RollbackConfig(every=1))
    response = loop.until_response(4, fall=0.02)
    assert response.response == "loosen" and loop.scheduler.rollbacks == ()
    assert response.reasons[1] == "not rolled back, since the last snapshot is of after the change"


def test_without_rollback_the_next_milder_and_the_rest_when_a_profile_comes(controller: Controller, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    loop = settled(controller, decision_log=log)
    response = loop.until_response(4, fall=0.02)
    assert response.response == "loosen"
    assert response.reasons[1:3] == (
        "not rolled back, since rollback is off",
        "no start is proposed anew without a profile",
    )
    assert "asks for a profile of the data as it is now" in response.reasons[3]
    before = loop.scheduler.decisions[loop.scheduler.decisions.index(response) - 1]
    assert response.groups == before.groups  # nothing moves at once
    assert loop.scheduler.awaits_profile
    assert loop.responses() == ["loosen"]
    decision = loop.scheduler.observe_profile(NOW)
    assert decision is loop.scheduler.decision and decision.response == "re_propose"
    assert not loop.scheduler.awaits_profile
    for _ in range(12):
        loop.interval(fall=0.02)
    assert loop.responses() == ["loosen", "re_propose"]
    fresh = controller.start(NOW, loop.scheduler._run.bindings.space, roles=("embedding",), interval=2)
    ours, theirs = (one.state_dict()["position"]["group_start"] for one in (loop.scheduler._run.session, fresh))
    assert ours == theirs
    drifts = [record.content for record in read_records(log) if record.kind == "drift" and record.content is not None]
    assert [content["response"] for content in drifts][-2:] == ["loosen", "re_propose"]
    assert all(120 < content["step"] <= 128 for content in drifts)
    profiles = [record.content for record in read_records(log) if record.kind == "profile"]
    assert [content["fingerprint"] for content in profiles if content] == [
        make_profile().fingerprint,
        NOW.fingerprint,
    ]


def test_a_fall_less_than_severe_and_a_rising_loss_are_responded_to(controller: Controller):
    fell = settled(controller, quiet=120)
    assert fell.until_response(5, fall=6 * NOISE).response == "loosen"
    assert fell.scheduler.drift is not None and fell.scheduler.drift.degree == "drift"
    rose = settled(controller, rollback=RollbackConfig(every=4))
    response = rose.until_response(5, rise=0.1)
    assert response.response == "roll_back" and "loss: up at once" in response.reasons[0]


def test_what_is_loosened_is_the_user_s(controller: Controller):
    loop = settled(controller, drift=DriftConfig(loosening=Loosening(decisions=9, factor=1.25)))
    assert any("1.25 times as wide for 9 decisions" in told for told in loop.until_response(4, fall=0.02).reasons)


def test_gains_and_seasons_are_logged_and_get_no_response(controller: Controller, tmp_path: Path):
    logs = {name: tmp_path / f"{name}.jsonl" for name in ("gain", "season")}
    gain = settled(controller, decision_log=logs["gain"])
    for _ in range(6):
        gain.interval(fall=-0.02)
    season = Loop(controller, decision_log=logs["season"])
    for index in range(60):
        season.interval(fall=0.02 * (index % 7 == 6))
    for log, told in ((logs["gain"], "up at once"), (logs["season"], "repeats itself")):
        drifts = [record.content for record in read_records(log) if record.kind == "drift"]
        assert any(told in content["sentence"] for content in drifts if content)
        assert {content["response"] for content in drifts if content and not content["harmful"]} == {"none"}
    assert gain.responses(asking=True) == []
    assert gain.scheduler.drift is not None and gain.scheduler.drift.direction == "up"


@pytest.mark.parametrize("rollback", [None, RollbackConfig(every=1)], ids=["no rollback", "rollback"])
def test_a_resumed_run_responds_the_same_to_the_bit(controller: Controller, rollback: RollbackConfig | None):
    def go(loop: Loop, first: int, last: int) -> None:
        for index in range(first, last):
            loop.interval(fall=0.02 * (index >= 60))
            if index in (20, 67):
                loop.scheduler.observe_profile(NOW if index == 67 else make_profile(4))

    def content(loop: Loop) -> bytes:
        buffer = io.BytesIO()
        parts = {"table": loop.table, "optimizer": loop.optimizer, "scheduler": loop.scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        return buffer.getvalue()

    # A resumed run goes back to where it was resumed at the furthest: between two rollbacks that makes a difference.
    cuts = (30, 61, 64, 66, 69) if rollback is None else (30, 66, 69)
    whole, saved = Loop(controller, rollback=rollback), {}
    for index in range(74):
        if index in cuts:
            saved[index] = content(whole)
        go(whole, index, index + 1)
    assert "re_propose" in whole.responses() and len(whole.responses()) >= 2
    for cut, state in saved.items():
        resumed = Loop(controller, rollback=rollback)
        loaded = torch.load(io.BytesIO(state), weights_only=True)
        resumed.table.load_state_dict(loaded["table"])
        resumed.optimizer.load_state_dict(loaded["optimizer"])
        resumed.scheduler.load_state_dict(loaded["scheduler"])
        resumed.index = cut
        go(resumed, cut, 74)
        assert resumed.scheduler.decisions == whole.scheduler.decisions, cut
        assert resumed.scheduler.drift == whole.scheduler.drift
        assert torch.equal(weights(resumed), weights(whole))


def test_a_shadow_watches_and_changes_nothing(controller: Controller, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    shadow = Loop(controller, steering="shadow", rollback=RollbackConfig(every=1), decision_log=log)
    torch.manual_seed(0)
    plain = torch.nn.Embedding(6, 2)
    optimizer = torch.optim.AdamW(plain.parameters())
    for index in range(70):
        shadow.interval(fall=0.02 * (index >= 60))
        for _ in range(2):
            plain.weight.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    shadow.scheduler.observe_profile(NOW)
    assert torch.equal(weights(shadow), plain.weight.detach())
    assert shadow.scheduler.rollbacks == () and shadow.scheduler.steps == 140
    assert shadow.responses() == ["loosen", "re_propose"]
    assert all(not any(decision.groups) for decision in shadow.scheduler.decisions)
    assert "drift" in [record.kind for record in read_records(log)]


def test_a_frozen_run_holds_and_an_advised_one_asks(controller: Controller):
    frozen = Loop(controller, steering="frozen", rollback=RollbackConfig(every=1))
    for index in range(66):
        frozen.interval(fall=0.02 * (index >= 60))
    assert frozen.responses() == [] and frozen.scheduler.rollbacks == ()
    held = [d for d in frozen.scheduler.decisions if any(reason.startswith("drift:") for reason in d.reasons)]
    assert {decision.status for decision in held} == {"held"}

    asked: list[Decision] = []

    def refuse_drift(decision: Decision) -> bool:
        asked.append(decision)
        return decision.response is None

    advised = Loop(controller, steering="advise", advisor=refuse_drift, rollback=RollbackConfig(every=10))
    for index in range(66):
        advised.interval(fall=0.02 * (index >= 60))
    assert [decision.response for decision in asked if decision.response is not None] == ["roll_back"]
    assert advised.scheduler.rollbacks == () and advised.responses() == []


def test_profiles_that_move_are_responded_to(controller: Controller):
    loop = Loop(controller)
    loop.interval()
    rng = np.random.default_rng(0)
    calm = make_profile()

    def window(shift: float) -> Any:
        values = np.where(calm.mask, calm.values + 0.05 * rng.standard_normal(len(calm.values)) + shift, calm.values)
        return type(calm)(
            values=values,
            mask=calm.mask,
            fingerprint=calm.fingerprint,
            num_users=900,
            num_items=400,
            num_interactions=9000,
        )

    for _ in range(30):
        loop.scheduler.observe_profile(window(0.0))
    assert loop.responses() == []
    for _ in range(6):
        decision = loop.scheduler.observe_profile(window(1.0), domain=NOW)
        if decision.response is not None:
            break
    assert decision.response == "re_propose"
    assert loop.scheduler.drift is not None and loop.scheduler.drift.stream == "interactions"


def test_what_is_not_watched_and_bad_arguments_are_named(controller: Controller):
    plain = Loop(controller, drift=None)
    with pytest.raises(SessionError, match=r"does not watch for drift; make it with drift=DriftConfig\(\)"):
        plain.scheduler.observe_profile(NOW)
    with pytest.raises(InvalidArgumentError, match="`drift` must be a DriftConfig or None, got bool"):
        Loop(controller, drift=True)  # type: ignore[arg-type]
    loop = Loop(controller)
    with pytest.raises(InvalidArgumentError, match="`window` must be a DomainProfile, got int"):
        loop.scheduler.observe_profile(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="`domain` must be a DomainProfile, got str"):
        loop.scheduler.observe_profile(NOW, domain="shop")  # type: ignore[arg-type]
    assert loop.scheduler.drift == DriftReport()
    other = Loop(controller, drift=DriftConfig(false_alarms_per_1000=2.0))
    with pytest.raises(SessionError, match="the state's `config` are"):
        other.scheduler.load_state_dict(loop.scheduler.state_dict())
    loop.interval()
    plain.scheduler.load_state_dict(loop.scheduler.state_dict())  # a run may go on without being watched
    assert plain.scheduler.decisions == loop.scheduler.decisions
