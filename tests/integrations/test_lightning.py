"""Lightning: the contract, and what only its Trainer has."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.torch import RollbackConfig
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

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
from metalearn.integrations.lightning import MetaSchedulerCallback, _call_closure_first  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises on workers, logs and step counters


class Module(pl.LightningModule):
    def __init__(self, job: Job) -> None:
        super().__init__()
        watched = Watched(job)
        self.net = watched.model
        self.kept = [watched]  # in a list, so that what it holds is not registered twice
        self.callback: MetaSchedulerCallback | None = None

    def configure_optimizers(self) -> Any:
        watched = self.kept[0]
        return {"optimizer": watched.optimizer, "lr_scheduler": {"scheduler": watched.decay, "interval": "step"}}

    def on_train_start(self) -> None:
        callback, watched = self.callback, self.kept[0]
        if callback is None:  # what is noted is of the step to come: see `_call_closure_first`
            watched.optimizer.register_step_pre_hook(_call_closure_first)
        watched.watch(None if callback is None else lambda: callback.scheduler)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.net(**batch)["loss"]

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("score", self.net.score())


def trained(job: Job, module: Any, **options: Any) -> Any:
    """Fit a module; return its Trainer."""
    data = Triples(job.domain)
    callbacks = options.pop("callbacks", [])
    if job.controller is not None:
        module.callback = MetaSchedulerCallback(**job.scheduler_options)
        callbacks = [*callbacks, module.callback]
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": EPOCHS,
            "val_check_interval": VALIDATE_EVERY,
            "accumulate_grad_batches": job.accumulate,
            "callbacks": callbacks,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": job.folder,
            **options,
        }
    )
    trainer.fit(
        module,
        torch.utils.data.DataLoader(data, BATCH_SIZE),
        torch.utils.data.DataLoader(torch.utils.data.Subset(data, [0]), 1),
        ckpt_path=job.folder / "saved.ckpt" if job.resume else None,
    )
    return trainer


def run(job: Job, **options: Any) -> Outcome:
    module = Module(job)
    if job.save:
        checkpoint = pl.callbacks.ModelCheckpoint(job.folder, "saved", save_on_train_epoch_end=True, every_n_epochs=1)
        checkpoint.on_train_epoch_end = once(checkpoint.on_train_epoch_end)
        options = {**options, "callbacks": [checkpoint], "enable_checkpointing": True}
    trained(job, module, **options)
    return module.kept[0].outcome(None if module.callback is None else module.callback.scheduler)


def once(function: Any) -> Any:
    """Return a function that does its work at the first call only."""
    calls: list[Any] = []
    return lambda *arguments: calls.append(0) or (function(*arguments) if len(calls) == 1 else None)


@over_the_contract
def test_contract(check: Any, job: Job):
    check(run, plain.run, job)


def test_gradients_that_are_probed_are_those_of_the_step(job: Job):
    """The optimizer calls Lightning's closure after torch's hooks: without help the probe would see the step before."""
    outcome, expected = run(job), plain.run(job)
    last = outcome.scheduler.state_dict()["monitor"]["sample"]
    for name, tensor in expected.scheduler.state_dict()["monitor"]["sample"].items():
        assert torch.equal(last[name], tensor) if isinstance(tensor, torch.Tensor) else last[name] == tensor


def test_an_unknown_horizon_is_validated_with_averaged_weights(job: Job):
    class Averaged(Module):
        weights: list[torch.Tensor]
        averaged: list[bool]

        def on_train_batch_end(self, *_: Any) -> None:
            self.weights = [parameter.detach().clone() for parameter in self.net.parameters()]

        def unchanged(self) -> bool:
            return all(torch.equal(a, b) for a, b in zip(self.net.parameters(), self.weights, strict=True))

        def validation_step(self, batch: Any, index: int) -> None:
            super().validation_step(batch, index)
            if not self.trainer.sanity_checking:
                self.averaged.append(not self.unchanged())

        def on_train_batch_start(self, *_: Any) -> None:
            assert not self.averaged or self.unchanged()

    module = Averaged(job)
    module.averaged = []
    trained(job, module, max_epochs=-1, max_steps=-1, max_time={"seconds": 2})
    assert module.averaged and all(module.averaged)
    assert module.callback.scheduler.multiplier(10**6) == 1.0


def test_what_a_checkpoint_monitors_is_the_metric(job: Job):
    class Verbose(Module):
        def validation_step(self, batch: Any, index: int) -> None:
            super().validation_step(batch, index)
            self.log("another", 0.0)

    module = Verbose(job)
    checkpoint = pl.callbacks.ModelCheckpoint(job.folder, monitor="score", mode="min")
    trained(job, module, callbacks=[checkpoint], enable_checkpointing=True)
    inferred = module.callback.scheduler.decisions
    explicit, opposite = (run(replace(job, options={"metric": "score", "mode": mode})) for mode in ("min", "max"))
    assert inferred == explicit.decisions != opposite.decisions


def test_a_rollback_takes_the_schedule_back(job: Job):
    class Diverging(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            loss = super().training_step(batch, index)
            return loss * float("nan") if self.global_step == 9 else loss

    module = Diverging(replace(job, options={"rollback": RollbackConfig(every=1)}))
    trained(module.kept[0].job, module)
    (record,) = module.callback.scheduler.rollbacks
    assert record.to_step < record.step
    assert module.kept[0].decay.last_epoch == EPOCH * EPOCHS - (record.step - record.to_step)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_a_trainer_can_be_fitted_again(job: Job):
    for _ in range(2):
        module = Module(job)
        trained(job, module)
        assert module.callback.scheduler.steps == EPOCH * EPOCHS


def test_manual_optimization_is_refused(job: Job):
    module = Module(job)
    module.automatic_optimization = False
    with pytest.raises(InvalidArgumentError, match="make a MetaScheduler in it for each optimizer"):
        trained(job, module)


def test_a_module_without_metrics_is_told(job: Job):
    class Silent(Module):
        def validation_step(self, batch: Any, index: int) -> None:
            pass

    with pytest.raises(InvalidArgumentError, match="`metrics` is empty; report at least one number"):
        trained(job, Silent(job))


def test_before_fit_there_is_no_scheduler(job: Job):
    with pytest.raises(SessionError, match="no scheduler before training starts"):
        MetaSchedulerCallback(domain=job.domain.profile).scheduler  # noqa: B018


def run_in_rank(job: Job, port: int) -> list[dict[str, Any]]:
    """Run a job in one of the processes that Lightning finds by the environment, then again from its checkpoint."""
    rank = os.environ["CREW_RANK"]
    os.environ.update(NODE_RANK="0", LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    outcomes = []
    for one in (replace(job, save=True), replace(job, resume=True)):
        strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
        outcome = run(one, strategy=strategy, devices=2)
        ranks = torch.distributed.get_world_size()
        outcomes.append({"weights": outcome.weights, "decisions": outcome.decisions, "ranks": ranks})
    torch.distributed.destroy_process_group()
    return outcomes


def test_two_processes_decide_as_one_and_resume_from_a_checkpoint(job: Job):
    whole = decided_as_one(run_in_rank, job)
    assert whole["ranks"] == 2 and len(whole["decisions"]) > 2


def test_another_way_to_share_the_work_is_refused(job: Job):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "world_size", 4)
        with pytest.raises(InvalidArgumentError, match="a run of 4 processes by SingleDeviceStrategy cannot"):
            trained(job, Module(job))
