"""One run's history: what an audit log says of it, put in the order of the run and ready to be drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

from metalearn.audit.record import Record, RecordKind, fault
from metalearn.controller.decision import Decision
from metalearn.errors import InvalidArgumentError

Parsed = TypeVar("Parsed")

MEASURED = ("validation", "loss", "seconds", "samples_per_second", "memory_bytes")
"""Numbers that a decision may be logged with: of the interval before it, at whose end it was taken."""
PROVENANCE = ("controller", "controller_fingerprint", "controller_version", "family", "horizon", "interval", "metric")
"""What else may be logged with a decision, a proposal or a profile, of the whole run: short texts and numbers."""
PROFILED = ("fingerprint", "schema_version", "num_users", "num_items", "num_interactions", "sampled_fraction")
"""What is told of a profile."""
DRIFTED = ("stream", "degree", "kind", "direction", "size", "response")
"""What is told of a drift, beside its sentence."""
TRIGGERS = (RecordKind.ROLLBACK, RecordKind.DRIFT, RecordKind.OVERRIDE)
MAX_STEP = 2**53
MAX_TEXT = 200
_SENTENCES = ("sentence", "reason", "text")
_DECISION_FIELDS = {field.name.removesuffix("_fn") for field in fields(Decision)}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A decision as it was logged.

    Args:
      record: that holds it.
      decision: the decision.
      measured: by name in `MEASURED`, what was logged with it; NaN is left out.
      cohorts: validation of parts of the data, by their names.
      step: from which it was in force. A rollback is decided on as of the decision before the snapshot, but in force
        from the snapshot on.
      until: optimizer step at which the next one took over.
      superseded: whether the run later went back to before it, or to where it was taken.
      undone: whether the run later went back to before what was `measured`.
    """

    record: Record
    decision: Decision
    measured: Mapping[str, float]
    cohorts: Mapping[str, float]
    step: int
    until: int
    superseded: bool = False
    undone: bool = False


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A rollback, a drift, or a human's override.

    Args:
      record: that holds it.
      kind: of `TRIGGERS`.
      step: at which it was; that of the decision before it where the record has none.
      sentence: what happened.
      facts: of a drift by name in `DRIFTED`.
      to_step: of a rollback, where it led.
    """

    record: Record
    kind: RecordKind
    step: int
    sentence: str
    facts: Mapping[str, str | float]
    to_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class History:
    """What a log holds of one run, in the order in which it was written.

    Args:
      name: of the run.
      first, last: records of it.
      decisions: at least one.
      triggers: rollbacks, drifts and overrides.
      about: what the log says of the run as a whole, by label.
      outcomes: numbers of its outcome records.
      notes: sequence number and text.
      erased: records of it whose content was erased.
    """

    name: str
    first: Record
    last: Record
    decisions: tuple[Taken, ...]
    triggers: tuple[Trigger, ...]
    about: Mapping[str, str | float]
    outcomes: tuple[Mapping[str, float], ...]
    notes: tuple[tuple[int, str], ...]
    erased: int

    @property
    def end(self) -> int:
        """The last optimizer step that the log speaks of."""
        return max(*(one.until for one in self.decisions), *(one.step for one in self.triggers), 1)

    def of_kind(self, kind: RecordKind) -> list[Trigger]:
        """Returns the triggers of one kind."""
        return [one for one in self.triggers if one.kind == kind]


def read_history(records: Iterable[Record], *, name: str | None = None, source: str = "log") -> History:
    """Puts together what records say of one run. Of their content only what is known here is taken over.

    Args:
      records: of a log, in order.
      name: of the run; None if the log holds the decisions of one only.
      source: what messages call the log.

    Returns:
      The history.

    Raises:
      InvalidArgumentError: there are no decisions, or none of a run of this name, or of several runs and no name.
      AuditError: a record of the run is not what its kind says.
    """
    own: dict[str, list[Record]] = {}
    version: dict[str, str | float] = {}
    for record in records:
        if record.kind == RecordKind.GENESIS:  # of the log, whichever run it bears the name of
            version = {"log begun by metalearn": str((record.content or {}).get("version", "of unknown version"))}
        else:
            own.setdefault(record.name, []).append(record)
    runs = [run for run, found in own.items() if any(_is_decision(record) for record in found)]
    name = _choose(runs, name, source)
    found = own[name]
    told = [record for record in found if record.content is not None]
    decisions = _decisions(told, source)
    return History(
        name=name,
        first=found[0],
        last=found[-1],
        decisions=decisions,
        triggers=_triggers(told, decisions, source),
        about=version | _about(told),
        outcomes=tuple(
            numbers for record in told if record.kind == RecordKind.OUTCOME and (numbers := _numbers(record.content))
        ),
        notes=tuple(
            (record.sequence, text) for record in told if record.kind == RecordKind.NOTE and (text := _sentence(record))
        ),
        erased=len(found) - len(told),
    )


def _choose(runs: list[str], name: str | None, source: str) -> str:
    """Returns the name of the run to tell of."""
    if not runs:
        raise InvalidArgumentError(
            f"{source} has no decisions; pass the log of a run that was given one, as `decision_log` of a MetaScheduler"
        )
    if name is None and len(runs) > 1:
        raise InvalidArgumentError(f"{source} has decisions of {len(runs)} runs; pass `name`, one of {sorted(runs)}")
    if name is not None and name not in runs:
        raise InvalidArgumentError(f"`name` must be a run with decisions in {source}: {sorted(runs)}, got {name!r}")
    return runs[0] if name is None else name


def _is_decision(record: Record) -> bool:
    return record.kind == RecordKind.DECISION and record.content is not None


def _decisions(told: list[Record], source: str) -> tuple[Taken, ...]:
    """Reads the decisions, and finds out until when each was in force and which were gone back from."""
    taken: list[Taken] = []
    back: tuple[int, int] | None = None  # of a rollback since the last decision: where it was, and where to
    for record in told:
        if record.kind == RecordKind.ROLLBACK:
            back = _parsed(record, _way_back, source)
        if not _is_decision(record):
            continue
        one = _parsed(record, _taken, source)
        step = one.step if back is None else max(one.step, back[1])
        if taken:
            last = taken[-1]
            taken[-1] = replace(last, until=max(last.step, step if back is None else back[0]))
            if back is not None or step < last.step:
                taken = [
                    replace(t, superseded=t.superseded or t.step >= step, undone=t.undone or t.step > step)
                    for t in taken
                ]
        taken.append(replace(one, step=step, until=step))
        back = None
    if back is not None:
        taken[-1] = replace(taken[-1], until=max(taken[-1].until, back[0]))
    return tuple(taken)


def _way_back(content: Mapping[str, Any], record: Record) -> tuple[int, int]:
    return _whole(content["step"]), _whole(content.get("to_step", 0))


def _taken(content: Mapping[str, Any], record: Record) -> Taken:
    known = {key: value for key, value in content.items() if key in _DECISION_FIELDS}
    known["step"], known["index"] = _whole(content["step"]), _whole(content["index"])
    known["groups"] = tuple(_values(group) for group in content["groups"])
    known["run"] = _values(content["run"])
    known["status"], known["mode"] = str(content["status"]), str(content.get("mode", "control"))
    known["schedule"], known["confidence"] = _number(content["schedule"]), _number(content["confidence"])
    known["reasons"] = tuple(str(reason) for reason in _listed(content["reasons"]))
    if (proposed := content.get("proposed")) is not None:
        known["proposed"] = {
            "groups": tuple(_values(group) for group in proposed["groups"]),
            "run": _values(proposed["run"]),
        }
    if (response := content.get("response")) is not None:
        known["response"] = str(response)[:MAX_TEXT]
    if (improvement := content.get("improvement")) is not None:
        known["improvement"] = {key: _number(value) for key, value in improvement.items()}
    if (explanation := content.get("explanation")) is not None:
        moved = [{**one, "contributions": _numbers(one["contributions"])} for one in explanation["attributions"]]
        known["explanation"] = {**explanation, "attributions": moved}
    return Taken(
        record=record,
        decision=Decision.from_dict(known),
        measured={key: number for key, number in _numbers(content).items() if key in MEASURED},
        cohorts=_numbers(content.get("cohorts")),
        step=known["step"],
        until=known["step"],
    )


def _triggers(told: list[Record], decisions: tuple[Taken, ...], source: str) -> tuple[Trigger, ...]:
    """Reads rollbacks, drifts and overrides; those of an advisor are in the decisions."""
    found: list[Trigger] = []
    step = 0
    taken = {one.record.sequence: one for one in decisions}
    for record in told:
        one = taken.get(record.sequence)
        if one is not None:
            step = one.step
            if one.decision.advice == "overridden":
                found.append(
                    Trigger(
                        record=record,
                        kind=RecordKind.OVERRIDE,
                        step=step,
                        sentence="overridden by the advisor",
                        facts={},
                    )
                )
        elif record.kind in TRIGGERS:
            found.append(_parsed(record, partial(_trigger, before=step), source))
    return tuple(found)


def _trigger(content: Mapping[str, Any], record: Record, before: int) -> Trigger:
    kind = RecordKind(record.kind)
    step = content.get("step")
    facts = {name: content[name] for name in DRIFTED if kind == RecordKind.DRIFT and _is_short(content.get(name))}
    return Trigger(
        record=record,
        kind=kind,
        step=before if step is None else _whole(step),
        sentence=_sentence(record),
        facts=facts,
        to_step=_whole(content["to_step"]) if kind == RecordKind.ROLLBACK and "to_step" in content else None,
    )


def _about(told: list[Record]) -> dict[str, str | float]:
    """Collects what is said of the run as a whole; of a later profile or start the newest word counts."""
    about: dict[str, str | float] = {}
    for record in told:
        content = record.content or {}
        if record.kind in (RecordKind.DECISION, RecordKind.PROPOSAL, RecordKind.PROFILE):
            about |= {name: content[name] for name in PROVENANCE if _is_short(content.get(name))}
        if record.kind == RecordKind.PROFILE:
            about |= {f"domain {name}": content[name] for name in PROFILED if _is_short(content.get(name))}
    return about


def _parsed(record: Record, parse: Callable[[Mapping[str, Any], Record], Parsed], source: str) -> Parsed:
    """Reads a record's content, or says which line is at fault."""
    try:
        return parse(record.content or {}, record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        problem = f"is not a {record.kind} record: {type(error).__name__}: {error}"
        raise fault(source, record.sequence + 1, problem) from error


def _sentence(record: Record) -> str:
    """Returns the sentence that a record holds, in whichever field; empty for none."""
    content = record.content or {}
    texts = [content[name] for name in _SENTENCES if isinstance(content.get(name), str)]
    reasons = content.get("reasons")
    return texts[0] if texts else "; ".join(map(str, reasons)) if isinstance(reasons, list) else ""


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in row.items()}


def _numbers(content: Any) -> dict[str, float]:
    """Returns the finite numbers of a mapping."""
    items = content.items() if isinstance(content, Mapping) else ()
    found = {str(name): _number(value) for name, value in items if isinstance(value, int | float)}
    return {name: number for name, number in found.items() if math.isfinite(number)}


def _number(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_STEP:
        raise ValueError(f"{value!r} is not a count")
    return value


def _listed(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r} is not a list")
    return value


def _is_short(value: Any) -> bool:
    """Whether it is a text of a line, or a number."""
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    return isinstance(value, int | float) and math.isfinite(_number(value))
