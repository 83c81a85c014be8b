"""Measures what simple rules for the learning rate in mid-run are worth, beside the controller as it ships.

    python scripts/compare_rules.py --data DIR      # 4 rules, 3 families, 8 domains: a quarter of an hour on 2 cores
    python scripts/compare_rules.py --quick         # a smoke check on a simulated domain, under a minute

An engineer who has no controller cuts the rate where validation stands still. Is that, or its opposite, worth more than
to leave the controller alone? A rule watches the validation metric of a run that the shipped controller steers, with
averaged weights, and multiplies the learning rate (`MetaScheduler.override`):

- plateau: by 0.3 after three validations without a best one, at most three times (`ReduceLROnPlateau`);
- plateau_back: the same, from the weights, the optimizer and the session of the best validation on;
- trend: by 1.7, at most to 8 times, where the mean of the last three validations is 3 % above that of the three before
  them; asked every three validations.

Every run keeps the weights that validated best, so that a rule can lose only what would have come after. Measured on
domains of DIR, by default eight of role "meta-training", is log(NDCG@10 + 0.02) of all validation users and of all test
users above the run without a rule, of one seed, with 95 % intervals of Student's t over domains. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scipy import stats
from tqdm.auto import tqdm

from envs.benchmark.methods import Controllers, start_run
from envs.benchmark.store import Identity
from envs.benchmark.tasks import Domains, Task, make_tasks
from envs.benchmark.trials import record
from envs.domains import Domain, make_domain
from envs.public import load_folder
from envs.recommenders import RECOMMENDERS
from envs.recommenders.training import TrainingRun, TrainingSettings
from envs.simulated import SimulatedPrior, simulate
from metalearn.controller.outcome import METRIC_OFFSET
from metalearn.errors import MetalearnError
from metalearn.spaces import CANONICAL_SPACE
from metalearn.torch import MetaScheduler
from provenance import provenance
from workers import make_pool

CACHE = Path("runs/benchmark/domains")
DOMAINS = (
    "ifdb_played",
    "ml_100k",
    "ml_1m",
    "mooccubex_courses",
    "movietweetings_100k",
    "retailrocket_caserec",
    "ta_feng",
    "wikipedia_edits",
)
MODELS = ("matrix_factorization", "two_tower", "self_attention")
WITHOUT = "none"


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Cuts the rate where validation stands still.

    Args:
      back: whether the run goes on from where it validated best.
    """

    back: bool
    patience: int = 3
    factor: float = 0.3
    most: int = 3

    def factor_after(self, validations: Sequence[float], factor: float) -> float:
        """Returns the factor on the rate after a validation.

        Args:
          validations: of the run; those before the last change are left out, save for the best.
          factor: in force.
        """
        stands_still = len(validations) > self.patience and max(validations[-self.patience :]) <= max(
            validations[: -self.patience]
        )
        return factor * self.factor if stands_still and factor > 1.01 * self.factor**self.most else factor


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Raises the rate while validation rises."""

    window: int = 3
    rise: float = 0.03
    factor: float = 1.7
    most: float = 8.0
    back = False

    def factor_after(self, validations: Sequence[float], factor: float) -> float:
        """Returns the factor on the rate after a validation."""
        if len(validations) % self.window or len(validations) < 2 * self.window:
            return factor
        last = np.mean(validations[-self.window :])
        rises = last > (1.0 + self.rise) * np.mean(validations[-2 * self.window : -self.window])
        return min(factor * self.factor, self.most) if rises else factor


RULES: dict[str, Plateau | Trend | None] = {
    WITHOUT: None,
    "plateau": Plateau(back=False),
    "plateau_back": Plateau(back=True),
    "trend": Trend(),
}


@dataclass(kw_only=True)
class Ruled:
    """Steers a run as its scheduler does, with a rule on top.

    Args:
      run: whose scheduler it is.
      rule: what changes the rate.
    """

    run: TrainingRun
    scheduler: MetaScheduler
    rule: Plateau | Trend
    factor: float = 1.0
    validations: list[float] = field(default_factory=list)
    best: Any = None

    def __post_init__(self) -> None:
        self.rates = [group["learning_rate"] for group in self.scheduler.decision.groups]

    @property
    def reads_losses(self) -> bool:
        return self.scheduler.reads_losses

    @property
    def should_validate(self) -> bool:
        return self.scheduler.should_validate

    def step(self, loss: torch.Tensor) -> None:
        self.scheduler.step(loss)

    def averaged_parameters(self) -> AbstractContextManager[None]:
        return self.scheduler.averaged_parameters()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Reports, then changes the rate as the rule says."""
        self.scheduler.report(metrics)
        value = metrics["ndcg"]
        if self.rule.back and (not self.validations or value > max(self.validations)):
            self.best = copy.deepcopy([part.state_dict() for part in self._parts])
        self.validations.append(value)
        factor = self.rule.factor_after(self.validations, self.factor)
        if factor == self.factor:
            return
        if self.rule.back:
            for part, state in zip(self._parts, self.best, strict=True):
                part.load_state_dict(copy.deepcopy(state))
        if isinstance(self.rule, Plateau):
            self.validations = [max(self.validations)]
        self.factor = factor
        highest = CANONICAL_SPACE["learning_rate"].high
        self.scheduler.override(
            {f"learning_rate[{g}]": min(rate * factor, highest) for g, rate in enumerate(self.rates)}
        )

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.run.model, self.run.optimizer, self.scheduler


def measure(task: Task, domain: Domain, rule: str, seed: int) -> tuple[float, float]:
    """Trains once; returns NDCG@10 of all validation users, and of all test users."""
    run = start_run("controller", {}, task, domain, Controllers(), seed=seed)
    if (given := RULES[rule]) is not None:
        run.steering = Ruled(run=run, scheduler=cast(MetaScheduler, run.steering), rule=given)
    run.advance()
    trial = record(run, Identity(task.name, rule, 0, 0, seed), {}, task, domain)
    measured = {measurement.metric: measurement.value for measurement in trial.measurements}
    return measured[f"selection_ndcg@{task.settings.k}"], measured[f"test_ndcg@{task.settings.k}"]


def work(job: tuple[str, str, str, int, Path]) -> tuple[float, float]:
    """Measures in a process of its own."""
    family, name, rule, seed, data = job
    (task,) = make_tasks([name], [family])
    return measure(task, Domains(load_folder(data), CACHE)[name], rule, seed)


def measure_quickly() -> np.ndarray:
    """Returns the figures of two simulated domains, as `main` lays them out."""
    prior = SimulatedPrior(users=(120, 120), items=(60, 60), history=(12.0, 12.0))
    settings = TrainingSettings(steps=80, batch_size=32, dim=4, validations=16)
    task = Task(domain="simulated", family=MODELS[0], settings=settings)
    domains = [make_domain(simulate(prior, seed=seed), name="simulated", split="leave-last-out") for seed in range(2)]
    return np.array([[[measure(task, domain, rule, 0) for domain in domains] for rule in RULES]])[..., None, :]


def summarise(scores: np.ndarray, models: Sequence[str]) -> dict[str, float]:
    """Returns mean and interval of what each rule gains, by rule, family and users.

    Args:
      scores: [family, rule, domain, 2] log(NDCG@10 + 0.02), averaged over seeds.
      models: names of the families.
    """
    figures: dict[str, float] = {}
    for family, of_family in zip(models, scores, strict=True):
        for rule, gains in zip(RULES, of_family - of_family[0], strict=True):
            if rule == WITHOUT:
                continue
            reach = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains, axis=0)
            for split, mean, width in zip(("validation", "test"), gains.mean(0), reach, strict=True):
                name = f"{rule}_{family}_{split}"
                figures |= {name: mean, f"{name}_low": mean - width, f"{name}_high": mean + width}
    return {name: round(float(value), 4) for name, value in figures.items()}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of domains")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(DOMAINS), help="domains of it, at least two")
    parser.add_argument("--models", nargs="+", choices=list(RECOMMENDERS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=Path("docs/results/compare_rules.json"))
    parser.add_argument("--quick", action="store_true", help="a smoke check, nothing is written")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.quick:
        parser.error("`--data` is needed, a folder of domains; or pass --quick")
    if len(arguments.only) < 2:
        parser.error("`--only` must name at least two domains, for an interval over them")
    return arguments


def main() -> None:
    arguments = parse()
    names, models, seeds = arguments.only, arguments.models, range(arguments.seeds)
    if arguments.quick:
        models, measured = MODELS[:1], measure_quickly()
    else:
        jobs = [
            (m, name, rule, seed, arguments.data) for m in models for rule in RULES for name in names for seed in seeds
        ]
        with make_pool(arguments.workers) as pool:
            runs = list(tqdm(pool.map(work, jobs), total=len(jobs), mininterval=5.0))
        measured = np.array(runs).reshape(len(models), len(RULES), len(names), len(seeds), 2)
    ndcg = measured.mean(3)
    figures = summarise(np.log(ndcg + METRIC_OFFSET), models)
    if not arguments.quick:
        by_rule = {
            family: {
                rule: dict(zip(names, rows.round(6).tolist(), strict=True))
                for rule, rows in zip(RULES, of_family, strict=True)
            }
            for family, of_family in zip(models, ndcg, strict=True)
        }
        content = {"figures": figures, "ndcg": by_rule, "provenance": provenance(domains=names, seeds=list(seeds))}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
