"""PyTorch: the scheduler that steers a training loop. Loads torch, never jax."""

from metalearn.torch.scheduler import MetaScheduler

__all__ = ["MetaScheduler"]
