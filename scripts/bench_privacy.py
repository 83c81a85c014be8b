"""Measures what a differentially private profile costs: how far its descriptors, and what they propose, move.

    python scripts/bench_privacy.py                 # bundled and simulated domains, trained runs; a quarter of an hour
    python scripts/bench_privacy.py --data FOLDER   # and every domain of a folder, see `envs.public.load_folder`
    python scripts/bench_privacy.py --quick         # simulated domains, no training, under a minute

Needs the extra metalearn[privacy]. On the training split of each domain the profile is released at every epsilon, some
times over; each is compared with the exact profile of the same rows. "bounded" is without noise, with everything
counted: what is lost by leaving out the meta-features that no private statistic gives. Measured: the mean absolute
difference of the descriptors that both have, in scaled units (the meta-training range is 2 wide), and of those that the
private one lacks from what stands in for them; the differences in log10 of the start's learning rate and weight decay
of matrix factorisation (horizon 3000, batches of 1024); and how often the confidence falls to 0, where the controller
falls back, while it does not with the exact profile.

With training: matrix factorisation on the bundled domain with the settings of scripts/quickstart, under a controller
that is told the exact profile and private ones, the same seeds; test NDCG@10.

The last line is JSON: per epsilon the medians over domains of `log10_learning_rate_*` and `log10_weight_decay_*`, the
means of `descriptors_*`, the share `fallback_*`, and, where trained, `ndcg_*`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm.auto import tqdm

import metalearn
from envs.domains import Domain, make_domain
from envs.metrics import mean_interval
from envs.public import BUNDLED, load_folder
from envs.recommenders import RECOMMENDERS
from envs.recommenders.training import TrainingSettings, train
from envs.simulated import SimulatedPrior, simulate
from metalearn.controller.observation import PROFILE_DESCRIPTORS, profile_descriptors
from metalearn.errors import InvalidArgumentError, MetalearnError
from metalearn.privacy import PrivacyLedger, release_profile
from metalearn.privacy.estimation import NoisyStatistics, private_profile
from metalearn.privacy.statistics import activity_histogram, popularity_survival
from metalearn.profiles import DomainProfile
from metalearn.signals import percentile_scale
from metalearn.torch import MetaScheduler
from provenance import provenance

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
FAMILY, HORIZON, BATCH_SIZE = "matrix_factorization", 3000, 1024
RELEASES = 3
SEED = 0
UNNOISED = "bounded"


def domains(folder: Path | None, *, simulated: int, bundled: bool) -> Iterator[Domain]:
    """Yields the bundled domain, those of a folder, and simulated ones."""
    sources = ([BUNDLED] if bundled else []) + (list(load_folder(folder).values()) if folder is not None else [])
    for source in sources:
        try:
            yield source.domain(split="auto")
        except InvalidArgumentError:  # too few users are left behind a split by time
            yield source.domain(split="leave-last-out")
    for seed in range(simulated):
        rows = simulate(SimulatedPrior(), seed=SEED + seed)
        yield make_domain(rows, name=f"simulated-{seed}", split="leave-last-out")


def releases(domain: Domain, count: int, folder: Path) -> Iterator[tuple[str, DomainProfile]]:
    """Yields private profiles of a domain's training split, named by their epsilon; and the one without noise."""
    rows = domain.train.compact()
    yield UNNOISED, unnoised(rows)
    for epsilon in EPSILONS:
        for _ in range(count):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                ledger = PrivacyLedger(Path(place) / "ledger.jsonl", epsilon=epsilon * 1.001, delta=0.0)
                yield (
                    f"{epsilon:g}",
                    release_profile(rows, num_items=rows.num_items, epsilon=epsilon, ledger=ledger, tenant=domain.name),
                )


def unnoised(rows: metalearn.Interactions) -> DomainProfile:
    """Returns the profile from the same statistics, whole and without noise."""
    return private_profile(
        NoisyStatistics(
            activity=activity_histogram(rows).astype(float),
            activity_deviation=0.0,
            survival=popularity_survival(rows).astype(float),
            survival_deviation=0.0,
            limit=len(rows),
            num_items=rows.num_items,
        )
    )


def start(controller: metalearn.Controller, profile: DomainProfile) -> tuple[float, float, float]:
    """Returns confidence, and log10 of the start's learning rate and weight decay."""
    session = controller.start(profile, family=FAMILY, horizon=HORIZON, batch_size=BATCH_SIZE)
    group = session.ask().groups[0]
    return session.confidence, math.log10(group["learning_rate"]), math.log10(group["weight_decay"])


def compare(controller: metalearn.Controller, exact: DomainProfile, private: DomainProfile) -> dict[str, Any]:
    """Returns how far a private profile, and what is proposed for it, lie from the exact one's."""
    knots = controller.checkpoint.normalizer.descriptors[: len(PROFILE_DESCRIPTORS)]
    both = [percentile_scale(profile_descriptors(profile), knots, np) for profile in (exact, private)]
    moved = np.abs(both[1] - both[0])
    measured = np.array([private[name] is not None for name in PROFILE_DESCRIPTORS])
    (confidence, *before), (private_confidence, *after) = start(controller, exact), start(controller, private)
    return {
        "descriptors": float(moved[measured].mean()),
        "missing_descriptors": float(moved[~measured].mean()),
        "by_descriptor": dict(zip(PROFILE_DESCRIPTORS, moved.round(4).tolist(), strict=True)),
        "log10_learning_rate": abs(after[0] - before[0]),
        "log10_weight_decay": abs(after[1] - before[1]),
        "confidence": private_confidence,
        "exact_confidence": confidence,
        "fallback": private_confidence == 0 and confidence > 0,
    }


def trained(controller: metalearn.Controller, domain: Domain, profile: DomainProfile, seed: int) -> float:
    """Trains matrix factorisation under the controller; returns the test NDCG@10."""
    settings = TrainingSettings()
    generator = torch.Generator().manual_seed(seed)
    model = RECOMMENDERS[FAMILY].for_domain(domain, dim=settings.dim, dropout=0.0, generator=generator)
    optimizer = torch.optim.AdamW(model.parameter_groups())
    scheduler = MetaScheduler(
        optimizer,
        model=model,
        domain=profile,
        family=FAMILY,
        horizon=settings.steps,
        batch_size=settings.batch_size,
        interval=settings.interval,
        controller=controller,
    )
    return train(model, optimizer, scheduler, domain, settings, seed=seed).test[f"ndcg@{settings.k}"]


def train_all(controller: metalearn.Controller, seeds: int, folder: Path) -> Iterator[dict[str, float]]:
    """Yields, seed by seed, the test NDCG@10 of each profile's run on the bundled domain, with releases of its own."""
    domain = BUNDLED.domain(split="auto")
    for seed in tqdm(range(seeds), desc="trained seeds", mininterval=5.0):
        profiles = {"exact": domain.profile, **dict(releases(domain, 1, folder))}
        yield {name: trained(controller, domain, profile, seed) for name, profile in profiles.items()}


def summarize(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Returns the figures of one epsilon: over domains, of each the mean over its releases."""
    of_domain: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["epsilon"] == name:
            of_domain.setdefault(row["domain"], []).append(row)
    keys = ("descriptors", "missing_descriptors", "log10_learning_rate", "log10_weight_decay", "fallback")
    means = {key: np.array([np.mean([r[key] for r in found]) for found in of_domain.values()]) for key in keys}
    figures = {key: float(means[key].mean()) for key in ("descriptors", "missing_descriptors", "fallback")}
    for key in ("log10_learning_rate", "log10_weight_decay"):
        figures |= {key: float(np.median(means[key])), f"{key}_90th": float(np.percentile(means[key], 90))}
    return figures


def table(figures: Mapping[str, Mapping[str, float]], ndcg: Mapping[str, list[float]], about: Mapping[str, Any]) -> str:
    """Returns the report in Markdown."""
    lines = [
        "# What private profiles cost",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        "Differences from the exact profile of the same rows. Descriptors: mean, in scaled units, of those that the "
        "private profile has; start: median over domains, and 90th percentile. Fallback: share of releases at which "
        "the controller falls back though with the exact profile it does not. NDCG@10: test of matrix factorisation on "
        "the bundled domain under the controller, mean and interval over seeds.",
        "",
        "| epsilon | descriptors | log10 learning rate | log10 weight decay | fallback | NDCG@10 |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("exact", UNNOISED, *(f"{epsilon:g}" for epsilon in EPSILONS)):
        cells = ["0", "0", "0", "0"]
        if name in figures:
            row = figures[name]
            cells = [f"{row['descriptors']:.3f}"]
            cells += [f"{row[k]:.3f} ({row[f'{k}_90th']:.3f})" for k in ("log10_learning_rate", "log10_weight_decay")]
            cells.append(f"{100 * row['fallback']:.1f} %")
        found = mean_interval(np.array(ndcg[name])) if name in ndcg else None
        cells.append("-" if found is None else f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]")
        lines.append(f"| {'no noise' if name == UNNOISED else name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(
    output: Path | None,
    controller: metalearn.Controller,
    rows: list[dict[str, Any]],
    figures: Mapping[str, Mapping[str, float]],
    ndcg: Mapping[str, list[float]],
) -> str:
    """Writes what there is so far, if there is a folder for it; returns the report."""
    about = provenance(
        domains=len({row["domain"] for row in rows}),
        releases=len(rows),
        trained_seeds=len(ndcg.get("exact", [])),
        controller=controller.fingerprint[:16],
    )
    text = table(figures, ndcg, about)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        content = {"provenance": about, "figures": figures, "ndcg": ndcg, "releases": rows}
        (output / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
        (output / "table.md").write_text(text)
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="simulated domains only, no training, under a minute")
    parser.add_argument("--data", type=Path, help="a folder of further domains, see envs.public.load_folder")
    parser.add_argument("--simulated", type=int, default=12, help="simulated domains")
    parser.add_argument("--seeds", type=int, default=3, help="of trained runs; 0 trains none")
    parser.add_argument("--output", type=Path, help="a folder for summary.json and table.md")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    logging.getLogger("envs.public").setLevel(logging.ERROR)
    quick = arguments.quick
    simulated, count, seeds = (3, 2, 0) if quick else (arguments.simulated, RELEASES, arguments.seeds)
    controller = metalearn.load_controller()
    names = (UNNOISED, *(f"{epsilon:g}" for epsilon in EPSILONS))
    rows: list[dict[str, Any]] = []
    ndcg: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-privacy-") as temporary:
        folder = Path(temporary)
        for domain in tqdm(domains(arguments.data, simulated=simulated, bundled=not quick), desc="domains"):
            for name, private in releases(domain, count, folder):
                compared = compare(controller, domain.profile, private)
                rows.append({"domain": domain.name, "epsilon": name, **compared})
        figures = {name: summarize(rows, name) for name in names}
        for found in train_all(controller, seeds, folder):
            ndcg = {name: [*ndcg.get(name, []), metric] for name, metric in found.items()}
            write(None if quick else arguments.output, controller, rows, figures, ndcg)
    print(write(None if quick else arguments.output, controller, rows, figures, ndcg))
    shown = ("descriptors", "log10_learning_rate", "log10_weight_decay", "fallback")
    record = {f"{key}_{name}": round(figures[name][key], 4) for name in names for key in shown}
    record |= {f"ndcg_{name}": round(float(np.mean(values)), 4) for name, values in ndcg.items()}
    print(json.dumps(record))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
