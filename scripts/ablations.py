"""Meta-trains without one part at a time, and measures on held-out tasks what the part was worth.

    python scripts/ablations.py --data DIR      # 10 arms, 3 seeds, 20 minutes on 2 cores; resumes where it stopped
    python scripts/ablations.py --quick         # a smoke check on simulated domains, under a minute

DIR is as for scripts/meta_train.py: the arms learn from slices of its "meta-training" domains and from simulated
domains, and are measured on slices of its "validation" domains. Matrix factorisation at the smallest size, so that all
of it fits into an hour: what is worth how much there need not hold at full size.

Arms of a seed share networks, tasks, initialisations and the order of groups. An arm does without its part in
meta-training and in use alike. Measured is the score of the last mean policy, log((NDCG@10 + 0.02) / (popularity +
0.02)), less that of the full recipe on the same episodes; a quarter of them told the horizon. Intervals are
95 % of Student's t over seeds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# One host device a core, one thread each; a quick check compiles once.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count={1 if '--quick' in sys.argv else os.cpu_count()} "
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from scipy import stats

from envs.tasks import EVENTS, NO_EVENTS, TaskPool
from experiment import FULL, QUICK, Size, build_pools
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS, PROFILE_DESCRIPTORS, Normalizer
from metalearn.errors import MetalearnError
from metalearn.meta_training import warm_start
from metalearn.meta_training.config import KNOWN, MetaTrainConfig
from metalearn.meta_training.curriculum import Curriculum
from metalearn.meta_training.loop import iteration_chunks, validation_chunks
from metalearn.meta_training.ppo import PPO
from metalearn.meta_training.rollout import PolicyParams, Prior
from metalearn.meta_training.runner import RolloutRunner, concatenate, relative_scores
from metalearn.signals import GLOBAL_FEATURES
from provenance import provenance

CONTROLS = ("progress", "epochs", "epochs_per_interval", "decisions", "dropout_residual", "dropout", "horizon_known")
"""What a policy knows of a run without looking at it."""
SHIPPED = {"learning_rate": 1e-3, "weight_decay": 1e-2, "beta1": 0.9, "dropout": 0.0}
"""AdamW as PyTorch ships it, which takes the place of the prior."""
OPEN_GATE = 12.0
"""Before the sigmoid: so far out that no gradient moves it."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The full recipe, or all of it but one part."""

    meta_features: bool = True
    live_signals: bool = True
    prior: bool = True
    real_domains: bool = True
    simulated_domains: bool = True
    augmentation: bool = True
    gate: bool = True
    group_actions: bool = True
    curriculum: bool = True


FULL_RECIPE = "full"
ARMS = {FULL_RECIPE: Arm(), **{f"no_{part}": Arm(**{part: False}) for part in Arm.__dataclass_fields__}}


NUM_ITERATIONS = 24
"""Of each arm: ten of them, with three seeds, are to fit into an hour."""
QUICK_ARMS = (FULL_RECIPE, "no_live_signals", "no_prior")


def taken(pool: TaskPool, arm: Arm) -> TaskPool:
    """Returns what an arm learns from."""
    simulated = np.array([name == "simulated" for name in pool.names])
    rows = np.flatnonzero(np.where(simulated, arm.simulated_domains, arm.real_domains))
    return replace(
        pool,
        tasks=jax.tree.map(lambda leaf: leaf[rows], pool.tasks),
        profiles=pool.profiles[rows],
        names=tuple(pool.names[row] for row in rows),
        events=EVENTS if arm.augmentation else NO_EVENTS,
    )


def blinded(normalizer: Normalizer, arm: Arm) -> Normalizer:
    """Returns knots that put at the median whatever an arm must not see: so wide that all of it is near zero."""

    def widened(knots: np.ndarray, rows: list[int]) -> np.ndarray:
        knots = np.array(knots)
        knots[rows] = np.linspace(-1e9, 1e9, knots.shape[1])
        return knots

    seen = {name for name in PROFILE_DESCRIPTORS if arm.meta_features}
    hidden = [index for index, name in enumerate(DESCRIPTORS) if name in PROFILE_DESCRIPTORS and name not in seen]
    normalizer = normalizer._replace(descriptors=widened(normalizer.descriptors, hidden))
    if arm.live_signals:
        return normalizer
    signals = [index for index, name in enumerate(GLOBAL_FEATURES) if name not in CONTROLS]
    return normalizer._replace(
        group=widened(normalizer.group, [*range(len(normalizer.group))]), run=widened(normalizer.run, signals)
    )


def with_gate(params: PolicyParams, arm: Arm) -> PolicyParams:
    """Opens the gate for good where an arm has none."""
    gate = params.network["gate"]
    return params if arm.gate else params._replace(network={**params.network, "gate": np.full_like(gate, OPEN_GATE)})


def prepare(
    arm: Arm, settings: MetaTrainConfig, runner: RolloutRunner, params: PolicyParams
) -> tuple[PolicyParams, Prior]:
    """Settles prior, normaliser and supervised start, as `metalearn.meta_training.loop.prepare` does."""
    config, rng = runner.config, np.random.default_rng([settings.seed, 3])
    shipped = np.array([config.space[name].encode(SHIPPED[name]) for name in CONTROLLED], np.float32)
    base = np.broadcast_to(shipped, (1 + len(config.families), 2, len(CONTROLLED))).astype(np.float32)
    prior, result = Prior(base, warm_start.identity_normalizer(config)), None
    if arm.prior:
        result = warm_start.run_search(
            runner,
            params,
            prior,
            tasks_per_pool=settings.search_tasks,
            configurations=settings.search_configurations,
            epochs_range=settings.epochs_range,
            steps_range=settings.steps_range,
            told_share=settings.told_share,
            seed=settings.seed,
        )
        prior = prior._replace(base=warm_start.choose_bases(result, config, seed=settings.seed)[0])
    exploratory = [chunk for index in range(2) for chunk in iteration_chunks(settings, runner, 2**20 + index)]
    episodes = runner.run(exploratory, params, prior, explore=1.5)
    prior = prior._replace(normalizer=blinded(warm_start.fit_normalizer(episodes, rng), arm))
    if result is not None:
        network, _ = warm_start.fit_start(result, config, params.network, prior, seed=settings.seed)
        params = params._replace(network=network)
    return params, prior


def measure(arm: Arm, size: Size, pools: tuple[TaskPool, TaskPool], seed: int) -> np.ndarray:
    """Meta-trains one arm; returns the mean policy's scores on the held-out episodes, told the horizon and not."""
    settings = replace(size.settings, seed=seed)
    if not arm.augmentation:
        settings = replace(settings, wrong_horizon_share=0.0, kept_share=0.0)
    settings = replace(settings, single_group_share=settings.single_group_share if arm.group_actions else 1.0)
    config = ControllerConfig(descriptors=DESCRIPTORS, families=(size.bucket.learner,))
    runner, held_out = RolloutRunner([taken(pools[0], arm)], config), RolloutRunner(pools[1:], config)
    estimator = PPO(config, settings.ppo)
    params, prior = prepare(arm, settings, runner, with_gate(estimator.init(key=jax.random.key(seed)), arm))
    settings = settings if arm.curriculum else replace(settings, progress_share=0.0)
    state, curriculum = estimator.start(runner, params, prior, []), Curriculum()
    for iteration in range(settings.num_iterations):
        chunks = iteration_chunks(settings, runner, iteration, curriculum)
        key = jax.random.fold_in(jax.random.key(seed + 1), iteration)
        params, state, _, ended = estimator.step(runner, params, state, prior, chunks, key=key)
        curriculum.observe(runner, ended)
    scores = []
    for told in (True, False):
        chunks = validation_chunks(settings, held_out, horizon_told=told)
        if not arm.group_actions:
            one = [chunk.spec._replace(single_group=np.ones_like(chunk.spec.single_group)) for chunk in chunks]
            chunks = [replace(chunk, spec=spec) for chunk, spec in zip(chunks, one, strict=True)]
        scores.append(relative_scores(concatenate(held_out.run(chunks, params, prior))))
    return np.stack(scores)


def run_arms(
    size: Size, arms: Sequence[str], pools: tuple[TaskPool, TaskPool], store: Path | None
) -> dict[str, np.ndarray]:
    """Runs every arm with every seed, or reads what the store has of them; arm to scores [seeds, 2, episodes]."""
    possible = {name: ARMS[name] for name in arms}
    if len({name == "simulated" for name in pools[0].names}) < 2:
        possible = {name: arm for name, arm in possible.items() if arm.real_domains and arm.simulated_domains}
    described = repr((replace(size, seeds=0), ARMS, *(pool.names for pool in pools)))
    identity = hashlib.sha256(described.encode()).hexdigest()[:12]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in possible}
    for seed in range(size.seeds):
        for name, arm in possible.items():
            kept = store / f"{identity}-{name}-{seed}.npy" if store else None
            began = time.monotonic()
            if kept and kept.exists():
                measured = np.load(kept)
            else:
                measured = measure(arm, size, pools, seed)
                if kept:
                    np.save(kept, measured)
            scores[name].append(measured)
            print(f"seed {seed}, {name}: {weighted(measured):+.4f}, {time.monotonic() - began:.0f} s", flush=True)
    return {name: np.stack(values) for name, values in scores.items()}


def weighted(scores: np.ndarray) -> Any:
    """Returns the mean over episodes, weighted as meta-training's validation is; [..., 2, episodes] to [...]."""
    means = scores.mean(-1)
    return KNOWN * means[..., 0] + (1.0 - KNOWN) * means[..., 1]


def summarise(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the full recipe's score, and for each arm what it loses, with intervals over seeds."""
    figures = {FULL_RECIPE: float(weighted(scores[FULL_RECIPE]).mean())}
    for name, values in scores.items():
        if name == FULL_RECIPE:
            continue
        change = weighted(values - scores[FULL_RECIPE])
        reach = float(stats.t.ppf(0.975, len(change) - 1) * stats.sem(change))
        mean = float(change.mean())
        figures |= {name: mean, f"{name}_low": mean - reach, f"{name}_high": mean + reach}
    return figures


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of interaction files, one domain each")
    parser.add_argument("--seeds", type=int, help="runs of each arm, at least 2")
    parser.add_argument("--store", type=Path, default=Path("runs/ablations"), help="scores of finished arms")
    parser.add_argument("--output", type=Path, default=Path("docs/results/ablations.json"))
    parser.add_argument("--quick", action="store_true", help="a smoke check on tiny tasks, nothing is written")
    return parser.parse_args()


def main() -> None:
    arguments, began = parse(), time.monotonic()
    size = QUICK if arguments.quick else FULL
    settings = replace(size.settings, num_iterations=1 if arguments.quick else NUM_ITERATIONS)
    size = replace(size, seeds=arguments.seeds or size.seeds, settings=settings)
    if size.seeds < 2:
        raise SystemExit(f"error: `--seeds` must be at least 2 for an interval over them, got {size.seeds}")
    if not arguments.quick:
        arguments.store.mkdir(parents=True, exist_ok=True)
    pools = build_pools(size, arguments.data)
    scores = run_arms(
        size, QUICK_ARMS if arguments.quick else tuple(ARMS), pools, None if arguments.quick else arguments.store
    )
    figures = {**summarise(scores), "seconds": time.monotonic() - began}
    if not arguments.quick:
        record = {
            "figures": figures,
            "scores": {name: weighted(values).tolist() for name, values in scores.items()},
            "settings": asdict(size.settings),
            "bucket": asdict(size.bucket),
            "provenance": provenance(
                seeds=list(range(size.seeds)), tasks=[len(pool) for pool in pools], real=arguments.data is not None
            ),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
