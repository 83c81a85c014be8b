"""What is overridden is in force, recorded, and kept through resume and rollback; all else is refused by name."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.domains import Domain
from metalearn import Controller
from metalearn.audit import RecordKind, read_decisions, read_records, verify, write_report
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.spaces import CANONICAL_SPACE
from metalearn.torch import BatchSize, Custom, MetaScheduler, ResizableBatchSampler, RollbackConfig
from tests.torch.bound_loops import BoundLoop

EVERYTHING: dict[str, Any] = {
    "batch_size": 32,
    "accumulation": 2,
    "grad_clip": 0.5,
    "trainable[0]": False,
    "precision": "bf16",
    "num_negatives": 8,
    "margin": 0.7,
    "learning_rate": 0.003,
    "weight_decay[1]": 0.2,
    "beta1": 0.8,
    "dropout": 0.3,
}


@pytest.fixture
def loop(domain: Domain, controller: Controller) -> BoundLoop:
    return BoundLoop(domain, controller)


def test_everything_is_in_force_from_the_next_step_on(loop: BoundLoop):
    loop.advance(8)
    untouched = loop.weights()
    decided = loop.scheduler.decision
    decision = loop.scheduler.override(EVERYTHING, "a look at everything")
    seen: list[list[dict[str, Any]]] = []
    loop.optimizer.register_step_pre_hook(lambda o, *_: seen.append([dict(group) for group in o.param_groups]))
    loop.advance(1)
    factor = loop.scheduler.multiplier(8)
    assert [group["lr"] for group in seen[0]] == pytest.approx([0.003 * factor] * 2)
    assert [group["weight_decay"] for group in seen[0]] == [decided.groups[0]["weight_decay"], 0.2]
    assert [group["betas"][0] for group in seen[0]] == [0.8, 0.8]
    assert loop.model.tower[1].p == 0.3
    assert [len(batch) for batch in loop.batches[-2:]] == [32, 32]
    assert torch.equal(loop.model.table.weight, untouched[0])
    assert not torch.equal(loop.model.tower[0].weight, untouched[1])
    assert loop.settings == {"num_negatives": 8, "margin": 0.7}
    assert loop.scheduler.decision == decision
    assert decision.groups[0]["learning_rate"] == 0.003
    assert decision.intended == decided.in_force
    assert decision.reasons[0].startswith("overridden: learning_rate[0] = 0.003, learning_rate[1] = 0.003")
    assert decision.reasons[1:] == decided.reasons
    both = {"learning_rate": 0.003, "beta1": 0.8}
    alone = {name: value for name, value in EVERYTHING.items() if name not in both}
    assert loop.scheduler.overrides == {**alone, **{f"{n}[{g}]": v for n, v in both.items() for g in (0, 1)}}


def test_the_controller_goes_on_deciding_and_takes_over_again(loop: BoundLoop):
    loop.advance(6)
    loop.scheduler.override({"learning_rate[0]": 0.05, "dropout": 0.6})
    loop.advance(12)
    assert len(loop.scheduler.decisions) == 4
    for decision in loop.scheduler.decisions[2:]:
        assert decision.groups[0]["learning_rate"] == 0.05
        assert decision.run["dropout"] == 0.6
        assert decision.proposed is not None
        assert decision.proposed.groups[0]["learning_rate"] != 0.05
    assert loop.scheduler._run.overrides.in_force(decision) is decision  # as ranks do that take it over from another
    wanted = loop.scheduler.decision.intended
    assert wanted.groups[1] == loop.scheduler.decision.groups[1]
    decision = loop.scheduler.release_override("learning_rate")
    assert decision.groups == wanted.groups
    assert decision.run["dropout"] == 0.6
    loop.scheduler.release_override()
    assert loop.scheduler.overrides == {}
    assert loop.scheduler.decision.in_force == wanted
    assert loop.model.tower[1].p == wanted.run["dropout"]
    loop.advance(1)
    factor = loop.scheduler.multiplier(18)
    assert loop.scheduler.get_last_lr() == pytest.approx([row["learning_rate"] * factor for row in wanted.groups])


def test_released_bindings_get_the_value_that_they_had(loop: BoundLoop):
    loop.scheduler.override({"batch_size": 64, "margin": 2.0, "trainable": False})
    loop.scheduler.override({"batch_size": 128, "trainable[1]": True})
    loop.scheduler.release_override("batch_size", "trainable[0]")
    assert loop.sampler.batch_size == 16
    assert loop.trainable.read() == [True, True]
    assert loop.settings["margin"] == 2.0
    assert loop.scheduler.overrides == {"margin": 2.0, "trainable[1]": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 8}, r"`batch_size` must be a whole number in \[16, 65536\], got 8"),
        ({"batch_size": 32.0}, r"`batch_size` must be a whole number in .*, got 32\.0"),
        ({"batch_size": True}, r"`batch_size` must be a whole number in .*, got True"),
        ({"num_negatives": 1025}, r"`num_negatives` must be a whole number in \[1, 1024\]"),
        ({"accumulation": 3}, r"`accumulation` must be one of \(1, 2, 4, 8, 16, 32\), got 3"),
        ({"accumulation": 1.0}, r"`accumulation` must be one of"),
        ({"trainable": 1}, r"`trainable` must be one of \(False, True\), got 1"),
        ({"precision": "fp16"}, r"`precision` cannot be 'fp16': a CPU has no float16"),
        ({"precision": "fp64"}, r"`precision` must be one of"),
        ({"grad_clip": math.nan}, r"`grad_clip` must be a number in \[0\.01, 100\], got nan"),
        ({"margin": "wide"}, r"`margin` must be a number in \[0\.1, 10\], got 'wide'"),
        ({"learning_rate[1]": 2.0}, r"`learning_rate\[1\]` must be a number in \[1e-05, 1\], got 2\.0"),
        (
            {"learning_rate[2]": 0.1},
            r"`learning_rate\[2\]` is unknown; what can be overridden is \['learning_rate\[0\]'",
        ),
        ({"dropout[0]": 0.1}, r"`dropout\[0\]` is unknown"),
        ({"temperature": 0.1}, r"`temperature` is unknown"),
        ({"embedding_dim": 8}, r"`embedding_dim` is not bound to this run; it is fixed once training begins"),
        ({"early_stop": True}, r"`early_stop` is not bound to this run; pass its handle in `bindings`"),
        ({}, r"`values` must be a mapping with at least one name, got \{\}"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name_and_changes_nothing(
    loop: BoundLoop, values: dict[str, Any], message: str
):
    before = loop.scheduler.state_dict()["overrides"]
    with pytest.raises(InvalidArgumentError, match=message):
        loop.scheduler.override({"margin": 3.0, **values} if values else values)
    assert loop.scheduler.state_dict()["overrides"] == before
    assert loop.scheduler.overrides == {}


def test_masked_hyperparameters_are_refused_with_the_reason(domain: Domain, controller: Controller):
    table, bias = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [table]}, {"params": [bias], "weight_decay": 0.0}]
    scheduler = MetaScheduler(torch.optim.AdamW(groups), domain=domain.profile, controller=controller, horizon=40)
    with pytest.raises(InvalidArgumentError, match=r"`dropout` cannot be changed: `model` was not given"):
        scheduler.override({"dropout": 0.1})
    with pytest.raises(InvalidArgumentError, match=r"`weight_decay\[1\]` cannot be changed: .* which it keeps"):
        scheduler.override({"weight_decay[1]": 0.1})
    scheduler.override({"weight_decay": 0.3})  # of all groups that have one
    assert scheduler.overrides == {"weight_decay[0]": 0.3}
    with pytest.raises(InvalidArgumentError, match=r"`learning_rate` is not overridden; overridden are"):
        scheduler.release_override("learning_rate")


def test_a_setter_that_raises_leaves_everything_as_it_was(domain: Domain, controller: Controller):
    told: list[int] = []

    def refuse(value: int) -> None:
        told.append(value)
        if value > 10:
            raise RuntimeError("no room")

    sampler = ResizableBatchSampler(100, 16)
    layer = torch.nn.Linear(2, 2)
    scheduler = MetaScheduler(
        torch.optim.AdamW(layer.parameters()),
        domain=domain.profile,
        controller=controller,
        bindings=[BatchSize(sampler), Custom("num_negatives", lambda: 4, refuse)],
    )
    decided = scheduler.decision
    with pytest.raises(RuntimeError, match="no room"):
        scheduler.override({"learning_rate": 0.5, "batch_size": 32, "num_negatives": 20})
    assert sampler.batch_size == 16
    assert told == [20, 4]
    assert scheduler.overrides == {}
    assert scheduler.decision == decided


def test_wrong_bindings_are_refused(domain: Domain, controller: Controller):
    def made(*bindings: Any) -> MetaScheduler:
        layer = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(layer.parameters())
        return MetaScheduler(optimizer, domain=domain.profile, controller=controller, bindings=bindings)

    with pytest.raises(InvalidArgumentError, match=r"`bindings\[0\]` must be a Handle, got int; wrap a getter"):
        made(3)
    negatives = Custom("num_negatives", lambda: 1, lambda n: None)
    with pytest.raises(InvalidArgumentError, match=r"`bindings\[1\]` is of num_negatives, which is there twice"):
        made(negatives, negatives)
    with pytest.raises(InvalidArgumentError, match=r"`bindings\[0\]` is of dropout, which is the optimizer's"):
        made(Custom("dropout", lambda: 0.1, lambda n: None))
    with pytest.raises(InvalidArgumentError, match=r"`when` of embedding_dim must be 'run', got 'start'"):
        Custom("embedding_dim", lambda: 4, lambda n: None)
    with pytest.raises(InvalidArgumentError, match=r"`scope` of learning_rate must be 'global', got 'group'"):
        Custom("learning_rate", lambda: 0.1, lambda n: None)


@pytest.mark.parametrize(("optimizer", "expected"), [(torch.optim.AdamW, [1.0, 2.0]), (torch.optim.SGD, [4.0, 4.0])])
def test_learning_rates_follow_the_batch(domain: Domain, controller: Controller, optimizer: Any, expected: list[float]):
    loop = BoundLoop(domain, controller, optimizer=optimizer)

    def rates() -> list[float]:
        decided = [row["learning_rate"] for row in loop.scheduler.decision.groups]
        factor = loop.scheduler.multiplier(loop.scheduler.steps)
        loop.advance(1)
        return [rate / (own * factor) for rate, own in zip(loop.scheduler.get_last_lr(), decided, strict=True)]

    assert rates() == pytest.approx([1.0, 1.0])
    loop.scheduler.override({"batch_size": 64})
    assert rates() == pytest.approx(expected)
    loop.scheduler.override({"batch_size": 16, "accumulation": 4})  # the same samples per step
    assert rates() == pytest.approx(expected)
    loop.advance(8)  # over a decision
    assert rates() == pytest.approx(expected)
    loop.scheduler.override({"learning_rate[1]": 0.01})
    assert rates() == pytest.approx([expected[0], 1.0])
    loop.scheduler.override({"accumulation": 1})
    loop.advance(1)
    assert rates() == pytest.approx([1.0, 1.0])


def test_samples_of_an_interval_follow_the_batch(domain: Domain, controller: Controller):
    told: list[float] = []
    loop = BoundLoop(domain, controller)
    measure = loop.scheduler._run.monitor.statistics
    loop.scheduler._run.monitor.statistics = lambda **about: told.append(about["batch_size"]) or measure(**about)  # type: ignore[method-assign]
    loop.advance(6)
    loop.scheduler.override({"batch_size": 48, "accumulation": 2})
    loop.advance(6)
    assert told == [16, 96]


def test_in_shadow_mode_only_what_is_overridden_is_in_force(domain: Domain, controller: Controller):
    loop = BoundLoop(domain, controller, steering="shadow")
    loop.advance(1)
    assert loop.scheduler.get_last_lr() == [0.01, 0.01]
    loop.scheduler.override({"learning_rate[0]": 0.2, "dropout": 0.5})
    loop.advance(7)
    assert loop.scheduler.get_last_lr() == pytest.approx([0.2 * loop.scheduler.multiplier(7), 0.01])
    assert loop.model.tower[1].p == 0.5
    loop.scheduler.release_override()
    loop.advance(1)
    assert loop.scheduler.get_last_lr() == [0.01, 0.01]
    assert loop.model.tower[1].p == 0.1


def test_detach_gives_everything_back(loop: BoundLoop):
    loop.scheduler.override(EVERYTHING)
    loop.scheduler.detach()
    assert loop.sampler.batch_size == 16
    assert loop.settings == {"num_negatives": 4, "margin": 1.0}
    assert loop.precision.read() == "fp32"
    assert loop.model.tower[1].p == 0.1
    assert not loop.optimizer._optimizer_step_pre_hooks
    table = loop.model.table.weight.detach().clone()
    loop.model(torch.arange(4)).sum().backward()
    loop.optimizer.step()
    assert not torch.equal(loop.model.table.weight, table)


def train(loop: BoundLoop, first: int, last: int) -> None:
    """Takes steps, with an override or a release before some of them."""
    for step in range(first, last):
        if step == 4:
            loop.scheduler.override(EVERYTHING)
        if step == 9:
            loop.scheduler.override({"batch_size": 20, "learning_rate[0]": 0.02, "precision": "fp32"})
        if step == 13:
            loop.scheduler.release_override("trainable", "accumulation", "learning_rate[0]", "dropout")
        loop.advance(1)


@pytest.mark.parametrize("kill", [0, 3, 5, 9, 11, 14, 17])
def test_resumed_to_the_bit(domain: Domain, controller: Controller, kill: int):
    whole = BoundLoop(domain, controller)
    train(whole, 0, 20)
    begun = BoundLoop(domain, controller)
    train(begun, 0, kill)
    buffer = io.BytesIO()
    torch.save(begun.save(), buffer)
    buffer.seek(0)
    resumed = BoundLoop(domain, controller, size=40)  # the rates are relative to the size that the run began with
    resumed.advance(2)  # whatever it was before
    resumed.settings["margin"] = 9.0
    resumed.load(torch.load(buffer, weights_only=True))
    resumed._source = iter(resumed.sampler)
    del resumed.batches[:]
    train(resumed, kill, 20)
    assert resumed.batches == whole.batches[len(begun.batches) :]
    assert all(map(torch.equal, resumed.weights(), whole.weights()))
    assert resumed.scheduler.overrides == whole.scheduler.overrides
    assert resumed.settings == whole.settings
    assert resumed.scheduler.decision == whole.scheduler.decision


def test_a_state_with_more_bindings_is_refused_and_one_from_before_them_is_taken(
    loop: BoundLoop, domain: Domain, controller: Controller
):
    layer = torch.nn.Linear(2, 2)
    other = MetaScheduler(
        torch.optim.AdamW([{"params": [p]} for p in layer.parameters()]),
        model=loop.model,
        domain=domain.profile,
        controller=controller,
        interval=6,
        batch_size=16,
        horizon=60,
    )
    with pytest.raises(SessionError, match=r"holds values of \[.*'batch_size'.*\], which this run does not bind"):
        other._run.overrides.load_state_dict(loop.scheduler.state_dict()["overrides"])
    state = loop.scheduler.state_dict()
    del state["overrides"]
    loop.scheduler.load_state_dict(state)
    loop.advance(1)


def test_a_rollback_brings_back_what_was_overridden_at_the_snapshot(
    domain: Domain, controller: Controller, tmp_path: Path
):
    def made(path: Path | None = None) -> BoundLoop:
        return BoundLoop(domain, controller, rollback=RollbackConfig(every=1), decision_log=path)

    def begin(loop: BoundLoop) -> None:
        loop.advance(4)
        loop.scheduler.override({"batch_size": 24, "num_negatives": 6, "weight_decay[0]": 0.5})
        loop.advance(3)  # the snapshot of step 6 holds them

    loop = made(tmp_path / "run.jsonl")
    begin(loop)
    loop.scheduler.override({"batch_size": 100, "margin": 5.0, "learning_rate": 0.9}, "too bold")
    with torch.no_grad():
        loop.model.tower[0].weight.fill_(torch.nan)
    loop.advance(5)
    assert len(loop.scheduler.rollbacks) == 1
    assert loop.scheduler.steps == 6
    assert loop.scheduler.overrides == {"batch_size": 24, "num_negatives": 6, "weight_decay[0]": 0.5}
    assert loop.sampler.batch_size == 24
    assert loop.settings == {"num_negatives": 6, "margin": 1.0}
    given = len(loop.batches)
    loop.advance(4)
    good = made()
    begin(good)
    good.advance(3)
    assert loop.batches[given:] == good.batches[6:10]  # from the snapshot on the data is that of a run without
    told = [r.content for r in read_records(tmp_path / "run.jsonl") if r.kind == RecordKind.OVERRIDE]
    assert [content["author"] for content in told if content] == ["person", "person", "rollback"]
    assert told[-1] is not None
    assert told[-1]["before"]["batch_size"] == 100
    assert told[-1]["after"] == {
        "batch_size": 24, "margin": None, "learning_rate[0]": None, "learning_rate[1]": None,
    }  # fmt: skip


def test_overrides_are_logged_and_reported(domain: Domain, controller: Controller, tmp_path: Path):
    path = tmp_path / "run.jsonl"
    loop = BoundLoop(domain, controller, decision_log=path)
    loop.advance(7)
    loop.scheduler.override({"batch_size": 64, "learning_rate[0]": 0.5}, "to see", author="constraint")
    loop.advance(6)
    loop.scheduler.release_override("learning_rate", reason="seen")
    loop.advance(6)
    verify(path)
    first, second = (record.content for record in read_records(path) if record.kind == RecordKind.OVERRIDE)
    assert first is not None and second is not None
    assert first["step"] == 7
    assert first["before"] == {"batch_size": 16, "learning_rate[0]": None}
    assert first["after"] == {"batch_size": 64, "learning_rate[0]": 0.5}
    assert first["rate_factors"] == [1.0, 2.0]
    assert first["sentence"] == (
        "constraint: batch_size: 16 to 64; learning_rate[0]: the controller's own to 0.5; for the batch the "
        "controller's learning rates are taken times 1, 2; to see"
    )
    assert second["after"] == {"learning_rate[0]": None}
    decisions = read_decisions(path)
    assert [one["groups"][0]["learning_rate"] == 0.5 for one in decisions] == [False, False, True, False]
    page = write_report(path, tmp_path / "report.html").read_text()
    assert "batch_size: 16 to 64" in page
    assert "person: learning_rate[0]: 0.5 to the controller" in page.replace("&#x27;", "'")


NUMBERS = {
    "batch_size": st.integers(16, 512),
    "num_negatives": st.integers(1, 1024),
    "grad_clip": st.floats(0.01, 100.0),
}
CHOICES = {"accumulation": st.sampled_from(CANONICAL_SPACE["accumulation"].choices)} | {
    f"trainable[{group}]": st.booleans() for group in (0, 1)
}
CONTROLLED = {f"learning_rate[{g}]": st.floats(1e-5, 1.0) for g in (0, 1)} | {"dropout": st.floats(0.0, 0.7)}
EVENTS = st.lists(
    st.one_of(
        st.fixed_dictionaries({}, optional={**NUMBERS, **CHOICES, **CONTROLLED}),
        st.lists(st.sampled_from([*NUMBERS, *CHOICES, *CONTROLLED]), unique=True),
    ),
    max_size=8,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS)
def test_any_course_of_overrides_and_releases(domain: Domain, controller: Controller, events: list[Any]):
    loop = BoundLoop(domain, controller)
    own = {"batch_size": 16, "num_negatives": 4, "grad_clip": 100.0, "accumulation": 1}
    own |= {"trainable[0]": True, "trainable[1]": True}
    expected: dict[str, Any] = {}
    for event in events:
        if isinstance(event, dict) and event:
            loop.scheduler.override(event)
            expected |= event
        elif isinstance(event, list) and event:
            known = [name for name in event if name in expected]
            if len(known) < len(event):
                with pytest.raises(InvalidArgumentError, match="is not overridden"):
                    loop.scheduler.release_override(*event)
                continue
            loop.scheduler.release_override(*event)
            expected = {name: value for name, value in expected.items() if name not in event}
        assert loop.scheduler.overrides == expected
        handles = loop.scheduler.state_dict()["overrides"]["handles"]
        for name, value in own.items():
            held = handles[name.split("[")[0]]["value"]
            assert (held[int(name[-2])] if "[" in name else held) == expected.get(name, value)
        decision = loop.scheduler.decision
        decided = [row["learning_rate"] for row in decision.intended.groups]
        assert [row["learning_rate"] for row in decision.groups] == [
            expected.get(f"learning_rate[{group}]", rate) for group, rate in enumerate(decided)
        ]
    loop.scheduler.detach()
    assert loop.sampler.batch_size == 16
