"""Searches that learn from their trials: Optuna's TPE, one trial after another, and population-based training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from envs.benchmark.methods import (
    SCHEDULES,
    Controllers,
    benchmark_package,
    from_box,
    sampled_configurations,
    start_run,
)
from envs.benchmark.store import Identity
from envs.benchmark.tasks import Task
from envs.benchmark.trials import configuration_of, record, run_trial
from envs.domains import Domain
from envs.recommenders.training import TrainingRun
from metalearn.controller.config import CONTROLLED
from metalearn.errors import InvalidArgumentError
from metalearn.trials import Measurement, Trial

POPULATION = 16
"""Members of a population."""
EXPLOIT_EVERY = 5
"""Validations after which the worse members take over from the better."""
EXPLOIT_SHARE = 4
"""One in so many members is replaced, by one of as many best."""
FACTORS = (0.8, 1.25)
"""What a taken over rate and decay are multiplied by, each by one of them."""


def run_tpe(
    identities: Sequence[Identity],
    task: Task,
    domain: Domain,
    controllers: Controllers,
    recorded: Mapping[Identity, Trial],
) -> Iterator[Trial]:
    """Runs a tree-structured Parzen estimator over the space of the random search, and yields its new trials.

    The study is rebuilt by asking and telling it anew what is recorded, so a search that was killed goes on as if it
    had not been.

    Args:
      identities: of the trials, in order; the replicate seeds the sampler.
      recorded: trials that are not run again.

    Raises:
      InvalidArgumentError: optuna is not installed, or it would not have asked for what is recorded.

    Source: Bergstra et al. (2011), Algorithms for hyper-parameter optimization; Akiba et al. (2019), Optuna.
    """
    optuna = benchmark_package("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=identities[0].replicate)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for identity in identities:
        asked = study.ask()
        hyperparameters: dict[str, Any] = {
            name: from_box(name, asked.suggest_float(name, 0.0, 1.0), task.family) for name in CONTROLLED
        }
        hyperparameters["schedule"] = asked.suggest_categorical("schedule", list(SCHEDULES))
        trial = recorded.get(identity)
        if trial is None:
            trial = run_trial(identity, hyperparameters, task, domain, controllers)
            yield trial
        elif trial.configuration != configuration_of(identity, hyperparameters):
            raise InvalidArgumentError(
                f"the recorded trial {identity} has another configuration than the search asks for here; remove this "
                f"search's trials, or use the version of optuna that they were made with (this is {optuna.__version__})"
            )
        study.tell(asked, selection_score(trial, task))


def selection_score(trial: Trial, task: Task) -> float:
    """Returns what a trial is selected by."""
    name = f"selection_ndcg@{task.settings.k}"
    return next(m.value for m in trial.measurements if m.metric == name)


def run_population(
    identities: Sequence[Identity], task: Task, domain: Domain, controllers: Controllers
) -> Iterator[Trial]:
    """Trains a population, and yields its members' trials at the end.

    At every 5th validation each of the worst quarter takes over weights, optimizer state and hyperparameters of one of
    the best quarter, and multiplies rate and decay by 0.8 or 1.25 each. The members begin with the first
    configurations of the random search and hold their rates. From each exchange on their trials have "learning_rate"
    and "weight_decay" as measurements.

    Args:
      identities: of the members; the replicate is of the random search, and seeds the exchanges.

    Source: Jaderberg et al. (2017), Population based training of neural networks.
    """
    replicate = identities[0].replicate
    rng = np.random.default_rng([replicate, 16])
    configurations = [
        {**drawn, "schedule": "constant"} for drawn in sampled_configurations(replicate, task.family)[: len(identities)]
    ]
    members = [
        start_run(identity.method, configuration, task, domain, controllers, seed=identity.seed)
        for identity, configuration in zip(identities, configurations, strict=True)
    ]
    history: list[list[Measurement]] = [[] for _ in members]
    settings = task.settings
    while True:
        for member in members:
            member.advance(EXPLOIT_EVERY * settings.interval)
        if members[0].steps == settings.steps:
            break
        exchange(members, rng)
        for member, changes in zip(members, history, strict=True):
            group = member.optimizer.param_groups[0]
            changes += [
                Measurement(member.steps, "learning_rate", group["lr"]),
                Measurement(member.steps, "weight_decay", group["weight_decay"]),
            ]
    for member, identity, configuration, changes in zip(members, identities, configurations, history, strict=True):
        yield record(member, identity, configuration, task, domain, *changes)


def exchange(members: Sequence[TrainingRun], rng: np.random.Generator) -> None:
    """Lets the worst quarter of a population take over from the best quarter, by the last validation."""
    order = np.argsort([-member.result.validation[-1][1] for member in members], kind="stable")
    count = len(members) // EXPLOIT_SHARE
    for loser in order[len(members) - count :]:
        take_over(members[loser], members[order[rng.integers(count)]], rng.choice(FACTORS, size=2))


def take_over(member: TrainingRun, donor: TrainingRun, factors: np.ndarray) -> None:
    """Copies a donor's weights, optimizer state and hyperparameters, and multiplies rate and decay by two factors."""
    member.model.load_state_dict(donor.model.state_dict())
    member.optimizer.load_state_dict(copy.deepcopy(donor.optimizer.state_dict()))
    for group in member.optimizer.param_groups:
        group["lr"] *= float(factors[0])
        group["weight_decay"] *= float(factors[1])
    for mine, theirs in zip(member.model.modules(), donor.model.modules(), strict=True):
        if isinstance(mine, nn.Dropout) and isinstance(theirs, nn.Dropout):
            mine.p = theirs.p
