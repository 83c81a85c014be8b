"""Accelerate: the contract, and what must be prepared first."""

from __future__ import annotations

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
