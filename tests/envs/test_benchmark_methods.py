"""What is run: schedules, the shared random configurations, optimizers and controllers."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from envs.benchmark import methods
from envs.benchmark.methods import (
    CONFIGURED,
    SCHEDULES,
    SHIPPED,
    STEERED,
    Controllers,
    sampled_configurations,
    start_run,
)
from envs.benchmark.store import Identity
from envs.benchmark.tasks import BUDGETS, Task, find_sources, make_tasks
from envs.benchmark.trials import run_trial
from envs.domains import Domain, make_domain
from envs.recommenders import RECOMMENDERS, Evaluator
from envs.recommenders.training import TrainingSettings, train
from envs.simulated import SimulatedPrior, simulate
from metalearn import Controller
from metalearn.controller.actions import schedule_multiplier
from metalearn.controller.config import CONTROLLED
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.release import with_cues
from metalearn.meta_training.warm_start import SEARCH_BOX
from metalearn.torch import MetaScheduler
from metalearn.trials import TrialStatus

SETTINGS = TrainingSettings(steps=40, batch_size=32, dim=4, validations=4)
TASK = Task(domain="simulated", family="matrix_factorization", settings=SETTINGS)
CONFIGURATION = {**SHIPPED, "learning_rate": 0.03, "dropout": 0.2, "schedule": "linear"}


@pytest.fixture(scope="module")
def domain() -> Domain:
    prior = SimulatedPrior(users=(120, 120), items=(60, 60), history=(12.0, 12.0))
    return make_domain(simulate(prior, seed=1), name="simulated", split="leave-last-out")


@pytest.fixture(scope="module")
def controllers() -> Controllers:
    return Controllers()


def rates(make, steps: int) -> np.ndarray:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(found)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)),
        ("linear", lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 200)),
        ("constant", lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        (
            "warmup_cosine",
            lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
                optimizer,
                [
                    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 20),
                    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 180),
                ],
                [20],
            ),
        ),
    ],
)
def test_schedules_are_torchs(name: str, make):
    mine = np.array([SCHEDULES[name](step / 200) for step in range(200)])
    np.testing.assert_allclose(mine, rates(make, 200), atol=1e-9)


def test_one_cycle_is_torchs():
    """Torch's reaches its peak and its end a step early, so its own steps are mapped to shares of a run."""
    theirs = rates(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=1001, cycle_momentum=False),
        1001,
    )
    peak = 0.3 * 1001 - 1
    step = np.arange(1001)
    share = np.where(step < peak, 0.3 * step / peak, 0.3 + 0.7 * (step - peak) / (1000 - peak))
    np.testing.assert_allclose([SCHEDULES["one_cycle"](p) for p in share], theirs, atol=1e-9)


def test_the_cosine_is_the_controllers():
    progress = np.linspace(0, 1, 11)[:-1]
    cosine = np.array([SCHEDULES["cosine"](p) for p in progress])
    np.testing.assert_allclose(0.3 + 0.7 * cosine, schedule_multiplier(progress, np, 0.3))


def test_random_configurations_are_uniform_in_the_box():
    drawn = [c for replicate in range(40) for c in sampled_configurations(replicate, "matrix_factorization")]
    assert len(drawn) == 40 * 64
    scales = {"learning_rate": np.log, "weight_decay": np.log, "beta1": lambda b: np.log(b / (1 - b)), "dropout": None}
    for name in CONTROLLED:
        scale = scales[name] or (lambda value: value)
        low, high = scale(np.array(SEARCH_BOX[name]))
        shares = (scale(np.array([c[name] for c in drawn])) - low) / (high - low)
        assert stats.kstest(shares, "uniform").pvalue > 0.01, name
    counts = np.array([sum(c["schedule"] == name for c in drawn) for name in SCHEDULES])
    assert stats.chisquare(counts).pvalue > 0.01


def test_random_configurations_never_change():
    """Recorded trials are of these: what they were when the first were recorded."""
    assert sampled_configurations(1, "matrix_factorization")[3] == {
        "learning_rate": 0.0580878,
        "weight_decay": 1.00759,
        "beta1": 0.962598,
        "dropout": 0.450037,
        "schedule": "constant",
    }
    assert sampled_configurations(0, "matrix_factorization") != sampled_configurations(1, "matrix_factorization")


def test_a_family_draws_in_its_own_box():
    """Its learning rates alone: the shares of the box are the same."""
    towers, other = (sampled_configurations(0, family) for family in ("two_tower", "click_model"))
    assert min(c["learning_rate"] for c in towers) < SEARCH_BOX["learning_rate"][0]
    assert [{**c, "learning_rate": 0} for c in towers] == [{**c, "learning_rate": 0} for c in other]


def test_a_plain_run_is_what_a_loop_of_ones_own_gives(domain: Domain, controllers: Controllers):
    trial = run_trial(Identity(TASK.name, "sampled", 3, 7, 5), CONFIGURATION, TASK, domain, controllers)
    model = RECOMMENDERS["matrix_factorization"].for_domain(
        domain, dim=4, dropout=0.2, generator=torch.Generator().manual_seed(5)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.01, betas=(0.9, 0.999))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
    result = train(model, optimizer, methods.PlainSchedule(10, decay), domain, SETTINGS, seed=5)
    values = {(m.step, m.metric): m.value for m in trial.measurements}
    for step, value in result.validation:
        assert values.pop((step, "validation_ndcg@10")) == pytest.approx(value, abs=2e-3)
    assert values == {
        (40, "selection_ndcg@10"): pytest.approx(Evaluator(domain, "validation")(model).mean_ndcg, abs=2e-3),
        (40, "test_ndcg@10"): pytest.approx(result.test["ndcg@10"], abs=2e-3),
        (40, "test_recall@10"): pytest.approx(result.test["recall@10"], abs=2e-3),
    }
    assert trial.configuration == {"method": "sampled", "replicate": 3, "index": 7, **CONFIGURATION}
    assert (trial.task, trial.seed, trial.status) == ("simulated/matrix_factorization/40x32", 5, TrialStatus.COMPLETE)
    assert trial.cost > 0


@pytest.mark.parametrize("family", RECOMMENDERS)
def test_every_family_repeats_itself(family: str, domain: Domain, controllers: Controllers):
    task = replace(TASK, family=family)
    identity = Identity(task.name, "sampled", 0, 0, 1)
    first, second = (run_trial(identity, CONFIGURATION, task, domain, controllers) for _ in range(2))
    assert first.measurements == second.measurements
    assert first.best("selection_ndcg@10") is not None


def test_final_scores_are_of_as_many_users_as_the_task_says(domain: Domain, controllers: Controllers):
    identity = Identity(TASK.name, "sampled", 0, 0, 1)
    few = replace(TASK, final_users=10)
    trial = run_trial(identity, CONFIGURATION, few, domain, controllers)
    run = start_run("sampled", CONFIGURATION, few, domain, controllers, seed=1)
    run.advance()
    run.restore_best()
    expected = Evaluator(domain, "validation", max_users=10)(run.model).mean_ndcg
    assert trial.best("selection_ndcg@10").value == pytest.approx(expected, abs=1e-6)
    whole = run_trial(identity, CONFIGURATION, TASK, domain, controllers)
    assert trial.best("selection_ndcg@10") != whole.best("selection_ndcg@10")


def test_a_run_that_diverges_is_recorded(domain: Domain, controllers: Controllers):
    broken = {**CONFIGURATION, "learning_rate": 1e37, "weight_decay": 0.0, "schedule": "constant"}
    trial = run_trial(Identity(TASK.name, "sampled", 0, 0, 0), broken, TASK, domain, controllers)
    assert trial.status is TrialStatus.DIVERGED
    assert trial.best("test_ndcg@10").value == 0.0


@pytest.mark.parametrize("method", ["schedule_free", "prodigy"])
def test_given_configurations_run(method: str, domain: Domain, controllers: Controllers):
    for index, configuration in enumerate(CONFIGURED[method]):
        identity = Identity(TASK.name, method, 0, index, 0)
        trial = run_trial(identity, configuration, TASK, domain, controllers)
        assert trial.status is TrialStatus.COMPLETE
        assert len(trial.measurements) == 7


def test_schedule_free_is_validated_at_its_average(domain: Domain, controllers: Controllers):
    run = start_run("schedule_free", CONFIGURED["schedule_free"][0], TASK, domain, controllers, seed=0)
    run.advance()
    trained = run.model.user.weight.detach().clone()
    run.optimizer.eval()
    averaged = Evaluator(domain, "validation")(run.model).mean_ndcg
    assert run.result.validation[-1] == (40, averaged)
    assert not torch.equal(trained, run.model.user.weight)
    run.optimizer.train()
    assert torch.allclose(trained, run.model.user.weight, atol=1e-5)  # it had gone on from where it trained


def test_a_missing_package_is_named(domain: Domain, controllers: Controllers, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(methods, "import_module", missing)
    with pytest.raises(InvalidArgumentError, match="package prodigyopt; install the `benchmark` extra"):
        start_run("prodigy", CONFIGURED["prodigy"][0], TASK, domain, controllers, seed=0)
    assert importlib.import_module("prodigyopt")


@pytest.mark.parametrize("method", STEERED)
def test_controllers_are_told_what_the_method_says(
    method: str, domain: Domain, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
):
    made: list[MetaScheduler] = []
    told: list[int | None] = []

    def make(*positional, **named):
        told.append(named["horizon"])
        made.append(MetaScheduler(*positional, **named))
        return made[-1]

    monkeypatch.setattr(methods, "MetaScheduler", make)
    task = TASK.prolonged(STEERED[method].length)
    start_run(method, {}, task, domain, controllers, seed=0).advance(40)
    expected = {"decaying": 40, "half": 20, "double": 80}.get(method.partition("_")[2])
    assert told == [expected]
    assert made[0].interval == task.settings.interval


@pytest.mark.parametrize("told", [1, 0])
def test_the_untrained_controller_keeps_to_its_base(told: int, domain: Domain, controllers: Controllers):
    method = "base_decaying" if told else "base"
    run = start_run(method, {}, TASK, domain, controllers, seed=0)
    run.advance()
    scheduler = run.steering
    config = controllers.untrained.config
    family = config.families.index(TASK.family) + 1 if TASK.family in config.families else 0
    base = controllers.trained.checkpoint.base[family, told]
    expected = {name: config.space[name].decode(float(unit)) for name, unit in zip(CONTROLLED, base, strict=True)}
    assert len(scheduler.decisions) > 2
    for decision in scheduler.decisions:
        for group in decision.groups:
            assert group == {name: pytest.approx(expected[name], rel=1e-5) for name in group}
        assert decision.run["dropout"] == pytest.approx(expected["dropout"], abs=1e-6)


def test_a_fingerprint_is_of_what_a_family_is_given(controllers: Controllers):
    checkpoint = controllers.trained.checkpoint
    trained, *others = checkpoint.config.families
    base = checkpoint.base.copy()
    base[checkpoint.config.family_index(others[0])] += 0.1
    changed = Controllers()
    changed.trained = Controller(replace(checkpoint, base=base))  # a cached property: in place of the loaded one
    for method in ("controller", "base"):
        assert changed.fingerprint(method, trained) == controllers.fingerprint(method, trained)
        assert changed.fingerprint(method, others[0]) != controllers.fingerprint(method, others[0])
    assert controllers.fingerprint("controller", trained) != controllers.fingerprint("base", trained)


def test_the_cue_of_a_family_is_in_its_fingerprint_and_not_in_its_base(controllers: Controllers):
    checkpoint = controllers.trained.checkpoint
    cued, other = checkpoint.config.at_rest[:2]
    changed, plain = Controllers(), Controllers()
    changed.trained, plain.trained = (Controller(with_cues(checkpoint, families)) for families in ([cued], []))
    assert changed.fingerprint("controller", cued) != plain.fingerprint("controller", cued)
    for method, family in (("base", cued), ("controller", other), ("base", other)):
        assert changed.fingerprint(method, family) == plain.fingerprint(method, family)
    assert changed.untrained.config.cued == ()


def test_tasks_are_named_by_their_budget():
    tasks = make_tasks(["movies", "games"], ["two_tower", "click_model"])
    assert [task.name for task in tasks] == [
        "movies/two_tower/2000x256",
        "movies/click_model/2000x512",
        "games/two_tower/2000x256",
        "games/click_model/2000x512",
    ]
    assert tasks[0].prolonged(10).name == "movies/two_tower/20000x256"
    assert set(BUDGETS) == set(RECOMMENDERS)
    with pytest.raises(InvalidArgumentError, match=r"`families` must be of .*, got \['tower'\]"):
        make_tasks(["movies"], ["tower"])


def test_domains_are_found_by_name(tmp_path):
    (tmp_path / "shop.parquet").touch()
    assert list(find_sources(files=[tmp_path / "shop.parquet"])) == ["uci_online_retail", "shop"]
    (tmp_path / "uci_online_retail.parquet").touch()
    with pytest.raises(InvalidArgumentError, match="several domains are called"):
        find_sources(files=[tmp_path / "uci_online_retail.parquet"])
