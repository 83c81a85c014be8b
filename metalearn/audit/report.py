"""The report of a run: one HTML page from the audit log, complete in itself: no scripts, no network."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from metalearn.audit.chain import Verification
from metalearn.audit.figures import STYLE, draw_chart, readable, swatch
from metalearn.audit.history import History, read_history
from metalearn.audit.log import read_records, verify
from metalearn.audit.record import Record
from metalearn.audit.report_figures import (
    Figure,
    cohort_figures,
    curve_figures,
    drift_figure,
    improvement_figure,
    resource_figures,
    shape_of,
    trajectory_figures,
)
from metalearn.audit.report_tables import cell, decision_table, drift_table, filter_style, trigger_table
from metalearn.audit.storage import anchor_path
from metalearn.errors import AuditError, InvalidArgumentError

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Of the page's content: no network, no script."""
_PAGE_STYLE = """
*{box-sizing:border-box}html{background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
body{max-width:76rem;margin:0 auto;padding:1rem}h1{font-size:1.6rem;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem}a{color:var(--c0)}:focus-visible{outline:3px solid var(--c0)}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;padding:0;margin:1rem 0}
.chain{border:1px solid var(--line);border-left:6px solid var(--good);background:var(--card);padding:.6rem 1rem;
overflow-wrap:anywhere}.chain.bad{border:3px solid var(--alert);color:var(--alert);font-weight:700;font-size:1.1rem}
dl{display:grid;grid-template-columns:fit-content(38%) 1fr;gap:.2rem 1rem}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}.grid{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem}
figcaption{font-size:.9rem}.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.85rem;margin:.2rem 0}
.key{display:inline-block;width:26px;height:12px;vertical-align:-1px;margin-right:.3rem}.plain{color:var(--ink)}
.chart .mark{fill:var(--card)}.chart .solid{fill:currentColor}
.scroll{overflow-x:auto;margin-top:1rem;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:.9rem}caption{text-align:left;padding:.4rem .6rem;color:var(--soft)}
th,td{text-align:left;vertical-align:top;padding:.4rem .6rem;border-top:1px solid var(--line)}
thead th{background:var(--card);white-space:nowrap}.number,tbody th{white-space:nowrap;
font-variant-numeric:tabular-nums}.wide{min-width:19rem;overflow-wrap:anywhere}tr.gone>*{color:var(--soft)}
.plainlist{margin:0;padding:0;list-style:none}.wide li{padding-left:.8rem;text-indent:-.8rem}
details{margin-top:.3rem}summary{cursor:pointer;color:var(--c0)}
fieldset{border:1px solid var(--line);border-radius:6px;margin:.5rem 0;display:none}label{margin-right:1rem}
footer{margin-top:2rem;color:var(--soft);font-size:.85rem}
@supports selector(:has(a)){fieldset{display:block}}
@media print{fieldset,nav{display:none!important}details::details-content{content-visibility:visible;block-size:auto}}
"""


def write_report(
    log_path: str | Path,
    output_path: str | Path,
    *,
    name: str | None = None,
    key: bytes | None = None,
    anchor: str | Path | None = None,
) -> Path:
    """Writes the report of a run, an HTML file that needs nothing else, from its audit log.

    The log is verified first, and the page says what came of it. It shows what metalearn knows of a record's content;
    of other fields, which anybody may have added, nothing.

    Args:
      log_path: the audit log.
      output_path: the file to write; its folder is made.
      name: of the run; None if the log holds one only.
      key: of the log, if it has one.
      anchor: file that holds the head of the chain; by default the log's path with `.head` added.

    Returns:
      The output's path.

    Raises:
      InvalidArgumentError: there is no such log, it has no decisions or none of that run, or the output cannot be
        written or would overwrite the log.
      AuditError: no record of the log can be read, or one of the run is not what its kind says.

    Example:
      >>> import tempfile
      >>> from metalearn.audit import AuditLog
      >>> log = AuditLog(Path(tempfile.mkdtemp(), "audit.jsonl"), name="movies-0")
      >>> values = {"groups": [{"learning_rate": 0.01}], "run": {}, "schedule": 1.0, "confidence": 1.0}
      >>> log.append("decision", {"index": 0, "step": 0, "status": "applied", "reasons": ["the base"], **values})
      1
      >>> write_report(log.path, log.path.with_name("run.html")).name
      'run.html'
    """
    log_path, output_path = Path(log_path), Path(output_path)
    if output_path.resolve() in (log_path.resolve(), anchor_path(log_path, anchor).resolve()):
        raise InvalidArgumentError(f"`output_path` is the log or its anchor, {output_path}; pass another file")
    state = _verified(log_path, key, anchor)
    history = read_history(_records(log_path, state), name=name, source=str(log_path))
    page = _page(history, state, log_path)
    try:
        output_path.parent.mkdir(parents=True, exist_ok=True)
        output_path.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise InvalidArgumentError(f"cannot write `output_path`: {error}; pass a file that can be written") from error
    return output_path


def _verified(path: Path, key: bytes | None, anchor: str | Path | None) -> Verification | AuditError:
    try:
        return verify(path, key=key, anchor=anchor)
    except AuditError as error:
        return error


def _records(path: Path, state: Verification | AuditError) -> Iterator[Record]:
    """Yields what was verified; of a log that does not verify what can be read, so that somebody can look into it."""
    if isinstance(state, Verification):
        yield from islice(read_records(path), state.records)
        return
    count = 0
    try:
        for record in read_records(path):
            yield record
            count += 1
    except (AuditError, InvalidArgumentError):
        if count == 0:
            raise state from None


def _page(history: History, state: Verification | AuditError, path: Path) -> str:
    title = history.name or "unnamed run"
    sections = [(label, body) for label, body in _sections(history) if body]
    links = "".join(f'<li><a href="#s{number}">{label}</a></li>' for number, (label, _) in enumerate(sections))
    body = "".join(
        f'<section aria-labelledby="s{number}"><h2 id="s{number}">{label}</h2>{content}</section>'
        for number, (label, content) in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{readable(title)}: report</title>'
        f"<style>{STYLE}{_PAGE_STYLE}{filter_style()}</style></head><body>"
        f"<header><h1>Run {readable(title)}</h1>{_chain(state, path)}{_about(history, state, path)}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>'
        f"<footer>Drawn by metalearn {_version()} from the audit log. Steps are optimizer steps, times UTC.</footer>"
        "</body></html>\n"
    )


def _sections(history: History) -> Iterable[tuple[str, str]]:
    """Yields label and content of each section, empty where the log has nothing for it."""
    drift, improvement = drift_figure(history), improvement_figure(history)
    yield "Curves", _figures(curve_figures(history)) + trigger_table(history)
    yield "Hyperparameters", _status_legend(history) + _figures(trajectory_figures(history))
    yield "Expected improvement", "" if improvement is None else _figures([improvement])
    yield "Drift", "" if drift is None else _figures([drift]) + drift_table(history)
    yield "Cohorts", _figures(cohort_figures(history))
    yield "Resources", _figures(resource_figures(history))
    yield "Decisions", decision_table(history)
    yield "Outcome", "".join(_facts(numbers) for numbers in history.outcomes)
    notes = "".join(f"<li>{readable(text)} (record {sequence})</li>" for sequence, text in history.notes)
    yield "Notes", f"<ul>{notes}</ul>" if notes else ""


def _chain(state: Verification | AuditError, path: Path) -> str:
    """Says whether the log is as it was written."""
    if isinstance(state, AuditError):
        problem = str(state).replace(f"{path.parent}{os.sep}", "")
        return (
            '<p class="chain bad" role="alert">NOT VERIFIED: this page may show what was never decided. '
            f"{readable(problem)}</p>"
        )
    keyed = "with its key" if state.keyed else "without a key: whoever can write log and anchor could have rewritten it"
    more = [
        f"{state.ahead} records are newer than the anchor." if state.ahead else "",
        f"The content of {state.erased} records was erased, as the log says." if state.erased else "",
        f"An unfinished last line of {state.unfinished_bytes} bytes is left out." if state.unfinished_bytes else "",
    ]
    return (
        f'<p class="chain"><strong>Chain verified</strong>, {keyed}. {state.records} records; head '
        f"{state.head.sequence} <code>{state.head.hash}</code>. {' '.join(text for text in more if text)}</p>"
    )


def _about(history: History, state: Verification | AuditError, path: Path) -> str:
    statuses = Counter(shape_of(one.decision)[0] for one in history.decisions)
    modes = dict.fromkeys(one.decision.mode for one in history.decisions)
    first, last = history.first.time, history.last.time
    confidence = history.decisions[0].decision.confidence
    facts: dict[str, Any] = {
        "Log": path.name,
        "Time": f"{first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S} ({str(last - first).partition('.')[0]} h)",
        "Steps": history.end,
        "Decisions": f"{len(history.decisions)}: " + ", ".join(f"{n} {status}" for status, n in statuses.items()),
        "Mode": ", ".join(modes),
        "Confidence": "" if math.isnan(confidence) else f"{confidence:.3g} of its reach",
        "Erased": f"content of {history.erased} records of this run" if history.erased else "",
    }
    facts |= {name.replace("num_", "").replace("_", " ").capitalize(): value for name, value in history.about.items()}
    return _facts({name: value for name, value in facts.items() if value != ""})


def _facts(facts: Mapping[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{readable(name)}</dt><dd>{cell(value)}</dd>' for name, value in facts.items())}</dl>"


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    parts = []
    for figure in figures:
        keys = "".join(f"<span>{swatch(i)}{readable(label)}</span>" for i, label in enumerate(figure.labels))
        legend = f'<div class="legend">{keys}</div>' if keys else ""
        caption = f"<div>{readable(figure.caption)}</div>" if figure.caption else ""
        parts.append(
            f"<figure><figcaption><strong>{readable(figure.chart.title)}</strong>{caption}{legend}</figcaption>"
            f"{draw_chart(figure.chart)}</figure>"
        )
    return f'<div class="grid">{"".join(parts)}</div>'


def _status_legend(history: History) -> str:
    shapes = dict(shape_of(one.decision) for one in history.decisions)
    keys = "".join(f"<span>{swatch(5, shape)}{readable(status)}</span>" for status, shape in shapes.items())
    faint = [
        text
        for text, there in (
            ("what the run went back from", any(one.superseded for one in history.decisions)),
            ("what shadow mode would have used", any(one.decision.mode == "shadow" for one in history.decisions)),
        )
        if there
    ]
    told = f"<span>Faint: {', '.join(faint)}.</span>" if faint else ""
    return f'<div class="legend plain">{keys}{told}</div>'


def _version() -> str:
    from metalearn import __version__

    return __version__
