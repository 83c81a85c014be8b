"""PyTorch: the scheduler that steers a training loop, and what a rollback goes back to. Loads torch, never jax."""

from metalearn.safety.constraints import Constraints
from metalearn.safety.rollback import Rollback, RollbackConfig
from metalearn.torch.batching import ResizableBatchSampler
from metalearn.torch.dropout import BufferedDropout
from metalearn.torch.effective_batch import Accumulation, rate_factor
from metalearn.torch.gradients import GradientClip, Trainable
from metalearn.torch.handles import BatchSize, Custom, Handle
from metalearn.torch.precision import Precision
from metalearn.torch.scheduler import MetaScheduler
from metalearn.torch.snapshots import Snapshots

__all__ = [
    "Accumulation",
    "BatchSize",
    "BufferedDropout",
    "Constraints",
    "Custom",
    "GradientClip",
    "Handle",
    "MetaScheduler",
    "Precision",
    "ResizableBatchSampler",
    "Rollback",
    "RollbackConfig",
    "Snapshots",
    "Trainable",
    "rate_factor",
]
