"""Constraints of a run: the batch size follows, what would worsen them is held, all is told and logged."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.errors import InvalidArgumentError
from metalearn.torch import BatchSize, Constraints, ResizableBatchSampler, RollbackConfig
from metalearn.torch.recovery import Recovery
from metalearn.torch.usage import UsageMeter
from tests.torch.runs import BATCH_SIZE, Run, start

INTERVAL = 6


def started(domain: Domain, controller: Controller, sampler: ResizableBatchSampler | None, **options: Any) -> Run:
    bindings = [] if sampler is None else [BatchSize(sampler)]
    return start(domain, controller=controller, horizon=120, interval=INTERVAL, bindings=bindings, **options)


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> ResizableBatchSampler:
    """A batch of which each sample takes a kilobyte; an interval takes a second."""
    made = ResizableBatchSampler(1000, BATCH_SIZE)
    end_interval = UsageMeter.end_interval

    def a_second(self: UsageMeter) -> None:
        end_interval(self)
        self.seconds = 1.0

    def a_second_too(self: Recovery) -> None:
        self._seconds = 1.0

    monkeypatch.setattr(Recovery, "end_interval", a_second_too)
    monkeypatch.setattr(UsageMeter, "memory_bytes", lambda self: 1000.0 * made.batch_size)
    monkeypatch.setattr(UsageMeter, "end_interval", a_second)
    return made


def test_the_batch_shrinks_until_memory_is_kept(
    domain: Domain, controller: Controller, sampler: ResizableBatchSampler, tmp_path: Path
):
    log = tmp_path / "log.jsonl"
    sampler.batch_size = 128
    limits = Constraints(max_memory_bytes=40_000)
    run = started(domain, controller, sampler, constraints=limits, decision_log=log)
    scheduler = run.scheduler
    assert scheduler is not None
    sizes = []
    for _ in range(5):
        run.advance(INTERVAL)
        sizes.append(sampler.batch_size)
    assert sizes == [64, 32, 32, 32, 32]  # 128 and 64 kilobytes are too much
    assert scheduler.overrides == {"batch_size": 32}
    assert scheduler.decisions[1].reasons[0] == (
        "constraint: 1.28e+05 bytes of memory are more than the 4e+04 allowed; "
        "constraint: batch size down from 128 to 64"
    )
    assert not scheduler.decisions[3].reasons[0].startswith("constraint")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    told = json.dumps(records)
    assert told.count("constraint: batch_size: ") == 2
    assert '"memory_bytes": 128000.0' in told and '"utilisation"' in told


def test_the_smallest_batch_is_not_halved(domain: Domain, controller: Controller, sampler: ResizableBatchSampler):
    run = started(domain, controller, sampler, constraints=Constraints(max_memory_bytes=10_000))
    run.advance(3 * INTERVAL)
    assert sampler.batch_size == 16
    assert run.scheduler is not None
    assert "a batch size of 8 lies outside [16, " in run.scheduler.decision.reasons[0]


def test_the_batch_grows_until_it_is_fast_enough(
    domain: Domain, controller: Controller, sampler: ResizableBatchSampler
):
    # 6 steps a second: 192 samples a second of 32 each, 384 of 64
    run = started(domain, controller, sampler, constraints=Constraints(min_samples_per_second=300))
    run.advance(4 * INTERVAL)
    assert sampler.batch_size == 64
    assert run.scheduler is not None
    assert "192 samples per second are fewer than the 300 required" in run.scheduler.decisions[1].reasons[0]


def test_a_batch_that_ran_out_of_memory_is_not_tried_again(
    domain: Domain, controller: Controller, sampler: ResizableBatchSampler
):
    limits, rollback = Constraints(min_samples_per_second=10_000), RollbackConfig(every=1, max_rollbacks=1)
    run = started(domain, controller, sampler, constraints=limits, rollback=rollback, tracked=[sampler])
    scheduler = run.scheduler
    assert scheduler is not None
    ran_out = 0
    for _ in range(5 * INTERVAL):
        with scheduler.survive_out_of_memory():
            if sampler.batch_size > 64:
                ran_out += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            run.step()
        if not scheduler.rolled_back:
            run.report()
    assert ran_out == 1 and sampler.batch_size == 64
    assert "above 64 it takes too much" in scheduler.decision.reasons[0]


@pytest.mark.parametrize("steering", ["shadow", "frozen"])
def test_where_the_controller_may_not_act_it_only_tells(
    domain: Domain, controller: Controller, sampler: ResizableBatchSampler, steering: Any
):
    run = started(domain, controller, sampler, constraints=Constraints(max_memory_bytes=10_000), steering=steering)
    run.advance(3 * INTERVAL)
    assert sampler.batch_size == BATCH_SIZE
    assert run.scheduler is not None
    assert any("bytes of memory are more than" in reason for reason in run.scheduler.decision.reasons)


def test_dropout_does_not_rise_while_a_constraint_is_violated(domain: Domain, controller: Controller):
    rises = []
    for limits in (None, Constraints(max_memory_bytes=1)):
        run = started(domain, controller, None, constraints=limits)
        run.advance(15 * INTERVAL)
        assert run.scheduler is not None
        rates = [decision.run["dropout"] for decision in run.scheduler.decisions]
        rises.append(sum(b > a for a, b in itertools.pairwise(rates)))
    assert rises[0] > 0 == rises[1]


def test_what_was_learnt_of_batch_sizes_is_in_the_state(
    domain: Domain, controller: Controller, sampler: ResizableBatchSampler
):
    options = {"constraints": Constraints(min_samples_per_second=1000, max_memory_bytes=40_000)}
    first = started(domain, controller, sampler, **options)
    first.advance(INTERVAL)  # twice the batch could take twice the memory, so it stays
    assert first.scheduler is not None and sampler.batch_size == BATCH_SIZE
    assert "no batch size that may be tried is left" in first.scheduler.decision.reasons[0]
    sampler.batch_size = 64
    first.advance(INTERVAL)  # too much: 32 it is, and no more
    state = copy.deepcopy(first.scheduler.state_dict())
    assert state["constraints"] == {"ceiling": 32, "floor": None, "tried": None}
    second = started(domain, controller, sampler, **options)
    assert second.scheduler is not None
    second.scheduler.load_state_dict(state)
    assert second.scheduler.state_dict()["constraints"] == state["constraints"]
    assert sampler.batch_size == 32


def test_the_meter_reads_the_machine():
    meter = UsageMeter(torch.device("cpu"))
    held = torch.ones(5_000_000)  # 20 MB
    sum(range(200_000))
    meter.end_interval()
    assert meter.seconds > 0.0
    assert 0.0 < meter.utilisation <= 1.0
    assert meter.memory_bytes() > held.nbytes


def test_wrong_constraints_are_refused(domain: Domain, controller: Controller):
    with pytest.raises(InvalidArgumentError, match="`constraints` must be Constraints or None, got dict"):
        started(domain, controller, None, constraints={"max_memory_bytes": 1})
    with pytest.raises(InvalidArgumentError, match="`batch_size` is None, so that `min_samples_per_second`"):
        started(domain, controller, None, constraints=Constraints(min_samples_per_second=1), batch_size=None)
