"""A kill at every system call of every operation, and real ones: nothing that was on the disk is lost or doubted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest

from metalearn.audit import AuditLog, erase, read_records, storage, verify
from metalearn.audit.storage import TAIL_BYTES
from metalearn.errors import AuditError, MetalearnError

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Stands for SIGKILL: no `except` of the library catches it, and nothing reaches the disk after it."""


class Kill:
    """Counts what changes files, and stops the process at one of them.

    Args:
      at: number of the call that is not carried out, or only in part if it writes.
      share: of the bytes of that write that reach the file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, share: float) -> None:
        self.calls: list[str] = []
        self._at, self._share = at, share
        kill = self

        class File(FileIO):
            def write(self, content) -> int:
                if len(kill.calls) == kill._at:
                    super().write(bytes(content)[: int(kill._share * len(content))])
                kill.call("write")
                return super().write(content)

            def truncate(self, size=None) -> int:
                kill.call("truncate")
                return super().truncate(size)

        monkeypatch.setattr(storage, "FileIO", File)
        for name in ("fsync", "replace"):
            monkeypatch.setattr(storage.os, name, self._counted(getattr(os, name)))
        real = os.open

        def opened(path, flags: int, *rest) -> int:
            if flags & os.O_CREAT:
                self.call("open")
            return real(path, flags, *rest)

        monkeypatch.setattr(storage.os, "open", opened)

    def call(self, name: str) -> None:
        """Notes one call; from the fatal one on, none is carried out."""
        if len(self.calls) == self._at:
            raise Killed
        self.calls.append(name)

    def _counted(self, function: Callable) -> Callable:
        def counted(*arguments):
            self.call(function.__name__)
            return function(*arguments)

        return counted


def nothing(path: Path) -> None:
    pass


def three_records(path: Path, size: int = 10) -> None:
    log = AuditLog(path, tenant="a")
    for index in range(3):
        log.append("note", {"index": index, "text": "x" * size})


def long_log(path: Path) -> None:
    three_records(path, TAIL_BYTES)


def torn(path: Path) -> None:
    three_records(path)
    with path.open("ab") as file:
        file.write(b'{"v":1,"seq":4,"time":"20' + b"x" * 600)  # more than what the repair writes over it


def torn_a_little(path: Path) -> None:
    three_records(path)
    with path.open("ab") as file:
        file.write(b"{")


def torn_genesis(path: Path) -> None:
    AuditLog(path)
    storage.write_anchor(path.with_name(path.name + ".head"), storage.START)
    path.write_bytes(path.read_bytes()[:-20])


def open_it(path: Path) -> None:
    AuditLog(path)


def append(path: Path) -> None:
    AuditLog(path).append("note", {"index": "killed"})


def append_behind(path: Path) -> None:
    log = AuditLog(path)
    log.append("note", {"index": "killed"}, wait=False)
    log.flush()


def erase_it(path: Path) -> None:
    erase(path, tenant="a")


@pytest.mark.parametrize(
    ("before", "operation"),
    [
        (nothing, open_it),
        (nothing, append),
        (three_records, append),
        (long_log, append),
        (nothing, append_behind),
        (three_records, append_behind),
        (torn, append_behind),
        (torn, append),
        (torn_a_little, append),
        (torn_genesis, append),
        (three_records, erase_it),
        (torn, erase_it),
    ],
)
def test_a_kill_between_any_two_calls_loses_nothing(tmp_path: Path, before: Callable, operation: Callable):
    def attempt(folder: Path, at: int, share: float) -> list[str]:
        folder.mkdir()
        before(folder / "log")
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            kill = Kill(patch, at, share)
            operation(folder / "log")
        return kill.calls

    calls = attempt(tmp_path / "whole", -1, 0.0)
    assert len(calls) >= 3
    for at, call in enumerate(calls):
        for share in (0.0, 0.3, 0.6, 0.99, 1.0) if call == "write" else (0.0,):
            folder = tmp_path / f"{at}-{share}"
            assert attempt(folder, at, share) == calls[:at]
            recovers(folder / "log", 4 if before not in (nothing, torn_genesis) else 0, erasing=operation is erase_it)
            if before in (torn, torn_a_little):
                assert "repair" in [record.kind for record in read_records(folder / "log")]


def recovers(path: Path, records: int, *, erasing: bool) -> None:
    """Checks what a kill has left, and what the next writer makes of it."""
    if records:
        assert verify(path).records >= records  # not taken for tampering
    elif path.exists():
        with suppress(AuditError):  # there may be no anchor yet
            assert verify(path).records <= 3
    log = AuditLog(path)
    added = log.append("note", {"index": "after"})
    found = verify(path)
    assert (found.records, found.ahead, found.unfinished_bytes) == (added + 1, 0, 0)
    contents = [record.content for record in read_records(path) if record.kind == "note"]
    assert contents[-1] == {"index": "after"}
    if records:
        expected = {None} if erasing and found.erased else {0, 1, 2}
        kept = contents[:3]
        assert {None if content is None else content["index"] for content in kept} == expected
        assert found.erased in ((0, 3) if erasing else (0,))
    if erasing:
        erase(path, tenant="a")
        assert verify(path).erased == 3
        assert sorted(p.name for p in path.parent.iterdir()) == ["log", "log.head"]


@pytest.mark.parametrize("rest", [b"{", b'{"v":1,"seq":4', b"\x00" * 5000, b"x" * 2 * TAIL_BYTES])
def test_an_unfinished_line_is_dropped_and_noted(tmp_path: Path, rest: bytes):
    path = tmp_path / "log"
    three_records(path)
    with path.open("ab") as file:
        file.write(rest)
    assert verify(path).unfinished_bytes == len(rest)
    AuditLog(path)
    assert verify(path).records == 5
    *_, last = read_records(path)
    assert (last.kind, last.content) == ("repair", {"dropped_bytes": len(rest)})


APPEND = """
import sys
from metalearn.audit import AuditLog
log = AuditLog(sys.argv[1])
while True:
    print(log.append("note", {"text": "x" * 20000}, wait=sys.argv[2] == "wait"), flush=True)
"""


@pytest.mark.parametrize("wait", ["wait", "behind"])
def test_processes_that_are_really_killed(tmp_path: Path, wait: str):
    path, acknowledged = tmp_path / "log", 0
    for delay in (0.0, 0.003, 0.02):
        with subprocess.Popen(
            [sys.executable, "-c", APPEND, path, wait], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            acknowledged = int(process.stdout.readline())
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            acknowledged = max([acknowledged, *(int(line) for line in process.stdout if line.endswith("\n"))])
        assert verify(path).records > acknowledged
    AuditLog(path).append("note", {})
    assert verify(path).ahead == 0


def test_a_full_disk_is_said_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = AuditLog(tmp_path / "log")

    class Full(FileIO):
        def write(self, content) -> int:
            super().write(bytes(content)[:50])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "FileIO", Full)
        with pytest.raises(MetalearnError, match=r"cannot write the audit log .*No space left on device"):
            log.append("note", {})
    assert log.append("note", {}) == 2
    assert [record.kind for record in read_records(log.path)] == ["genesis", "repair", "note"]
    assert verify(log.path).records == 3


def test_a_disk_that_does_not_take_a_record_is_said_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = AuditLog(tmp_path / "log")

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", fails)
        log.append("note", {"index": 0}, wait=False)
        with pytest.raises(AuditError, match=r"may not be on the disk: .*Input/output error; make room"):
            log.append("note", {"index": 1})
    assert verify(log.path).ahead == 1  # the anchor names nothing that the disk may not have
    log.append("note", {"index": 2})
    assert [record.content for record in read_records(log.path)][1:] == [{"index": 0}, {"index": 2}]
    assert verify(log.path).ahead == 0
