"""Measures an audit log: how fast it is written and verified, and what share of tampering is detected.

    python scripts/bench_audit.py           # a million records, about 3 minutes and 1.5 GB of temporary disk
    python scripts/bench_audit.py --quick   # 20 000 records, under a minute

Records are decisions of two parameter groups with three sentences of reasons each, 1.2 kB a line. The log that is
verified is sealed in memory and written at once, because a record at a time waits for the disk; `append` is measured
apart, on the disk that holds the temporary files, flush to the disk included. Everything is done without and with a
key. Verification is timed by the clock, and by the processor, which what else the machine does slows less.

Tampering is applied to a short log, thousands of times at seeded places: a byte edited, two lines exchanged, a line
copied to another place, a forged record inserted, a line deleted, the tail cut off. The anchor is out of reach, as it
is meant to be.

The last line is JSON. Targets: `verify_seconds` below 30 for a million records on one core, with and without a key;
`tampering_detected` 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metalearn.audit import AuditLog, verify
from metalearn.audit.chain import verify_lines
from metalearn.audit.record import START, Head, format_anchor, seal, split_line
from metalearn.errors import AuditError
from provenance import provenance

SEED = 0
KEY = bytes(range(32))
KEYS = {"": None, "_keyed": KEY}
NOW = datetime(2026, 1, 31, tzinfo=UTC)
TAMPERED_RECORDS = 30
REASONS = (
    "learning_rate[0] fell by 3.2 %, learning_rate[1] by 1.1 %: validation rose by 0.4 % in the last interval",
    "limited beta1[1]: largest step of one decision",
    "of the change of the learning rate, 0.41 is from the loss's slope and 0.22 from the share of the budget used",
)


def decision(index: int, rng: random.Random) -> dict[str, Any]:
    """Returns what a decision's record holds."""
    names = ("learning_rate", "weight_decay", "beta1")
    return {
        "index": index,
        "step": 50 * index,
        "status": "applied",
        "groups": [{name: rng.random() for name in names} for _ in range(2)],
        "run": {"dropout": rng.random()},
        "schedule": rng.random(),
        "confidence": 1.0,
        "improvement": {name: rng.random() for name in ("expected", "low", "high", "probability")},
        "reasons": REASONS,
        "validation": rng.random(),
        "seconds": rng.random(),
    }


def write_log(path: Path, records: int, key: bytes | None) -> Head:
    """Writes a log and its anchor at once; returns the head."""
    rng, head = random.Random(SEED), START
    genesis = {"package": "metalearn", "version": "bench", "format": 1, "keyed": key is not None}
    with path.open("wb") as file:
        for index in range(records):
            kind, content = ("decision", decision(index, rng)) if index else ("genesis", genesis)
            line, head = seal(kind, content, head=head, time=NOW, salt=rng.randbytes(16), name="bench", key=key)
            file.write(line)
    path.with_name(path.name + ".head").write_bytes(format_anchor(head))
    return head


def measure_verification(folder: Path, records: int, key: bytes | None) -> dict[str, float]:
    """Writes and verifies a log; returns wall-clock and processor seconds, and the size of the file."""
    path = folder / "verified.jsonl"
    write_log(path, records, key)
    began, worked = time.perf_counter(), time.process_time()
    found = verify(path, key=key)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    assert found.records == records
    megabytes = path.stat().st_size / 1e6
    path.unlink()
    return {"verify_seconds": seconds, "verify_cpu_seconds": cpu_seconds, "megabytes": megabytes}


def measure_appends(folder: Path, records: int, key: bytes | None) -> float:
    """Returns appends a second, each on the disk before the next."""
    log = AuditLog(folder / f"appended-{key is not None}.jsonl", name="bench", key=key)
    contents = [decision(index, random.Random(SEED)) for index in range(records)]
    began = time.perf_counter()
    for content in contents:
        log.append("decision", content)
    return records / (time.perf_counter() - began)


def edit(lines: list[bytes], rng: random.Random) -> bytes:
    content = bytearray(b"".join(lines))
    content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    return bytes(content)


def exchange(lines: list[bytes], rng: random.Random) -> bytes:
    first, second = rng.sample(range(len(lines)), 2)
    lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


def insert_copy(lines: list[bytes], rng: random.Random) -> bytes:
    return b"".join([*lines[: (place := rng.randrange(len(lines) + 1))], rng.choice(lines), *lines[place:]])


def insert_forgery(lines: list[bytes], rng: random.Random) -> bytes:
    """Inserts a record sealed without the key that follows the one before it; at the end it would be an append."""
    place = rng.randrange(1, len(lines))
    head = Head(place - 1, split_line(lines[place - 1], place).hash.decode())
    forged, _ = seal("decision", decision(place, rng), head=head, time=NOW, salt=rng.randbytes(16), name="bench")
    return b"".join([*lines[:place], forged, *lines[place:]])


def delete(lines: list[bytes], rng: random.Random) -> bytes:
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def cut_tail(lines: list[bytes], rng: random.Random) -> bytes:
    content = b"".join(lines)
    return content[: rng.randrange(len(content))]


TAMPERINGS: tuple[Callable[[list[bytes], random.Random], bytes], ...] = (
    edit,
    exchange,
    insert_copy,
    insert_forgery,
    delete,
    cut_tail,
)


def measure_detection(folder: Path, places: int, key: bytes | None) -> dict[str, int]:
    """Returns how often each tampering is detected, of `places` times."""
    path = folder / "tampered.jsonl"
    head = write_log(path, TAMPERED_RECORDS, key)
    lines = path.read_bytes().splitlines(keepends=True)
    detected = {}
    for tampering in TAMPERINGS:
        count = 0
        for seed in range(places):
            try:
                verify_lines(BytesIO(tampering(list(lines), random.Random(seed))), anchor=head, key=key)
            except AuditError:
                count += 1
        detected[tampering.__name__] = count
    return detected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 000 records")
    parser.add_argument("--folder", type=Path, help="where the temporary files lie; default: the system's folder")
    parser.add_argument("--output", type=Path, help="a JSON file for all figures and where they are from")
    arguments = parser.parse_args()
    records, appends, places = (20_000, 300, 200) if arguments.quick else (1_000_000, 3000, 2000)

    figures: dict[str, float] = {"records": records}
    detected: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-audit-", dir=arguments.folder) as folder:
        for suffix, key in KEYS.items():
            run = measure_verification(Path(folder), records, key)
            run["appends_per_second"] = measure_appends(Path(folder), appends, key)
            detected[suffix] = measure_detection(Path(folder), places, key)
            print(
                f"{'keyed' if key else 'no key'}: {records:,} records ({run['megabytes']:.0f} MB) verified in "
                f"{run['verify_seconds']:.2f} s, {run['verify_cpu_seconds']:.2f} s of processor time; "
                f"{run['appends_per_second']:.0f} appends a second; of {places} tamperings each, detected: "
                + ", ".join(f"{name} {count}" for name, count in detected[suffix].items()),
                flush=True,
            )
            figures |= {f"{name}{suffix}": value for name, value in run.items()}
    attempts = places * len(TAMPERINGS) * len(KEYS)
    figures["tampering_detected"] = sum(sum(counts.values()) for counts in detected.values()) / attempts
    figures = {name: round(value, 4) for name, value in figures.items()}
    if arguments.output is not None:
        record = {**figures, "detected": detected, "provenance": provenance(seed=SEED)}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
