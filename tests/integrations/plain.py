"""The contract's job in a loop without a framework: the oracle of the others."""

from __future__ import annotations

import torch

from metalearn.torch import MetaScheduler
from tests.integrations.contract import BATCH_SIZE, EPOCH, EPOCHS, VALIDATE_EVERY, Job, Outcome, Triples, Watched


def run(job: Job) -> Outcome:
    """Run the job."""
    watched = Watched(job)
    model, optimizer, scheduler = watched.model, watched.optimizer, None
    if job.controller is not None:
        known = {"horizon": EPOCH * EPOCHS // job.accumulate, "batch_size": BATCH_SIZE * job.accumulate}
        scheduler = MetaScheduler(optimizer, model=model, **{**known, **job.scheduler_options})
    parts = [model, optimizer, watched.decay, *([] if scheduler is None else [scheduler])]
    file, first = job.folder / "plain.pt", 0
    if job.resume:
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        first = 1
    watched.watch(None if scheduler is None else lambda: scheduler)
    loader = torch.utils.data.DataLoader(Triples(job.domain), BATCH_SIZE)
    for epoch in range(first, EPOCHS):
        for index, batch in enumerate(loader, start=1):
            loss = model(**batch)["loss"]
            (loss / job.accumulate).backward()
            if index % job.accumulate == 0:
                optimizer.step()
                watched.decay.step()
                optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step(loss)
            if index % VALIDATE_EVERY == 0:
                metrics = {"score": model.score().item()}
                if scheduler is not None:
                    scheduler.report(metrics)
        if job.save and epoch == 0:
            torch.save([part.state_dict() for part in parts], file)
    if scheduler is not None:
        scheduler.detach()
    return watched.outcome(scheduler)
