"""Measures by real PyTorch runs on whole domains for which families at rest a cue is worth having, and sets it.

    python scripts/choose_cue.py --data DIR --models self_attention --only retailrocket_caserec ta_feng
    python scripts/choose_cue.py --data DIR --models two_tower --moves weight_decay --output decay_cue.json
    python scripts/choose_cue.py --quick         # a smoke check on a simulated domain, under a minute

The learning rate of a family that goes by a cue rises while the validation metric does, its weight decay by how much of
what it learns is memorised (`metalearn.controller.cues`).
Each family is run from its base without and with it, averaged weights evaluated, on domains of DIR, by default those of
role "meta-training". Reported is the gain in log(NDCG@10 + 0.02) of all validation and of all test users, with 95 %
intervals of Student's t over domains, and on how many domains the cue acted at all: elsewhere both runs are one.

What `--output` already holds is not run again. With `--into`, a checkpoint gets the cue for those of the families whose
mean gain on validation users is above `LEAST_GAIN`, and loses it for the others of them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import stats
from tqdm.auto import tqdm

from envs.benchmark.methods import Controllers, start_run
from envs.benchmark.store import Identity
from envs.benchmark.tasks import Domains, Task, make_tasks
from envs.benchmark.trials import record
from envs.domains import Domain, make_domain
from envs.public import load_folder
from envs.recommenders.training import TrainingSettings
from envs.simulated import SimulatedPrior, simulate
from metalearn import load_controller
from metalearn.controller import ControllerConfig, load_checkpoint, save_checkpoint
from metalearn.controller.cues import ACTION, FIELDS, cues_of
from metalearn.controller.outcome import METRIC_OFFSET
from metalearn.errors import InvalidArgumentError, MetalearnError
from metalearn.meta_training.model_card import write_model_card
from metalearn.meta_training.release import check_at_rest, with_cues
from provenance import provenance
from workers import make_pool

CACHE = Path("runs/benchmark/domains")
LEAST_GAIN = 0.005
"""In log(NDCG@10 + 0.02). Where the cue does not act, and that is on most domains, the gain is 0."""
SPLITS = ("validation", "test")


class Run(NamedTuple):
    """NDCG@10 of one run."""

    validation: float
    test: float
    acted: int
    """decisions that moved the hyperparameter"""


def save_arms(folder: Path, families: Sequence[str], moves: str) -> dict[bool, Path]:
    """Writes the shipped controller without a cue, and with one for some families, which are at rest."""
    checkpoint = load_controller().checkpoint
    for other in FIELDS:
        checkpoint = with_cues(checkpoint, (), moves=other)
    return {
        cued: save_checkpoint(
            with_cues(checkpoint, families if cued else (), moves=moves), folder / f"{cued}.safetensors"
        )
        for cued in (False, True)
    }


def measure(task: Task, domain: Domain, controllers: Controllers, seed: int, moves: str) -> Run:
    """Trains once from the base."""
    run = start_run("controller", {}, task, domain, controllers, seed=seed)
    run.advance()
    trial = record(run, Identity(task.name, "controller", 0, 0, seed), {}, task, domain)
    found = {measurement.metric: measurement.value for measurement in trial.measurements}
    in_force = [decision.groups[0][moves] for decision in run.steering.decisions]  # type: ignore[attr-defined]
    acted = int(np.sum(np.diff(in_force) != 0.0))
    return Run(found[f"selection_ndcg@{task.settings.k}"], found[f"test_ndcg@{task.settings.k}"], acted)


def work(job: tuple[str, str, int, Path, Path, str]) -> Run:
    """Measures in a process of its own."""
    family, name, seed, data, checkpoint, moves = job
    (task,) = make_tasks([name], [family])
    return measure(task, Domains(load_folder(data), CACHE)[name], Controllers(checkpoint), seed, moves)


def measure_quickly(moves: str) -> list[dict[str, Any]]:
    """Returns the rows of two simulated domains."""
    prior = SimulatedPrior(users=(120, 120), items=(60, 60), history=(12.0, 12.0))
    settings = TrainingSettings(steps=80, batch_size=32, dim=4, validations=16)
    family, rows = "two_tower", []
    with tempfile.TemporaryDirectory(prefix="choose-cue-") as folder:
        arms = save_arms(Path(folder), [family], moves)
        for seed in range(2):
            domain = make_domain(simulate(prior, seed=seed), name=f"simulated-{seed}", split="leave-last-out")
            task = Task(domain=domain.name, family=family, settings=settings)
            rows += [
                {"family": family, "domain": domain.name, "seed": 0, "cued": cued}
                | measure(task, domain, Controllers(path), 0, moves)._asdict()
                for cued, path in arms.items()
            ]
    return rows


def read_recorded(path: Path, moves: str) -> list[dict[str, Any]]:
    """Returns the rows of an earlier run; none if there is no such file.

    Raises:
      InvalidArgumentError: the file is of another controller, or none of this script.
    """
    if not path.exists():
        return []
    try:
        recorded = json.loads(path.read_text())
        rows: list[dict[str, Any]] = recorded["runs"]
        about = recorded["controller"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"`--output` is there and no output of this script: {path} ({error!r})") from error
    if about != controller_of_runs(moves):
        raise InvalidArgumentError(f"`--output` {path} is of a controller with other bases or cues; pass another path")
    return rows


def controller_of_runs(moves: str) -> dict[str, Any]:
    """Returns what runs depend on: the cue, and the shipped controller's held bases by family in unit ranges."""
    field, threshold = FIELDS[moves]
    family, *_ = load_controller().config.at_rest
    config = ControllerConfig(descriptors=(), families=(family,), at_rest=(family,), **{field: (family,)})
    (cue,) = cues_of(config, family, held=True)
    checkpoint = load_controller().checkpoint
    bases = {
        name: [round(float(unit), 6) for unit in base[0]]
        for name, base in zip(checkpoint.config.rows, checkpoint.base, strict=True)
    }
    return {"cue": cue.feature, "at": getattr(ControllerConfig, threshold), "action": ACTION, "bases": bases}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns by family the mean gain of the cue, its interval, and how many domains there are and it acted on."""
    figures: dict[str, float] = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        arms: dict[bool, dict[tuple[str, int], dict[str, Any]]] = {False: {}, True: {}}
        for row in rows:
            if row["family"] == family:
                arms[row["cued"]][row["domain"], row["seed"]] = row
        pairs = [(arms[False][key], arms[True][key]) for key in arms[True] if key in arms[False]]
        if not pairs:
            continue
        domains = list(dict.fromkeys(row["domain"] for row, _ in pairs))
        for split in SPLITS:
            gains = np.array([np.log(b[split] + METRIC_OFFSET) - np.log(a[split] + METRIC_OFFSET) for a, b in pairs])
            means = np.array([gains[[a["domain"] == name for a, _ in pairs]].mean() for name in domains])
            reach = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means) if len(means) > 1 else float("nan")
            name = f"{family}_{split}"
            figures |= {name: means.mean(), f"{name}_low": means.mean() - reach, f"{name}_high": means.mean() + reach}
            figures[f"{name}_worst"] = means.min()
        acted = {b["domain"] for _, b in pairs if b["acted"]}
        figures |= {f"{family}_domains": len(domains), f"{family}_acted_on": len(acted)}
    return {name: round(float(value), 4) for name, value in figures.items()}


def save_into(path: Path, figures: dict[str, float], families: Sequence[str], moves: str) -> list[str]:
    """Gives a checkpoint the cue for the families that gain by it, beside those that go by it; writes its card anew.

    Returns:
      The families that gain.
    """
    checkpoint = load_checkpoint(path)
    field, _ = FIELDS[moves]
    before = checkpoint.provenance.get(field, {})
    chosen = [family for family in families if figures[f"{family}_validation"] > LEAST_GAIN]
    kept = [family for family in getattr(checkpoint.config, field) if family not in families]
    measured = {f: (figures[f"{f}_validation"], int(figures[f"{f}_domains"])) for f in chosen}
    gains = {f: before["gains"][f] for f in kept} | {f: gain for f, (gain, _) in measured.items()}
    domains = {f: before["domains"][f] for f in kept} | {f: count for f, (_, count) in measured.items()}
    checkpoint = with_cues(checkpoint, [*kept, *chosen], moves=moves, gains=gains, domains=domains)
    save_checkpoint(checkpoint, path)
    write_model_card(checkpoint, path.with_name("README.md"))
    return chosen


def parse() -> argparse.Namespace:
    """Reads the command line."""
    resting = list(load_controller().config.at_rest)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of domains")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="domains of it, by name")
    parser.add_argument("--models", nargs="+", choices=resting, default=resting)
    parser.add_argument("--moves", choices=list(FIELDS), default="learning_rate", help="what the cue moves")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=Path("docs/results/choose_cue.json"))
    parser.add_argument("--into", type=Path, help="a checkpoint with these families at rest, to be given the cue")
    parser.add_argument("--quick", action="store_true", help="a smoke check, nothing is written")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.quick:
        parser.error("`--data` is needed, a folder of domains; or pass --quick")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.quick:
        print(json.dumps(summarise(measure_quickly(arguments.moves))))
        return
    if arguments.into is not None:  # said before the runs, not after them
        check_at_rest(load_checkpoint(arguments.into), arguments.models)
    names = arguments.only or sorted(load_folder(arguments.data, role="meta-training"))
    rows = read_recorded(arguments.output, arguments.moves)
    done = {(row["family"], row["domain"], row["seed"], row["cued"]) for row in rows}
    wanted = product(arguments.models, names, range(arguments.seeds), (False, True))
    cells = [cell for cell in wanted if cell not in done]
    about_controller = controller_of_runs(arguments.moves)
    with tempfile.TemporaryDirectory(prefix="choose-cue-") as folder, make_pool(arguments.workers) as pool:
        arms = save_arms(Path(folder), arguments.models, arguments.moves)
        jobs = [(family, name, seed, arguments.data, arms[cued], arguments.moves) for family, name, seed, cued in cells]
        for cell, run in zip(cells, tqdm(pool.map(work, jobs), total=len(jobs), mininterval=5.0), strict=True):
            rows.append({**dict(zip(("family", "domain", "seed", "cued"), cell, strict=True)), **run._asdict()})
            about = provenance(domains=list(dict.fromkeys(row["domain"] for row in rows)))
            figures = summarise(rows)
            content = {"figures": figures, "controller": about_controller, "runs": rows, "provenance": about}
            unfinished = arguments.output.with_suffix(".tmp")  # a kill leaves the old file or the new one
            unfinished.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(unfinished, arguments.output)
    figures = summarise(rows)
    if arguments.into is not None:
        print(f"goes by the cue: {save_into(arguments.into, figures, arguments.models, arguments.moves)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
