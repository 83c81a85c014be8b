"""Trains a recommender three ways at the same number of steps, and shows what the controller is worth.

    python scripts/train_recommender.py --quickstart                  # the bundled domain
    python scripts/train_recommender.py --data interactions.parquet   # yours

The columns of a file of yours are user_id, item_id[, timestamp, rating].

Arms: AdamW as PyTorch ships it; the best fixed configuration known from meta-training, its rate held and its weights
averaged, which is the untrained controller; the controller. Writes results.json, decisions.jsonl, trajectories.png and
an offline W&B run to the output folder. About 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm.auto import tqdm

from envs.benchmark.methods import Controllers
from envs.domains import Domain
from envs.metrics import mean_interval, popularity_baseline
from envs.public import BUNDLED, DomainCache, find_source
from envs.recommenders import RECOMMENDERS
from envs.recommenders.training import PlainSchedule, TrainingResult, TrainingSettings, train
from metalearn.audit import draw_trajectories
from metalearn.errors import MetalearnError
from metalearn.torch import MetaScheduler
from metalearn.tracking import Tracker
from metalearn.trials import Measurement, Trial
from provenance import provenance

ARMS = {
    "default": "AdamW as PyTorch ships it",
    "fixed": "best fixed configuration, averaged",
    "controller": "metalearn controller",
}


def run_arm(
    arm: str,
    family: str,
    domain: Domain,
    settings: TrainingSettings,
    seed: int,
    controllers: Controllers,
    output: Path,
) -> tuple[TrainingResult, MetaScheduler | None]:
    """Trains one arm with one seed; every arm has the same initial weights and batches."""
    model = RECOMMENDERS[family].for_domain(domain, dim=settings.dim, generator=torch.Generator().manual_seed(seed))
    if arm == "default":
        scheduler = None
        optimizer = torch.optim.AdamW(model.parameters())
        steering: Any = PlainSchedule(settings.interval)
    else:
        controller = controllers.trained if arm == "controller" else controllers.untrained
        optimizer = torch.optim.AdamW(model.parameter_groups())
        steering = scheduler = MetaScheduler(
            optimizer,
            model=model,
            domain=domain.profile,
            family=controller.config.known_family(family),
            horizon=settings.steps,
            averaging=True,
            batch_size=settings.batch_size,
            interval=settings.interval,
            controller=controller,
            decision_log=output / "decisions.jsonl" if arm == "controller" else None,
            name=f"{arm}-{seed}",
        )
    with tqdm(total=settings.steps, desc=f"{arm:10s} seed {seed}", leave=False, mininterval=0.5) as bar:
        result = train(model, optimizer, steering, domain, settings, seed=seed, on_step=lambda _: bar.update())
    return result, scheduler


def summarize(results: dict[str, list[TrainingResult]], shares: list[float], floor: float, k: int) -> str:
    """Returns the table that ends the run."""
    lines = [f"{'':38s} {f'test NDCG@{k}':>24s} {f'test Recall@{k}':>24s} {'steps/s':>9s} {'controller':>11s}"]
    lines.append(f"{'popularity (floor)':38s} {floor:24.4f}")
    for arm, runs in results.items():
        cells = []
        for metric in (f"ndcg@{k}", f"recall@{k}"):
            interval = mean_interval(np.array([run.test[metric] for run in runs]))
            cells.append(f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]")
        speed = sum(run.steps_per_second for run in runs) / len(runs)
        share = f"{100 * sum(shares) / len(shares):.2f} %" if arm == "controller" else ""
        lines.append(f"{ARMS[arm]:38s} {cells[0]:>24s} {cells[1]:>24s} {speed:9.0f} {share:>11s}")
    return "\n".join(lines)


def open_domain(arguments: argparse.Namespace, output: Path) -> Domain:
    """Loads the bundled domain, or the user's; shows its terms and what is doubtful about it."""
    logging.getLogger("envs.public").setLevel(logging.ERROR)  # what it warns of is in the report below
    source = BUNDLED if arguments.data is None else find_source(arguments.data, min_rating=arguments.min_rating)
    cache = DomainCache(output / "domains")
    domain = source.domain(split=arguments.split, cache=cache)
    print("\n".join([*source.describe(), domain.provenance["hygiene"], str(cache.statistics)]))
    return domain


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--quickstart", action="store_true", help="train on the bundled domain")
    source.add_argument("--data", type=Path, help="a parquet or CSV file, a folder with a README, or a registered name")
    parser.add_argument("--split", choices=("auto", "time", "leave-last-out"), default="auto")
    parser.add_argument(
        "--min-rating", type=float, help="interactions rated lower are not positives (default: above 0)"
    )
    parser.add_argument("--model", choices=list(RECOMMENDERS), default="matrix_factorization", help="model family")
    parser.add_argument("--controller", type=Path, help="a checkpoint instead of the one that ships")
    parser.add_argument("--steps", type=int, default=TrainingSettings.steps)
    parser.add_argument(
        "--batch-size",
        type=int,
        help=f"default: {TrainingSettings.batch_size}, or an eighth of the training interactions if that is less",
    )
    parser.add_argument("--dim", type=int, default=TrainingSettings.dim)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: runs/quickstart, or runs/<name of the file>")
    parser.add_argument("--quick", action="store_true", help="a smoke check: one seed, few steps")
    return parser.parse_args()


def as_trial(
    result: TrainingResult, family: str, domain: Domain, settings: TrainingSettings, arm: str, seed: int
) -> Trial:
    """Records a run: every validation, the test, seconds of training."""
    validation = [Measurement(step, f"validation_ndcg@{settings.k}", value) for step, value in result.validation]
    test = [Measurement(settings.steps, f"test_{name}", value) for name, value in result.test.items()]
    task = f"{domain.name}/{family}/{settings.steps}x{settings.batch_size}"
    trial = Trial(task=task, configuration={"arm": arm, "dim": settings.dim}, seed=seed).record(*validation, *test)
    return trial.diverge(cost=result.seconds) if result.diverged else trial.complete(cost=result.seconds)


def main() -> None:
    arguments = parse()
    settings = TrainingSettings(
        steps=200 if arguments.quick else arguments.steps,
        batch_size=TrainingSettings.batch_size if arguments.batch_size is None else arguments.batch_size,
        dim=arguments.dim,
    )
    seeds = list(range(1 if arguments.quick else arguments.seeds))
    output = arguments.output or Path("runs") / ("quickstart" if arguments.quickstart else arguments.data.stem)
    controllers = Controllers(arguments.controller)
    controllers.of("controller")  # a file that cannot be read is named before anything is trained
    output.mkdir(parents=True, exist_ok=True)
    domain = open_domain(arguments, output)
    if arguments.batch_size is None:
        settings = replace(settings, batch_size=min(settings.batch_size, max(1, len(domain.train) // 8)))
    (output / "decisions.jsonl").unlink(missing_ok=True)
    floor = popularity_baseline(domain, k=settings.k).means()
    epochs = settings.steps * settings.batch_size / len(domain.train)
    print(
        f"{arguments.model} on {domain.name}: {domain.num_users} users, {domain.num_items} items, {len(domain.train)} "
        f"training interactions, split {domain.split}; {settings.steps} steps of {settings.batch_size} "
        f"({epochs:.1f} epochs), {len(seeds)} seeds"
    )

    results: dict[str, list[TrainingResult]] = {arm: [] for arm in ARMS}
    schedulers: list[MetaScheduler] = []
    config = {**asdict(settings), "domain": domain.name, "model": arguments.model}
    with Tracker("metalearn-recommender", config=config, directory=output) as tracker:
        for seed in seeds:
            for arm in ARMS:  # arms take turns, so that a noisy machine slows them alike
                result, scheduler = run_arm(arm, arguments.model, domain, settings, seed, controllers, output)
                results[arm].append(result)
                for step, value in result.validation:
                    tracker.log({f"{arm}/{seed}/validation_ndcg": value, f"{arm}/{seed}/step": step})
                if scheduler is not None and arm == "controller":
                    schedulers.append(scheduler)
                    tracker.decisions(scheduler.decisions, prefix=f"controller/{seed}")
        rows = [[arm, run, *r.test.values()] for arm, runs in results.items() for run, r in enumerate(runs)]
        tracker.table("test", ["arm", "seed", *results["default"][0].test], rows)

    shares = [s.host_seconds / r.seconds for s, r in zip(schedulers, results["controller"], strict=True)]
    draw_trajectories(
        output / "trajectories.png",
        schedulers[0].decisions,
        {ARMS[arm]: [run.validation for run in runs] for arm, runs in results.items()},
        multiplier=schedulers[0].multiplier,
        metric=f"validation NDCG@{settings.k}",
    )
    arms: dict[str, dict[str, Any]] = {
        arm: {
            **{f"test_{name}": [run.test[name] for run in runs] for name in runs[0].test},
            "steps_per_second": [run.steps_per_second for run in runs],
            "report": [run.report for run in runs],
        }
        for arm, runs in results.items()
    }
    arms["controller"] |= {"controller_share": shares, "confidence": schedulers[0].confidence}
    record = {
        "domain": domain.name,
        "model": arguments.model,
        "split": domain.split,
        "settings": asdict(settings),
        "popularity": {f"test_{name}": value for name, value in floor.items()},
        "arms": arms,
        "trials": [
            as_trial(run, arguments.model, domain, settings, arm, seed).as_dict()
            for arm, runs in results.items()
            for seed, run in zip(seeds, runs, strict=True)
        ],
        "provenance": provenance(seeds=seeds, threads=torch.get_num_threads()),
    }
    (output / "results.json").write_text(json.dumps(record, indent=1))
    print(summarize(results, shares, floor[f"ndcg@{settings.k}"], settings.k))
    print(f"results, decisions with their reasons, trajectories and the offline W&B run are in {output}/")
    means = {arm: float(np.mean(values[f"test_ndcg@{settings.k}"])) for arm, values in arms.items()}
    print(json.dumps({f"test_ndcg@{settings.k}": means, "controller_share": float(np.mean(shares))}))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
