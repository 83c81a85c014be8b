r"""The audit chain: the format of a record, how records are linked, and how a log is verified. Pure functions.

A log is JSON Lines in ASCII, one record a line, every line of exactly this form:

    {"v":1,"seq":7,"time":"2026-01-31T09:30:00.000000Z","kind":"decision","name":"run","tenant":"","digest":"<64 hex>",
    "prev":"<64 hex>","hash":"<64 hex>","salt":"<32 hex>","content":{...}}

- `digest` hashes the bytes from the salt's first digit to the content's last brace: `<salt>","content":{...}`.
- `hash` hashes the bytes from the line's start to the quote that ends `prev`: every header field and the digest.
- `prev` is the `hash` of the record before; 64 zeros in the first.
- Hashes are SHA-256, with a key HMAC-SHA-256. Bytes are hashed as they lie in the file: nothing is serialised again.

The chain covers the digest of the content, not the content, so that erasing content leaves the chain whole: an erased
record ends after its `hash`. The random salt keeps the content of an erased record from being found by trying what it
may have been. What an `erasure` record does not list must have its content, and what it lists must not.

Sequence numbers count from 0 without gaps, so record n is line n + 1. Record 0 is the genesis: package version, format,
and whether the log is keyed.

The anchor is the head of the chain (sequence number and hash of the last record), kept outside the log: an edited,
inserted, deleted or moved record breaks the chain, but a cut tail does not; only an anchor tells.

What this protects against:

- Without a key: accidents, and whoever can write the log but not the anchor: up to the anchor nothing can be changed
  unseen. Anybody who can write the log can append to it, even an erasure, and drop the content that it lists. Whoever
  can write both can rewrite history: put the anchor, or copies of it, where the training job's user cannot write, or
  use a key.
- With a key: whoever does not have it can neither change nor append nor erase. If they can write both files, they can
  still cut off the tail and move the anchor back, or put back older copies. The key is symmetric: whoever can verify
  can also forge.
- Never: a false record by the process that writes the log, the deletion of log and anchor together, the cutting off of
  records newer than the anchor, and copies (backups, freed blocks of the disk) of content that was erased.

Header fields outlive erasure. Run names and tenants are for codes, not for names of people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from metalearn.audit.record import (
    FORMAT,
    MAX_LINE_BYTES,
    START,
    Fields,
    Head,
    RecordKind,
    digest,
    fault,
    misplaced,
    read_record,
    split_line,
)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a whole log turned out to hold; a log that is not whole raises instead.

    Args:
      records: in the log, genesis included.
      head: of the chain.
      keyed: whether its hashes need a key.
      erased: records whose content was erased, as erasure records say.
      ahead: records newer than the anchor. The process was killed between writing a record and moving the anchor, or
        the anchor is an older copy, or somebody has written meanwhile.
      unfinished_bytes: of a last line without an end. The process was killed while writing it, or is at it; the next
        writer drops it, and says so in a `repair` record.
    """

    records: int
    head: Head
    keyed: bool
    erased: int = 0
    ahead: int = 0
    unfinished_bytes: int = 0


def check_genesis(line: bytes, *, key: bytes | None, source: str = "log") -> None:
    """Checks that a log begins as one should, and is keyed if and only if there is a key.

    Raises:
      AuditError: it does not.
    """
    record = read_record(line, 1, source)
    if record.kind != RecordKind.GENESIS or record.content is None or record.content.get("format") != FORMAT:
        raise fault(source, 1, "is not the genesis record that every log begins with")
    keyed = record.content.get("keyed")
    if keyed is not (key is not None):
        raise fault(
            source,
            1,
            "says that the log is keyed; pass its key"
            if keyed
            else "says that the log has no key, but one was passed: pass none, or somebody has rewritten the log",
        )


def follow(line: bytes, head: Head, *, key: bytes | None, source: str = "log") -> tuple[Head, Fields]:
    """Checks that a line is whole and follows `head`.

    Returns:
      The new head, and the line's parts.

    Raises:
      AuditError: it does not follow, or a byte of it was altered.
    """
    number = head.sequence + 2
    fields = split_line(line, number, source)
    sequence = int(fields.sequence)
    if sequence != head.sequence + 1:
        raise fault(source, number, misplaced(sequence, number))
    if fields.previous.decode() != head.hash:
        raise fault(source, number, "does not follow the line before: one of the two was replaced")
    own = fields.hash.decode()
    if digest(fields.header, key) != own:
        raise fault(source, number, "does not match its hash: it was altered, or the key is another")
    if fields.body is not None and digest(fields.body, key) != fields.digest.decode():
        raise fault(source, number, "has content that does not match its digest: it was altered")
    return Head(sequence, own), fields


def verify_lines(
    lines: Iterable[bytes], *, anchor: Head, key: bytes | None = None, source: str = "log"
) -> Verification:
    """Verifies a whole log, in one pass.

    Args:
      lines: with their ends, none longer than `MAX_LINE_BYTES` + 1; a last one without an end is unfinished.
      anchor: the head that was kept outside the log.
      key: the log's key, None if it has none.
      source: what messages call the log.

    Raises:
      AuditError: the log is not what was written; the message names the first line at which that shows.
    """
    head, unfinished, erased = START, 0, 0
    missing: set[int] = set()
    for line in lines:
        if not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
            unfinished = len(line)
            break
        if head == START:
            check_genesis(line, key=key, source=source)
        head, fields = follow(line, head, key=key, source=source)
        if head.sequence == anchor.sequence and head != anchor:
            raise fault(source, head.sequence + 1, "is not the record that the anchor names: the log was rewritten")
        if fields.content is None:
            missing.add(head.sequence)
        elif fields.kind == b"erasure":
            listed = _erased(fields.content, head.sequence, source)
            if not listed <= missing:
                number = min(listed - missing) + 1
                raise fault(source, number, f"has content that line {head.sequence + 1} says was erased")
            missing -= listed
            erased += len(listed)
    if head.sequence < anchor.sequence:
        raise fault(
            source, head.sequence + 2, f"is missing: the anchor has {anchor.sequence + 1} records; the tail was cut off"
        )
    if missing:
        raise fault(source, min(missing) + 1, "has no content, and no erasure record says why")
    return Verification(
        records=head.sequence + 1,
        head=head,
        keyed=key is not None,
        erased=erased,
        ahead=head.sequence - anchor.sequence,
        unfinished_bytes=unfinished,
    )


def _erased(content: bytes, sequence: int, source: str) -> set[int]:
    """Returns the sequence numbers that an erasure record lists, as ascending [first, last] pairs before its own."""
    erased: set[int] = set()
    end = -1
    try:
        for first, last in json.loads(content)["erased"]:
            if not (type(first) is type(last) is int and end < first <= last < sequence):
                raise ValueError(f"[{first!r}, {last!r}] is out of order")
            erased.update(range(first, last + 1))
            end = last
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise fault(source, sequence + 1, f"is not an erasure record: {error}") from error
    return erased
