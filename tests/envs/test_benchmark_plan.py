"""What is run: everything once, nothing that is recorded, the first of all tasks before the second of any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from envs.benchmark.methods import CONFIGURED, Controllers, sampled_configurations
from envs.benchmark.plan import METHODS, Size, Unit, chosen_elsewhere, make_plan, rerun, run_unit
from envs.benchmark.store import Identity, TrialStore, identity
from envs.benchmark.tasks import Domains, Task, make_tasks
from envs.benchmark.trials import configuration_of
from envs.domains import Domain, make_domain
from envs.recommenders.training import TrainingSettings
from envs.simulated import SimulatedPrior, simulate
from metalearn.errors import InvalidArgumentError
from metalearn.trials import Measurement, Trial

SIZE = Size(replicates=2, trials=4, seeds=2)
TASKS = make_tasks(["movies", "games"], ["two_tower"])
CONTROLLERS = Controllers()


def recorded_trial(unit: Unit) -> Trial:
    (key,) = unit.identities
    configuration = configuration_of(key, unit.hyperparameters or {})
    return Trial(task=key.task, configuration=configuration, seed=key.seed).complete()


def test_a_plan_has_everything_once():
    plan = make_plan(TASKS, METHODS, SIZE, CONTROLLERS)
    keys = [key for unit in plan for key in unit.identities]
    assert len(keys) == len(set(keys))
    counts = {method: sum(key.method == method for key in keys) for method in METHODS}
    single = {method: 4 * len(given) for method, given in CONFIGURED.items()}
    steered = dict.fromkeys((name for name in METHODS if name.startswith(("controller", "base"))), 4)
    floors = dict.fromkeys(("popularity", "item_knn", "ease"), 2)
    assert counts == {"sampled": 16, **single, **steered, **floors, "tpe": 16, "pbt": 64}
    assert Identity("movies/floor/0x0", "ease", 0, 0, 0) in keys
    assert Identity("movies/two_tower/20000x256", "controller_long", 0, 0, 1) in keys
    assert Identity("movies/two_tower/2000x256", "sampled", 1, 3, 1) in keys
    assert all(key.seed == key.replicate for key in keys if key.method in ("sampled", "tpe", "pbt"))


def test_first_replicates_come_first():
    plan = make_plan(TASKS, ["sampled", "default"], SIZE, CONTROLLERS)
    order = [(unit.identities[0].seed, unit.method, unit.task.domain) for unit in plan]
    runs = [key for place, key in enumerate(order) if place == 0 or order[place - 1] != key]
    pairs = [(method, domain) for method in ("sampled", "default") for domain in ("movies", "games")]
    assert runs == [(seed, *pair) for seed in (0, 1) for pair in pairs]


def test_what_is_recorded_is_not_run_again():
    plan = make_plan(TASKS, ["sampled", "controller"], SIZE, CONTROLLERS)
    recorded = {unit.identities[0]: recorded_trial(unit) for unit in plan}
    assert all(unit.is_recorded(recorded) for unit in plan)
    dropped = plan[5].identities[0]
    del recorded[dropped]
    assert [unit.identities[0] for unit in plan if not unit.is_recorded(recorded)] == [dropped]


def test_another_checkpoint_is_run_again():
    (unit, *_) = make_plan(TASKS, ["controller"], SIZE, CONTROLLERS)
    recorded = {unit.identities[0]: recorded_trial(unit)}
    assert unit.is_recorded(recorded)
    assert not replace(unit, hyperparameters={"checkpoint": "0" * 16}).is_recorded(recorded)


def test_a_search_is_recorded_when_all_its_trials_are():
    (unit, *_) = make_plan(TASKS, ["tpe"], SIZE, CONTROLLERS)
    recorded = {
        key: Trial(task=key.task, configuration=configuration_of(key, {"found": 1}), seed=key.seed).complete()
        for key in unit.identities
    }
    assert unit.is_recorded(recorded)
    recorded.popitem()
    assert not unit.is_recorded(recorded)


def test_arguments_are_checked():
    with pytest.raises(InvalidArgumentError, match=r"`methods` must be of .* got \['grid'\]"):
        make_plan(TASKS, ["grid"], SIZE, CONTROLLERS)
    with pytest.raises(InvalidArgumentError, match="`trials` must be at most 64, got 65"):
        Size(trials=65)
    with pytest.raises(InvalidArgumentError, match="`seeds` must be at least 1, got 0"):
        Size(seeds=0)


def test_configurations_that_are_best_elsewhere_are_rerun():
    """Index 3 is best on games and so is rerun on movies, where another is; of constant rates it is index 1's turn."""
    schedules = [sampled_configurations(0, "matrix_factorization")[index]["schedule"] for index in range(64)]
    constant, other = schedules.index("constant"), next(i for i, name in enumerate(schedules) if name != "constant")
    favourites = {"movies": (0.9, 0.1), "games": (0.3, 0.8)}
    trials = []
    for unit in make_plan(TASKS, ["sampled"], Size(replicates=1), CONTROLLERS):
        key = unit.identities[0]
        scores = dict(zip((constant, other), favourites[unit.task.domain], strict=True))
        trial = replace(recorded_trial(unit), status="running")
        values = [Measurement(2000, f"{name}_ndcg@10", scores.get(key.index, 0.01)) for name in ("selection", "test")]
        trials.append(trial.record(*values).complete())
    keys = chosen_elsewhere(TASKS, trials)
    assert keys == {TASKS[0].name: sorted([(0, constant), (0, other)]), TASKS[1].name: [(0, constant)]}
    units = rerun(TASKS, keys, 2)
    assert sorted(unit.identities[0] for unit in units) == sorted(
        Identity(task.name, "sampled", *key, seed) for task in TASKS for key in keys[task.name] for seed in (0, 1)
    )
    for unit in units:
        assert unit.hyperparameters == sampled_configurations(0, unit.task.family)[unit.identities[0].index]
    assert chosen_elsewhere(TASKS, []) == {task.name: [] for task in TASKS}


class Opened(Domains):
    """Domains that are there already."""

    def __init__(self, domain: Domain) -> None:
        super().__init__({}, Path("unused"))
        self._open = {"simulated": domain}


@pytest.mark.parametrize("method", METHODS)
def test_units_record_their_trials(method: str, tmp_path: Path):
    prior = SimulatedPrior(users=(80, 80), items=(40, 40), history=(10.0, 10.0))
    domain = make_domain(simulate(prior, seed=1), name="simulated", split="leave-last-out")
    settings = TrainingSettings(steps=20, batch_size=16, dim=2, validations=10)
    task = Task(domain="simulated", family="matrix_factorization", settings=settings)
    store = TrialStore(tmp_path / "trials.jsonl")
    (unit, *_) = make_plan([task], [method], Size(trials=2), CONTROLLERS)
    run_unit(unit, Opened(domain), CONTROLLERS, store)
    assert set(store.read()) == set(unit.identities)
    assert all(identity(trial) == key for key, trial in store.read().items())
    assert unit.is_recorded(store.read())
