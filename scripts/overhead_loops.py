"""The loops that `bench_overhead.py` measures, each of a framework: batches come from `Turns`, which measures steps.

One run takes turns with itself: for some steps the controller is in the loop, for as many it is out of it, and the
groups hold the values that it has in force. So both sides train one model, in one place of the memory, with the same
arithmetic, and what else the machine does slows both alike.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from overhead_workloads import Workload

from metalearn.errors import SessionError
from metalearn.torch import MetaScheduler

TURN = 10
"""Optimizer steps."""
LEAST_INTERVALS = 3
METRIC = 0.1
"""What is reported in place of a validation, which would cost the same on both sides."""


class Step(NamedTuple):
    """One training step."""

    turn: int
    """odd ones are with the controller"""
    interval: int
    """how many decisions there had been"""
    position: int
    """optimizer steps since the last one, 0 also if it is overdue"""
    length: int
    """optimizer steps between decisions"""
    figures: tuple[float, ...]
    """what `read` said at the end, less what it said before"""


class Turns:
    """Iterates over a workload's batches, notes what each step took, and switches the controller on and off.

    Args:
      workload: whose batches.
      read: returns the figures to be noted: clocks, or counts.
      intervals: of the controller, after which the batches end.
      seconds: after so many they end too, but not before the third interval's end.
      switches: whether it takes turns; else the controller is always in the loop.
    """

    def __init__(
        self,
        workload: Workload,
        read: Callable[[], tuple[float, ...]],
        *,
        intervals: int,
        seconds: float = float("inf"),
        switches: bool = True,
    ) -> None:
        self.workload, self._read, self._intervals, self._seconds = workload, read, intervals, seconds
        self._switches = switches
        self.steps: list[Step] = []
        self.steered = True
        """Whether the controller is in the loop."""
        self.find: Callable[[], MetaScheduler] = _nobody
        """returns the scheduler, once there is one"""
        self.switch: Callable[[bool], None] = lambda steered: None
        """takes the framework's part of it in or out"""
        self._scheduler: MetaScheduler | None = None
        self._turn, self._begun = 1, 0
        self._hooks: tuple[Any, Any] | None = None
        self._own: list[dict[str, Any]] = []
        self._before: tuple[float, ...] | None = None
        self._tag: tuple[int, int, int, int] = (0, 0, 0, 0)
        self.ended = False
        """Whether the batch that was drawn last, whose step is not noted, is the last."""

    @property
    def scheduler(self) -> MetaScheduler:
        """The scheduler, once there is one."""
        assert self._scheduler is not None
        return self._scheduler

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, ...]:
        if self.ended:
            raise StopIteration
        if self._scheduler is None:
            with suppress(SessionError):
                self._scheduler = self.find()
        now = self._read()
        if self._before is not None:
            figures = tuple(b - a for a, b in zip(self._before, now, strict=True))
            self.steps.append(Step(*self._tag, figures))
        if self._scheduler is not None:
            self._take_turns(self._scheduler)
            self._before = self._read()  # the lines above are no part of the training
        return self.workload.batch()

    def _take_turns(self, scheduler: MetaScheduler) -> None:
        interval, length = scheduler.decision.index, scheduler.interval
        position = scheduler.steps - scheduler.decision.step
        position = 0 if position >= length else position
        self._begun += 1
        probing = self.steered and position == length - 1
        if self._switches and self._begun > TURN and not probing:
            self._turn, self._begun = self._turn + 1, 1
            self._steer(bool(self._turn % 2))
        self._tag = (self._turn, interval, position, length)
        spent = sum(step.figures[0] for step in self.steps[-1:])
        self._seconds -= spent
        self.ended = interval >= self._intervals or (self._seconds < 0 and interval >= LEAST_INTERVALS)
        if self.ended:
            self._steer(True)

    def _steer(self, steered: bool) -> None:
        if steered == self.steered:
            return
        optimizer, scheduler = self.workload.optimizer, self.scheduler
        self.steered = steered
        if steered:
            for group, own in zip(optimizer.param_groups, self._own, strict=True):
                group.update(own)
            assert self._hooks is not None
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = self._hooks
        else:
            self._hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
            self._own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            rows = zip(optimizer.param_groups, scheduler.decision.groups, scheduler.get_last_lr(), strict=True)
            for group, values, rate in rows:
                group["lr"] = rate
                if "weight_decay" in values:
                    group["weight_decay"] = values["weight_decay"]
                if "beta1" in values:
                    group["betas"] = (values["beta1"], group["betas"][1])
        self.switch(steered)


def _nobody() -> MetaScheduler:
    raise SessionError("there is no scheduler yet")


def plain(turns: Turns, **options: Any) -> None:
    """Trains in a loop of its own."""
    model, optimizer = turns.workload.model, turns.workload.optimizer
    scheduler = MetaScheduler(optimizer, model=model, **options)
    turns.find = lambda: scheduler
    for batch in turns:
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if turns.steered:
            scheduler.step(loss)
            if scheduler.should_validate:
                scheduler.report(METRIC)
    scheduler.detach()


def accelerate(turns: Turns, **options: Any) -> None:
    """Trains with Accelerate."""
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    from metalearn.integrations.accelerate import prepare_scheduler

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(turns.workload.model, turns.workload.optimizer)
    scheduler = prepare_scheduler(accelerator, optimizer, model=model, **options)
    turns.find = lambda: scheduler
    for batch in turns:
        with accelerator.accumulate(model):
            loss = model(*batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if turns.steered:
                scheduler.step(loss)
        if turns.steered and scheduler.should_validate:
            scheduler.report(METRIC)
    scheduler.detach()


def lightning(turns: Turns, **options: Any) -> None:
    """Trains with Lightning's Trainer; decisions are made without a metric."""
    import logging

    from lightning.pytorch import LightningModule, Trainer  # pyright: ignore[reportMissingImports]

    from metalearn.integrations.lightning import MetaSchedulerCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    workload = turns.workload

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = workload.model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net(*batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return workload.optimizer

    callback = MetaSchedulerCallback(**options)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers and validation
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_val_batches=0,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )

        def switch(steered: bool) -> None:
            (trainer.callbacks.append if steered else trainer.callbacks.remove)(callback)

        turns.find, turns.switch = lambda: callback.scheduler, switch
        trainer.fit(Module(), turns)


def transformers(turns: Turns, **options: Any) -> None:
    """Trains with Transformers' Trainer; decisions are made without a metric."""
    from transformers import (  # pyright: ignore[reportMissingImports]
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from metalearn.integrations.transformers import MetaSchedulerCallback

    workload = turns.workload

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = workload.model

        def forward(self, batch: Any) -> dict[str, torch.Tensor]:
            return {"loss": self.net(*batch)}

    class Loader:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return ({"batch": batch} for batch in turns)

    class Ending(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = turns.ended  # else it would look for batches until `max_steps`

    class OnTurns(Trainer):
        def get_train_dataloader(self) -> Any:
            return Loader()

    callback, module = MetaSchedulerCallback(**options), Module()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=10**9,
            max_grad_norm=0.0,  # there is no norm of sparse gradients
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = OnTurns(module, arguments, optimizers=(workload.optimizer, None), callbacks=[callback, Ending()])
        trainer.remove_callback(PrinterCallback)
        forward_hooks: list[Any] = []

        def switch(steered: bool) -> None:
            if steered:
                trainer.callback_handler.callbacks.append(callback)
                module._forward_hooks = forward_hooks.pop()
            else:
                trainer.callback_handler.callbacks.remove(callback)
                forward_hooks.append(module._forward_hooks)
                module._forward_hooks = OrderedDict()

        turns.find, turns.switch = lambda: callback.scheduler, switch
        trainer.train()


LOOPS: dict[str, Callable[..., None]] = {
    "plain": plain,
    "lightning": lightning,
    "transformers": transformers,
    "accelerate": accelerate,
}
"""By framework, what trains a workload; the options are a MetaScheduler's."""
