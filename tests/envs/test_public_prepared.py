"""Prepared domains come back to the bit, and an entry that is not what it was is built again."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from envs.domains import Domain, make_domain
from envs.public import CacheStatistics, DomainCache, HygieneReport, PublicSource, load_public, prepared
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions
from tests.envs.logs import random_log


def write_log(path: Path, seed: int = 0) -> None:
    log = random_log(seed=seed)
    pl.DataFrame(
        {
            "user_id": [f"Ü{user}" for user in log.user],
            "item_id": log.item.astype(np.int64) + 100,
            "timestamp": log.timestamp + 1_600_000_000,
            "rating": np.where(log.item % 2 == 0, np.nan, 4.0),
        }
    ).write_parquet(path)


@pytest.fixture
def source(tmp_path: Path) -> PublicSource:
    write_log(tmp_path / "log.parquet")
    return PublicSource(name="log", location=str(tmp_path / "log.parquet"), counts={"users": 80})


def assert_same(first: Domain, second: Domain) -> None:
    for name in ("train", "validation", "test", "exposures"):
        parts = [getattr(domain, name) for domain in (first, second)]
        if parts[0] is None:
            assert parts[1] is None
            continue
        for field in dataclasses.fields(Interactions):
            values = [getattr(part, field.name) for part in parts]
            assert type(values[0]) is type(values[1]), field.name
            if isinstance(values[0], np.ndarray):
                assert values[0].dtype == values[1].dtype, field.name
            np.testing.assert_array_equal(*values)
    for name in ("item_titles", "item_content"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert [(d.name, d.split, dict(d.provenance)) for d in (first,)] == [
        (d.name, d.split, dict(d.provenance)) for d in (second,)
    ]


def counted(cache: DomainCache) -> tuple[int, int, int]:
    return cache.statistics.hits, cache.statistics.misses, cache.statistics.rebuilt


def test_a_second_load_is_the_first(source: PublicSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DomainCache(tmp_path / "cache")
    first = source.domain(cache=cache)
    assert sorted(path.suffix for path in cache.directory.iterdir()) == [".json", ".npz"]
    monkeypatch.setattr(PublicSource, "rows", lambda self: pytest.fail("the data were read again"))
    again = source.domain(cache=DomainCache(cache.directory))
    assert_same(first, again)
    assert again.train.user_ids([0])[0] == "Ü0" and again.train.item_ids([0])[0] == 100
    assert_same(first, source.domain(cache=cache))
    assert counted(cache) == (1, 1, 0)
    assert str(cache.statistics) == "prepared domains: 1 of 2 from the cache (50%), 0 broken or stale entries rebuilt"
    assert CacheStatistics().hit_rate == 0.0


def test_titles_content_and_exposures_come_back(tmp_path: Path) -> None:
    log = random_log()
    exposures = dataclasses.replace(log, user=log.item % 80, item=log.user % 40, timestamp=log.timestamp / 2)
    domain = make_domain(
        log,
        name="whole",
        item_titles=np.array([f"“{item}”\0" if item % 3 else "" for item in range(40)], dtype=object),
        item_content=np.random.default_rng(0).normal(size=(40, 5)),
        exposures=exposures,
        provenance={"credit": "Å"},
    )
    assert len(domain.exposures) > 0
    cache = DomainCache(tmp_path)
    report = HygieneReport(domain="whole")
    cache.get("whole", "content", {}, lambda: (domain, report))
    again, found = cache.get("whole", "content", {}, lambda: pytest.fail("prepared again"))
    assert_same(domain, again)
    assert found == report


def test_the_bundled_domain_comes_back(tmp_path: Path) -> None:
    cache = DomainCache(tmp_path)
    assert_same(*(load_public("uci_online_retail", cache=cache) for _ in range(2)))
    assert counted(cache) == (1, 1, 0)
    load_public("uci_online_retail", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"split": "leave-last-out"},
        {"min_user_interactions": 3},
        {"min_item_interactions": 2},
        {"validation_fraction": 0.2},
        {"test_fraction": 0.2},
        {"max_users": 50},
        {"max_items": 30},
        {"seed": 1},
    ],
)
def test_other_parameters_are_another_entry(options: dict, source: PublicSource, tmp_path: Path) -> None:
    cache = DomainCache(tmp_path / "cache")
    source.domain(cache=cache)
    assert_same(source.domain(cache=cache, **options), source.domain(**options))
    assert counted(cache) == (0, 2, 0) and len(list(cache.directory.glob("*.npz"))) == 2
    dataclasses.replace(source, min_rating=4.0).domain(cache=cache)
    assert counted(cache) == (0, 3, 0)


def test_other_data_make_the_entry_stale(source: PublicSource, tmp_path: Path) -> None:
    cache = DomainCache(tmp_path / "cache")
    before = source.domain(cache=cache)
    write_log(Path(source.location), seed=1)
    after = source.domain(cache=cache)
    assert counted(cache) == (0, 2, 1)
    assert before.train.item.tolist() != after.train.item.tolist()
    assert_same(after, source.domain(cache=cache))
    assert counted(cache) == (1, 2, 1) and len(list(cache.directory.iterdir())) == 2


def test_other_items_make_the_entry_stale(source: PublicSource, tmp_path: Path) -> None:
    from envs.public import ItemTable

    path = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": [100], "title": ["first"]}).write_parquet(path)
    described = dataclasses.replace(source, items=ItemTable(location=str(path)))
    cache = DomainCache(tmp_path / "cache")
    assert described.domain(cache=cache).item_titles[0] == "first"
    pl.DataFrame({"item_id": [100], "title": ["second"]}).write_parquet(path)
    assert described.domain(cache=cache).item_titles[0] == "second"
    assert counted(cache) == (0, 2, 1)


def test_other_code_makes_the_entry_stale(
    source: PublicSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DomainCache(tmp_path / "cache")
    source.domain(cache=cache)
    monkeypatch.setattr(prepared, "_code_digest", lambda: "another")
    source.domain(cache=cache)
    monkeypatch.setattr(prepared, "FORMAT", prepared.FORMAT + 1)
    source.domain(cache=cache)
    assert counted(cache) == (0, 3, 2)


def test_every_broken_entry_is_built_again(source: PublicSource, tmp_path: Path) -> None:
    cache = DomainCache(tmp_path / "cache")
    whole = source.domain(cache=cache)
    arrays, header = sorted(cache.directory.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (arrays.suffix, header.suffix) == (".npz", ".json")
    data, text = arrays.read_bytes(), header.read_bytes()
    rng = np.random.default_rng(0)

    def flip(content: bytes) -> bytes:
        place = int(rng.integers(len(content)))
        return content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1 :]

    damages = [(flip(data), text) for _ in range(10)] + [(data, flip(text)) for _ in range(10)]
    damages += [
        (data[: len(data) // 2], text),
        (b"", text),
        (data, b""),
        (data, text[:-1]),
        (data, b"[]"),
        (data, b"5"),
    ]
    damages += [(None, text), (data, None)]
    for number, damage in enumerate(damages, 1):
        for path, content in zip((arrays, header), damage, strict=True):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        assert_same(whole, source.domain(cache=cache))
        assert counted(cache) == (0, number + 1, number), damage[1]
        assert (arrays.read_bytes(), header.read_bytes()) == (data, text)


def test_a_header_that_was_written_anew_is_not_believed(source: PublicSource, tmp_path: Path) -> None:
    cache = DomainCache(tmp_path / "cache")
    source.domain(cache=cache)
    path = next(cache.directory.glob("*.json"))
    header = json.loads(path.read_text())
    header["domain"]["num_items"] += 1
    path.write_text(json.dumps(header))
    source.domain(cache=cache)
    assert counted(cache) == (0, 2, 1)


def test_an_interrupted_write_leaves_nothing_that_is_read(
    source: PublicSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DomainCache(tmp_path / "cache")
    replace, calls = prepared._replace, []

    def interrupted(path: Path, content: bytes) -> None:
        calls.append(path.suffix)
        if len(calls) == 2:
            raise OSError("no space left")
        replace(path, content)

    monkeypatch.setattr(prepared, "_replace", interrupted)
    with pytest.raises(OSError, match="no space left"):
        source.domain(cache=cache)
    assert [path.suffix for path in cache.directory.iterdir()] == [".npz"] and calls == [".npz", ".json"]
    monkeypatch.setattr(prepared, "_replace", replace)
    source.domain(cache=cache)
    source.domain(cache=cache)
    assert counted(cache) == (1, 2, 1)
    monkeypatch.setattr(prepared.os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        source.domain(cache=cache, seed=7)
    assert len(list(cache.directory.iterdir())) == 2  # no temporary file stays


def load_in_process(directory: str, location: str) -> int:
    cache = DomainCache(directory)
    return len(PublicSource(name="log", location=location).domain(cache=cache).train)


@pytest.mark.slow
def test_processes_share_a_folder(source: PublicSource, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sizes = pool.starmap(load_in_process, [(str(tmp_path / "cache"), source.location)] * 4)
    assert len(set(sizes)) == 1
    cache = DomainCache(tmp_path / "cache")
    PublicSource(name="log", location=source.location).domain(cache=cache)
    assert counted(cache) == (1, 0, 0)


def test_ids_that_json_cannot_hold_are_an_error(tmp_path: Path) -> None:
    domain = make_domain(random_log(), name="odd")
    labels = np.fromiter([bytes([code]) for code in range(domain.num_users)], dtype=object, count=domain.num_users)
    odd = dataclasses.replace(domain, train=dataclasses.replace(domain.train, user_labels=labels))
    with pytest.raises(InvalidArgumentError, match=r"`user_labels` cannot be cached.*cache=None"):
        DomainCache(tmp_path).get("odd", "content", {}, lambda: (odd, HygieneReport(domain="odd")))


def test_severe_findings_are_told_on_a_hit_too(
    source: PublicSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = dataclasses.replace(source, counts={"users": 800})
    cache = DomainCache(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            wrong.domain(cache=cache)
    assert counted(cache) == (1, 1, 0)
    assert [record.getMessage() for record in caplog.records] == [caplog.records[0].getMessage()] * 2
    assert "80 users, but 800 are stated" in caplog.text
