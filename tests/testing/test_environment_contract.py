"""The contract suite: every environment of ours passes, and every check finds the faults that were made for it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from envs.domains import make_domain
from envs.learners import LEARNERS
from envs.pytorch import PyTorchEnvironment
from envs.simulated import SimulatedPrior, simulate
from envs.vectorized import Bucket, VectorizedEnvironment, make_task
from metalearn.controller.actions import Values
from metalearn.errors import InvalidArgumentError
from metalearn.testing import ENVIRONMENT_CHECKS, JITTED_ENVIRONMENT_CHECKS, EnvironmentContract
from tests.meta_training.toy import ToyEnvironment, ToyPool
from tests.testing import mutants
from tests.testing.linear import LinearEnvironment, linear_tasks

ALL_CHECKS = ENVIRONMENT_CHECKS + JITTED_ENVIRONMENT_CHECKS
CHECKS = {check.__name__: check for check in ALL_CHECKS}
BUCKET = Bucket(users=128, items=96, interactions=4096, dim=8, batch=32, evaluated=64)


@pytest.fixture(scope="module")
def domains():
    prior = SimulatedPrior(users=(110, 110), items=(80, 80), history=(15.0, 15.0))
    return [
        make_domain(simulate(prior, seed=seed), name=f"simulated-{seed}", split="leave-last-out") for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def vectorized(domains):
    return EnvironmentContract(
        environment=VectorizedEnvironment(BUCKET), tasks=[make_task(domain, BUCKET) for domain in domains]
    )


@pytest.fixture(scope="module")
def pytorch(domains):
    return EnvironmentContract(
        environment=PyTorchEnvironment(dim=8, batch_size=32, max_users=64), tasks=domains, jitted=False
    )


@pytest.fixture(scope="module")
def linear():
    return EnvironmentContract(environment=LinearEnvironment(), tasks=linear_tasks(), jitted=False)


def toy_contract(environment):
    tasks = [jax.tree.map(lambda leaf, index=index: leaf[index], ToyPool().tasks) for index in (0, 1)]
    return EnvironmentContract(
        environment=environment, tasks=tasks, inert=("learning_rate", "weight_decay", "beta1"), steps=4
    )


@pytest.fixture(scope="module")
def toy():
    return toy_contract(ToyEnvironment())


@pytest.mark.parametrize("check", ALL_CHECKS)
def test_the_jax_environment(check, vectorized):
    check(vectorized)


@pytest.mark.parametrize("check", ENVIRONMENT_CHECKS)
def test_the_pytorch_environment(check, pytorch):
    check(pytorch)


OTHER_FAMILIES = sorted(set(LEARNERS) - {BUCKET.learner})


@pytest.fixture(scope="module", params=OTHER_FAMILIES)
def vectorized_family(request, domains):
    bucket = replace(BUCKET, learner=request.param, history=10, content=6, exposures=64)
    return EnvironmentContract(
        environment=VectorizedEnvironment(bucket), tasks=[make_task(domain, bucket) for domain in domains]
    )


@pytest.fixture(scope="module", params=OTHER_FAMILIES)
def pytorch_family(request, domains):
    environment = PyTorchEnvironment(request.param, dim=8, batch_size=32, max_users=64)
    return EnvironmentContract(environment=environment, tasks=domains, jitted=False)


@pytest.mark.slow
@pytest.mark.parametrize("check", ALL_CHECKS)
def test_every_family_in_jax(check, vectorized_family):
    check(vectorized_family)


@pytest.mark.slow
@pytest.mark.parametrize("check", ENVIRONMENT_CHECKS)
def test_every_family_in_pytorch(check, pytorch_family):
    check(pytorch_family)


@pytest.mark.parametrize("check", ENVIRONMENT_CHECKS)
def test_an_environment_in_numpy(check, linear):
    check(linear)


# The toy trains no weights: what a learning rate, a schedule, a key or a second group does, it does not have.
WITHOUT_WEIGHTS = {
    "other_keys_give_another_run",
    "lost_weights_score_nothing",
    "losses_that_are_not_finite_are_counted",
    "a_huge_rate_is_survived",
    "a_rate_of_zero_changes_nothing",
    "a_rate_of_zero_holds_one_group",
    "one_group_is_measured_as_one",
    "the_rate_ends_at_zero",
}


@pytest.mark.parametrize("check", ALL_CHECKS)
def test_the_toy_environment(check, toy):
    if check.__name__ not in WITHOUT_WEIGHTS:
        check(toy)
    else:
        with pytest.raises(AssertionError, match="must"):
            check(toy)


FAULTS = {
    "fulfils_the_protocol": [mutants.OneRoleShort(), mutants.UnknownRole(), mutants.FamilyByNumber()],
    "statistics_have_their_shapes": [
        mutants.LossInAVector(),
        mutants.MeanOverGroups(),
        mutants.ValidationInWholePercent(),
    ],
    "statistics_are_in_range": [
        mutants.ValidationInPercent(),
        mutants.CosineNotNormalised(),
        mutants.SquareOfTheMean(),
        mutants.NeverValidates(),
    ],
    "steps_and_samples_are_counted": [mutants.SamplesOfOneStep(), mutants.StepsWithoutTheProbe()],
    "equal_keys_give_equal_bits": [mutants.KeyOfItsOwn()],
    "other_keys_give_another_run": [mutants.OneKeyForAll()],
    "score_and_status_only_look": [mutants.ScoreLeavesTheBestWeights()],
    "runs_do_not_touch_each_other": [mutants.MomentInTheObject()],
    "a_sound_run_is_running": [mutants.AlwaysDiverged(), mutants.CountsFiniteLosses()],
    "score_is_a_share": [mutants.ScoreInPercent(), mutants.NaNBeforeTheFirst()],
    "lost_weights_score_nothing": [
        mutants.LossForScore(),
        mutants.LostIsFirst(),
        mutants.AlwaysRunning(),
        mutants.NaNIsDivergence(),
        mutants.RaisesWhenLost(),
    ],
    "losses_that_are_not_finite_are_counted": [mutants.NothingIsNotFinite(), mutants.CountsFiniteLosses()],
    "a_huge_rate_is_survived": [mutants.RaisesWhenLost(), mutants.AlwaysRunning()],
    "a_rate_of_zero_changes_nothing": [mutants.DecayNotScaledByTheRate(), mutants.ProbeFindsMovement()],
    "a_rate_of_zero_holds_one_group": [mutants.FirstRateForAll(), mutants.RatesSwapped()],
    "every_value_has_an_effect": [
        mutants.Ignores("learning_rate", np.full(2, 0.02)),
        mutants.Ignores("weight_decay", np.full(2, 0.1)),
        mutants.Ignores("beta1", np.full(2, 0.9)),
        mutants.Ignores("dropout", 0.1),
    ],
    "one_group_is_measured_as_one": [mutants.GroupsKeptApart(), mutants.SecondGroupMeasuredTwice()],
    "an_unknown_horizon_has_no_schedule": [mutants.HalfRateWithoutHorizon()],
    "the_rate_keeps_its_share": [mutants.DecaysAllTheWay()],
    "the_rate_ends_at_zero": [mutants.ScheduleLeftOut(), mutants.CosineComesBack()],
    "one_program_serves_all": [mutants.CountOfAnotherType(), mutants.BranchesOnAValue()],
    "runs_in_batches": [mutants.ScoresOnTheHost(), mutants.BatchedDifferently()],
}


@pytest.mark.parametrize(
    ("check", "mutant"),
    [
        pytest.param(CHECKS[name], mutant, id=f"{name}-{type(mutant).__name__}")
        for name, found in FAULTS.items()
        for mutant in found
    ],
)
def test_a_check_finds_the_fault(check, mutant):
    if isinstance(mutant, ToyEnvironment):
        contract = toy_contract(mutant)
    else:
        contract = EnvironmentContract(environment=mutant, tasks=linear_tasks(), jitted=False)
    with pytest.raises(AssertionError, match="must") as failure:
        check(contract)
    raises = isinstance(mutant, mutants.RaisesWhenLost | mutants.BranchesOnAValue)
    assert ("without an exception" in str(failure.value)) == raises


def test_every_check_has_a_fault_to_find():
    assert FAULTS.keys() == CHECKS.keys()


def test_a_value_without_use_is_named_in_inert():
    environment = mutants.Ignores("dropout", 0.1)
    arguments = {"environment": environment, "tasks": linear_tasks(), "jitted": False}
    CHECKS["every_value_has_an_effect"](EnvironmentContract(**arguments, inert=("dropout",)))
    with pytest.raises(AssertionError, match="dropout"):
        CHECKS["every_value_has_an_effect"](EnvironmentContract(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": linear_tasks(1)}, "`tasks` must be two or more, got 1"),
        ({"steps": 3}, "`steps` must be 4 or more, got 3"),
        ({"inert": ("momentum",)}, r"`inert` must name some of .*, got \['momentum'\]"),
        ({"values": Values(0.02, 0.1, 0.9, 0.0)}, "`dropout`"),
    ],
)
def test_what_a_contract_refuses(arguments, message):
    ordinary = {"environment": LinearEnvironment(), "tasks": linear_tasks(), "jitted": False}
    with pytest.raises(InvalidArgumentError, match=message):
        EnvironmentContract(**(ordinary | arguments))


def test_it_loads_neither_jax_nor_torch_nor_envs():
    code = "import metalearn.testing, sys; print({'jax', 'torch', 'envs'} & sys.modules.keys())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "set()"
