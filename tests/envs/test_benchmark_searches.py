"""Searches: a killed one goes on exactly; what members of a population take over, and that they leave each other be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from envs.benchmark.methods import SCHEDULES, Controllers, sampled_configurations, start_run
from envs.benchmark.searches import exchange, run_population, run_tpe, selection_score, take_over
from envs.benchmark.store import Identity
from envs.benchmark.tasks import Task
from envs.domains import Domain, make_domain
from envs.recommenders.training import TrainingRun, TrainingSettings
from envs.simulated import SimulatedPrior, simulate
from metalearn.controller.config import CONTROLLED
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.warm_start import SEARCH_BOX
from metalearn.trials import Trial

SETTINGS = TrainingSettings(steps=40, batch_size=32, dim=4, validations=20)
TASK = Task(domain="simulated", family="matrix_factorization", settings=SETTINGS)
CONTROLLERS = Controllers()


@pytest.fixture(scope="module")
def domain() -> Domain:
    prior = SimulatedPrior(users=(120, 120), items=(60, 60), history=(12.0, 12.0))
    return make_domain(simulate(prior, seed=1), name="simulated", split="leave-last-out")


def identities(method: str, count: int, replicate: int = 1) -> list[Identity]:
    return [Identity(TASK.name, method, replicate, index, replicate) for index in range(count)]


def without_cost(trials: Sequence[Trial]) -> list[Trial]:
    return [replace(trial, cost=0.0) for trial in trials]


@pytest.fixture(scope="module")
def whole(domain: Domain) -> list[Trial]:
    """A search of 14 trials: the sampler's first 10 are random."""
    return list(run_tpe(identities("tpe", 14), TASK, domain, CONTROLLERS, {}))


@pytest.mark.parametrize("done", [0, 1, 12, 14])
def test_a_killed_search_goes_on_exactly(done: int, domain: Domain, whole: list[Trial]):
    wanted = identities("tpe", 14)
    recorded = dict(zip(wanted[:done], whole, strict=False))
    rest = list(run_tpe(wanted, TASK, domain, CONTROLLERS, recorded))
    assert without_cost(rest) == without_cost(whole[done:])


def test_a_search_learns_from_what_it_is_told(domain: Domain, whole: list[Trial]):
    """Tell it other scores: its random trials are the same ones, those after them are not."""
    wanted = identities("tpe", 14)
    values = {id(trial): place for place, trial in enumerate(reversed(whole))}
    swapped = {
        key: replace(
            trial,
            measurements=tuple(
                replace(m, value=float(values[id(trial)])) if m.metric == "selection_ndcg@10" else m
                for m in trial.measurements
            ),
        )
        for key, trial in zip(wanted[:10], whole, strict=False)
    }
    rest = list(run_tpe(wanted, TASK, domain, CONTROLLERS, swapped))
    assert len(rest) == 4
    assert [t.configuration for t in rest[1:]] != [t.configuration for t in whole[11:]]


def test_a_search_stays_in_the_box(whole: list[Trial]):
    for trial in whole:
        for name in CONTROLLED:
            low, high = SEARCH_BOX[name]
            assert low * (1 - 1e-5) <= trial.configuration[name] <= high * (1 + 1e-5)
        assert trial.configuration["schedule"] in SCHEDULES
    assert len({trial.configuration["learning_rate"] for trial in whole}) == 14
    assert selection_score(whole[0], TASK) == whole[0].best("selection_ndcg@10").value


def test_a_record_of_another_search_is_refused(domain: Domain, whole: list[Trial]):
    other = identities("tpe", 14, replicate=2)
    with pytest.raises(InvalidArgumentError, match="another configuration than the search asks for"):
        next(run_tpe(other, TASK, domain, CONTROLLERS, dict(zip(other, whole, strict=True))))


def make_members(domain: Domain, count: int, *, seed: int = 3) -> list[TrainingRun]:
    drawn = [{**c, "schedule": "constant"} for c in sampled_configurations(0, "matrix_factorization")[:count]]
    return [start_run("pbt", configuration, TASK, domain, CONTROLLERS, seed=seed) for configuration in drawn]


def test_runs_that_take_turns_do_not_disturb_each_other(domain: Domain):
    together, alone = make_members(domain, 3), make_members(domain, 3)
    for _ in range(4):
        for member in together:
            member.advance(11)
    for member, other in zip(together, alone, strict=True):
        other.advance()
        assert member.steps == other.steps == 40
        assert member.result.validation == other.result.validation
        assert torch.equal(member.model.user.weight, other.model.user.weight)
        assert member.result.seconds > 0


def test_taking_over_copies_everything(domain: Domain):
    member, donor = make_members(domain, 2)
    for run in (member, donor):
        run.advance(10)
    group = dict(donor.optimizer.param_groups[0])
    take_over(member, donor, np.array([0.8, 1.25]))
    taken = member.optimizer.param_groups[0]
    assert taken["lr"] == pytest.approx(0.8 * group["lr"])
    assert taken["weight_decay"] == pytest.approx(1.25 * group["weight_decay"])
    assert taken["betas"] == group["betas"]
    assert member.model.dropout.p == donor.model.dropout.p
    kept = donor.model.user.weight.detach().clone(), donor.optimizer.state[donor.model.user.weight]["exp_avg"].clone()
    torch.testing.assert_close(member.model.user.weight.detach(), kept[0])
    torch.testing.assert_close(member.optimizer.state[member.model.user.weight]["exp_avg"], kept[1])
    member.advance(10)  # and shares nothing with it
    assert torch.equal(donor.model.user.weight, kept[0])
    assert torch.equal(donor.optimizer.state[donor.model.user.weight]["exp_avg"], kept[1])
    assert donor.optimizer.param_groups[0]["lr"] == group["lr"]


def test_the_worst_quarter_takes_over_from_the_best(domain: Domain):
    members = make_members(domain, 8)
    scores = [0.5, 0.1, 0.7, 0.3, 0.2, 0.8, 0.4, 0.6]  # best: members 5 and 2; worst: 1 and 4
    for member, score in zip(members, scores, strict=True):
        member.result.validation.append((10, score))
    before = [member.optimizer.param_groups[0]["lr"] for member in members]
    exchange(members, np.random.default_rng(0))
    after = [member.optimizer.param_groups[0]["lr"] for member in members]
    assert [place for place in range(8) if before[place] != after[place]] == [1, 4]
    for place in (1, 4):
        ratios = [after[place] / before[donor] for donor in (5, 2)]
        assert any(ratio == pytest.approx(factor) for ratio in ratios for factor in (0.8, 1.25))


def test_a_population_records_its_members(domain: Domain):
    wanted = identities("pbt", 8)
    first, second = (list(run_population(wanted, TASK, domain, CONTROLLERS)) for _ in range(2))
    assert without_cost(first) == without_cost(second)
    assert [trial.configuration["index"] for trial in first] == list(range(8))
    changed = 0
    for trial, drawn in zip(first, sampled_configurations(1, "matrix_factorization"), strict=False):
        assert trial.configuration["learning_rate"] == drawn["learning_rate"]
        assert trial.configuration["schedule"] == "constant"
        rates = [(m.step, m.value) for m in trial.measurements if m.metric == "learning_rate"]
        assert [step for step, _ in rates] == [10, 20, 30]
        assert sum(m.metric == "validation_ndcg@10" for m in trial.measurements) == 20
        changed += rates[-1][1] != drawn["learning_rate"]
    assert 2 <= changed <= 6
