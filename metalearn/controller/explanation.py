"""Why a decision was taken: attribution, expectation, precedents, counterfactual, prior; in a sentence and in numbers.

Shape legend as in `metalearn.controller.setting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from metalearn.controller.actions import Position
from metalearn.controller.attribution import attribute_start, attribute_step
from metalearn.controller.counterfactual import Counterfactual, SignalChange, find_counterfactual, main_value
from metalearn.controller.forecast import Improvement
from metalearn.controller.setting import Moment, Past, Setting, flat

LIMITS = "limits"
"""What trust region, guard and, at the start, the loop's own values took from what the network asked for, or added."""
NEW_START = "new start"
"""A start that was proposed anew because of drift, and to which the run travels."""
NUM_SIMILAR = 3


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What moved one value; the contributions sum to the action.

    Args:
      label: the value, as "learning_rate[0]" for that of parameter group 0.
      action: its change, as a share of its unit range; of decision 0 the start's shift from the base.
      factor: the same as a factor; None where the scale is not logarithmic.
      contributions: signal, meta-feature, "model family", "what went before" (the recurrent state), "usual move" (what
        the network does at the median of everything), "new start" (the way to a start proposed anew) or "limits" (trust
        region and guard) to its part of the action.
    """

    label: str
    action: float
    factor: float | None
    contributions: Mapping[str, float]

    def largest(self, count: int) -> list[tuple[str, float]]:
        """Returns the names and shares of what contributed most."""
        return sorted(self.contributions.items(), key=lambda item: -abs(item[1]))[:count]


class SimilarDecision(NamedTuple):
    """An earlier decision of the run, taken on signals much like these, and what it led to."""

    index: int
    step: int
    distance: float
    """root mean square difference of the scaled signals"""
    move: float | None
    """what it did to the value that the sentence is about, as a share of the unit range"""
    validation_change: float | None
    """relative change of the validation metric until the next decision; None if not measured"""


class PriorShare(NamedTuple):
    """How one value in force is made up: shared base, domain's shift, run's shift; shifts in shares of the unit range.

    On a logarithmic scale the value is base times both factors.
    """

    label: str
    base: float
    """in the hyperparameter's own unit, as is `value`"""
    gate: float
    """share of the domain's modifier that transfers, 0 to 1"""
    modifier: float
    """what the domain asks for, -1 to 1 of the start's reach"""
    domain_shift: float
    domain_factor: float | None
    run_shift: float
    run_factor: float | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Answers why a decision was taken.

    Args:
      index, step: of the decision.
      recorded: False if the decision was read from a file without its explanation, which is worked out only on demand.
      sentence: all of it in one plain sentence.
      attributions: one a value that the run may change; none where no policy was asked.
      expected: improvement that the outcome model expected, with its interval; None if there is no model.
      similar: nearest earlier decisions of the run, the nearest first.
      counterfactual: the smallest change of signals that would have turned the main hyperparameter's step round; None
        if there is none of one or two signals.
      prior: one a value that the run may change.
    """

    index: int
    step: int
    recorded: bool
    sentence: str
    attributions: tuple[Attribution, ...] = ()
    expected: Improvement | None = None
    similar: tuple[SimilarDecision, ...] = ()
    counterfactual: Counterfactual | None = None
    prior: tuple[PriorShare, ...] = ()

    def __str__(self) -> str:
        return self.sentence

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        turned = self.counterfactual
        return {
            "index": self.index,
            "step": self.step,
            "recorded": self.recorded,
            "sentence": self.sentence,
            "attributions": [{**asdict(one), "contributions": dict(one.contributions)} for one in self.attributions],
            "expected": None if self.expected is None else self.expected._asdict(),
            "similar": [one._asdict() for one in self.similar],
            "counterfactual": None
            if turned is None
            else {**turned._asdict(), "changes": [change._asdict() for change in turned.changes]},
            "prior": [one._asdict() for one in self.prior],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Explanation:
        """Inverts `as_dict`."""
        turned, expected = content["counterfactual"], content["expected"]
        if turned is not None:
            turned = Counterfactual(
                **{**turned, "changes": tuple(SignalChange(**change) for change in turned["changes"])}
            )
        return cls(
            index=content["index"],
            step=content["step"],
            recorded=content["recorded"],
            sentence=content["sentence"],
            attributions=tuple(Attribution(**one) for one in content["attributions"]),
            expected=None if expected is None else Improvement(**expected),
            similar=tuple(SimilarDecision(**one) for one in content["similar"]),
            counterfactual=turned,
            prior=tuple(PriorShare(**one) for one in content["prior"]),
        )


def not_recorded(index: int, step: int) -> Explanation:
    """Returns what there is to say of a decision whose explanation was not kept."""
    return Explanation(
        index=index,
        step=step,
        recorded=False,
        sentence=f"The explanation of decision {index} was not recorded: it is worked out on demand, while the session "
        "that took the decision lives; its reasons and its values are.",
    )


def explain_event(index: int, step: int, reasons: Sequence[str]) -> Explanation:
    """Explains what no policy decided: a rollback, a fallback, a response to drift, a change of mode."""
    return Explanation(index=index, step=step, recorded=True, sentence=f"At step {step}: {'; '.join(reasons)}.")


def explain_start(
    setting: Setting,
    *,
    position: Position,
    base: np.ndarray,
    trust: float,
    expected: Improvement | None,
) -> Explanation:
    """Explains the start configuration: what shifted it from the base.

    Args:
      setting: of the run.
      position: the start.
      base: [V] what the shift counts from.
      trust: share of its reach that the controller uses.
      expected: improvement over the base.
    """
    shift = flat(position.group_start, position.global_start) - base
    contributions, asked = attribute_start(setting, trust)
    attributions = _attributions(setting, contributions, asked, shift)
    sentence = _sentence("At the start", attributions[:1], "the base", expected, setting, None, ())
    return Explanation(
        index=0,
        step=0,
        recorded=True,
        sentence=sentence,
        attributions=attributions,
        expected=expected,
        prior=prior_shares(setting, position),
    )


def explain_step(
    setting: Setting,
    moment: Moment,
    *,
    index: int,
    step: int,
    move: np.ndarray,
    position: Position,
    expected: Improvement | None,
    past: Sequence[Past],
    way: np.ndarray | None = None,
) -> Explanation:
    """Explains a decision in mid-run: what moved the values, and what else the controller knew.

    Args:
      setting: of the run.
      moment: what the decision saw.
      index, step: of the decision.
      move: [V] what the controller did after the guard, in unit ranges.
      position: after it.
      expected: improvement over going on without a change.
      past: earlier decisions, in order.
      way: [V] of the move, how far the start itself has travelled; None if it stays.
    """
    contributions, asked = attribute_step(setting, moment)
    if way is not None:
        contributions, asked = contributions | {NEW_START: way}, asked + way
    attributions = _attributions(setting, contributions, asked, move)
    turned = find_counterfactual(setting, moment)
    main = main_value(setting, moment)
    similar = similar_decisions(moment, past, main)
    told = [one for one in attributions if main is not None and one.label == setting.labels[main]]
    return Explanation(
        index=index,
        step=step,
        recorded=True,
        sentence=_sentence(f"At step {step}", told, "what it was", expected, setting, turned, similar),
        attributions=attributions,
        expected=expected,
        similar=similar,
        counterfactual=turned,
        prior=prior_shares(setting, position),
    )


def similar_decisions(moment: Moment, past: Sequence[Past], main: int | None) -> tuple[SimilarDecision, ...]:
    """Returns the earlier decisions whose scaled signals were nearest, and how validation went on.

    Args:
      moment: of the decision in question.
      past: earlier decisions, in order.
      main: index of the value whose moves are of interest.
    """

    def observed(group: np.ndarray, run: np.ndarray) -> np.ndarray:
        return np.concatenate([group.mean(0), run])

    if not past:
        return ()
    here = observed(moment.group, moment.run)
    distances = [float(np.sqrt(np.square(observed(one.group, one.run) - here).mean())) for one in past]
    # What a decision led to was measured by the next one; of the last, by the decision in question.
    led_to = [*(one.validation_change for one in past[1:]), moment.validation_change]
    return tuple(
        SimilarDecision(
            past[i].index,
            past[i].step,
            distances[i],
            None if main is None else float(past[i].move[main]),
            led_to[i] if math.isfinite(led_to[i]) else None,
        )
        for i in sorted(range(len(past)), key=distances.__getitem__)[:NUM_SIMILAR]
    )


def prior_shares(setting: Setting, position: Position) -> tuple[PriorShare, ...]:
    """Says of every value that the run may change what the shared prior, the domain and the run made of it."""
    gate, modifier = (setting.spread(part) for part in setting.network.start(setting.code))
    base = setting.spread(setting.base)
    start = flat(position.group_start, position.global_start)
    residual = flat(position.group_residual, position.global_residual)
    shares = []
    for i in np.flatnonzero(setting.free).tolist():
        name = setting.hyperparameters[i]
        domain, run, decode = float(start[i] - base[i]), float(residual[i]), setting.config.space[name].decode
        shares.append(
            PriorShare(
                setting.labels[i],
                float(decode(base[i])),
                float(gate[i]),
                float(np.tanh(modifier[i])),
                domain,
                setting.factor(name, domain),
                run,
                setting.factor(name, run),
                float(decode(start[i] + residual[i])),
            )
        )
    return tuple(shares)


def _attributions(
    setting: Setting, contributions: Mapping[str, np.ndarray], asked: np.ndarray, action: np.ndarray
) -> tuple[Attribution, ...]:
    parts = {**contributions, LIMITS: action - asked}
    return tuple(
        Attribution(
            label=setting.labels[i],
            action=float(action[i]),
            factor=setting.factor(setting.hyperparameters[i], float(action[i])),
            contributions={name: float(part[i]) for name, part in parts.items()},
        )
        for i in np.flatnonzero(setting.free).tolist()
    )


def _sentence(
    when: str,
    told: Sequence[Attribution],
    reference: str,
    expected: Improvement | None,
    setting: Setting,
    turned: Counterfactual | None,
    similar: Sequence[SimilarDecision],
) -> str:
    """Puts the main value's story into one sentence."""
    if not told:
        return f"{when} the controller changed nothing, since there is nothing that it may change here."
    one, parts = told[0], []
    names = [f"{name} {_signed(share)}" for name, share in one.largest(3) if abs(share) >= 1e-4]
    if names:
        parts.append(f"of the {_signed(one.action)} of its range that this is, most was {', '.join(names)}")
    if expected is None:
        parts.append("with no outcome model to say what that brings")
    else:
        parts.append(
            f"expected to end {100 * expected.expected:+.1f} % from where it would have "
            f"({100 * expected.low:+.1f} to {100 * expected.high:+.1f} % in nine cases of ten)"
        )
    if similar and similar[0].validation_change is not None:
        parts.append(
            f"after decision {similar[0].index}, the most like it, validation changed by "
            f"{100 * similar[0].validation_change:+.1f} %"
        )
    if turned is not None:
        changes = " and ".join(f"{c.name} been {c.instead:.3g} instead of {c.measured:.3g}" for c in turned.changes)
        parts.append(f"it would have gone the other way had {changes}")
    return f"{when} the controller {_done(one, setting, reference)}: {'; '.join(parts)}."


def _signed(share: float) -> str:
    return f"{100 * share:+.2f} %"


def _done(one: Attribution, setting: Setting, reference: str) -> str:
    """Says what was done to a value."""
    name, _, group = one.label.partition("[")
    subject = name.replace("_", " ") + (f" of group {group[:-1]}" if group and setting.num_groups > 1 else "")
    if abs(one.action) < 1e-6:
        return f"left the {subject} at {reference}"
    verb = "raised" if one.action > 0 else "lowered"
    by = (
        f"to {one.factor:.3g} times {reference}" if one.factor is not None else f"by {_signed(one.action)} of its range"
    )
    return f"{verb} the {subject} {by}"
