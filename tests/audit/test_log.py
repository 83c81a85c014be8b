"""The audit log on disk: what is written reads back, other writers, keys, anchors, and refusals."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

import metalearn
from metalearn.audit import AuditLog, RecordKind, read_decisions, read_key, read_records, storage, verify
from metalearn.audit.record import MAX_LINE_BYTES, Head, seal, split_line
from metalearn.audit.storage import TAIL_BYTES, read_lines, replace_log, writable
from metalearn.controller import Decision
from metalearn.errors import AuditError, InvalidArgumentError
from metalearn.profiles import DomainProfile

ROOT = Path(__file__).parents[2]
KEY = bytes(range(32))


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


def kinds(path: Path) -> list[str]:
    return [record.kind for record in read_records(path)]


def test_decisions_are_read_back_as_they_were(tmp_path: Path):
    log = AuditLog(tmp_path / "new" / "folder" / "audit.jsonl", name="movies-0")
    decisions = [make_decision(index) for index in range(3)]
    sequences = [log.record_decision(decision, validation=0.1, seconds=2.5) for decision in decisions]
    assert sequences == [1, 2, 3]
    log.append("note", {"text": "between"})
    records = read_decisions(log.path)
    assert [(r["name"], r["validation"], r["seconds"]) for r in records] == [("movies-0", 0.1, 2.5)] * 3
    for record, decision in zip(records, decisions, strict=True):
        fields = {name: record[name] for name in decision.as_dict()}
        assert Decision.from_dict(fields) == decision


@pytest.mark.parametrize("key", [None, KEY])
def test_every_record_is_there_as_soon_as_it_is_written(tmp_path: Path, key: bytes | None):
    log = AuditLog(tmp_path / "audit.jsonl", key=key, name="run", tenant="shop")
    for count in range(1, 4):
        log.append(RecordKind.NOTE, {"count": count})
        found = verify(log.path, key=key)
        assert (found.records, found.ahead, found.unfinished_bytes) == (count + 1, 0, 0)
    genesis, *rest = read_records(log.path)
    assert genesis.content == {
        "package": "metalearn",
        "version": metalearn.__version__,
        "format": 1,
        "keyed": key is not None,
    }
    assert [(r.name, r.tenant, r.content) for r in rest] == [("run", "shop", {"count": n}) for n in (1, 2, 3)]


def test_salts_differ_so_that_equal_content_has_different_digests(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for _ in range(3):
        log.append("note", {})
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert len({line["salt"] for line in lines}) == len({line["digest"] for line in lines[1:]}) + 1 == 4


def test_an_existing_log_is_continued(tmp_path: Path):
    for name in ("first", "second"):
        AuditLog(tmp_path / "audit.jsonl", name=name).record_decision(make_decision())
    assert [record["name"] for record in read_decisions(tmp_path / "audit.jsonl")] == ["first", "second"]
    assert kinds(tmp_path / "audit.jsonl") == ["genesis", "decision", "decision"]


@pytest.mark.parametrize("size", [10, 2 * TAIL_BYTES], ids=["read whole", "read from the anchor on"])
def test_writers_in_turn_continue_one_chain(tmp_path: Path, size: int):
    logs = [AuditLog(tmp_path / "audit.jsonl", name=name) for name in ("first", "second")]
    logs[0].append("note", {"text": "x" * size})
    for turn in range(6):
        logs[turn % 2].append("note", {"text": "x" * (size // 8)})
    assert verify(tmp_path / "audit.jsonl").records == 8
    assert [record.name for record in read_records(tmp_path / "audit.jsonl")][2:] == ["first", "second"] * 3


def test_what_is_not_finite_is_null_and_numpy_is_plain(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record_decision(
        make_decision(schedule=math.nan), validation=math.inf, curve=[1.0, (math.nan,)], more={"x": -math.inf}
    )
    log.append("outcome", {"a": np.float32(np.nan), "b": np.array([[1.5, np.inf]]), "c": np.int64(3), "d": np.True_})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not strict JSON")

    _, *lines = log.path.read_text().splitlines()
    decision, outcome = (json.loads(line, parse_constant=refuse)["content"] for line in lines)
    assert decision["schedule"] is decision["validation"] is None
    assert decision["curve"] == [1.0, [None]]
    assert decision["more"] == {"x": None}
    assert outcome == {"a": None, "b": [[1.5, None]], "c": 3, "d": True}


def test_a_profile_is_recorded_without_any_id(tmp_path: Path):
    users = [f"user-{n}-secret" for n in (71, 71, 82, 82, 93)]
    items = [f"item-{n}-secret" for n in (55, 66, 66, 77, 66)]
    profile = metalearn.profile_domain(metalearn.Interactions.from_arrays(users, items))
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record_profile(profile, split="train")
    assert "secret" not in log.path.read_text()
    (record,) = [record for record in read_records(log.path) if record.kind == "profile"]
    assert record.content is not None
    content = {name: value for name, value in record.content.items() if name != "split"}
    assert record.content["split"] == "train"
    assert DomainProfile.from_json(json.dumps(content)).to_json() == profile.to_json()
    # Counts, numbers by name, and one text: nothing that could hold a row.
    counts = {"schema_version", "num_users", "num_items", "num_interactions", "sampled_fraction"}
    assert set(content) == {"fingerprint", "meta_features", *counts}
    assert all(isinstance(content[name], int | float) for name in counts)
    assert all(value is None or isinstance(value, float) for value in content["meta_features"].values())


@pytest.mark.parametrize("kind", ["genesis", "erasure", "repair", "Decision", "", None, 3])
def test_kinds_of_the_log_itself_and_unknown_ones_are_refused(tmp_path: Path, kind):
    log = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(InvalidArgumentError, match=r"`kind` must be one of .*'decision'"):
        log.append(kind, {})


def test_content_that_is_no_json_is_refused_and_nothing_is_written(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    before = log.path.read_bytes()
    endless: dict = {}
    endless["self"] = endless
    for content in ([], "text", {"x": object()}, {"x": {1, 2}}, {"x": b"bytes"}, endless, {"x": "y" * MAX_LINE_BYTES}):
        with pytest.raises(InvalidArgumentError, match="`content`"):
            log.append("note", content)  # type: ignore[arg-type]
    assert log.path.read_bytes() == before
    assert log.append("note", {}) == 1


@pytest.mark.parametrize("arguments", [{"name": 3}, {"tenant": None}, {"key": b"short"}, {"key": "k" * 32}])
def test_arguments_are_checked_before_anything_is_written(tmp_path: Path, arguments):
    with pytest.raises(InvalidArgumentError, match=f"`{next(iter(arguments))}` must be"):
        AuditLog(tmp_path / "audit.jsonl", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_anchor_lies_where_it_is_wanted(tmp_path: Path):
    anchor = tmp_path / "other" / "volume" / "head"
    log = AuditLog(tmp_path / "audit.jsonl", anchor=anchor)
    log.append("note", {})
    assert not (tmp_path / "audit.jsonl.head").exists()
    assert verify(log.path, anchor=anchor).records == 2
    with pytest.raises(AuditError, match=r"audit\.jsonl has no anchor at .*audit\.jsonl\.head"):
        verify(log.path)
    with pytest.raises(AuditError, match="has no anchor"):
        AuditLog(log.path)
    with pytest.raises(InvalidArgumentError, match="`anchor` must not be the log itself"):
        AuditLog(log.path, anchor=log.path)
    anchor.write_text("{}")
    for opened in (verify, AuditLog):
        with pytest.raises(AuditError, match="head is not the anchor of an audit log"):
            opened(log.path, anchor=anchor)


@pytest.mark.parametrize("size", [10, TAIL_BYTES // 4], ids=["read whole", "read from the anchor on"])
def test_a_cut_log_is_not_continued(tmp_path: Path, size: int):
    log = AuditLog(tmp_path / "audit.jsonl")
    for _ in range(8):
        log.append("note", {"text": "x" * size})
    lines = log.path.read_bytes().splitlines(keepends=True)
    for cut in (lines[:-1], lines[:1], [], [*lines[:-1], lines[-1][:-1]]):
        log.path.write_bytes(b"".join(cut))
        for attempt in (lambda: AuditLog(log.path), lambda: log.append("note", {}), lambda: verify(log.path)):
            with pytest.raises(AuditError, match=r"audit\.jsonl:\d is missing: the anchor has 9 records") as caught:
                attempt()
            assert caught.value.line == (9 if len(cut) >= 8 else len(cut) + 1)
        assert log.path.read_bytes() == b"".join(cut)
    log.path.unlink()
    with pytest.raises(AuditError, match="it was deleted"):
        verify(log.path)


@pytest.mark.parametrize("size", [10, TAIL_BYTES // 4], ids=["read whole", "read from the anchor on"])
def test_a_log_altered_at_its_end_is_not_continued(tmp_path: Path, size: int):
    log = AuditLog(tmp_path / "audit.jsonl")
    for _ in range(8):
        log.append("note", {"text": "x" * size})
    whole = log.path.read_bytes()
    *rest, before, last = whole.splitlines(keepends=True)
    head = Head(7, split_line(before, 8).hash.decode())
    forged, _ = seal("note", {}, head=head, time=datetime.now(UTC), salt=bytes(16))
    for altered in (whole[:-4] + b"y" + whole[-3:], whole + b"\n", whole + last, b"".join([*rest, before, forged])):
        log.path.write_bytes(altered)
        for attempt in (lambda: AuditLog(log.path), lambda: log.append("note", {})):
            with pytest.raises(AuditError):
                attempt()
        assert log.path.read_bytes() == altered
    log.path.write_bytes(whole)
    assert log.append("note", {}) == 9


@pytest.mark.parametrize("size", [10, TAIL_BYTES // 4], ids=["read whole", "read from the anchor on"])
def test_a_log_ahead_of_its_anchor_is_continued(tmp_path: Path, size: int):
    log = AuditLog(tmp_path / "audit.jsonl")
    older = []
    for _ in range(8):
        older.append(log.anchor.read_bytes())
        log.append("note", {"text": "x" * size})
    for count, anchor in enumerate(older, 1):
        log.anchor.write_bytes(anchor)
        assert verify(log.path).ahead == 9 - count
        AuditLog(log.path)
        assert verify(log.path).ahead == 0


def test_the_anchor_holds_the_last_two_heads(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for last in range(1, 6):
        log.append("note", {})
        hashes = {json.loads(line)["hash"] for line in log.path.read_text().splitlines()[-2:]}
        anchored = [json.loads(line) for line in log.anchor.read_text().splitlines()]
        assert {head["seq"] for head in anchored} == {last - 1, last}
        assert {head["hash"] for head in anchored} == hashes


def test_the_anchor_follows_once_the_disk_has_what_nobody_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log, other = AuditLog(tmp_path / "log"), AuditLog(tmp_path / "log")
    slow, synced = threading.Event(), storage.os.fsync

    def waits(descriptor: int) -> None:
        assert slow.wait(10)
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", waits)
        assert log.append("note", {"index": 0}, wait=False) == 1
        assert (verify(log.path).records, verify(log.path).ahead) == (2, 1)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(other.append, "note", {"index": 1})
            with pytest.raises(TimeoutError):  # it would overtake the record whose anchor is to come
                second.result(0.1)
            slow.set()
            assert second.result(10) == 2
    log.flush()
    assert (verify(log.path).records, verify(log.path).ahead) == (3, 0)


FORKS = """
import os, sys
from metalearn.audit import AuditLog
log = AuditLog(sys.argv[1])
for _ in range(20):
    log.append("note", {}, wait=False)
    if os.fork() == 0:
        log.append("note", {"of": "child"}, wait=False)
        log.flush()
        os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
log.append("note", {"of": "the end"}, wait=False)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forks_append_on_their_own_and_the_end_of_the_interpreter_waits_for_the_disk(tmp_path: Path):
    subprocess.run([sys.executable, "-c", FORKS, tmp_path / "log"], cwd=ROOT, timeout=60, check=True)
    assert (verify(tmp_path / "log").records, verify(tmp_path / "log").ahead) == (42, 0)


AT_EXIT = """
import atexit, sys
from metalearn.audit import AuditLog
log = AuditLog(sys.argv[1])
atexit.register(lambda: log.append("note", {}, wait=False))
"""


def test_a_record_of_when_no_thread_can_be_started_any_more_is_committed_at_once(tmp_path: Path):
    subprocess.run([sys.executable, "-c", AT_EXIT, tmp_path / "log"], cwd=ROOT, timeout=60, check=True)
    assert (verify(tmp_path / "log").records, verify(tmp_path / "log").ahead) == (2, 0)


def test_a_writer_that_waits_for_an_erasure_writes_to_the_new_file(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    with writable(log.path) as file:
        waiting = threading.Thread(target=log.append, args=("note", {"text": "waited"}))
        waiting.start()
        time.sleep(0.1)
        assert len(log.path.read_bytes().splitlines()) == 1
        replace_log(log.path, list(read_lines(file)))
    waiting.join()
    assert verify(log.path).records == 2


@pytest.mark.parametrize("size", [10, TAIL_BYTES // 4], ids=["read whole", "read from the anchor on"])
def test_another_key_is_refused(tmp_path: Path, size: int):
    log = AuditLog(tmp_path / "audit.jsonl", key=KEY)
    for _ in range(8):
        log.append("note", {"text": "x" * size})
    for opened in (AuditLog, verify):
        with pytest.raises(AuditError, match="the key is another"):
            opened(log.path, key=bytes(32))
        with pytest.raises(AuditError, match="says that the log is keyed; pass its key"):
            opened(log.path)
    assert verify(log.path, key=KEY).keyed


def test_keys_are_read_from_files(tmp_path: Path):
    (tmp_path / "key").write_bytes(b"  0123456789abcdef\n")
    assert read_key(tmp_path / "key") == b"0123456789abcdef"
    (tmp_path / "key").write_bytes(b"short" + b"\n" * 20)
    with pytest.raises(InvalidArgumentError, match="holds 5 bytes"):
        read_key(tmp_path / "key")
    with pytest.raises(InvalidArgumentError, match="cannot read the key file"):
        read_key(tmp_path / "none")


def test_an_empty_file_has_no_decisions_and_is_begun(tmp_path: Path):
    (tmp_path / "audit.jsonl").touch()
    assert read_decisions(tmp_path / "audit.jsonl") == []
    AuditLog(tmp_path / "audit.jsonl")
    assert kinds(tmp_path / "audit.jsonl") == ["genesis"]


@pytest.mark.parametrize("line", ['{"version": 1, "index"', "[]", "3", "null", "{}", ""])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record_decision(make_decision())
    with log.path.open("a") as file:
        file.write(line + "\n")
    for read in (read_decisions, verify):
        with pytest.raises(AuditError, match=r"audit\.jsonl:3 is not an audit record") as caught:
            read(log.path)
        assert caught.value.line == 3


def test_readers_leave_out_a_line_that_is_being_written(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record_decision(make_decision())
    with log.path.open("a") as file:
        file.write('{"v":1,"seq":2,"ti')
    assert len(read_decisions(log.path)) == 1
    assert verify(log.path).unfinished_bytes == 18


def test_a_file_that_cannot_be_a_log_is_refused(tmp_path: Path):
    for read in (verify, lambda path: list(read_records(path)), read_decisions):
        with pytest.raises(InvalidArgumentError, match="there is no audit log"):
            read(tmp_path / "none")
        with pytest.raises(InvalidArgumentError, match="cannot read the audit log"):
            read(tmp_path)
    file = tmp_path / "file"
    file.write_text("text\n")
    for path, message in ((tmp_path, "cannot write"), (file / "log", "cannot write"), (file, "no anchor")):
        with pytest.raises(AuditError, match=message):
            AuditLog(path)


APPEND = """
import sys
from metalearn.audit import AuditLog
log = AuditLog(sys.argv[1], name=sys.argv[2])
for index in range(int(sys.argv[3])):
    log.append("note", {"index": index, "text": "x" * 3000})
"""


def test_processes_append_to_one_log(tmp_path: Path):
    path, count = tmp_path / "audit.jsonl", 60
    started = [subprocess.Popen([sys.executable, "-c", APPEND, path, name, str(count)], cwd=ROOT) for name in "abc"]
    assert [process.wait(timeout=60) for process in started] == [0, 0, 0]
    assert (verify(path).records, verify(path).ahead) == (3 * count + 1, 0)
    for name in "abc":
        mine = [
            record.content["index"] for record in read_records(path) if record.name == name and record.kind == "note"
        ]
        assert mine == list(range(count))


def test_threads_append_to_one_log(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    sequences: list[int] = []
    threads = [
        threading.Thread(target=lambda: sequences.extend(log.append("note", {}) for _ in range(20))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sequences) == list(range(1, 81))
    assert verify(log.path).records == 81
