"""Transformers: the contract, and what only its Trainer has."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metalearn.errors import InvalidArgumentError, SessionError
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

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="its Trainer needs Accelerate, which is not installed")
from metalearn.integrations.transformers import MetaSchedulerCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore", "error:.*lr_scheduler_type.*:UserWarning")


class Watching(transformers.TrainerCallback):
    """Begins to note steps when training begins."""

    def __init__(self, watched: Watched, callback: MetaSchedulerCallback | None) -> None:
        self.watched, self.callback = watched, callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        callback = self.callback
        self.watched.watch(None if callback is None else lambda: callback.scheduler)


def trainer_for(job: Job, watched: Watched, callback: Any, kind: Any = transformers.Trainer, **options: Any) -> Any:
    data = Triples(job.domain)
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(job.folder),
            "use_cpu": True,
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": BATCH_SIZE,
            "gradient_accumulation_steps": job.accumulate,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "eval_steps": VALIDATE_EVERY // job.accumulate,
            "save_strategy": "steps" if job.save else "no",
            "save_steps": EPOCH,
            "metric_for_best_model": "score",
            "label_names": ["row"],
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **options,
        }
    )
    return kind(
        watched.model,
        arguments,
        train_dataset=data,
        eval_dataset=torch.utils.data.Subset(data, [0]),
        optimizers=(watched.optimizer, watched.decay),
        compute_metrics=lambda prediction: {"score": watched.model.score().item()},
        callbacks=[*([] if callback is None else [callback]), Watching(watched, callback)],
    )


def run(job: Job, **options: Any) -> Outcome:
    watched = Watched(job)
    callback = None if job.controller is None else MetaSchedulerCallback(**job.scheduler_options)
    trainer = trainer_for(job, watched, callback, **options)
    trainer.train(resume_from_checkpoint=str(job.folder / f"checkpoint-{EPOCH}") if job.resume else None)
    return watched.outcome(None if callback is None else callback.scheduler)


@over_the_contract
def test_contract(check: Any, job: Job):
    check(run, plain.run, job)


def test_the_state_is_in_the_trainers_own_file(job: Job):
    run(replace(job, save=True))
    saved = json.loads((job.folder / f"checkpoint-{EPOCH}" / "trainer_state.json").read_text(encoding="utf8"))
    assert saved["stateful_callbacks"]["MetaSchedulerCallback"]["attributes"]["scheduler"]


def test_without_a_metric_for_the_best_model_it_is_the_loss(job: Job):
    decisions = []
    for options in ({}, {"metric": "eval_loss", "mode": "min"}, {"metric": "eval_loss", "mode": "max"}):
        callback = MetaSchedulerCallback(**job.scheduler_options, **options)
        trainer_for(job, Watched(job), callback, metric_for_best_model=None).train()
        decisions.append(callback.scheduler.decisions)
    assert decisions[0] == decisions[1] != decisions[2]


def test_a_trainer_with_a_loss_of_its_own_records_it(job: Job):
    class Own(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> torch.Tensor:
            loss = model(**inputs)["loss"]
            callback.record(loss)
            return loss

    watched, callback = Watched(job), MetaSchedulerCallback(**job.scheduler_options)
    trainer_for(job, watched, callback, Own, eval_strategy="no").train()
    reference = MetaSchedulerCallback(**job.scheduler_options)
    trainer_for(job, Watched(job), reference, eval_strategy="no").train()
    assert callback.scheduler.decisions == reference.scheduler.decisions


def test_a_loss_that_nobody_sees_is_told(job: Job):
    class Hidden(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> torch.Tensor:
            model.own.append([])
            return model.factors(inputs["user"], inputs["positive"], inputs["negative"])

    watched, callback = Watched(job), MetaSchedulerCallback(**job.scheduler_options)
    with pytest.raises(SessionError, match=r"no loss was seen; .*call `MetaSchedulerCallback.record`"):
        trainer_for(job, watched, callback, Hidden, eval_strategy="no").train()


def test_a_decaying_schedule_is_warned_of(job: Job):
    watched, callback = Watched(job), MetaSchedulerCallback(**job.scheduler_options)
    trainer = trainer_for(job, watched, callback, lr_scheduler_type="linear")
    with pytest.warns(UserWarning, match="`lr_scheduler_type` is 'linear', whose decay multiplies"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("options", [{"horizon": None}, {"averaging": True}])
def test_averages_that_nobody_would_evaluate_are_refused(options: dict[str, Any], job: Job):
    with pytest.raises(InvalidArgumentError, match="Trainer evaluates and keeps weights as they are"):
        MetaSchedulerCallback(**{**job.scheduler_options, **options})


def test_callbacks_made_anew_are_refused(job: Job):
    watched, callback = Watched(job), MetaSchedulerCallback(**job.scheduler_options)
    trainer = trainer_for(job, watched, callback, restore_callback_states_from_checkpoint=True)
    with pytest.raises(InvalidArgumentError, match="`restore_callback_states_from_checkpoint` makes callbacks anew"):
        trainer.train()


def run_in_rank(job: Job, port: int) -> list[dict[str, Any]]:
    """Run a job in one of the processes that the Trainer finds by the environment, then again from its checkpoint."""
    rank = os.environ["CREW_RANK"]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    outcomes = []
    for one in (replace(job, save=True), replace(job, resume=True)):
        outcome = run(one, ddp_backend="gloo", save_steps=EPOCH)
        ranks = torch.distributed.get_world_size()
        outcomes.append({"weights": outcome.weights, "decisions": outcome.decisions, "ranks": ranks})
    torch.distributed.destroy_process_group()
    return outcomes


def test_two_processes_decide_as_one_and_resume_from_a_checkpoint(job: Job):
    whole = decided_as_one(run_in_rank, job)
    assert whole["ranks"] == 2 and len(whole["decisions"]) > 2


def test_another_way_to_share_the_work_is_refused(job: Job):
    watched, callback = Watched(job), MetaSchedulerCallback(**job.scheduler_options)
    trainer = trainer_for(job, watched, callback)
    arguments = SimpleNamespace(world_size=4, fsdp=["full_shard"])
    with pytest.raises(InvalidArgumentError, match="a run of 4 processes by `fsdp` cannot be steered through"):
        callback.on_train_begin(arguments, trainer.state, trainer.control)
