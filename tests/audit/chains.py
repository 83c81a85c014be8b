"""Chains in memory, for tests that alter them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any

from metalearn.audit.chain import Verification, verify_lines
from metalearn.audit.record import START, Head, seal

KEY = bytes(range(32))
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def sealed(contents: list[tuple[str, dict[str, Any]]], *, key: bytes | None = None) -> tuple[list[bytes], Head]:
    """Returns the lines of a log, its genesis first, and its head."""
    genesis = {"package": "metalearn", "version": "0", "format": 1, "keyed": key is not None}
    lines, head = [], START
    for index, (kind, content) in enumerate([("genesis", genesis), *contents]):
        line, head = seal(
            kind,
            content,
            head=head,
            time=NOON + timedelta(seconds=index),
            salt=index.to_bytes(16, "big"),
            name="run",
            tenant=f"tenant-{index % 3}",
            key=key,
        )
        lines.append(line)
    return lines, head


def notes(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Returns content for records that differ."""
    return [("note", {"number": index, "text": "é" * (index % 5), "nested": [{"x": 0.5}]}) for index in range(count)]


def check(content: bytes, anchor: Head, key: bytes | None = None) -> Verification:
    """Verifies the bytes of a log."""
    return verify_lines(BytesIO(content), anchor=anchor, key=key)
