"""Compares the estimators of meta-training: PPO with grouped rollouts against evolution strategies (PES).

    python scripts/compare_estimators.py              # 3 seeds, about 20 minutes on 2 cores
    python scripts/compare_estimators.py --quick      # a smoke check, under a minute
    python scripts/compare_estimators.py --data DIR   # slices of real domains beside the simulated ones

DIR is as for scripts/meta_train.py: slices of its "meta-training" domains are learnt from, those of its "validation"
domains are held out; without it, other simulated domains are held out than are learnt from.

With the same seed both have the same networks, bases, normaliser and supervised start, and are given the same groups of
episodes in every iteration. Measured is the gain of the mean policy over the base schedule on held-out tasks, in
log((NDCG@10 + 0.02) / (popularity + 0.02)): after every few iterations, without choosing the best, which would flatter
whoever is noisier. Intervals are 95 % of Student's t over seeds; the difference is paired by seed. Groups of evolution
strategies wait for their phase in the first iteration, so that it takes slightly fewer steps. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# One host device a core, one thread each: a second core does nothing inside one program of small tensors. Every device
# compiles its own programs, which is most of a quick check: that has one.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count={1 if '--quick' in sys.argv else os.cpu_count()} "
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import stats

from envs.tasks import TaskPool
from experiment import FULL, QUICK, Size, build_pools
from metalearn.controller.config import ControllerConfig
from metalearn.controller.observation import DESCRIPTORS
from metalearn.errors import MetalearnError
from metalearn.meta_training.config import MetaTrainConfig
from metalearn.meta_training.es import ESConfig
from metalearn.meta_training.loop import meta_train
from provenance import provenance

ESTIMATORS = ("ppo", "es")
PREPARED = ("search-*.npz", "baseline.json")
"""What both estimators make alike from a seed, before their first iteration; the second is given the first one's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One run, at its evaluations.

    Args:
      inner_steps: optimizer steps that episodes took so far.
      gain: mean gain over the base schedule on held-out tasks.
      seconds: spent on rollouts and updates so far.
    """

    inner_steps: list[float]
    gain: list[float]
    seconds: list[float]


class _Measured(Exception):
    """The last evaluation is done."""


def run(settings: MetaTrainConfig, pools: tuple[TaskPool, TaskPool], directory: Path) -> Curve:
    """Meta-trains once, up to the last evaluation: no checkpoint is needed."""
    records: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        records.append(record)
        if record["phase"] == "validate" and record["iteration"] == settings.num_iterations:
            raise _Measured

    controller = ControllerConfig(descriptors=DESCRIPTORS, families=(pools[0].bucket.learner,))
    with suppress(_Measured):
        meta_train(settings, controller, pools[:1], pools[1:], directory=directory, log=log, provenance={})
    curve, inner_steps, seconds = Curve(inner_steps=[], gain=[], seconds=[]), 0.0, 0.0
    for record in records:
        if record["phase"] == "train":
            inner_steps += record["inner_steps"]
            seconds += record["rollout_seconds"] + record["update_seconds"]
        elif record["phase"] == "validate":
            curve.inner_steps.append(inner_steps)
            curve.gain.append(record["validation/overall"])
            curve.seconds.append(seconds)
    return curve


def compare(size: Size, pools: tuple[TaskPool, TaskPool], folder: Path) -> dict[str, list[Curve]]:
    """Runs every estimator with every seed."""
    curves: dict[str, list[Curve]] = {name: [] for name in ESTIMATORS}
    for seed in range(size.seeds):
        for name in ESTIMATORS:
            began, directory = time.monotonic(), folder / f"{name}-{seed}"
            directory.mkdir()
            for pattern in PREPARED:
                for file in (folder / f"{ESTIMATORS[0]}-{seed}").glob(pattern):
                    shutil.copy(file, directory)
            settings = replace(size.settings, seed=seed, patience=size.settings.num_iterations)
            # Both are to see the same groups, so none are drawn by what an estimator has learnt.
            settings = replace(settings, es=ESConfig() if name == "es" else None, progress_share=0.0)
            curve = run(settings, pools, directory)
            curves[name].append(curve)
            print(
                f"seed {seed}, {name:3}: gain {curve.gain[0]:+.4f} at the start, {curve.gain[-1]:+.4f} after "
                f"{curve.inner_steps[-1] / 1e6:.2f} million steps, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return curves


def interval(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean and 95 % interval of Student's t over the first axis."""
    samples = np.asarray(values, np.float64)
    mean, error = samples.mean(0), stats.sem(samples, axis=0)
    reach = stats.t.ppf(0.975, len(samples) - 1) * error
    return mean, mean - reach, mean + reach


def summarise(curves: dict[str, list[Curve]]) -> dict[str, float]:
    """Returns the figures of the last line."""
    last = {name: np.array([curve.gain[-1] for curve in runs]) for name, runs in curves.items()}
    figures = {"gain_start": float(np.mean([curve.gain[0] for curve in curves[ESTIMATORS[0]]]))}
    measured = {**{f"gain_{name}": gains for name, gains in last.items()}, "es_minus_ppo": last["es"] - last["ppo"]}
    for name, values in measured.items():
        mean, low, high = interval(values)
        figures |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
    for name, runs in curves.items():
        figures[f"inner_steps_{name}"] = float(np.mean([curve.inner_steps[-1] for curve in runs]))
        figures[f"seconds_{name}"] = float(np.mean([curve.seconds[-1] for curve in runs]))
    return figures


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draws mean and interval of the gain, by optimizer steps taken."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = {"ppo": "PPO, grouped rollouts", "es": "evolution strategies, persistent"}
    for name, runs in curves.items():
        steps = np.mean([curve.inner_steps for curve in runs], axis=0) / 1e6
        mean, low, high = interval([curve.gain for curve in runs])
        axes.plot(steps, mean, marker="o", markersize=3, label=labels[name])
        axes.fill_between(steps, low, high, alpha=0.2)
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_xlabel("optimizer steps taken by episodes, millions")
    axes.set_ylabel("gain over the base schedule, held-out tasks")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of interaction files, one domain each")
    parser.add_argument("--seeds", type=int, help="runs of each estimator, at least 2")
    parser.add_argument("--iterations", type=int, help="of each run, a multiple of the 10 between evaluations")
    parser.add_argument("--output", type=Path, help="folder of the figures and the plot; docs/results by default")
    parser.add_argument("--quick", action="store_true", help="a smoke check on tiny tasks, nothing is written")
    return parser.parse_args()


def main() -> None:
    arguments, began = parse(), time.monotonic()
    size = QUICK if arguments.quick else FULL
    iterations = arguments.iterations or size.settings.num_iterations
    size = replace(
        size, seeds=arguments.seeds or size.seeds, settings=replace(size.settings, num_iterations=iterations)
    )
    if size.seeds < 2:
        raise SystemExit(f"error: `--seeds` must be at least 2 for an interval over them, got {size.seeds}")
    with tempfile.TemporaryDirectory(prefix="compare-estimators-") as folder:
        pools = build_pools(size, arguments.data)
        curves = compare(size, pools, Path(folder))
    figures = {**summarise(curves), "seconds": time.monotonic() - began}
    output = arguments.output or (None if arguments.quick else Path("docs/results"))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        draw(curves, output / "compare_estimators.png")
        record = {
            "figures": figures,
            "curves": {name: [asdict(curve) for curve in runs] for name, runs in curves.items()},
            "settings": {"ppo": asdict(size.settings), "es": asdict(ESConfig()), "bucket": asdict(size.bucket)},
            "provenance": provenance(
                seeds=list(range(size.seeds)), tasks=[len(pool) for pool in pools], real=arguments.data is not None
            ),
        }
        (output / "compare_estimators.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
