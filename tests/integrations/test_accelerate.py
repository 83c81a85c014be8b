"""Accelerate: the contract, and what must be prepared first."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metalearn.errors import InvalidArgumentError
from tests.integrations import plain
from tests.integrations.contract import (
    BATCH_SIZE,
    EPOCH,
    EPOCHS,
    VALIDATE_EVERY,
    Job,
    Outcome,
    Triples,
    Watched,
    decided_as_one,
    over_the_contract,
)

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
from metalearn.integrations.accelerate import prepare_scheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def run(job: Job) -> Outcome:
    watched = Watched(job)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=job.accumulate, step_scheduler_with_optimizer=True
    )
    loader = torch.utils.data.DataLoader(Triples(job.domain), BATCH_SIZE)
    model, optimizer, loader, decay = accelerator.prepare(watched.model, watched.optimizer, loader, watched.decay)
    scheduler = None
    if job.controller is not None:
        known = {"horizon": EPOCH * EPOCHS // job.accumulate, "batch_size": BATCH_SIZE * job.accumulate}
        scheduler = prepare_scheduler(accelerator, optimizer, model=model, **{**known, **job.scheduler_options})
    watched.watch(None if scheduler is None else lambda: scheduler)
    if job.resume:
        accelerator.load_state(job.folder / "saved")
    for epoch in range(1 if job.resume else 0, EPOCHS):
        for index, batch in enumerate(loader, start=1):
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                decay.step()
                optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step(loss)
            if index % VALIDATE_EVERY == 0:
                metrics = {"score": accelerator.unwrap_model(model).score().item()}
                if scheduler is not None:
                    scheduler.report(metrics)
        if job.save and epoch == 0:
            accelerator.save_state(job.folder / "saved")
    if scheduler is not None:
        scheduler.detach()
    return watched.outcome(scheduler)


@over_the_contract
def test_contract(check: Any, job: Job):
    check(run, plain.run, job)


def test_what_is_not_prepared_is_refused(job: Job):
    watched = Watched(job)
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(InvalidArgumentError, match=r"`optimizer` must be a prepared one, got AdamW; pass what"):
        prepare_scheduler(accelerator, watched.optimizer, **job.scheduler_options)
    with pytest.raises(InvalidArgumentError, match="`accelerator` must be an Accelerator, got SimpleNamespace"):
        prepare_scheduler(SimpleNamespace(), watched.optimizer, **job.scheduler_options)


def run_in_rank(job: Job, port: int) -> list[dict[str, Any]]:
    """Run a job in one of the processes that Accelerate finds by the environment, then again from its checkpoint."""
    rank = os.environ["CREW_RANK"]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    outcomes = []
    for one in (replace(job, save=True), replace(job, resume=True)):
        outcome = run(one)
        kind = accelerate.PartialState().distributed_type.value
        outcomes.append({"weights": outcome.weights, "decisions": outcome.decisions, "kind": kind})
    torch.distributed.destroy_process_group()
    return outcomes


def test_two_processes_decide_as_one_and_resume_from_save_state(job: Job):
    whole = decided_as_one(run_in_rank, job)
    assert whole["kind"] == "MULTI_CPU"
    assert [decision.step for decision in whole["decisions"]] == [0, 5, 10]


def test_another_way_to_share_the_work_is_refused(job: Job):
    watched = Watched(job)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare(watched.optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "num_processes", 4)
        patch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType.DEEPSPEED)
        with pytest.raises(InvalidArgumentError, match="a run of 4 processes by DEEPSPEED cannot be steered through"):
            prepare_scheduler(accelerator, optimizer, **job.scheduler_options)
