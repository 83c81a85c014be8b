"""Measures how well simulated domains surround real ones, and whether rankings of configurations carry over.

    python scripts/simulator_coverage.py                      # the bundled domain alone, some minutes
    python scripts/simulator_coverage.py --quick              # under a minute
    python scripts/simulator_coverage.py --data DIR --output FILE.json --picture FILE.png

DIR is as for scripts/meta_train.py: the prior's ranges were set on its "meta-training" domains, its "validation"
domains are only looked at. A real domain is seen in several crops and slices about as large as the simulated ones, so
that size is not what sets them apart, and whole, without the meta-features of absolute size.

Reported for the prior of version 0.1 ("before", everything newer switched off) and for the current one ("after"):

- coverage: share of real views within the simulated 2.5-97.5 % range, by meta-feature;
- distance: of a view to its nearest simulated domains, over the 95 % quantile of the same among simulated ones;
- auc: of a logistic regression that tells real views from simulated domains, cross-validated by domain.

Then BPR matrix factorisation is trained with a grid of learning rates and weight decays on real slices and on simulated
domains: Spearman's correlation between a slice's scores and the mean scores of its nearest simulated domains, against
as many random ones; 95 % bootstrap over domains and their slices. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# One host device a core, one thread each: a second core does nothing inside one program of small tensors.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count={os.cpu_count()} "
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from tqdm.auto import tqdm

from envs.public import crop, draw_slice, load_folder
from envs.public.registry import BUNDLED
from envs.simulated import SimulatedPrior, simulate
from envs.simulated.coverage import (
    cloud_distances,
    pairwise_distances,
    range_coverage,
    rank_correlations,
    robust_scale,
    two_sample_auc,
)
from envs.tasks import build_pool
from envs.vectorized import SMALL
from metalearn import profile_domain
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS, PROFILE_DESCRIPTORS
from metalearn.errors import InvalidArgumentError, MetalearnError
from metalearn.interactions import Interactions
from metalearn.meta_training import ppo
from metalearn.meta_training.rollout import Prior
from metalearn.meta_training.runner import CHUNK, RolloutRunner, concatenate, make_chunk, relative_scores
from metalearn.meta_training.warm_start import identity_normalizer
from metalearn.profiles.meta_features import META_FEATURE_NAMES
from provenance import provenance

BEFORE = SimulatedPrior(
    history=(4.0, 80.0), clusters=(3, 60), hierarchy=(0.0, 0.0), taste_strength=(1.0, 12.0), popularity_std=(0.1, 1.3),
    born=(0.0, 0.25), cold_items=(0.0, 0.0), rise=(0.0, 0.0), decay=(0.0, 1.0), season=(0.0, 0.0),
    activity_std=(0.2, 1.2), min_history=(0, 0), lifetime=(0.4, 1.0), lifetime_std=(0.0, 0.0), growth=(0.0, 0.0),
    cold_users=(0.0, 0.0), session_length=(1.0, 1.0), noise=(0.0, 0.35), core=(1, 1), span_days=(7.0, 3000.0),
    daily_season=(0.0, 0.0), weekly_season=(0.0, 0.0), untimed=0.3, explicit=0.0, click=0.0, repeating=0.0,
    shifting=0.0, described=0.0,
)  # fmt: skip
"""The ranges of version 0.1, with every property that it did not have switched off. The generator that draws from them
is the current one: users now have at least 3 interactions, not 2, and at most 80 % of what they see, not 40 %."""

_REPEATS = META_FEATURE_NAMES.index("repeat_share")
SPACES: Mapping[str, tuple[int, ...]] = {
    "structure": tuple(range(_REPEATS)),
    "controller": tuple(META_FEATURE_NAMES.index(name) for name in PROFILE_DESCRIPTORS),
    "all": tuple(range(len(META_FEATURE_NAMES))),
}
"""Meta-features to measure distances in: size, shapes, co-occurrence and landmarks; what a controller reads; all that
the real domain defines, repeats, times and ratings included."""
ABSOLUTE_SIZE = ("log_num_users", "log_num_items", "log_num_interactions", "log_density")
RATES = (0.005, 0.02, 0.07, 0.25)
DECAYS = (0.01, 0.1, 0.6, 4.0)
STEPS = 32
"""Optimizer steps of an interval."""


class Views(NamedTuple):
    """Meta-features of parts of real domains, NaN where undefined."""

    values: np.ndarray
    """[R, M]"""
    domain: np.ndarray
    """[R] names"""


def meta_features(interactions: Interactions) -> np.ndarray:
    """Profiles a domain; [M], NaN where undefined."""
    profile = profile_domain(interactions)
    return np.where(profile.mask, profile.values, np.nan)


def real_views(sources: Mapping[str, Interactions], count: int) -> Views:
    """Profiles crops and slices of every domain in turn, log-uniform in size, `count` of each domain."""
    rows, names = [], []
    for name, interactions in sources.items():
        for index in range(count):
            rng = np.random.default_rng([zlib.crc32(name.encode()), index])
            users, items = (round(float(np.exp(rng.uniform(np.log(300), np.log(3000))))) for _ in range(2))
            try:
                if index % 2:
                    part = draw_slice(
                        interactions, max_users=users, max_items=items, key=rng, min_users=100, min_items=60
                    )
                else:
                    part = crop(interactions, max_users=users, max_items=items, key=rng)
            except InvalidArgumentError:
                continue
            rows.append(meta_features(part))
            names.append(name)
    return Views(np.array(rows), np.array(names))


def simulated_cloud(prior: SimulatedPrior, count: int, label: str) -> np.ndarray:
    """Profiles simulated domains, [count, M]."""
    return np.array([meta_features(simulate(prior, seed=seed)) for seed in tqdm(range(count), label, disable=None)])


def compare(cloud: np.ndarray, views: Mapping[str, Views], whole: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compares a cloud with the views of each role, and whole domains by name."""
    report: dict[str, Any] = {"coverage": {}, "auc": {}, "distance": {}, "within": {}}
    for role, real in views.items():
        coverage = range_coverage(real.values, cloud)
        named = zip(META_FEATURE_NAMES, coverage.tolist(), strict=True)
        report["coverage"][role] = {name: value for name, value in named if np.isfinite(value)}
    sized = np.isin(META_FEATURE_NAMES, ABSOLUTE_SIZE)
    for space, columns in SPACES.items():
        scaled = robust_scale(cloud, cloud)[:, columns]
        own = cloud_distances(scaled, scaled, own=True)
        limit = float(np.quantile(own[np.isfinite(own)], 0.95))
        distances: dict[str, dict[str, Any]] = {}
        for role, real in views.items():
            relative = cloud_distances(robust_scale(real.values, cloud)[:, columns], scaled) / limit
            report["within"].setdefault(space, {})[role] = float(np.mean(relative <= 1.0))
            for name in dict.fromkeys(real.domain.tolist()):
                full = np.where(sized, np.nan, robust_scale(whole[name][None], cloud))[:, columns]
                distances[name] = {
                    "role": role,
                    "views": _finite(np.median(relative[real.domain == name])),
                    "whole": _finite(cloud_distances(full, scaled)[0] / limit),
                }
            pooled = np.concatenate([real.values, cloud])
            if len(set(real.domain.tolist())) > 1:
                mine, others = (robust_scale(values, pooled)[:, columns] for values in (real.values, cloud))
                auc = two_sample_auc(mine, others, real.domain, rng=np.random.default_rng(0))
                report["auc"].setdefault(space, {})[role] = auc
        report["distance"][space] = {"limit": limit, "relative": distances}
    return report


def _finite(value: float) -> float | None:
    """JSON has no infinity: a domain with meta-features that too few simulated ones define has no distance."""
    return float(value) if np.isfinite(value) else None


def score_configurations(pool: Any, *, seeds: int) -> np.ndarray:
    """Scores the grid of configurations on every task of a pool, mean over initialisations; [tasks, configurations]."""
    config = ControllerConfig(descriptors=DESCRIPTORS)
    space = {"beta1": 0.9, "dropout": 0.1}
    grid = [space | {"learning_rate": rate, "weight_decay": decay} for rate in RATES for decay in DECAYS]
    starts = np.array([[config.space[name].encode(point[name]) for name in CONTROLLED] for point in grid], np.float32)
    prior = Prior(np.tile(starts[0], (1, 2, 1)), identity_normalizer(config))
    params = ppo.init(config, ppo.PPOConfig(), key=jax.random.key(0))
    chunks = [
        make_chunk(0, STEPS, task=task, initialization=seed, start=starts[low : low + CHUNK], num_start=len(CONTROLLED))
        for task in range(len(pool))
        for seed in range(seeds)
        for low in range(0, len(starts), CHUNK)
    ]
    episodes = RolloutRunner([pool], config).run(chunks, params, prior, act=False, label="configurations")
    return relative_scores(concatenate(episodes)).reshape(len(pool), seeds, len(grid)).mean(axis=1)


def carry_over(sources: Mapping[str, Mapping[str, Interactions]], *, slices: int, simulated: int) -> dict[str, Any]:
    """Correlates configurations' scores on real slices with those on the nearest and on random simulated domains."""
    cloud = build_pool({}, SMALL, slices_per_domain=0, num_simulated=simulated, seed=0)
    cloud_scores = score_configurations(cloud, seeds=1)
    neighbours = max(min(16, simulated // 4), 1)
    rng = np.random.default_rng(0)
    report: dict[str, Any] = {"simulated": simulated, "neighbours": neighbours}
    for role, real in sources.items():
        pool = build_pool(real, SMALL, slices_per_domain=slices, num_simulated=0, seed=1)
        scores = score_configurations(pool, seeds=2)
        mine, others = (robust_scale(profiles, cloud.profiles) for profiles in (pool.profiles, cloud.profiles))
        # What one of the two does not define is taken for the median.
        order = np.argsort(pairwise_distances(np.nan_to_num(mine), np.nan_to_num(others)), axis=1)[:, :neighbours]
        draws = rng.integers(0, simulated, (64, len(pool), neighbours))
        nearest = rank_correlations(scores, cloud_scores[order].mean(axis=1))
        random = np.mean([rank_correlations(scores, cloud_scores[draw].mean(axis=1)) for draw in draws], axis=0)
        names = np.array(pool.names)
        report[role] = {
            "slices": len(pool),
            "nearest": bootstrap(nearest, names, rng),
            "random": bootstrap(random, names, rng),
            "difference": bootstrap(nearest - random, names, rng),
            "by_domain": {
                name: [float(nearest[names == name].mean()), float(random[names == name].mean())]
                for name in dict.fromkeys(pool.names)
            },
        }
    return report


def bootstrap(values: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Mean over domains of the means over slices, and its 95 % interval: domains are drawn anew, then their slices."""
    parts = [values[groups == name] for name in dict.fromkeys(groups.tolist())]

    def once() -> float:
        chosen = rng.integers(0, len(parts), len(parts))
        return float(np.mean([rng.choice(parts[index], len(parts[index])).mean() for index in chosen]))

    low, high = np.quantile([once() for _ in range(2000)], [0.025, 0.975])
    return [float(np.mean([part.mean() for part in parts])), float(low), float(high)]


def draw_picture(
    path: Path, cloud: np.ndarray, views: Mapping[str, Views], report: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draws the clouds along their two principal axes, and coverage by meta-feature before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = SPACES["structure"]
    scaled = robust_scale(cloud, cloud)[:, columns]
    _, _, axes = np.linalg.svd(scaled - scaled.mean(axis=0), full_matrices=False)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 9), width_ratios=(1.1, 1.0), layout="constrained")
    left.scatter(*(scaled @ axes[:2].T).T, s=8, color="0.75", label="simulated")
    for (role, real), color in zip(views.items(), ("tab:blue", "tab:red", "tab:green"), strict=False):
        points = np.nan_to_num(robust_scale(real.values, cloud)[:, columns]) @ axes[:2].T
        left.scatter(*points.T, s=16, color=color, label=role)
    left.set(xlabel="first principal axis", ylabel="second", title="Real views among simulated domains")
    left.legend()
    role = next(iter(views))
    names = [name for name in META_FEATURE_NAMES if name in report["after"]["coverage"][role]]
    for name, marker, color in (("before", "o", "0.6"), ("after", "o", "tab:blue")):
        values = [report[name]["coverage"][role][feature] for feature in names]
        right.plot(values, range(len(names)), marker, ms=4, color=color, label=name)
    right.axvline(0.95, color="0.8", lw=1, zorder=0)
    right.set_yticks(range(len(names)), names, fontsize=6)
    right.invert_yaxis()
    right.set(xlabel="share within the simulated 2.5-97.5 % range", title=f"Coverage of {role} views")
    right.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def summarize(report: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the figures of the last line."""
    summary: dict[str, Any] = {}
    for when in ("before", "after"):
        part = report[when]
        for role, coverage in part["coverage"].items():
            summary[f"coverage_{role}_{when}"] = float(np.mean(list(coverage.values())))
        for space in SPACES:
            for role, value in part["auc"].get(space, {}).items():
                summary[f"auc_{space}_{role}_{when}"] = value
            for role in part["coverage"]:
                rows = [row["views"] for row in part["distance"][space]["relative"].values() if row["role"] == role]
                within = float(np.mean([value is not None and value <= 1.0 for value in rows]))
                summary[f"domains_within_{space}_{role}_{when}"] = within
    for role in report["after"]["coverage"]:
        for kind in ("nearest", "random", "difference"):
            names = (f"rank_correlation_{kind}_{role}{end}" for end in ("", "_low", "_high"))
            summary |= dict(zip(names, report["carry_over"][role][kind], strict=True))
    return {name: round(value, 4) for name, value in summary.items()} | {"seconds": report["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of interaction files, one domain each")
    parser.add_argument("--quick", action="store_true", help="fewer domains, views and slices")
    parser.add_argument("--output", type=Path, help="JSON file for the whole report")
    parser.add_argument("--picture", type=Path, help="PNG file")
    arguments = parser.parse_args()
    began = time.monotonic()
    sources: dict[str, dict[str, Interactions]] = {}
    for role in ("meta-training", "validation") if arguments.data else ():
        found = load_folder(arguments.data, role=role)
        sources[role] = {name: source.interactions() for name, source in found.items()}
    sources = {role: found for role, found in sources.items() if found} or {
        "bundled": {BUNDLED.name: BUNDLED.interactions()}
    }
    views = {role: real_views(found, 2 if arguments.quick else 8) for role, found in sources.items()}
    whole = {name: meta_features(rows) for found in sources.values() for name, rows in found.items()}
    count = 40 if arguments.quick else 600
    clouds = {
        "before": simulated_cloud(BEFORE, count, "before"),
        "after": simulated_cloud(SimulatedPrior(), count, "after"),
    }
    report: dict[str, Any] = {"settings": {**provenance(), "simulated": count, "seeds": [0, count - 1]}}
    report |= {name: compare(cloud, views, whole) for name, cloud in clouds.items()}
    report["carry_over"] = carry_over(
        sources, slices=1 if arguments.quick else 6, simulated=16 if arguments.quick else 256
    )
    report["seconds"] = round(time.monotonic() - began, 1)
    report["summary"] = summarize(report)
    if arguments.picture:
        draw_picture(arguments.picture, clouds["after"], views, report)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    for name, value in report["summary"].items():
        print(f"{name:50s} {value}")
    print(json.dumps(report["summary"]))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
