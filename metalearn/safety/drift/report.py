"""What a drift monitor says, and what that asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metalearn.safety.drift.change import Kind
from metalearn.safety.drift.detector import Degree, Direction

Response = Literal["none", "re_profile", "loosen", "re_propose", "roll_back"]

DEGREES: tuple[Degree, ...] = ("none", "watch", "drift", "severe")
"""From least to most."""


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """Say whether something drifted, and how.

    Args:
      degree: `none`, `watch` (more than noise does often; also a season just learnt), `drift`, or `severe`.
      kind: `abrupt`, `gradual` or `seasonal`; None where nothing drifted, or one window cannot tell.
      direction: of a stream; None for data.
      harmful: whether the change is to the worse, as far as is known: a stream that moves its good way is not.
      stream: name of what is watched, empty where nothing drifted.
      since: its clock at the first point after the change; None where unknown.
      size: of the change: standard deviations of noise, or the population stability index of samples.
      new: whether the change is reported for the first time; later reports only know it better.
      sentence: the same in plain words.
    """

    degree: Degree = "none"
    kind: Kind | None = None
    direction: Direction | None = None
    harmful: bool = False
    stream: str = ""
    since: int | None = None
    size: float = 0.0
    new: bool = False
    sentence: str = "no drift"

    @property
    def response(self) -> Response:
        """What the degree asks for.

        `watch`: profile the data again, which costs little. `drift`: let the policy move further from its start
        (`loosen`) where the change is gradual and can be followed, propose a new start (`re_propose`) where it is
        abrupt. `severe`: go back to the last good state where a stream fell at once; propose anew where the data moved
        or the fall was slow: going back to a state that was good for other data does not help. A stream that
        improved, or a season, asks for no more than a profile.

        >>> DriftReport(degree="severe", kind="abrupt", direction="down", harmful=True, stream="ndcg").response
        'roll_back'
        """
        if self.degree == "none":
            return "none"
        if self.degree == "watch" or not self.harmful:
            return "re_profile"
        if self.degree == "drift":
            return "loosen" if self.kind == "gradual" else "re_propose"
        return "roll_back" if self.kind == "abrupt" and self.direction is not None else "re_propose"


def worst(reports: list[DriftReport]) -> DriftReport:
    """Returns the report of the highest degree; of equals the harmful, the new and the larger come first."""
    rank = {degree: index for index, degree in enumerate(DEGREES)}
    key = [(rank[report.degree], report.harmful, report.new, abs(report.size)) for report in reports]
    return reports[max(range(len(reports)), key=key.__getitem__)] if reports else DriftReport()
