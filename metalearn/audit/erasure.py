"""Which records an erasure takes, and the log without their content. Pure functions over lines."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence

from metalearn.audit.record import OWN_KINDS, split_line, without_content


def erasable(lines: Iterable[bytes], *, tenant: str | None, before: str | None) -> list[int]:
    """Returns the sequence numbers of records that still have their content and are meant, ascending.

    Args:
      lines: of a whole, verified log.
      tenant: whose records; None for everybody's.
      before: only those written before this time, as records write it; None for all.
    """
    limit = None if before is None else before.encode()
    own = {kind.encode() for kind in OWN_KINDS}
    chosen = []
    for sequence, line in enumerate(lines):
        fields = split_line(line, sequence + 1)
        if fields.content is None or fields.kind in own or (limit is not None and fields.time >= limit):
            continue
        if tenant is None or json.loads(fields.tenant) == tenant:
            chosen.append(sequence)
    return chosen


def without(lines: Iterable[bytes], sequences: Collection[int]) -> Iterator[bytes]:
    """Yields the lines, those of `sequences` without content and salt."""
    chosen = set(sequences)
    for sequence, line in enumerate(lines):
        yield without_content(split_line(line, sequence + 1)) if sequence in chosen else line


def as_ranges(sequences: Sequence[int]) -> list[list[int]]:
    """Writes ascending numbers as [first, last] pairs.

    Example:
      >>> as_ranges([1, 2, 3, 7])
      [[1, 3], [7, 7]]
    """
    ranges: list[list[int]] = []
    for number in sequences:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges
