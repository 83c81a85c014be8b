"""Chooses how far the rate decays and how much of the in-run policy acts, by real PyTorch runs on whole domains.

    python scripts/choose_release.py --data DIR --output release.json                     # 10 minutes on 2 cores
    python scripts/choose_release.py --data DIR --checkpoint controller.safetensors --into released.safetensors
    python scripts/choose_release.py --data DIR --quick                                   # a smoke check

A policy is meta-trained on crops and in JAX, under one base schedule. Whether that schedule, and all of what the policy
does in mid-run, is right for whole domains only runs of them say. On every domain of role "validation" in DIR (or of
another `--role`) a family that the policy acts on is trained with each share of the in-run actions, with a known
horizon under each decay, and without. A score is the mean over domains of log(NDCG@10 + 0.02) of validation users,
above that of the checkpoint as it is; the best by the mean over both horizons is chosen. Scores of test users are
recorded beside it, and choose nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm.auto import tqdm

from envs.benchmark.methods import Controllers
from envs.benchmark.store import Identity
from envs.benchmark.tasks import Domains, make_tasks
from envs.benchmark.trials import run_trial
from envs.public import load_folder
from metalearn import load_controller
from metalearn.controller import load_checkpoint, save_checkpoint
from metalearn.controller.outcome import METRIC_OFFSET
from metalearn.errors import InvalidArgumentError, MetalearnError
from metalearn.meta_training.config import KNOWN
from metalearn.meta_training.model_card import write_model_card
from metalearn.meta_training.release import tempered
from provenance import commit, provenance
from workers import make_pool

DECAYS = (0.0, 0.3)
SHARES = (0.0, 0.3, 1.0)
CACHE = Path("runs/benchmark/domains")


def measure(job: tuple[str, str, str, Path, str, int, Path]) -> tuple[float, float]:
    """Trains on one whole domain; returns NDCG@10 of all validation users, and of all test users."""
    name, role, family, data, method, seed, checkpoint = job
    (task,) = make_tasks([name], [family])
    domain = Domains(load_folder(data, role=role), CACHE)[name]
    trial = run_trial(Identity(task.name, method, 0, 0, seed), {}, task, domain, Controllers(checkpoint))
    measured = {measurement.metric: measurement.value for measurement in trial.measurements}
    return measured[f"selection_ndcg@{task.settings.k}"], measured[f"test_ndcg@{task.settings.k}"]


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of domains")
    parser.add_argument("--role", default="validation", choices=("validation", "meta-training"), help="of the domains")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these domains of it, by name")
    parser.add_argument("--family", default="matrix_factorization", help="that the policy acts on")
    parser.add_argument("--checkpoint", type=Path, help="by default the one that ships")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--into", type=Path, help="where to write the checkpoint that is chosen, and its card")
    parser.add_argument("--quick", action="store_true", help="a smoke check: one domain, two arms, 1 seed")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    names = arguments.only or sorted(load_folder(arguments.data, role=arguments.role))
    shipped = load_controller(arguments.checkpoint).checkpoint
    as_it_is = shipped.config.decay_to, 1.0
    seeds, arms = arguments.seeds, [as_it_is, *(arm for arm in product(DECAYS, SHARES) if arm != as_it_is)]
    if arguments.quick:
        names, seeds, arms = names[:1], 1, [as_it_is, (DECAYS[-1], SHARES[1])]
    if arguments.family not in {*shipped.config.families} - {*shipped.config.at_rest}:
        raise InvalidArgumentError(f"`--family` must be one that the policy acts on, got {arguments.family!r}")
    if arguments.into is not None and "tempered" in shipped.provenance:
        raise InvalidArgumentError(
            "this checkpoint was tempered already; pass as `--checkpoint` the one that it was made of"
        )
    with tempfile.TemporaryDirectory(prefix="choose-release-") as folder:
        paths = {
            arm: save_checkpoint(
                tempered(shipped, decay_to=arm[0], policy_share=arm[1]), Path(folder) / f"{index}.safetensors"
            )
            for index, arm in enumerate(arms)
        }
        # Without a horizon nothing decays: one decay stands for all.
        cells = [(arm, "controller_decaying") for arm in arms]
        cells += [(arm, "controller") for arm in arms if arm[0] == as_it_is[0] or arguments.quick]
        jobs = [
            (name, arguments.role, arguments.family, arguments.data, method, seed, paths[arm])
            for arm, method in cells
            for name in names
            for seed in range(seeds)
        ]
        with make_pool(arguments.workers) as pool:
            runs = tqdm(pool.map(measure, jobs), total=len(jobs), mininterval=5.0)
            measured = np.array(list(runs)).reshape(len(cells), len(names), seeds, 2).mean(2)
    rows: list[dict[str, Any]] = []
    for (arm, method), values in zip(cells, measured, strict=True):
        validation, test = np.log(values + METRIC_OFFSET).mean(0).tolist()
        rows.append(
            {
                "horizon": "unknown" if method == "controller" else "known",
                "decay_to": arm[0],
                "policy_share": arm[1],
                "validation": validation,
                "test": test,
                "ndcg": dict(zip(names, values.round(6).tolist(), strict=True)),
            }
        )
    by_horizon = {horizon: [row for row in rows if row["horizon"] == horizon] for horizon in ("known", "unknown")}
    reference = {horizon: found[0] for horizon, found in by_horizon.items()}  # the first is the checkpoint as it is
    for row in rows:
        for split in ("validation", "test"):
            row[f"{split}_gain"] = round(row[split] - reference[row["horizon"]][split], 4)
        print({name: row[name] for name in ("horizon", "decay_to", "policy_share", "validation_gain", "test_gain")})

    def gain(arm: tuple[float, float]) -> float:
        known, unknown = (
            next(
                row["validation_gain"]
                for row in found
                if row["policy_share"] == arm[1] and (horizon == "unknown" or row["decay_to"] == arm[0])
            )
            for horizon, found in by_horizon.items()
        )
        return KNOWN * known + (1.0 - KNOWN) * unknown

    best = max(arms, key=gain)
    chosen = {"decay_to": best[0], "policy_share": best[1], "gain": round(gain(best), 4)}
    if arguments.output is not None and not arguments.quick:
        about = provenance(domains=names, role=arguments.role, family=arguments.family, seeds=list(range(seeds)))
        arguments.output.write_text(json.dumps({"chosen": chosen, "runs": rows, "provenance": about}, indent=1) + "\n")
    if arguments.into is not None and not arguments.quick:
        grounds = {"gain": chosen["gain"], "domains": names, "family": arguments.family, "commit": commit()}
        save_checkpoint(tempered(shipped, decay_to=best[0], policy_share=best[1], **grounds), arguments.into)
        write_model_card(load_checkpoint(arguments.into), arguments.into.with_name("README.md"))
    print(json.dumps(chosen))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
