"""Hugging Face Transformers: a Trainer under the controller, by one callback.

from transformers import Trainer, TrainingArguments
from metalearn.integrations.transformers import MetaSchedulerCallback

callback = MetaSchedulerCallback(domain=metalearn.profile_domain(interactions), metric="eval_ndcg@10")
arguments = TrainingArguments("runs", max_steps=10_000, lr_scheduler_type="constant", eval_strategy="steps")
trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=validation, callbacks=[callback])
trainer.train()
"""

from __future__ import annotations

import base64
import io
import warnings
from typing import Any, Literal, Unpack

import torch

try:
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
    from transformers.trainer_callback import ExportableState  # pyright: ignore[reportMissingImports]
except ImportError as missing:
    raise ImportError("Transformers is not installed: pip install 'metalearn[transformers]'") from missing

from metalearn.errors import InvalidArgumentError
from metalearn.integrations.deferred import DeferredScheduler
from metalearn.integrations.options import Found, SchedulerOptions
from metalearn.torch import MetaScheduler

CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
"""Of the Trainer's learning-rate schedules those that do not decay."""


class MetaSchedulerCallback(TrainerCallback, ExportableState):  # pyright: ignore[reportGeneralTypeIssues]
    """Steers the optimizer of a Transformers Trainer; see `metalearn.torch.MetaScheduler` for what is decided, and how.

    From the Trainer it takes the horizon (`max_steps`), the batch size and, unless `metric` is given,
    `metric_for_best_model`, else `eval_loss`. Every evaluation is reported. Its state is in `trainer_state.json` of
    every checkpoint, and `Trainer.train(resume_from_checkpoint=...)` goes on with the same decisions. With `rollback`,
    the learning-rate scheduler goes back too; the Trainer's own step counter does not.

    Several processes train by DDP (`torchrun`): rank 0 decides for all, from what all have measured.

    The loss is what the model's `forward` returns as `loss`. Where the Trainer computes another (`compute_loss`,
    `compute_loss_func`, label smoothing), call `record` with that.

    The Trainer's schedule multiplies the controller's, and by default decays linearly: pass
    `lr_scheduler_type="constant"` or "constant_with_warmup".

    Args:
      **options: keyword arguments of MetaScheduler, see `SchedulerOptions`; `domain` is needed.

    Raises:
      InvalidArgumentError: an option is unknown or wrong, or needs averaged weights, which the Trainer does not
        evaluate; later, when training starts: several processes in another way than DDP, several devices in one,
        `restore_callback_states_from_checkpoint`, an optimizer that already has a MetaScheduler.
    """

    def __init__(self, **options: Unpack[SchedulerOptions]) -> None:
        if options.get("horizon", "auto") is None or options.get("averaging"):
            raise InvalidArgumentError(
                "Transformers' Trainer evaluates and keeps weights as they are, not averaged: `horizon` must be known "
                "and `averaging` false; leave both out, and set `max_steps` as long as you mean to train"
            )
        self._deferred = DeferredScheduler(options)
        self._forward_hook: Any = None
        self._recorded = False
        """whether losses come from `record`, not from the model's outputs"""
        self._ranks = 1
        self._state: dict[str, Any] | None = None
        """of several processes, who make it together where it may be saved: only the first is asked for it then"""

    @property
    def scheduler(self) -> MetaScheduler:
        """The scheduler of this run, from the start of training on."""
        return self._deferred.scheduler

    def record(self, loss: torch.Tensor) -> None:
        """Takes the loss of a micro-batch, in place of what the model's `forward` returns; call it before the step.

        Args:
          loss: a scalar; it stays on its device.
        """
        if not self._recorded:
            self._recorded = True
            self._deferred.forget_loss()
        self._deferred.record(loss)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the scheduler: model and optimizer have been restored by now."""
        _check_arguments(args)
        self._let_go()
        self._ranks, self._state = args.world_size, None
        model, optimizer, name = kwargs["model"], kwargs["optimizer"], type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, self.state())
        if isinstance(saved, dict) and saved["attributes"]:
            self._deferred.load_state_dict(_decode(saved["attributes"]["scheduler"]))
        metric, mode = _metric(args)
        found = Found(
            steps=state.max_steps - (0 if self._deferred.resumes else state.global_step),
            batch_size=args.train_batch_size * args.gradient_accumulation_steps,
            metric=metric,
            mode=mode,
            tracked=[kwargs["lr_scheduler"]],
        )
        self._deferred.start(getattr(optimizer, "optimizer", optimizer), model=model, found=found)
        self._recorded = False
        self._forward_hook = model.register_forward_hook(self._see_outputs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a step."""
        self._deferred.end_step(
            source="let the model's `forward` return a dict with `loss`, or call `MetaSchedulerCallback.record` with "
            "it in your `compute_loss`"
        )
        self._gather(control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the state that is to be saved."""
        self._gather(control.should_save)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports an evaluation during training, after which the Trainer may decide to save."""
        if self._forward_hook is not None:
            self.scheduler.report(kwargs["metrics"])
            self._gather(True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets go of the optimizer and the model."""
        self._let_go()

    def state(self) -> dict[str, Any]:
        """Returns the scheduler's state as text, for `trainer_state.json`."""
        held = self._deferred.state_dict() if self._state is None else self._state
        return {"args": {}, "attributes": {"scheduler": _encode(held)} if held else {}}

    def _gather(self, saves: bool) -> None:
        if self._ranks > 1 and saves:
            self._state = self._deferred.state_dict(of_all_ranks=True)

    def _see_outputs(self, module: Any, inputs: Any, outputs: Any) -> None:
        if self._recorded or not module.training:
            return
        loss = outputs.get("loss") if hasattr(outputs, "get") else outputs[0] if isinstance(outputs, tuple) else None
        if loss is not None:
            self._deferred.record(loss)

    def _let_go(self) -> None:
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None
        self._deferred.end()


def _check_arguments(args: Any) -> None:
    others = [name for name in ("fsdp", "deepspeed", "parallelism_config") if getattr(args, name, None)]
    if args.world_size > 1 and others:
        raise InvalidArgumentError(
            f"a run of {args.world_size} processes by `{others[0]}` cannot be steered through the Trainer; let it "
            "train by DDP, or shard the model by torch.distributed.fsdp.fully_shard in a loop of your own"
        )
    if args.n_gpu > 1:
        raise InvalidArgumentError(
            f"the Trainer would spread each batch over {args.n_gpu} GPUs by DataParallel, which this callback cannot "
            "follow; set CUDA_VISIBLE_DEVICES to one of them"
        )
    if args.restore_callback_states_from_checkpoint:
        raise InvalidArgumentError(
            "`restore_callback_states_from_checkpoint` makes callbacks anew, and this one cannot be made without its "
            "domain; leave it False: MetaSchedulerCallback resumes without"
        )
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if kind not in CONSTANT_SCHEDULES:
        warnings.warn(
            f"`lr_scheduler_type` is {kind!r}, whose decay multiplies the controller's own; pass 'constant' or "
            "'constant_with_warmup' to TrainingArguments unless both are meant",
            UserWarning,
            stacklevel=2,
        )


def _metric(args: Any) -> tuple[str, Literal["max", "min"]]:
    """Returns the metric that the Trainer itself goes by, and which way is better."""
    name = args.metric_for_best_model or "loss"
    bigger = args.greater_is_better
    if bigger is None:
        bigger = not name.endswith("loss")
    return name if name.startswith("eval_") else f"eval_{name}", "max" if bigger else "min"


def _encode(state: dict[str, Any]) -> str:
    """Writes a state as text: the Trainer keeps those of callbacks in JSON."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _decode(text: str) -> dict[str, Any]:
    """Inverts `_encode`; executes nothing."""
    return torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
