"""The files of an audit log: the log itself, locked while it is written, and the anchor beside it.

Order of writes, so that a kill between any two leaves something that the next writer can continue: the anchor at
`START`, then the log; a record, flushed to the disk, then the anchor. So the anchor never names a record that is not
there. Where the writer does not wait for the disk, another thread keeps that order, and the log stays locked until it
has moved the anchor. That has two lines, of which the older one is replaced in place: a torn write leaves the other,
and so does a reader that comes at that moment find one. It is not flushed: after a loss of power an older one is on the
disk, which is behind the log, as after a kill.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedWriter, FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: one writer at a time is then up to the user
    fcntl = None

from metalearn.audit.chain import check_genesis, follow, verify_lines
from metalearn.audit.record import (
    MAX_LINE_BYTES,
    START,
    Head,
    format_anchor,
    parse_anchor,
    split_line,
)
from metalearn.errors import AuditError, InvalidArgumentError

TAIL_BYTES = 2**16
"""Read to find where a log ends; only if the anchor's record is not among them is the whole log read."""


def anchor_path(path: Path, anchor: str | Path | None) -> Path:
    """Returns where the anchor lies: beside the log with `.head` added, unless said otherwise."""
    if anchor is None:
        return path.with_name(path.name + ".head")
    if Path(anchor) == path:
        raise InvalidArgumentError(f"`anchor` must not be the log itself, got {anchor}; leave it out, or name another")
    return Path(anchor)


@contextmanager
def writable(path: Path) -> Iterator[FileIO]:
    """Opens a log to append to it, made with its folder if need be, and locks it against processes and threads.

    Raises:
      AuditError: the operating system refuses something, in the block too.
    """
    try:
        while True:
            with _appending(path) as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                # An erasure may have put another file in its place while this one waited for the lock.
                if _is_at(path, file):
                    yield file
                    return
    except OSError as error:
        raise AuditError(f"cannot write the audit log {path}: {error}; make room, or pass another path") from error


def _appending(path: Path) -> FileIO:
    try:
        return FileIO(path, "a+")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(path, "a+")


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def write_all(file: FileIO, content: bytes) -> None:
    """Writes; a kill of the process leaves it there, a loss of power may not."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def commit(descriptor: int, anchor: Path, head: Head) -> None:
    """Waits until the disk has a log up to a head, and moves the anchor to it."""
    os.fsync(descriptor)
    write_anchor(anchor, head)


def commit_behind(file: FileIO, anchor: Path, head: Head) -> Future[None]:
    """Commits in another thread; the log stays locked until that is done.

    Args:
      file: the log, open and locked; it may be closed before.
      anchor: path of the anchor.
      head: of the log.
    """
    descriptor = os.dup(file.fileno())  # shares the lock

    def work() -> None:
        try:
            commit(descriptor, anchor, head)
        finally:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would leave it to a process forked meanwhile
            os.close(descriptor)

    try:
        return _committer().submit(work)
    except RuntimeError:  # the interpreter is about to end, and starts no threads any more
        done: Future[None] = Future()
        done.set_result(work())
        return done


@lru_cache(maxsize=1)
def _committer() -> ThreadPoolExecutor:
    """Returns the thread that commits; what is left to it is done before the interpreter ends."""
    return ThreadPoolExecutor(1, "metalearn-audit")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_committer.cache_clear)  # a fork has the object, but not its thread


def replace_unfinished(path: Path, unfinished_bytes: int, line: bytes) -> None:
    """Writes a record over the unfinished last line; `commit` is to follow.

    It is written before what is left of the old line is cut off: if it is killed in between, the rest is an unfinished
    last line again, and the record that tells of it is there.
    """
    with FileIO(path, "r+") as file:
        file.seek(-unfinished_bytes, os.SEEK_END)
        write_all(file, line)
        os.fsync(file.fileno())
        file.truncate(file.tell())


def replace_log(path: Path, lines: Iterable[bytes]) -> None:
    """Writes another file and puts it in the log's place: a kill leaves the one or the other, whole.

    Another file that a kill has left behind is overwritten.
    """
    other = path.with_name(path.name + ".erasing")
    # For nobody else's eyes before it has the log's permissions.
    descriptor = os.open(other, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with BufferedWriter(FileIO(descriptor, "w"), 2**20) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(descriptor)
    shutil.copymode(path, other)
    os.replace(other, path)
    sync_folder(path.parent)


def read_lines(file: FileIO) -> Iterator[bytes]:
    """Yields the lines from the start, none longer than `MAX_LINE_BYTES` + 1, so that no file fills the memory."""
    with open(file.fileno(), "rb", buffering=2**20, closefd=False) as stream:
        stream.seek(0)
        yield from iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")


def read_anchor(path: Path) -> Head | None:
    """Returns the anchored head; None if there is no such file, or no whole line in it yet.

    Raises:
      AuditError: it cannot be read, or is not an anchor.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AuditError(f"cannot read the anchor {path}: {error}") from error
    return parse_anchor(content, str(path))


def write_anchor(path: Path, head: Head) -> None:
    """Moves the anchor to a head; for `START` makes it, with its folder if need be."""
    line = format_anchor(head)
    if head == START:
        path.parent.mkdir(parents=True, exist_ok=True)
    with FileIO(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "w") as file:
        file.seek(0 if head == START else head.sequence % 2 * len(line))
        file.write(2 * line if head == START else line)


def find_head(file: FileIO, path: Path, anchor: Path, *, key: bytes | None) -> tuple[Head, int]:
    """Finds where a log ends, and checks what is newer than the anchor; all of it, if it is short.

    Args:
      file: the log, open and locked.
      path: its path, for messages.
      anchor: path of its anchor.
      key: the log's key.

    Returns:
      The head, and the bytes of an unfinished last line.

    Raises:
      AuditError: the log does not fit the anchor, or what is newer than it is not whole.
    """
    anchored = read_anchor(anchor)
    size = file.seek(0, os.SEEK_END)
    if anchored is None and size > 0:
        raise missing_anchor(path, anchor)
    if size > TAIL_BYTES and anchored is not None and anchored != START:
        check_genesis(next(read_lines(file)), key=key, source=str(path))
        file.seek(size - TAIL_BYTES)
        parts = file.readall().split(b"\n")
        lines, unfinished = parts[1:-1], parts[-1]
        newer = [place for place, line in enumerate(lines) if line.startswith(b'{"v":1,"seq":%d,' % anchored.sequence)]
        if newer:
            head = _follow_from([line + b"\n" for line in lines[newer[0] :]], anchored, key=key, source=str(path))
            return head, len(unfinished)
    found = verify_lines(read_lines(file), anchor=anchored or START, key=key, source=str(path))
    return found.head, found.unfinished_bytes


def missing_anchor(path: Path, anchor: Path) -> AuditError:
    """Returns the error for a log without its anchor."""
    return AuditError(
        f"{path} has no anchor at {anchor}, without which a cut tail would not show; pass `anchor` if it lies "
        "elsewhere; if the file is no audit log, pass another path"
    )


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names of the files in a folder; where folders cannot be opened, nothing."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _follow_from(lines: list[bytes], anchored: Head, *, key: bytes | None, source: str) -> Head:
    """Checks the anchor's record, which is the first line, and all that follow it."""
    before = split_line(lines[0], anchored.sequence + 1, source).previous.decode()
    head = Head(anchored.sequence - 1, before)
    for line in lines:
        head, _ = follow(line, head, key=key, source=source)
        if head.sequence == anchored.sequence and head != anchored:
            raise AuditError(f"{source}:{head.sequence + 1} is not the record that the anchor names: it was rewritten")
    return head
