"""What a loop reports: which of its validation metrics is followed, which way is better, and the losses beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from metalearn.errors import InvalidArgumentError

PREFERRED = ("ndcg@10", "ndcg", "recall@10", "hit@10", "mrr", "auc")


class Losses(NamedTuple):
    """Mean losses of the same weights, computed in the same way; NaN where they are not reported."""

    validation_loss: float = math.nan
    """of validation data"""
    training_sample_loss: float = math.nan
    """of a sample of the training data"""


class Metric:
    """One metric of those reported, higher is better.

    Args:
      name: its key; None for the first of `PREFERRED` that is reported, or for the only one.
      mode: "max" if a higher metric is better, "min" if lower.

    Raises:
      InvalidArgumentError: there is no such mode.
    """

    def __init__(self, name: str | None, mode: Literal["max", "min"]) -> None:
        if mode not in ("max", "min"):
            raise InvalidArgumentError(f"`mode` must be 'max' or 'min', got {mode!r}")
        self.name, self._sign = name, 1.0 if mode == "max" else -1.0

    def read(self, metrics: float | Mapping[str, float]) -> float:
        """Returns the metric, higher is better.

        Raises:
          InvalidArgumentError: the mapping is empty, it is unclear which entry is the metric, or that is no number.
        """
        return self._sign * self._pick(metrics)

    @staticmethod
    def read_losses(metrics: float | Mapping[str, float]) -> Losses:
        """Returns the losses that are among the metrics.

        Raises:
          InvalidArgumentError: one is no number.
        """
        if not isinstance(metrics, Mapping):
            return Losses()
        return Losses(*(_number(metrics.get(name, math.nan)) for name in Losses._fields))

    def _pick(self, metrics: float | Mapping[str, float]) -> float:
        if not isinstance(metrics, Mapping):
            return _number(metrics)
        others = [name for name in metrics if name not in Losses._fields] or list(metrics)
        names = [self.name] if self.name else [name for name in PREFERRED if name in metrics] or others
        if not metrics:
            raise InvalidArgumentError("`metrics` is empty; report at least one number")
        if names[0] not in metrics or (len(names) > 1 and names[0] not in PREFERRED):
            raise InvalidArgumentError(
                f"cannot tell which of {list(metrics)} to follow; pass `metric` to MetaScheduler, one of these names"
            )
        return _number(metrics[names[0]])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"`metrics` must hold numbers, got {value!r}; report math.nan for what was not measured"
        ) from error
