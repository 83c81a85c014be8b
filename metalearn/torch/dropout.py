"""Dropout whose rate is a buffer: a compiled model sees it change without being compiled again."""

from __future__ import annotations

import torch

from metalearn.errors import InvalidArgumentError


class BufferedDropout(torch.nn.Module):
    """Drops elements with probability p and divides the others by 1 - p, as `torch.nn.Dropout` does.

    There p is a number that compilation builds into the graph, so that every change compiles anew, until after eight of
    them the model runs uncompiled. Here it is read from a buffer. The buffer is not in the model's `state_dict`, so
    that checkpoints of a model with `torch.nn.Dropout` fit.

    Args:
      p: in [0, 1).

    Raises:
      InvalidArgumentError: p is not in [0, 1).

    Example:
      >>> dropout = BufferedDropout(0.25)
      >>> dropout.p = 0.5
      >>> sorted(set(dropout(torch.ones(100)).tolist()))
      [0.0, 2.0]
    """

    rate: torch.Tensor

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("rate", torch.zeros(()), persistent=False)
        self.p = p

    @property
    def p(self) -> float:
        """Probability with which an element is dropped."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise InvalidArgumentError(f"`p` must be in [0, 1), got {value!r}")
        self._p = float(value)  # beside the buffer, of which reading would wait for an accelerator
        self.rate.fill_(value)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Drops elements in training; else returns the values as they are."""
        if not self.training:
            return values
        kept = torch.rand_like(values, dtype=torch.float32) >= self.rate  # narrower types are too coarse for small p
        return values * (kept / (1.0 - self.rate)).to(values.dtype)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"p={self.p}"
