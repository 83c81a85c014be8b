"""PyTorch: the scheduler that steers a training loop, and what a rollback goes back to. Loads torch, never jax."""

from metalearn.safety.rollback import Constraints, Rollback, RollbackConfig
from metalearn.torch.scheduler import MetaScheduler
from metalearn.torch.snapshots import Snapshots

__all__ = ["Constraints", "MetaScheduler", "Rollback", "RollbackConfig", "Snapshots"]
