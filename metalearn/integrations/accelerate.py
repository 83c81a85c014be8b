"""Accelerate: a MetaScheduler on a prepared optimizer, saved and loaded with the run's state.

from accelerate import Accelerator
from metalearn.integrations.accelerate import prepare_scheduler

accelerator = Accelerator()
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
scheduler = prepare_scheduler(accelerator, optimizer, model=model, domain=profile, horizon=10_000)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
    if scheduler.should_validate:
        scheduler.report(evaluate(model))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

try:
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]
    from accelerate.optimizer import AcceleratedOptimizer  # pyright: ignore[reportMissingImports]
except ImportError as missing:
    raise ImportError("Accelerate is not installed: pip install 'metalearn[accelerate]'") from missing

from metalearn.errors import InvalidArgumentError
from metalearn.integrations.options import Found, SchedulerOptions, check_options, complete_options
from metalearn.torch import MetaScheduler


class _Checkpointed:
    """What Accelerate saves and loads: it writes the first process's state only, so that must hold what all measured.

    Args:
      scheduler: whose state it is.
    """

    def __init__(self, scheduler: MetaScheduler) -> None:
        self._scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of all processes, which Accelerate asks each of them for."""
        return self._scheduler.state_dict(of_all_ranks=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state, in every process."""
        self._scheduler.load_state_dict(state)


def prepare_scheduler(
    accelerator: Any,
    optimizer: Any,
    *,
    model: Any = None,
    **options: Unpack[SchedulerOptions],
) -> MetaScheduler:
    """Makes a MetaScheduler for an optimizer that `accelerator.prepare` returned, and registers it for checkpointing.

    The loop is yours: call `step` and `report` as in a plain one. Micro-batches that Accelerate accumulates and steps
    that its GradScaler skips do not count. `accelerator.save_state` saves the scheduler and `load_state` brings it
    back, if objects are registered in the same order. With `rollback`, the GradScaler goes back too; pass schedulers
    and loaders as `tracked`.

    In a run of several processes by DDP all make the scheduler, step it and report to it; `batch_size` is what one of
    them takes for a step. Those that have no metric report None.

    Args:
      accelerator: the `Accelerator` that prepared the optimizer.
      optimizer: the prepared one; AdamW inside for the whole effect.
      model: prepared or not; bound for its dropout layers, and for inferring the groups' roles.
      **options: further keyword arguments of MetaScheduler; `domain` is needed, `horizon` is unknown unless given.

    Returns:
      The scheduler.

    Raises:
      InvalidArgumentError: the optimizer is not prepared or already has a MetaScheduler, several processes train
        together in another way than DDP, or an option is wrong.
    """
    checked = check_options(options)
    if not isinstance(accelerator, Accelerator):
        raise InvalidArgumentError(f"`accelerator` must be an Accelerator, got {type(accelerator).__name__}")
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise InvalidArgumentError(
            f"`optimizer` must be a prepared one, got {type(optimizer).__name__}; pass what accelerator.prepare(...) "
            "returned: only then parameters lie on their device"
        )
    kind = str(accelerator.distributed_type.value)
    if accelerator.num_processes > 1 and not kind.startswith("MULTI_"):
        raise InvalidArgumentError(
            f"a run of {accelerator.num_processes} processes by {kind} cannot be steered through Accelerate; let it "
            "train by DDP, or shard the model by torch.distributed.fsdp.fully_shard in a loop of your own"
        )
    scaler = accelerator.scaler
    found = Found(tracked=() if scaler is None else (scaler,))
    scheduler = MetaScheduler(
        optimizer.optimizer,
        model=None if model is None else accelerator.unwrap_model(model),
        **complete_options(checked, found),
    )
    accelerator.register_for_checkpointing(_Checkpointed(scheduler))
    return scheduler
