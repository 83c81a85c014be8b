"""The audit log: what was decided, seen and done, appended record by record to a hash-chained file.

`metalearn.audit.chain` says what a record looks like, and what the chain does and does not protect against.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from metalearn.audit.chain import Verification, verify_lines
from metalearn.audit.erasure import as_ranges, erasable, without
from metalearn.audit.record import (
    FORMAT,
    MAX_LINE_BYTES,
    MIN_KEY_BYTES,
    OWN_KINDS,
    SALT_BYTES,
    START,
    Head,
    Record,
    RecordKind,
    check_key,
    fault,
    format_time,
    read_record,
    seal,
)
from metalearn.audit.storage import (
    anchor_path,
    commit,
    commit_behind,
    find_head,
    missing_anchor,
    read_anchor,
    read_lines,
    replace_log,
    replace_unfinished,
    sync_folder,
    writable,
    write_all,
    write_anchor,
)
from metalearn.controller.decision import Decision
from metalearn.errors import AuditError, InvalidArgumentError
from metalearn.profiles import DomainProfile


class AuditLog:
    """Appends records to an audit log; each is on the disk when `append` returns, unless told not to wait for that.

    Several processes may continue one log: it is opened and locked for each record. After a kill the next one to open
    it drops an unfinished last line and notes that in the log; nothing else is ever repaired.

    Records must not hold ids of users or items. Those that metalearn writes do not: profiles are aggregates, decisions
    are hyperparameters and sentences about them.

    Args:
      path: the file; its folder is made. An existing log is continued.
      name: of the run, in each record.
      tenant: whose records these are, for `erase`; a code rather than a name, because erasure leaves it.
      key: of the whole log, at least 16 bytes, for HMAC-SHA-256 instead of SHA-256; see `read_key`.
      anchor: file that holds the head of the chain, by default the log's path with `.head` added. Another volume, or
        another user's folder, protects more.

    Raises:
      InvalidArgumentError: a name or key that cannot be one.
      AuditError: the file is not an audit log, is shorter than its anchor says, has another key, or cannot be written.

    Example:
      >>> import tempfile
      >>> log = AuditLog(Path(tempfile.mkdtemp(), "audit.jsonl"), name="movies-0")
      >>> log.append("note", {"text": "first run on the new shard"})
      1
      >>> verify(log.path).records
      2
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "",
        tenant: str = "",
        key: bytes | None = None,
        anchor: str | Path | None = None,
    ) -> None:
        for label, value in (("name", name), ("tenant", tenant)):
            if not isinstance(value, str):
                raise InvalidArgumentError(f"`{label}` must be a text, got {type(value).__name__}")
        self.path = Path(path)
        self.anchor = anchor_path(self.path, anchor)
        self._name, self._tenant, self._key = name, tenant, check_key(key)
        self._head = START
        self._seen: tuple[int, ...] | None = None
        self._behind: tuple[int, Future[None]] | None = None
        """process that left a record to be committed, and what says when it is"""
        with writable(self.path) as file:
            self._catch_up(file)

    def append(self, kind: RecordKind | str, content: Mapping[str, Any], *, wait: bool = True) -> int:
        """Writes one record.

        Args:
          kind: what it is about, except those that the log itself writes.
          content: JSON-ready; not-finite floats become null, NumPy values plain ones.
          wait: whether to return only when the disk has it. Otherwise the operating system has it: a kill of the
            process leaves it there, a loss of power may not. Another thread then waits for the disk and moves the
            anchor, and the next writer waits for that thread, as `flush` and the end of the interpreter do.

        Returns:
          The record's sequence number.

        Raises:
          InvalidArgumentError: an unknown kind, or content that is not JSON-ready.
          AuditError: the log was altered meanwhile, or cannot be written, or the record before could not be committed.
        """
        allowed = [known.value for known in RecordKind if known not in OWN_KINDS]
        if kind not in allowed:
            raise InvalidArgumentError(f"`kind` must be one of {allowed}, got {kind!r}")
        if not isinstance(content, Mapping):
            raise InvalidArgumentError(f"`content` must be a dict, got {type(content).__name__}")
        try:
            plain = _plain(content)
        except RecursionError as error:
            raise InvalidArgumentError("`content` is nested too deeply, or in itself; pass a flatter dict") from error
        self.flush()
        with writable(self.path) as file:
            self._catch_up(file)
            self._write(file, RecordKind(kind), plain, wait=wait)
            return self._head.sequence

    def flush(self) -> None:
        """Waits until the disk has every record that this object has written.

        Raises:
          AuditError: it did not take the last one.
        """
        behind, self._behind = self._behind, None
        if behind is None or behind[0] != os.getpid():  # a fork's own copy is never told
            return
        try:
            behind[1].result()
        except OSError as error:
            raise AuditError(
                f"the last record of the audit log {self.path} may not be on the disk: {error}; make room, or pass "
                "another path"
            ) from error

    def record_decision(self, decision: Decision, *, wait: bool = True, **context: Any) -> int:
        """Writes a decision with its reasons, and whatever else gives it context; returns the sequence number."""
        return self.append(RecordKind.DECISION, {**decision.as_dict(), **context}, wait=wait)

    def record_profile(self, profile: DomainProfile, **context: Any) -> int:
        """Writes a domain's profile, and whatever else gives it context; returns the sequence number.

        That is counts, meta-features and the fingerprint, a hash of the rows: no ids, and no row of the data.
        """
        return self.append(RecordKind.PROFILE, {**json.loads(profile.to_json()), **context})

    def erase(self, *, tenant: str | None = None, before: datetime | None = None) -> int:
        """Drops the content and salt of records and says so in the log, in one step; see `erase`."""
        if tenant is None and before is None:
            raise InvalidArgumentError("`tenant` and `before` are both None; say whose records, or up to when")
        if before is not None and before.tzinfo is None:
            raise InvalidArgumentError(f"`before` must have a time zone, got {before}; add tzinfo=datetime.UTC")
        limit = None if before is None else format_time(before)
        self.flush()
        with writable(self.path) as file:
            self._catch_up(file)
            # A log that was altered is evidence: it is not rewritten.
            verify_lines(read_lines(file), anchor=self._head, key=self._key, source=str(self.path))
            chosen = erasable(read_lines(file), tenant=tenant, before=limit)
            if not chosen:
                return 0
            content = {"erased": as_ranges(chosen), "tenant": tenant, "before": limit}
            line, head = self._seal(RecordKind.ERASURE, content)
            replace_log(self.path, chain(without(read_lines(file), chosen), [line]))
            write_anchor(self.anchor, head)
        return len(chosen)

    def _catch_up(self, file: FileIO) -> None:
        """Finds the head again if anybody else has written; begins an empty log; repairs one that a kill left."""
        if self._seen == _identity(file):
            return
        head, unfinished = find_head(file, self.path, self.anchor, key=self._key)
        self._head = head
        if head == START:
            from metalearn import __version__

            # The anchor first: a log without one has lost it.
            write_anchor(self.anchor, START)
            sync_folder(self.anchor.parent)
            genesis = {"package": "metalearn", "version": __version__, "format": FORMAT, "keyed": self._key is not None}
            self._write(file, RecordKind.GENESIS, genesis, unfinished)
            sync_folder(self.path.parent)
        if unfinished:
            replaced = 0 if head == START else unfinished
            self._write(file, RecordKind.REPAIR, {"dropped_bytes": unfinished}, replaced)
        elif read_anchor(self.anchor) != self._head:
            commit(file.fileno(), self.anchor, self._head)
        self._seen = _identity(file)

    def _write(
        self, file: FileIO, kind: RecordKind, content: Mapping[str, Any], unfinished: int = 0, *, wait: bool = True
    ) -> None:
        """Adds a record, in the place of an unfinished line if there is one, and moves the anchor to it."""
        line, head = self._seal(kind, content)
        if unfinished:
            replace_unfinished(self.path, unfinished, line)
        else:
            write_all(file, line)
        self._head, self._seen = head, _identity(file)
        if wait:
            commit(file.fileno(), self.anchor, head)
        else:
            self._behind = os.getpid(), commit_behind(file, self.anchor, head)

    def _seal(self, kind: RecordKind, content: Mapping[str, Any]) -> tuple[bytes, Head]:
        return seal(
            kind,
            content,
            head=self._head,
            time=datetime.now(UTC),
            salt=os.urandom(SALT_BYTES),
            name=self._name,
            tenant="" if kind in OWN_KINDS else self._tenant,
            key=self._key,
        )


def verify(path: str | Path, *, key: bytes | None = None, anchor: str | Path | None = None) -> Verification:
    """Verifies a log against its hashes and its anchor; it may be written meanwhile.

    Args:
      path: the log.
      key: its key, if it has one.
      anchor: file that holds the head; by default the log's path with `.head` added. An older copy will do: what is
        newer than it is verified all the same, but could have been cut.

    Returns:
      What it holds.

    Raises:
      InvalidArgumentError: there is no such log, or the key cannot be one.
      AuditError: the log is altered or cut, or has no anchor; `line` is the first line at which that shows.
    """
    path = Path(path)
    place = anchor_path(path, anchor)
    head = read_anchor(place)  # before the log: one that grows meanwhile is ahead of it, never behind
    with _readable(path, deleted=head is not None) as file:
        if head is None:
            raise missing_anchor(path, place)
        return verify_lines(read_lines(file), anchor=head, key=check_key(key), source=str(path))


def erase(
    path: str | Path,
    *,
    tenant: str | None = None,
    before: datetime | None = None,
    key: bytes | None = None,
    anchor: str | Path | None = None,
) -> int:
    """Drops content and salt of a tenant's records, or of old ones; the chain stays whole.

    The log is verified, written anew without them, with an `erasure` record that lists their sequence numbers at its
    end, and put in the old one's place: a kill leaves the one or the other. Header fields stay (time, kind, run,
    tenant). Gone are the bytes in this file, not those in backups or in freed blocks of the disk.

    Args:
      path: the log.
      tenant: whose records; None for everybody's, "" for those without a tenant.
      before: only records written before this time, with its zone; None for all.
      key: the log's key, if it has one.
      anchor: file that holds the head; by default the log's path with `.head` added.

    Returns:
      How many records lost their content.

    Raises:
      InvalidArgumentError: there is no such log, or neither `tenant` nor `before` is given.
      AuditError: the log is altered or cut, and was left as it is.
    """
    _readable(Path(path)).close()
    return AuditLog(path, key=key, anchor=anchor).erase(tenant=tenant, before=before)


def read_records(path: str | Path) -> Iterator[Record]:
    """Yields a log's records in order, without a look at their hashes (`verify` does that).

    A last line without an end, which somebody may be writing, is left out.

    Raises:
      InvalidArgumentError: there is no such log.
      AuditError: a line is not a record, or not that line's; the message gives its number.
    """
    with _readable(Path(path)) as file:
        for number, line in enumerate(read_lines(file), 1):
            if line.endswith(b"\n") or len(line) > MAX_LINE_BYTES:
                yield read_record(line, number, str(path))


def read_decisions(path: str | Path) -> list[dict[str, Any]]:
    """Reads the decisions of a log that still have their content: what was recorded, and `name` and `time` of it.

    Raises:
      InvalidArgumentError: there is no such log.
      AuditError: a line is not a record; the message gives its number.
    """
    return [
        {**record.content, "name": record.name, "time": record.time}
        for record in read_records(path)
        if record.kind == RecordKind.DECISION and record.content is not None
    ]


def read_key(path: str | Path) -> bytes:
    """Reads a key from a file; space around it, such as the line end that editors add, does not count.

    Raises:
      InvalidArgumentError: it cannot be read, or is too short.
    """
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise InvalidArgumentError(f"cannot read the key file: {error}; pass a file that holds it") from error
    if len(key) < MIN_KEY_BYTES:
        raise InvalidArgumentError(f"{path} holds {len(key)} bytes, a key has at least {MIN_KEY_BYTES}")
    return key


def _readable(path: Path, *, deleted: bool = False) -> FileIO:
    try:
        return FileIO(path, "r")
    except FileNotFoundError as error:
        if deleted:
            raise fault(str(path), 1, "is missing: there is an anchor, but no log; it was deleted") from error
        raise InvalidArgumentError(f"there is no audit log {path}; pass the path of one") from error
    except OSError as error:
        raise InvalidArgumentError(f"cannot read the audit log {path}: {error}; pass the path of a file") from error


def _identity(file: FileIO) -> tuple[int, ...]:
    """Returns what changes when anybody else has written or replaced the file."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _plain(value: Any) -> Any:
    """Makes a value strict JSON: not-finite floats become null, NumPy scalars and arrays plain ones."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
