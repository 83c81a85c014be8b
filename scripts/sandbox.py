"""Replays incidents against guarded training runs, their unguarded twins, and the fallback configuration.

    python scripts/sandbox.py                             # 1000 episodes; half an hour on one core, and resumes
    python scripts/sandbox.py --quick                     # a few episodes, under a minute, nothing written
    python scripts/sandbox.py --incidents mix.json        # incidents of yours, see `envs.sandbox.read_mix`
    python scripts/sandbox.py --report                    # what is there so far, nothing run

An episode is one small PyTorch run (120 steps of 128, dimension 8, 20 decisions) on a simulated domain or on a slice of
the bundled one (`--data` adds slices of others), in which one incident happens, in a quarter of the episodes on top of
another. It is trained twice. Guarded: MetaScheduler with its guard, rollback and drift detection, snapshots each
interval or, in a quarter of the episodes, as often as is the default; in half of them the position in the data is
tracked; the loop catches errors for want of memory, saves its state at the end of each interval, and goes on if a
metric is refused by name. Unguarded: the same without rollback and drift detection, and where the incident is what is
proposed (hostile policies, 1000 × the learning rate), with that put into the optimizer as it is, bounds of the space
apart. The fallback is the configuration that a session falls back to: the controller's base and its schedule, held
throughout. Of the incidents it sees drift only: so both arms are held against fallback runs that nothing befell.

Worse than the fallback, by more than seed noise: the test NDCG@10 of the last weights (not of the best-validated ones)
lies below the lower prediction bound of one more fallback run, mean - t · s · √(1 + 1/n) over n = 16 fallback seeds of
the same domain, family, horizon and drift, with Student's t at a rate of 0.001; and that is not by chance: weights are
not finite, or the same episode with 15 other seeds ends below the fallback's seeds on average (Welch's t, one-sided, at
5 %) or is lost. A thousand episodes of a harmless run have one below the bound: `below_bound` counts those alone. The
rate that the bound really has is measured on the fallback's own seeds, each judged by the others, and what lies below
the bounds at 0.01 and 0.05 is reported beside it. Non-finite: a weight is not
finite at the end. Lost: the run raised, did not end within 8 times its steps, could not be resumed, or lost more work
at once than one interval, and the step that finds it (where snapshots are as often as is the default: than the 10
intervals that it says).

The last line is JSON: `episodes`, `worse_than_fallback`, `nonfinite`, `lost`, each but the first also `unguarded_`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm.auto import tqdm

import metalearn
from envs.sandbox import (
    Budget,
    Cell,
    Episode,
    Mix,
    Outcome,
    below_bound,
    draw_episodes,
    read_mix,
    real_cells,
    run_episode,
    run_fallback,
    run_killed,
    simulated_cells,
    summarize,
    table,
)
from metalearn.errors import MetalearnError
from provenance import provenance

FALLBACK_SEEDS = 16
REPEATS = 15
NAMES = ("worse_than_fallback", "nonfinite", "lost")


class Results:
    """Episodes and fallback runs, each kept in a file by line, so that a run that was cut off goes on.

    Args:
      folder: of the files; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.records: dict[str, dict[str, Any]] = {row["key"]: row for row in self._read("episodes.jsonl")}
        self.fallbacks: dict[str, dict[int, float]] = {}
        for row in self._read("fallback.jsonl"):
            self.fallbacks.setdefault(row["group"], {})[row["seed"]] = row["metric"]

    def add_record(self, record: dict[str, Any]) -> None:
        self.records[record["key"]] = record
        self._append("episodes.jsonl", record)

    def add_fallback(self, group: str, seed: int, metric: float) -> None:
        self.fallbacks.setdefault(group, {})[seed] = metric
        self._append("fallback.jsonl", {"group": group, "seed": seed, "metric": metric})

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = None if self._folder is None else self._folder / name
        if path is None or not path.exists():
            return []
        whole, _, cut = path.read_text().rpartition("\n")
        if cut:  # of the line at which an earlier run was killed
            path.write_text(whole + "\n" if whole else "")
        return [json.loads(line) for line in whole.splitlines()]

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / name).open("a") as file:
                file.write(json.dumps(row) + "\n")


@dataclass(frozen=True, kw_only=True)
class Staged:
    """An episode where it takes place, and the names under which it and its fallback runs are kept.

    They do not know the code: after changing it, start in another folder.
    """

    episode: Episode
    cell: Cell
    key: str
    group: str


def stage(episode: Episode, cells: Sequence[Cell], controller: metalearn.Controller) -> Staged:
    """Chooses an episode's cell."""
    cell, drift = cells[int(episode.draw * len(cells))], episode.find("drift")
    place = f"{cell.name}/{cell.budget.steps} steps/{controller.fingerprint[:8]}"
    group = place if drift is None else f"{place}/{drift.variant} drift"
    return Staged(episode=episode, cell=cell, key=f"{episode.key}/{place}", group=group)


def run_all(staged: Sequence[Staged], controller: metalearn.Controller, results: Results, seeds: int) -> None:
    """Runs every episode that is not there yet, in a random order, and the fallback runs it is held against."""
    profiles = list({id(one.cell.domain): one.cell.domain.profile for one in staged}.values())
    waiting = [one for one in staged if one.key not in results.records]
    for at in tqdm(np.random.default_rng(0).permutation(len(waiting)), desc="episodes", mininterval=5.0):
        one, episode = waiting[at], waiting[at].episode
        for seed in range(seeds):
            if seed not in results.fallbacks.get(one.group, {}):
                metric = run_fallback(one.cell, controller, seed, episode.find("drift"))
                results.add_fallback(one.group, seed, metric)
        record = {
            "key": one.key,
            "incident": episode.name,
            "variant": episode.incidents[0].variant,
            "fallback": one.group,
            "episode": asdict(episode),
        }
        for arm in ("guarded", "unguarded"):
            began = time.perf_counter()
            outcome = run_arm(episode, one.cell, controller, profiles, guarded=arm == "guarded")
            record[arm] = {**asdict(outcome), "lost": outcome.lost, "seconds": round(time.perf_counter() - began, 3)}
            if outcome.finite and below_bound(record[arm], list(results.fallbacks[one.group].values())):
                record[arm]["repeats"] = repeat(one, controller, profiles, guarded=arm == "guarded")
        results.add_record(record)


def repeat(
    one: Staged, controller: metalearn.Controller, profiles: Sequence[metalearn.DomainProfile], *, guarded: bool
) -> list[float | None]:
    """Returns the metrics of one arm of the same episode with other seeds; None where it was lost."""
    seeds = np.random.SeedSequence(one.episode.seed).generate_state(REPEATS)
    again = [replace(one.episode, seed=int(seed >> 1)) for seed in seeds]
    outcomes = [run_arm(episode, one.cell, controller, profiles, guarded=guarded) for episode in again]
    return [None if outcome.lost else outcome.metric for outcome in outcomes]


def run_arm(
    episode: Episode,
    cell: Cell,
    controller: metalearn.Controller,
    profiles: Sequence[metalearn.DomainProfile],
    *,
    guarded: bool,
) -> Outcome:
    """Runs one arm, in processes of its own if it is to be killed."""
    if episode.find("kill") is None:
        return run_episode(episode, cell, controller, guarded=guarded, others=profiles)
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        return run_killed(episode, cell, controller, guarded=guarded, others=profiles, folder=Path(folder))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few episodes, under a minute, nothing written")
    parser.add_argument("--incidents", type=Path, help="JSON file of incidents instead of the built-in mix")
    parser.add_argument("--seed", type=int, help="of the draw of episodes, instead of the mix's own")
    parser.add_argument("--episodes", type=int, help="about so many, in the proportions of the mix")
    parser.add_argument("--data", type=Path, help="a folder of further domains, see envs.public.load_folder")
    parser.add_argument("--domains", type=int, default=4, help="simulated ones, and slices of the bundled one")
    parser.add_argument("--controller", type=Path, help="a checkpoint instead of the one that ships")
    parser.add_argument("--runs", type=Path, default=Path("runs/sandbox"), help="where episodes are kept")
    parser.add_argument("--output", type=Path, help="a folder for summary.json and table.md, at the end")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    logging.getLogger("envs.public").setLevel(logging.ERROR)
    mix = Mix() if arguments.incidents is None else read_mix(arguments.incidents)
    if arguments.seed is not None:
        mix = replace(mix, seed=arguments.seed)
    budget, seeds, domains = Budget(), FALLBACK_SEEDS, arguments.domains
    if arguments.quick:
        mix, budget, seeds, domains = mix.scaled(1), Budget(steps=48, interval=4, batch_size=64), 4, 1
    elif arguments.episodes is not None:
        mix = mix.scaled(arguments.episodes)
    controller = metalearn.load_controller(arguments.controller)
    results = Results(None if arguments.quick else arguments.runs)
    cells = simulated_cells(domains, budget)
    cells = cells[:1] if arguments.quick else cells + real_cells(domains, budget, arguments.data)
    staged = [stage(episode, cells, controller) for episode in draw_episodes(mix)]
    if not arguments.report:
        run_all(staged, controller, results, seeds)
    records = [results.records[one.key] for one in staged if one.key in results.records]
    groups = {record["fallback"] for record in records}
    summary = summarize(records, {group: list(results.fallbacks[group].values()) for group in sorted(groups)})
    about = provenance(
        seed=mix.seed,
        fallback_seeds=seeds,
        budget=asdict(budget),
        controller=controller.fingerprint[:16],
        incidents="built-in" if arguments.incidents is None else arguments.incidents.name,
    )
    print(table(summary, about))
    if arguments.output is not None and not arguments.quick:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "summary.json").write_text(json.dumps({"provenance": about, **summary}, indent=1) + "\n")
        (arguments.output / "table.md").write_text(table(summary, about))
    total = summary["all"]
    figures = {"episodes": total["episodes"], **{name: total[name] for name in NAMES}}
    print(json.dumps(figures | {f"unguarded_{name}": total[f"unguarded_{name}"] for name in NAMES}))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
