"""Erasure: the bytes are gone, the chain is whole, and only what was meant is touched."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from metalearn.audit import AuditLog, erase, read_decisions, read_records, verify
from metalearn.audit.erasure import as_ranges
from metalearn.audit.record import format_anchor
from metalearn.errors import AuditError, InvalidArgumentError
from tests.audit.chains import NOON, sealed

KEY = bytes(range(32))


def write(path: Path, key: bytes | None = None) -> None:
    """Writes three records each of two tenants and of none, in turn."""
    logs = [AuditLog(path, tenant=tenant, key=key) for tenant in ("shop", "press", "")]
    for index in range(9):
        logs[index % 3].append("decision", {"index": index, "secret": f"secret-{index}-of-{index % 3}"})


@pytest.mark.parametrize("key", [None, KEY])
def test_content_of_a_tenant_is_gone_and_the_rest_is_whole(tmp_path: Path, key: bytes | None):
    path = tmp_path / "log"
    write(path, key)
    before = [json.loads(line) for line in path.read_bytes().splitlines()]
    anchor = (tmp_path / "log.head").read_bytes()
    assert erase(path, tenant="shop", key=key) == 3
    content = path.read_bytes()
    after = [json.loads(line) for line in content.splitlines()]
    for index, record in enumerate(before):
        if record["tenant"] == "shop":
            assert record["content"]["secret"].encode() not in content
            assert record["salt"].encode() not in content
            assert after[index] == {name: v for name, v in record.items() if name not in ("salt", "content")}
        else:
            assert after[index] == record
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["log", "log.head"]
    assert after[-1]["content"] == {"erased": [[1, 1], [4, 4], [7, 7]], "tenant": "shop", "before": None}
    found = verify(path, key=key)
    assert (found.records, found.erased, found.ahead) == (11, 3, 0)
    (tmp_path / "older").write_bytes(anchor)
    assert verify(path, key=key, anchor=tmp_path / "older").ahead == 1
    assert [record["index"] for record in read_decisions(path)] == [1, 2, 4, 5, 7, 8]
    AuditLog(path, key=key).append("note", {})
    assert verify(path, key=key).records == 12


def test_erasures_follow_each_other(tmp_path: Path):
    path = tmp_path / "log"
    write(path)
    assert erase(path, tenant="") == 3  # those without a tenant; not the log's own records, which have none either
    assert erase(path, tenant="") == 0
    assert erase(path, tenant="nobody") == 0
    log = AuditLog(path, tenant="shop")
    log.append("note", {})
    assert erase(path, tenant="shop") == 4
    assert erase(path, before=datetime.now(UTC) + timedelta(hours=1)) == 3
    assert log.append("note", {}) == 14
    found = verify(path)
    assert (found.records, found.erased) == (15, 10)
    kept = [record.kind for record in read_records(path) if record.content is not None]
    assert kept == ["genesis", "erasure", "erasure", "erasure", "note"]


def test_old_records_are_erased_by_time(tmp_path: Path):
    path = tmp_path / "log"
    lines, head = sealed([("note", {"index": index}) for index in range(1, 9)])  # a second apart
    path.write_bytes(b"".join(lines))
    (tmp_path / "log.head").write_bytes(format_anchor(head))
    limit = (NOON + timedelta(seconds=6)).astimezone(tz=None)
    assert erase(path, before=limit, tenant="tenant-2") == 2  # records 2 and 5; 8 is later
    assert erase(path, before=limit) == 3
    kept = [r.content["index"] for r in read_records(path) if r.content is not None and r.kind == "note"]
    assert kept == [6, 7, 8]
    *_, last = read_records(path)
    assert last.content == {"erased": [[1, 1], [3, 4]], "tenant": None, "before": "2026-01-31T12:00:06.000000Z"}
    assert verify(path).erased == 5


def test_an_altered_log_is_left_as_it_is(tmp_path: Path):
    path = tmp_path / "log"
    write(path)
    altered = path.read_bytes().replace(b"secret-4", b"secret-5")
    path.write_bytes(altered)
    with pytest.raises(AuditError, match=r"log:6 has content that does not match its digest"):
        erase(path, tenant="shop")
    assert path.read_bytes() == altered


def test_permissions_stay(tmp_path: Path):
    path = tmp_path / "log"
    write(path)
    path.chmod(0o640)
    erase(path, tenant="shop")
    assert os.stat(path).st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`tenant` and `before` are both None"),
        ({"before": datetime(2026, 1, 1)}, "`before` must have a time zone"),
        (
            {"before": datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))},
            "`time` must be in the years",
        ),
    ],
)
def test_it_must_be_said_what_to_erase(tmp_path: Path, arguments, message):
    path = tmp_path / "log"
    write(path)
    with pytest.raises(InvalidArgumentError, match=message):
        erase(path, **arguments)


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path):
    with pytest.raises(InvalidArgumentError, match="there is no audit log"):
        erase(tmp_path / "log", tenant="shop")
    assert list(tmp_path.iterdir()) == []


def test_ranges():
    assert as_ranges([]) == []
    assert as_ranges([0, 2, 3, 5]) == [[0, 0], [2, 3], [5, 5]]
