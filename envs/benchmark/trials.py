"""Runs one trial: trains, selects the weights that validated best, scores them on all users, and records it all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from envs.benchmark.methods import Controllers, start_run
from envs.benchmark.store import Identity, round_trial
from envs.benchmark.tasks import Task
from envs.domains import Domain
from envs.recommenders import Evaluator
from envs.recommenders.training import TrainingRun
from metalearn.trials import Measurement, Trial


def configuration_of(identity: Identity, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a trial's configuration as it is recorded: what identifies it, then its hyperparameters."""
    return {
        "method": identity.method,
        "replicate": identity.replicate,
        "index": identity.index,
        **hyperparameters,
    }


def run_trial(
    identity: Identity, hyperparameters: Mapping[str, Any], task: Task, domain: Domain, controllers: Controllers
) -> Trial:
    """Runs a method with one configuration and one seed.

    Returns:
      The ended trial, diverged if the loss was not finite at some validation; figures rounded as they are recorded.
    """
    run = start_run(identity.method, hyperparameters, task, domain, controllers, seed=identity.seed)
    run.advance()
    return record(run, identity, hyperparameters, task, domain)


def record(
    run: TrainingRun,
    identity: Identity,
    hyperparameters: Mapping[str, Any],
    task: Task,
    domain: Domain,
    *more: Measurement,
) -> Trial:
    """Scores a finished run's best weights on the users of validation and test, and returns its trial.

    Args:
      more: measurements to record beside the usual ones.
    """
    run.restore_best()
    k, steps, result = task.settings.k, task.settings.steps, run.result
    validation, test = (
        Evaluator(domain, split, k=k, max_users=task.final_users)(run.model) for split in ("validation", "test")
    )
    measurements = [Measurement(step, f"validation_ndcg@{k}", value) for step, value in result.validation]
    measurements += [
        Measurement(steps, f"selection_ndcg@{k}", validation.mean_ndcg),
        Measurement(steps, f"test_ndcg@{k}", test.mean_ndcg),
        Measurement(steps, f"test_recall@{k}", test.mean_recall),
    ]
    trial = Trial(task=task.name, configuration=configuration_of(identity, hyperparameters), seed=identity.seed)
    trial = trial.record(*measurements, *more)
    return round_trial(trial.diverge(cost=result.seconds) if result.diverged else trial.complete(cost=result.seconds))
