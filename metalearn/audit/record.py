"""The format of an audit record and of an anchor; `metalearn.audit.chain` says what the parts are for."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

from metalearn.errors import AuditError, InvalidArgumentError

FORMAT = 1
MAX_LINE_BYTES = 2**24
"""Of a record, with its line end; what is longer is not a record."""
MIN_KEY_BYTES = 16
SALT_BYTES = 16


class RecordKind(StrEnum):
    """What a record is about."""

    GENESIS = "genesis"
    """the first of a log, written by it: package version, format, whether keyed"""
    PROFILE = "profile"
    """what a domain looked like: meta-features, counts and fingerprint, never its rows"""
    PROPOSAL = "proposal"
    """what a policy or a search wanted, before any rule saw it"""
    DECISION = "decision"
    """what is in force from a step on, and why"""
    VERDICT = "verdict"
    """what the guard made of a proposal, where that is not in the decision"""
    ROLLBACK = "rollback"
    """a return to a snapshot, its trigger and what was barred"""
    DRIFT = "drift"
    """an alarm, and the response to it"""
    OVERRIDE = "override"
    """what a person, a script or a constraint set instead of the controller, or gave back"""
    OUTCOME = "outcome"
    """how a run or a trial ended: metrics, cost, failure"""
    ERASURE = "erasure"
    """sequence numbers whose content was dropped; written by `erase`"""
    REPAIR = "repair"
    """an unfinished last line was dropped; written by the log when it is opened after a kill"""
    NOTE = "note"
    """anything else that a reader should know"""


OWN_KINDS = frozenset({RecordKind.GENESIS, RecordKind.ERASURE, RecordKind.REPAIR})
"""Written by the log itself, and never erased: verification relies on them."""


class Head(NamedTuple):
    """Where a chain ends: the last record's sequence number, -1 before the first, and its hash."""

    sequence: int
    hash: str


START = Head(-1, "0" * 64)


class Fields(NamedTuple):
    """The bytes of one line, by part; `header` and `body` are what is hashed, `body` is None once erased."""

    header: bytes
    sequence: bytes
    time: bytes
    kind: bytes
    name: bytes
    tenant: bytes
    digest: bytes
    previous: bytes
    hash: bytes
    body: bytes | None
    content: bytes | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record, decoded.

    Args:
      sequence: 0, 1, 2, ... within the log; its line is one more.
      time: when it was written, UTC.
      kind: a `RecordKind`, as text: a later version may know more of them.
      name: of the run.
      tenant: whose record it is; empty if the log has no tenants.
      hash: of the record, 64 hexadecimal digits.
      content: None once erased.
    """

    sequence: int
    time: datetime
    kind: str
    name: str
    tenant: str
    hash: str
    content: Mapping[str, Any] | None


_TEXT = rb'"[ !#-\[\]-~]*(?:\\(?:["\\/bfnrt]|u[0-9a-f]{4})[ !#-\[\]-~]*)*"'
_LINE = re.compile(
    rb'(\{"v":1,"seq":(0|[1-9][0-9]{0,17}),"time":"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z)",'
    rb'"kind":"([a-z_]{1,32})","name":(' + _TEXT + rb'),"tenant":(' + _TEXT + rb'),"digest":"([0-9a-f]{64})",'
    rb'"prev":"([0-9a-f]{64})"),"hash":"([0-9a-f]{64})"(?:,"salt":"([0-9a-f]{32}","content":(\{.*\})))?\}\n'
)
_VERSION = re.compile(rb'\{"v":([0-9]{1,18}),')
_ANCHOR = re.compile(rb'(\{"v":1,"seq": *(-1|0|[1-9][0-9]{0,17}),"hash":"([0-9a-f]{64})"),"check":"([0-9a-f]{16})"\}\n')


def seal(
    kind: str,
    content: Mapping[str, Any],
    *,
    head: Head,
    time: datetime,
    salt: bytes,
    name: str = "",
    tenant: str = "",
    key: bytes | None = None,
) -> tuple[bytes, Head]:
    """Writes the record that follows `head`.

    Args:
      kind: a `RecordKind`.
      content: JSON-ready, all of it finite.
      head: of the chain so far, `START` for none.
      time: with its zone.
      salt: `SALT_BYTES` random bytes.
      name: of the run.
      tenant: whose record it is.
      key: for HMAC; None for plain SHA-256.

    Returns:
      The line, and the new head.

    Raises:
      InvalidArgumentError: the content is not JSON-ready, or too long for a record.

    Example:
      >>> now, salt = datetime(2026, 1, 31, tzinfo=UTC), bytes(16)
      >>> line, head = seal("note", {"text": "hello"}, head=START, time=now, salt=salt)
      >>> head.sequence, read_record(line, 1).content
      (0, {'text': 'hello'})
    """
    try:
        text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"`content` is not JSON: {error}; pass numbers, text, lists and dicts") from error
    body = f'{salt.hex()}","content":{text}'.encode("ascii")
    header = (
        f'{{"v":{FORMAT},"seq":{head.sequence + 1},"time":"{format_time(time)}","kind":"{kind}",'
        f'"name":{json.dumps(name)},"tenant":{json.dumps(tenant)},'
        f'"digest":"{digest(body, key)}","prev":"{head.hash}"'
    ).encode("ascii")
    own = digest(header, key)
    line = b'%b,"hash":"%b","salt":"%b}\n' % (header, own.encode("ascii"), body)
    if len(line) > MAX_LINE_BYTES:
        raise InvalidArgumentError(
            f"`content` makes a record of {len(line)} bytes, {MAX_LINE_BYTES} is the most; keep it in a file of its "
            "own, and its digest in the record"
        )
    return line, Head(head.sequence + 1, own)


def format_time(time: datetime) -> str:
    """Writes a time as records do: UTC, microseconds, so that the order of texts is the order of times.

    Raises:
      InvalidArgumentError: it is outside the years 1 to 9999.
    """
    try:
        return time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    except OverflowError as error:
        raise InvalidArgumentError(f"`time` must be in the years 1 to 9999 UTC, got {time}") from error


def format_anchor(head: Head) -> bytes:
    """Writes a head as one line of an anchor: always of the same length, with a check against a torn write."""
    text = f'{{"v":{FORMAT},"seq":{head.sequence:>20},"hash":"{head.hash}"'.encode("ascii")
    return b'%b,"check":"%b"}\n' % (text, _check(text))


def parse_anchor(content: bytes, source: str = "anchor") -> Head | None:
    """Reads the newest head of an anchor's lines; None if there is none yet, because its making was cut short.

    Raises:
      AuditError: it is not an anchor.
    """
    matches = [match for match in _ANCHOR.finditer(content) if match[4] == _check(match[1])]
    if not matches and not format_anchor(START).startswith(content):
        raise AuditError(f"{source} is not the anchor of an audit log; it was altered, or another file is meant")
    return max((Head(int(match[2]), match[3].decode()) for match in matches), default=None)


def split_line(line: bytes, number: int, source: str = "log") -> Fields:
    """Takes a line apart, without a look at its hashes.

    Raises:
      AuditError: it has not the form of a record.
    """
    match = _LINE.fullmatch(line)
    if match is None or len(line) > MAX_LINE_BYTES:
        version = _VERSION.match(line)
        if version is not None and int(version[1]) != FORMAT:
            raise fault(source, number, f"has format {int(version[1])}, this metalearn reads {FORMAT}")
        raise fault(source, number, "is not an audit record: it was altered, or the file is something else")
    return Fields._make(match.groups())


def read_record(line: bytes, number: int, source: str = "log") -> Record:
    """Decodes a line, without a look at its hashes.

    Raises:
      AuditError: it is not a record, or not the one of that line.
    """
    fields = split_line(line, number, source)
    sequence = int(fields.sequence)
    if sequence != number - 1:
        raise fault(source, number, misplaced(sequence, number))
    try:
        time = datetime.fromisoformat(fields.time.decode())
        content = None if fields.content is None else json.loads(fields.content)
    except (ValueError, RecursionError) as error:
        raise fault(source, number, f"is not an audit record: {error}") from error
    return Record(
        sequence=sequence,
        time=time,
        kind=fields.kind.decode(),
        name=json.loads(fields.name),
        tenant=json.loads(fields.tenant),
        hash=fields.hash.decode(),
        content=content,
    )


def without_content(fields: Fields) -> bytes:
    """Returns the line of an erased record."""
    return b'%b,"hash":"%b"}\n' % (fields.header, fields.hash)


def fault(source: str, number: int, problem: str) -> AuditError:
    """Returns the error for a line."""
    error = AuditError(f"{source}:{number} {problem}")
    error.line = number
    return error


def check_key(key: bytes | None) -> bytes | None:
    """Returns the key if it can be one.

    Raises:
      InvalidArgumentError: it is not bytes, or too short to be secret.
    """
    if key is None or (isinstance(key, bytes) and len(key) >= MIN_KEY_BYTES):
        return key
    received = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
    raise InvalidArgumentError(
        f"`key` must be at least {MIN_KEY_BYTES} bytes, got {received}; make one with secrets.token_bytes(32)"
    )


def digest(data: bytes, key: bytes | None) -> str:
    """Returns the SHA-256 of bytes, with a key their HMAC-SHA-256, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest() if key is None else hmac.digest(key, data, "sha256").hex()


def misplaced(sequence: int, number: int) -> str:
    """Returns what is wrong with a line that holds another line's record."""
    return f"holds record {sequence} instead of {number - 1}: records were deleted, inserted or moved"


def _check(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode("ascii")
