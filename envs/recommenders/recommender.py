"""What a recommender is: one family as a PyTorch module, the twin of a learner in `envs.learners`.

Shape legend: B batch, I item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import nn

from envs.domains import Domain
from envs.recommenders.sampling import Sampler


class Recommender(nn.Module, ABC):
    """A model that computes its own loss from a batch, and scores every item for users.

    Its dropout modules are `nn.Dropout`, so that a controller can find and set them.
    """

    roles: ClassVar[tuple[str, ...]]
    """Role of every parameter group, in order; the same as the JAX twin's."""

    @classmethod
    @abstractmethod
    def for_domain(
        cls,
        domain: Domain,
        *,
        dim: int = 32,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Returns an untrained model for a domain.

        Args:
          domain: gives the sizes, and content or histories where the family uses them.
          dim: embedding dimension.
          dropout: rate, in [0, 1).
          generator: of the initial weights.
        """

    @abstractmethod
    def sampler(self, domain: Domain, batch_size: int, *, seed: int, device: torch.device | str = "cpu") -> Sampler:
        """Returns the sampler of this family's batches."""

    @abstractmethod
    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of a batch."""

    @abstractmethod
    def score(self, user: torch.Tensor) -> torch.Tensor:
        """Returns scores of every item for users int64 [B]: float [B, I], without gradients."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the groups for an optimizer, each with its `role`, in the order of the JAX twin's."""
