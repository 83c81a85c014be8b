"""Measures how long a profile of a parquet file takes, and how much memory, at a million to a hundred million rows.

    python scripts/bench_profile.py           # about 3 minutes on 2 cores, 1.3 GB of temporary disk
    python scripts/bench_profile.py --quick   # 100 000 and a million rows, under a minute

Files are simulated: users and items are used by a power of their rank, 20 rows a user and 100 rows an item; times
ascend over three years, with more rows late than early. Each is profiled in a fresh process, with two Polars threads.
Wall-clock and processor seconds are those of `profile_domain` on the file, the import of Polars included; the peak is
the largest resident set of the process. Small sizes are profiled three times, and the fastest counts: what else the
machine does can only slow them.

The last line is JSON. Targets: 1 s at a million rows; 90 s and 4 GiB at a hundred million; time grows linearly: a slope
of about 1 at most, of its logarithm over that of the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import metalearn
from provenance import provenance

SIZES = {"100k": 10**5, "1m": 10**6, "10m": 10**7, "100m": 10**8}
REPEATS = {"100k": 3, "1m": 3, "10m": 1, "100m": 1}
ROW_GROUP = 1 << 20
SEED = 0


def write_rows(path: Path, num_rows: int) -> None:
    """Writes a parquet file of simulated interactions, one row group at a time."""
    import pyarrow
    import pyarrow.parquet

    fields = (("user_id", pyarrow.int32()), ("item_id", pyarrow.int32()), ("timestamp", pyarrow.int64()))
    schema = pyarrow.schema(fields)
    rng = np.random.default_rng(SEED)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, ROW_GROUP):
            size = min(ROW_GROUP, num_rows - first)
            user = (num_rows // 20 * rng.random(size) ** 2).astype(np.int32)
            item = (num_rows // 100 * rng.random(size) ** 3).astype(np.int32)
            moment = np.sort(((first + size * rng.random(size)) / num_rows) ** 0.7)
            timestamp = (1.5e9 + 1e8 * moment).astype(np.int64)
            writer.write_table(pyarrow.table([user, item, timestamp], schema=schema))


def profile(path: Path) -> dict[str, float]:
    """Profiles a file; for a process of its own, whose peak memory it reports."""
    began, worked = time.perf_counter(), time.process_time()
    result = metalearn.profile_domain(metalearn.Interactions.scan(path))
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - worked,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "users": result.num_users,
        "items": result.num_items,
        "sampled_fraction": result.sampled_fraction,
    }


def measure(name: str, folder: Path) -> dict[str, float]:
    """Writes a file, profiles it in fresh processes, removes it; returns the fastest run."""
    path = folder / f"{name}.parquet"
    write_rows(path, SIZES[name])
    runs = []
    for _ in range(REPEATS[name]):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            runs.append(process.submit(profile, path).result())
    megabytes = path.stat().st_size / 1e6
    path.unlink()
    return {"rows": SIZES[name], "file_mb": megabytes, **min(runs, key=lambda run: run["seconds"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 000 and a million rows only")
    parser.add_argument("--output", type=Path, help="a JSON file for all figures and where they are from")
    arguments = parser.parse_args()

    os.environ["POLARS_MAX_THREADS"] = "2"  # of the processes to come
    sizes = ["100k", "1m"] if arguments.quick else ["1m", "10m", "100m"]
    runs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-profile-") as folder:
        for name in sizes:
            run = runs[name] = measure(name, Path(folder))
            print(
                f"{run['rows']:>11,} rows ({run['file_mb']:.0f} MB): {run['seconds']:.2f} s, {run['cpu_seconds']:.2f} "
                f"s of processor time, {run['peak_gib']:.2f} GiB; {run['sampled_fraction']:.0%} of rows in the sample",
                flush=True,
            )
    rows, seconds, cpu = (np.log([run[key] for run in runs.values()]) for key in ("rows", "seconds", "cpu_seconds"))
    record = {
        f"{figure}_{name}": run[figure]
        for figure in ("seconds", "cpu_seconds", "peak_gib")
        for name, run in runs.items()
    }
    record |= {"slope": float(np.polyfit(rows, seconds, 1)[0]), "cpu_slope": float(np.polyfit(rows, cpu, 1)[0])}
    record = {name: round(value, 4) for name, value in record.items()}
    if arguments.output is not None:
        arguments.output.write_text(
            json.dumps({**record, "runs": runs, "provenance": provenance(seed=SEED)}, indent=1) + "\n"
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
