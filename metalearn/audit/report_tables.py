"""The tables of a run's report: what triggered what, drift, and the decisions with their reasons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from metalearn.audit.figures import readable, swatch
from metalearn.audit.history import DRIFTED, History, Taken
from metalearn.audit.record import RecordKind
from metalearn.audit.report_figures import PROPOSED, STATUS_SHAPES, shape_of
from metalearn.controller.decision import Configuration, Decision
from metalearn.controller.explanation import Explanation

NUM_SHOWN = 4
"""Reasons, and changes, that are seen at once."""
NUM_CONTRIBUTIONS = 4
"""Largest shares of an attribution that are shown."""


def _table(caption: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    """Returns a table in a box of its own that scrolls."""
    heads = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def trigger_table(history: History) -> str:
    """Lists rollbacks, drifts and overrides; empty if there were none."""
    rows = [
        f'<tr><th scope="row">{one.step}</th><td>{one.kind}'
        f"{'' if one.to_step is None else f', to step {one.to_step}'}</td>"
        f'<td class="wide">{readable(one.sentence)}</td></tr>'
        for one in history.triggers
    ]
    return _table("Triggers, in the order of the log", ("Step", "What", "Why"), rows) if rows else ""


def drift_table(history: History) -> str:
    """Lists drift alarms, with all that was logged of them."""
    drifts = history.of_kind(RecordKind.DRIFT)
    shown = [name for name in DRIFTED if any(name in one.facts for one in drifts)]
    rows = [
        f'<tr><th scope="row">{one.step}</th>{"".join(f"<td>{cell(one.facts.get(name))}</td>" for name in shown)}'
        f'<td class="wide">{readable(one.sentence)}</td></tr>'
        for one in drifts
    ]
    return _table("Drift alarms", ("Step", *(name.capitalize() for name in shown), "What"), rows)


def decision_table(history: History) -> str:
    """Lists the decisions, with boxes to choose statuses by."""
    decisions = history.decisions
    measured = any("validation" in one.measured for one in decisions)
    expected = any(one.decision.improvement is not None for one in decisions)
    columns = ["Step", "Decision", "Status", *["Validation"] * measured, "Values changed"]
    columns += [*["Expected improvement"] * expected, "Reasons"]
    rows = []
    before: Decision | None = None
    for one in decisions:
        decision = one.decision
        status, shape = shape_of(decision)
        cells = [
            f'<th scope="row">{one.step}</th><td>{decision.index}</td>',
            f'<td class="number plain">{swatch(5, shape)}{readable(status)}{_aside(one)}</td>',
            f'<td class="number">{cell(one.measured.get("validation"))}</td>' if measured else "",
            f'<td class="number">{_folded(list(_changes(decision, before))) or "none"}</td>',
            f'<td class="number">{_improvement(decision)}</td>' if expected else "",
            f'<td class="wide">{_reasons(decision)}</td>',
        ]
        gone = " gone" if one.superseded else ""
        rows.append(f'<tr class="{_slug(status)}{gone}">{"".join(cells)}</tr>')
        before = decision
    table = _table("Decisions, in the order of the log", columns, rows)
    return f'<div class="decisions">{_filters(decisions)}{table}</div>'


def _filters(decisions: Sequence[Taken]) -> str:
    """Returns a box for each status; the style sheet hides the rows of those that are cleared."""
    counts = Counter(shape_of(one.decision)[0] for one in decisions if _slug(shape_of(one.decision)[0]) != "other")
    boxes = "".join(
        f'<label><input type="checkbox" checked id="show-{_slug(status)}"> {readable(status)} ({count})</label>'
        for status, count in counts.items()
    )
    return f"<fieldset><legend>Show</legend>{boxes}</fieldset>" if len(counts) > 1 else ""


def filter_style() -> str:
    """Returns the style that hides the rows of a status whose box is cleared."""
    return "".join(
        f".decisions:has(#show-{slug}:not(:checked)) tr.{slug}{{display:none}}"
        for slug in map(_slug, (*STATUS_SHAPES, PROPOSED))
    )


def _slug(status: str) -> str:
    return status.replace(" ", "-") if status in (*STATUS_SHAPES, PROPOSED) else "other"


def _aside(one: Taken) -> str:
    mode = "" if one.decision.mode == "control" else f"<br>mode {readable(one.decision.mode)}"
    advice = "" if one.decision.advice is None else f"<br>{readable(one.decision.advice)} by the advisor"
    response = "" if one.decision.response is None else f"<br>to drift: {readable(one.decision.response)}"
    return f"{mode}{advice}{response}{'<br>later gone back from' if one.superseded else ''}"


def _changes(decision: Decision, before: Decision | None) -> Iterator[str]:
    """Yields what is another value than before, and what would have been."""
    now, old = _labelled(decision.in_force), {} if before is None else _labelled(before.in_force)
    for label, value in now.items():
        if label not in old:
            yield f"{readable(label)} = {value:.4g}"
        elif value != old[label]:
            factor = f" (× {value / old[label]:.3g})" if old[label] else ""
            yield f"{readable(label)}: {old[label]:.4g} → {value:.4g}{factor}"
    if decision.proposed is not None:
        for label, value in _labelled(decision.proposed).items():
            if label not in now or value != now[label]:
                yield f"{readable(label)}: {value:.4g} only proposed"


def _labelled(configuration: Configuration) -> dict[str, float]:
    groups = configuration.groups
    many = len(groups) > 1
    values = {f"{name}[{g}]" if many else name: value for g, row in enumerate(groups) for name, value in row.items()}
    return values | dict(configuration.run)


def _improvement(decision: Decision) -> str:
    expected = decision.improvement
    if expected is None or not math.isfinite(expected.expected):
        return "–"
    return (
        f"{100 * expected.expected:+.2f} %<br>{100 * expected.low:+.2f} to {100 * expected.high:+.2f} %<br>"
        f"better in {100 * expected.probability:.0f} % of cases"
    )


def _reasons(decision: Decision) -> str:
    reasons = _folded([readable(reason) for reason in decision.reasons])
    return reasons + ("" if decision.explanation_fn is None else _explanation(decision.explain()))


def _folded(items: Sequence[str]) -> str:
    """Returns a list of which the first items are seen, and the others when asked for."""
    shown = items if len(items) == NUM_SHOWN + 1 else items[:NUM_SHOWN]
    hidden = items[len(shown) :]
    more = f"<details><summary>{len(hidden)} more</summary>{_listed(hidden)}</details>" if hidden else ""
    return _listed(shown) + more


def _listed(items: Sequence[str]) -> str:
    return f'<ul class="plainlist">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def _explanation(explanation: Explanation) -> str:
    """Returns an explanation, folded: the sentence, what moved each value, and what each is made up of."""
    items = []
    for one in explanation.attributions:
        parts = ", ".join(f"{readable(name)} {_percent(share)}" for name, share in one.largest(NUM_CONTRIBUTIONS))
        items.append(f"{readable(one.label)} moved by {_percent(one.action)} of its range: {parts}")
    for one in explanation.prior:
        items.append(
            f"{readable(one.label)} = {cell(one.value)}: shared base {cell(one.base)}, shift of the domain "
            f"{_percent(one.domain_shift)}, of the run {_percent(one.run_shift)} of its range"
        )
    sentence = readable(explanation.sentence)
    return f"<details><summary>Explanation</summary><p>{sentence}</p>{_listed(items)}</details>"


def _percent(share: Any) -> str:
    return f"{100 * share:+.2f} %" if isinstance(share, int | float) else "–"


def cell(value: Any) -> str:
    """Returns a number at four digits, a count in full, a text escaped."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else readable(value)
