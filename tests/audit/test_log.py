"""The decision log: one line a decision, readable again, and strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from metalearn.audit import DecisionLog, read_decisions
from metalearn.controller import Decision
from metalearn.errors import InvalidArgumentError


def make_decision(index: int = 0, **changes) -> Decision:
    fields = {
        "index": index,
        "step": 100 * index,
        "status": "applied",
        "groups": ({"learning_rate": 0.02, "beta1": 0.9}, {"learning_rate": 0.01, "beta1": 0.8}),
        "run": {"dropout": 0.1},
        "schedule": 0.5,
        "confidence": 1.0,
        "reasons": ("no change", "Größe: −3 % \u2028 below"),
    }
    return Decision.from_dict(fields | changes)


def test_decisions_are_read_back_as_they_were(tmp_path: Path):
    log = DecisionLog(tmp_path / "new" / "folder" / "decisions.jsonl", name="movies-0")
    decisions = [make_decision(index) for index in range(3)]
    for decision in decisions:
        log.append(decision, validation=0.1, seconds=2.5)
    records = read_decisions(log.path)
    assert [(r["version"], r["name"], r["validation"], r["seconds"]) for r in records] == [
        (1, "movies-0", 0.1, 2.5)
    ] * 3
    for record, decision in zip(records, decisions, strict=True):
        fields = {name: record[name] for name in decision.as_dict()}
        assert Decision.from_dict(fields) == decision


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path: Path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for count in range(1, 4):
        log.append(make_decision(count))
        assert len(log.path.read_text().splitlines()) == count


def test_an_existing_file_is_continued(tmp_path: Path):
    for name in ("first", "second"):
        DecisionLog(tmp_path / "decisions.jsonl", name=name).append(make_decision())
    assert [record["name"] for record in read_decisions(tmp_path / "decisions.jsonl")] == ["first", "second"]


def test_what_is_not_finite_is_null(tmp_path: Path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.append(make_decision(schedule=math.nan), validation=math.inf, curve=[1.0, (math.nan,)], more={"x": -math.inf})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not strict JSON")

    record = json.loads(log.path.read_text(), parse_constant=refuse)
    assert record["schedule"] is record["validation"] is None
    assert record["curve"] == [1.0, [None]]
    assert record["more"] == {"x": None}


def test_an_empty_log_has_no_decisions(tmp_path: Path):
    (tmp_path / "decisions.jsonl").touch()
    assert read_decisions(tmp_path / "decisions.jsonl") == []


@pytest.mark.parametrize("line", ['{"version": 1, "index"', "[]", "3", "null", "{}", ""])
def test_a_line_that_is_no_decision_is_named(tmp_path: Path, line: str):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.append(make_decision())
    with log.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InvalidArgumentError, match=r"decisions\.jsonl:2 is not a decision"):
        read_decisions(log.path)


def test_another_log_version_is_named(tmp_path: Path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.append(make_decision())
    log.path.write_text(log.path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(InvalidArgumentError, match=r"jsonl:1 has log version 2, this metalearn reads 1$"):
        read_decisions(log.path)
