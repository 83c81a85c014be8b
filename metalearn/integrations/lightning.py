"""Lightning: a Trainer under the controller, by one callback.

from lightning.pytorch import Trainer
from metalearn.integrations.lightning import MetaSchedulerCallback

callback = MetaSchedulerCallback(domain=metalearn.profile_domain(interactions), metric="ndcg@10")
trainer = Trainer(max_steps=10_000, callbacks=[callback])
trainer.fit(module, train_loader, validation_loader)
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Unpack

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
    from lightning.pytorch.strategies import DDPStrategy  # pyright: ignore[reportMissingImports]
except ImportError:
    try:
        from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]
        from pytorch_lightning.strategies import DDPStrategy  # pyright: ignore[reportMissingImports]
    except ImportError as missing:
        raise ImportError("Lightning is not installed: pip install 'metalearn[lightning]'") from missing

from metalearn.errors import InvalidArgumentError
from metalearn.integrations.deferred import DeferredScheduler
from metalearn.integrations.options import Found, SchedulerOptions
from metalearn.torch import MetaScheduler


class MetaSchedulerCallback(Callback):
    """Steers the optimizer of a Lightning run; see `metalearn.torch.MetaScheduler` for what is decided, and how.

    From the Trainer it takes the horizon (`estimated_stepping_batches`), the batch size (of the training loader, times
    `accumulate_grad_batches`) and, unless `metric` is given, what a ModelCheckpoint or EarlyStopping monitors. Every
    validation is reported, inside `averaged_parameters`: pass `averaging=True` if you export what is evaluated. Its
    state is in Lightning's checkpoints, as is that of every callback: `Trainer.fit(ckpt_path=...)` goes on with the
    same decisions. With `rollback`, learning-rate schedulers and the GradScaler go back too; Lightning's own step
    counter does not.

    Several processes train by DDP (`Trainer(strategy="ddp", devices=...)`): rank 0 decides for all, from what all have
    measured, and of a metric that processes have their own values of (`sync_dist=False`) the mean counts.

    The module's optimizer is best AdamW, its schedulers none, or a warm-up: what they do multiplies.

    Args:
      **options: keyword arguments of MetaScheduler, see `SchedulerOptions`; `domain` is needed.

    Raises:
      InvalidArgumentError: an option is unknown or wrong; later, when training starts: manual optimization, several
        optimizers, several processes in another way than DDP, an optimizer that already has a MetaScheduler.
    """

    def __init__(self, **options: Unpack[SchedulerOptions]) -> None:
        self._deferred = DeferredScheduler(options)
        self._closure_hook: Any = None
        self._attempted = False
        """whether the optimizer was to step in this batch"""
        self._validating = ExitStack()
        self._of_all_ranks = False
        """whether the state is of several processes, each of which must take part in making it"""
        self._last_state: dict[str, Any] | None = None
        """at the end of training by several processes, which then part"""

    @property
    def scheduler(self) -> MetaScheduler:
        """The scheduler of this run, from the start of training on."""
        return self._deferred.scheduler

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the scheduler: model, optimizer and callbacks have been restored by now."""
        optimizer = _only_optimizer(trainer, pl_module)
        self._let_go()
        self._of_all_ranks, self._last_state = trainer.world_size > 1, None
        # Lightning computes gradients in a closure that the optimizer calls; torch runs hooks before it calls that.
        # The MetaScheduler's hook looks at gradients, so this one, registered before it, computes them first.
        self._closure_hook = optimizer.register_step_pre_hook(_call_closure_first)
        try:
            self._deferred.start(optimizer, model=pl_module, found=_found(trainer, resumes=self._deferred.resumes))
        except Exception:
            self._closure_hook.remove()
            raise

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Notes that this batch is the last of a step."""
        self._attempted = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts a step when its last micro-batch is done."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            self._deferred.record(loss)
        if self._attempted:
            self._attempted = False
            self._deferred.end_step(source="return it from `training_step`")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts averaged weights in place, if there are any."""
        if _validates_training(trainer):
            self._validating.enter_context(self.scheduler.averaged_parameters())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Reports what `validation_step` and its like have logged."""
        if _validates_training(trainer):
            with self._validating:
                self.scheduler.report(trainer.callback_metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lets go of the optimizer and the model."""
        if self._of_all_ranks:
            self._last_state = self.state_dict()
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lets go of the optimizer and the model; the other processes may know nothing of the exception."""
        self._let_go()

    def _let_go(self) -> None:
        self._validating.close()
        if self._closure_hook is not None:
            self._closure_hook.remove()
        self._deferred.end()

    def state_dict(self) -> dict[str, Any]:
        """Returns the scheduler's state, for Lightning's checkpoint; each process is asked for it."""
        if self._last_state is not None:
            return self._last_state
        return self._deferred.state_dict(of_all_ranks=self._of_all_ranks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state out of Lightning's checkpoint, for when training starts."""
        self._deferred.load_state_dict(state_dict)


def _only_optimizer(trainer: Any, pl_module: Any) -> Any:
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise InvalidArgumentError(
            f"a run of {trainer.world_size} processes by {type(trainer.strategy).__name__} cannot be steered through "
            'Lightning; pass Trainer(strategy="ddp"), or shard the model by torch.distributed.fsdp.fully_shard in a '
            "loop of your own"
        )
    if not pl_module.automatic_optimization:
        raise InvalidArgumentError(
            "this LightningModule has `automatic_optimization = False`: nobody but itself knows its steps; make a "
            "MetaScheduler in it for each optimizer, and call its step after the optimizer's"
        )
    if len(trainer.optimizers) != 1:
        raise InvalidArgumentError(
            f"`configure_optimizers` must return one optimizer, got {len(trainer.optimizers)}; give parameters their "
            "own values by parameter groups"
        )
    return trainer.optimizers[0]


def _found(trainer: Any, *, resumes: bool) -> Found:
    """Returns what the Trainer knows; a run that resumes counts its steps from the beginning."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    monitors = [
        (found.monitor, found.mode)
        for found in (*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks)
        if getattr(found, "monitor", None) is not None
    ]
    metric, mode = monitors[0] if monitors else (None, "max")
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return Found(
        steps=trainer.estimated_stepping_batches - (0 if resumes else trainer.global_step),
        batch_size=size * trainer.accumulate_grad_batches if isinstance(size, int) else None,
        metric=metric,
        mode=mode,
        tracked=[
            *(config.scheduler for config in trainer.lr_scheduler_configs),
            *([] if scaler is None else [scaler]),
        ],
    )


def _validates_training(trainer: Any) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _call_closure_first(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Is a step pre-hook: calls the closure, and has the optimizer find its result."""
    closure = kwargs.get("closure")
    if closure is None or type(optimizer).__name__ == "LBFGS":  # which evaluates it again and again
        return None
    loss = closure()
    return args, {**kwargs, "closure": lambda: loss}
