"""Runs the benchmark: ways to set hyperparameters, on many domains, model families and tuning budgets.

    python scripts/benchmark.py --quick                                        # a smoke check, under a minute
    python scripts/benchmark.py --data DIR --methods sampled default controller
    python scripts/benchmark.py --summary                                      # only the figures of what is recorded

DIR holds one parquet or CSV file a domain and a MANIFEST.json; those of role "validation" are taken, beside the bundled
domain and each `--domain FILE`. What is recorded is not run again, so a killed run goes on where it was. Everything for
five domains and five families takes days on 2 cores; figures are written at the end of every run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import polars
from tqdm.auto import tqdm

from envs.benchmark.methods import Controllers
from envs.benchmark.plan import METHODS, Size, Unit, chosen_elsewhere, make_plan, rerun, run_unit
from envs.benchmark.store import TrialStore
from envs.benchmark.tasks import BUDGETS, Domains, Task, find_sources, make_tasks
from envs.public import PublicSource
from envs.recommenders import RECOMMENDERS
from envs.simulated import SimulatedPrior, simulate
from metalearn.errors import MetalearnError
from provenance import provenance
from workers import make_pool

CACHE = Path("runs/benchmark/domains")
"""Where prepared domains are kept."""


class Worker:
    """What a worker process keeps: open domains, controllers, the store."""

    domains: Domains
    controllers: Controllers
    store: TrialStore

    @classmethod
    def start(cls, sources: dict[str, PublicSource], checkpoint: Path | None, store: Path, cache: Path) -> None:
        """Prepares the process."""
        cls.domains, cls.controllers, cls.store = Domains(sources, cache), Controllers(checkpoint), TrialStore(store)

    @classmethod
    def run(cls, unit: Unit) -> None:
        """Runs a unit."""
        run_unit(unit, cls.domains, cls.controllers, cls.store)


def run_units(units: Sequence[Unit], workers: int, start: tuple) -> int:
    """Runs units in worker processes; returns how many failed, each with its traceback on stderr."""
    failed = 0
    with (
        make_pool(workers, Worker.start, *start) as pool,
        tqdm(total=sum(len(unit.identities) for unit in units), unit="trial", smoothing=0.02) as bar,
    ):
        futures = {pool.submit(Worker.run, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                unit = futures[future]
                bar.update(len(unit.identities))
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise SystemExit("error: a worker process died, out of memory perhaps; run this again to go on")
                if error is not None:
                    failed += 1
                    bar.write(f"failed: {unit.identities[0]}", file=sys.stderr)
                    traceback.print_exception(error)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return failed


def quick_task(folder: Path) -> tuple[dict[str, PublicSource], list[Task]]:
    """Writes a small simulated domain as a file, and returns it with a task on it."""
    interactions = simulate(SimulatedPrior(users=(300, 300), items=(200, 200), history=(20.0, 20.0)), seed=0)
    columns = {"user_id": interactions.user, "item_id": interactions.item}
    if interactions.timestamp is not None:
        columns["timestamp"] = interactions.timestamp
    polars.DataFrame(columns).write_parquet(folder / "simulated.parquet")
    sources = find_sources(files=[folder / "simulated.parquet"])
    settings = replace(BUDGETS["matrix_factorization"], steps=80, batch_size=64, dim=8)
    return sources, [Task(domain="simulated", family="matrix_factorization", settings=settings)]


def parse_key(text: str) -> tuple[int, int]:
    """Reads "REPLICATE:INDEX"."""
    replicate, index = text.split(":")
    return int(replicate), int(index)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of domains; those of role validation are taken")
    parser.add_argument("--domain", type=Path, action="append", default=[], help="one more domain, may be repeated")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of all these domains only some, by name")
    parser.add_argument("--models", nargs="+", choices=list(RECOMMENDERS), default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--replicates", type=int, default=Size.replicates, help="of every search")
    parser.add_argument("--trials", type=int, default=Size.trials, help="configurations of a search, at most 64")
    parser.add_argument("--seeds", type=int, default=Size.seeds, help="of every method that is one run")
    parser.add_argument(
        "--rerun",
        nargs="*",
        type=parse_key,
        metavar="REPLICATE:INDEX",
        help="run only these sampled configurations, with every seed; by default those that do best on other domains",
    )
    parser.add_argument("--checkpoint", type=Path, help="a controller instead of the one that ships")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=Path("docs/results/benchmark"))
    parser.add_argument("--summary", action="store_true", help="run nothing, only print what is recorded")
    parser.add_argument("--quick", action="store_true", help="a smoke check on a small simulated domain")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    """Runs what is missing; returns how many units failed."""
    size = Size(replicates=arguments.replicates, trials=arguments.trials, seeds=arguments.seeds)
    if arguments.quick:
        size = Size(replicates=2, trials=4, seeds=2)
        sources, tasks = quick_task(arguments.output)
        cache = arguments.output / "domains"
    else:
        sources = find_sources(arguments.data, arguments.domain)
        missing = sorted(set(arguments.only or ()) - set(sources))
        if missing:
            raise SystemExit(f"error: `--only` must be of {sorted(sources)}, got {missing}")
        tasks = make_tasks(arguments.only or sources, arguments.models)
        cache = CACHE
    controllers = Controllers(arguments.checkpoint)
    store = TrialStore(arguments.output / "trials.jsonl")
    recorded = store.read()
    if arguments.rerun is None:
        plan = make_plan(tasks, arguments.methods, size, controllers)
    elif arguments.rerun:
        plan = rerun(tasks, {task.name: arguments.rerun for task in tasks}, size.seeds)
    else:
        plan = rerun(tasks, chosen_elsewhere(tasks, recorded.values()), size.seeds)
    units = [unit for unit in plan if not unit.is_recorded(recorded)]
    print(
        f"{len(tasks)} tasks, {len(plan)} units of trials, {len(units)} not recorded yet; {arguments.workers} workers"
    )
    if not units:
        return 0
    domains = Domains(sources, cache)
    for name in dict.fromkeys(unit.task.domain for unit in units):  # prepared here once, the workers find them
        domain = domains[name]
        print(f"{name}: {domain.num_users} users, {domain.num_items} items, {len(domain.train)} training interactions")
    return run_units(units, arguments.workers, (sources, arguments.checkpoint, store.path, cache))


def main() -> None:
    arguments = parse()
    if arguments.quick:
        arguments.output = Path(tempfile.mkdtemp(prefix="benchmark-"))
    failed = 0 if arguments.summary else run(arguments)

    # The figures, of all that is recorded.
    from envs.benchmark import report, tables

    trials = TrialStore(arguments.output / "trials.jsonl").read().values()
    found = provenance(trials=len(trials))
    if arguments.summary:
        summary = report.summary(trials)
        print(tables.markdown({"provenance": found, **summary}))
    else:
        summary = report.write_report(trials, arguments.output, found)
        print(f"the trials, and figures of all of them, are in {arguments.output}/")
    print(json.dumps({**summary["overall"], **{key: summary[key] for key in ("families", "domains", "variants")}}))
    if failed:
        raise SystemExit(f"error: {failed} units failed; what they lack is run when this is run again")


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
