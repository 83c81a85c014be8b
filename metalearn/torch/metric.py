"""Which of the validation metrics that a loop reports is followed, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from metalearn.errors import InvalidArgumentError

PREFERRED = ("ndcg@10", "ndcg", "recall@10", "hit@10", "mrr", "auc")


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

    def told(self, value: float) -> float:
        """Inverts the sign of `read`."""
        return self._sign * value

    def _pick(self, metrics: float | Mapping[str, float]) -> float:
        if not isinstance(metrics, Mapping):
            return _number(metrics)
        names: Sequence[str] = [self.name] if self.name else [n for n in PREFERRED if n in metrics] or list(metrics)
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
