"""Each thing that can be wrong with data is found, counted and told; clean data are left in peace."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from envs.domains import make_domain
from envs.public import PublicSource, check_hygiene, load_folder
from envs.public.hygiene import Finding, HygieneReport
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions
from tests.envs.logs import hand_made

NOW = 1_700_000_000.0
START = 1_600_000_000.0
DAY = 86_400.0


def clean_log(*, seed: int = 0, rows: int = 6000, users: int = 80, items: int = 400) -> Interactions:
    """Distinct pairs at distinct times, with popularities and ids that have nothing to do with time."""
    rng = np.random.default_rng(seed)
    weight = rng.permutation(1.0 / np.arange(1, items + 1) ** 0.5)
    drawn = rng.choice(users * items, size=rows, replace=False, p=np.tile(weight, users) / weight.sum() / users)
    time = START + 977.0 * np.arange(rows) + rng.integers(1, 900, rows)
    return Interactions(
        user=(drawn // items).astype(np.int32),
        item=(drawn % items).astype(np.int32),
        num_users=users,
        num_items=items,
        timestamp=time,
        rating=rng.integers(1, 6, rows).astype(np.float32),
    )


def report_of(log: Interactions, *, split: str = "auto", **source) -> HygieneReport:
    described = PublicSource(name="log", location=".", **source)
    return check_hygiene(log, make_domain(log, name="log", split=split), described, now=NOW)


def only(report: HygieneReport, name: str) -> Finding:
    found = [finding for finding in report.findings if finding.name == name]
    assert len(found) == 1, str(report)
    return found[0]


def names(report: HygieneReport) -> list[str]:
    return [finding.name for finding in report.findings]


def rows_again(log: Interactions, rows: np.ndarray, **changes) -> Interactions:
    again = dataclasses.replace(log.select(rows), **changes)
    columns = {name: np.concatenate([getattr(log, name), getattr(again, name)]) for name in ("user", "item")}
    columns |= {name: np.concatenate([getattr(log, name), getattr(again, name)]) for name in ("timestamp", "rating")}
    return dataclasses.replace(log, **columns)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("split", ["time", "leave-last-out"])
def test_clean_data_have_no_findings(seed: int, split: str) -> None:
    report = report_of(clean_log(seed=seed), split=split, counts={"users": 80, "items": 400, "interactions": 6000})
    assert str(report) == "log: no findings"


def test_exact_duplicates_are_told_from_repeats() -> None:
    log = clean_log()
    report = report_of(rows_again(log, np.arange(90)))
    finding = only(report, "exact duplicates")
    # 90 of 6 090 rows are 1.5 %.
    assert (finding.count, finding.severity) == (90, "notice") and "(1.5%)" in finding.detail
    assert "repeated pairs" not in names(report)
    again = rows_again(log, np.arange(90), timestamp=log.timestamp[:90] + 7.0)
    assert only(report_of(again), "repeated pairs").count == 90
    assert "exact duplicates" not in names(report_of(again))
    rated = rows_again(log, np.arange(90), rating=log.rating[:90] + 1)
    assert only(report_of(rated), "repeated pairs").count == 90
    assert only(report_of(rows_again(log, np.arange(700))), "exact duplicates").severity == "severe"


def test_unrated_duplicates_are_duplicates() -> None:
    log = clean_log()
    log = dataclasses.replace(log, rating=np.where(np.arange(6000) < 3000, np.nan, log.rating))
    assert only(report_of(rows_again(log, np.arange(10))), "exact duplicates").count == 10


def test_impossible_times() -> None:
    log = clean_log()
    future = np.where(np.arange(6000) % 100 == 0, NOW + 1.0, log.timestamp)
    finding = only(report_of(dataclasses.replace(log, timestamp=future)), "future times")
    assert (finding.count, finding.severity) == (60, "severe")
    report = report_of(dataclasses.replace(log, timestamp=log.timestamp * 1000))
    assert only(report, "future times").count == 6000 and "`time_unit`" in only(report, "future times").remedy
    early = only(report_of(dataclasses.replace(log, timestamp=np.arange(6000.0))), "early times")
    assert (early.count, early.severity) == (6000, "severe") and "order only" in early.remedy
    assert "early times" not in names(
        report_of(dataclasses.replace(log, timestamp=np.arange(6000.0)), timestamps="order")
    )


def test_suspicious_times() -> None:
    log = clean_log()
    days = only(report_of(dataclasses.replace(log, timestamp=log.timestamp // DAY * DAY)), "days only")
    assert (days.count, days.severity) == (6000, "notice")
    for rows, severity in ((120, "notice"), (900, "severe")):
        time = np.where(np.arange(6000) < rows, START + 1, log.timestamp)
        finding = only(report_of(dataclasses.replace(log, timestamp=time)), "one second")
        assert (finding.count, finding.severity) == (rows, severity)
    few = np.where(np.arange(6000) < 50, START + 1, log.timestamp)
    assert names(report_of(dataclasses.replace(log, timestamp=few))) == []


def test_metadata_that_disagrees() -> None:
    counts = {"users": 80, "items": 401, "interactions": 12_000}
    report = report_of(clean_log(), counts=counts)
    items, rows = sorted((f for f in report.findings if f.name == "counts disagree"), key=lambda f: f.count)
    assert (items.count, items.severity, rows.count, rows.severity) == (1, "notice", 6000, "severe")
    assert items.detail == "400 items, but 401 are stated"
    assert report.findings[0] == rows  # severe findings come first
    untimed = dataclasses.replace(clean_log(), timestamp=None)
    assert names(report_of(untimed)) == ["no times"]
    assert names(report_of(untimed, timestamps="none")) == []


def test_ids_that_tell_order_are_found() -> None:
    log = clean_log()

    def renumbered(values: np.ndarray) -> Interactions:
        code = np.empty(log.num_items, dtype=np.int32)
        code[np.argsort(values, kind="stable")] = np.arange(log.num_items)
        return dataclasses.replace(log, item=code[log.item])

    counts = np.bincount(log.item, minlength=log.num_items)
    finding = only(report_of(renumbered(-counts)), "item ids follow popularity")
    assert finding.severity == "severe" and "rank correlation -1.00" in finding.detail
    time = np.bincount(log.item, weights=log.timestamp, minlength=log.num_items) / np.maximum(counts, 1)
    assert only(report_of(renumbered(time)), "item ids follow time").severity == "notice"
    rating = np.bincount(log.item, weights=log.rating, minlength=log.num_items) / np.maximum(counts, 1)
    assert only(report_of(renumbered(rating)), "item ids follow rating").severity == "severe"


def test_ratings_that_tell_the_label() -> None:
    log = clean_log()
    constant = report_of(dataclasses.replace(log, rating=np.ones(6000, dtype=np.float32)))
    assert only(constant, "one rating").count == 6000
    late = log.timestamp >= np.quantile(log.timestamp, 0.85)
    marked = dataclasses.replace(log, rating=np.where(late, 9.0, log.rating).astype(np.float32))
    finding = only(report_of(marked), "rating tells the part")
    assert finding.severity == "severe"


def test_evaluated_pairs_in_training_are_found() -> None:
    times = np.arange(20.0)
    train = [(user, item, time) for time, (user, item) in enumerate([(0, 0), (1, 1), (2, 2), (3, 3)])]
    domain = hand_made(train, [(0, 0, 8.0), (1, 2, 8.0)], [(2, 2, 9.0), (3, 3, 9.0), (1, 4, 9.0)])
    log = Interactions(
        user=np.arange(20) % 4, item=np.arange(20) % 5, num_users=4, num_items=5, timestamp=START + times
    )
    source = PublicSource(name="log", location=".")
    leaks = [f for f in check_hygiene(log, domain, source, now=NOW).findings if f.name == "evaluated pairs in training"]
    assert [(leak.count, leak.detail.split(" pairs")[0], leak.severity) for leak in leaks] == [
        (1, "1 of 2 validation", "severe"),
        (2, "2 of 3 test", "severe"),
    ]


def test_drift_is_measured_against_a_random_split() -> None:
    log = clean_log()
    # Late rows move to the other half of the catalogue, which training knows through a tenth of its rows.
    late = log.timestamp >= np.quantile(log.timestamp, 0.8)
    rare = np.random.default_rng(1).random(6000) < 0.1
    item = np.where(late | rare, log.item % 200 + 200, log.item % 200).astype(np.int32)
    finding = only(report_of(dataclasses.replace(log, item=item), split="time"), "drift")
    assert finding.severity == "severe" and "if split at random" in finding.detail


def test_new_items_are_counted() -> None:
    log = clean_log(items=300)
    # Of the last tenth of the rows, every fourth is of an item that did not exist before.
    time = np.arange(6000)
    item = np.where((time >= 5400) & (time % 4 == 0), 300 + time % 50, log.item).astype(np.int32)
    finding = only(report_of(dataclasses.replace(log, item=item, num_items=350), split="time"), "new items")
    assert finding.severity == "notice" and finding.count == pytest.approx(150, abs=2)


def test_a_report_survives_json() -> None:
    report = report_of(rows_again(clean_log(), np.arange(900)), counts={"users": 81})
    assert HygieneReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert str(report).splitlines()[0] == f"log: {len(report.findings)} findings"
    assert [finding.name for finding in report.severe] == ["exact duplicates", "counts disagree"]
    empty = clean_log().select([])
    with pytest.raises(InvalidArgumentError, match="`interactions` is empty"):
        check_hygiene(empty, make_domain(clean_log(), name="log"), PublicSource(name="log", location="."))


def test_severe_findings_are_logged_on_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = clean_log()
    frame = pl.DataFrame({"user_id": log.user, "item_id": log.item, "timestamp": log.timestamp})
    frame.write_parquet(tmp_path / "good.parquet")
    frame.with_columns(timestamp=pl.int_range(6000)).write_parquet(tmp_path / "bad.parquet")
    manifest = {"datasets": [{"name": "good", "users": 80, "items": 399}]}
    (tmp_path / "MANIFEST.json").write_text(json.dumps(manifest))
    sources = load_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        good = sources["good"].domain()
        assert caplog.records == []
        bad = sources["bad"].domain()
    assert "notice: counts disagree: 400 items, but 399 are stated" in good.provenance["hygiene"]
    assert "severe: early times: 6000 rows" in bad.provenance["hygiene"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "severe: early times" in caplog.text and "notice" not in caplog.text
