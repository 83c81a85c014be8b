"""What is to be run, less what is recorded, in units that one process runs at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.benchmark.floors import FLOORS, run_floor
from envs.benchmark.methods import CONFIGURED, NUM_SAMPLED, STEERED, Controllers, sampled_configurations
from envs.benchmark.outcomes import Missing, TaskName, collect
from envs.benchmark.replays import leave_one_domain_out, pools_of
from envs.benchmark.searches import POPULATION, run_population, run_tpe
from envs.benchmark.store import Identity, TrialStore
from envs.benchmark.tasks import FLOOR_TASK, Domains, Task
from envs.benchmark.trials import configuration_of, run_trial
from envs.domains import Domain
from metalearn.errors import InvalidArgumentError
from metalearn.trials import Trial

METHODS = ("sampled", *CONFIGURED, *STEERED, *FLOORS, "tpe", "pbt")
"""Everything that can be run."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is run of every method.

    Args:
      replicates: of each search.
      trials: configurations of a replicate, at most 64.
      seeds: of each method that is one run.
    """

    replicates: int = 5
    trials: int = NUM_SAMPLED
    seeds: int = 5

    def __post_init__(self) -> None:
        for name in ("replicates", "trials", "seeds"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.trials > NUM_SAMPLED:
            raise InvalidArgumentError(f"`trials` must be at most {NUM_SAMPLED}, got {self.trials}")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Trials that belong together: one run, or a search whose later trials depend on the earlier ones.

    Args:
      task: what is trained; of floors only the domain counts.
      identities: of its trials.
      hyperparameters: of the one trial; None where running it finds them.
    """

    task: Task
    identities: tuple[Identity, ...]
    hyperparameters: Mapping[str, Any] | None = None

    @property
    def method(self) -> str:
        return self.identities[0].method

    def is_recorded(self, recorded: Mapping[Identity, Trial]) -> bool:
        """Whether all its trials are recorded with these hyperparameters: another checkpoint's are not."""
        if any(identity not in recorded for identity in self.identities):
            return False
        if self.hyperparameters is None:
            return True
        (identity,) = self.identities
        return recorded[identity].configuration == configuration_of(identity, self.hyperparameters)


def make_plan(tasks: Sequence[Task], methods: Iterable[str], size: Size, controllers: Controllers) -> list[Unit]:
    """Returns the units of some methods on some tasks.

    The first replicate, or seed, of every task comes before the second of any: a run that is stopped has something
    of all tasks.

    Raises:
      InvalidArgumentError: there is no such method.
    """
    methods = list(methods)
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise InvalidArgumentError(f"`methods` must be of {list(METHODS)}, got {unknown}")
    first_of_domain = {task.domain: task for task in reversed(tasks)}
    ordered = [
        (turn, place, unit)
        for place, method in enumerate(methods)
        for task in (first_of_domain.values() if method in FLOORS else tasks)
        for turn, unit in _units(method, task, size, controllers)
    ]
    return [unit for _, _, unit in sorted(ordered, key=lambda entry: entry[:2])]


def _units(method: str, task: Task, size: Size, controllers: Controllers) -> Iterator[tuple[int, Unit]]:
    """Yields the units of one method on one task, each with the replicate or seed that it is."""
    if method == "sampled":
        for replicate in range(size.replicates):
            for index, drawn in enumerate(sampled_configurations(replicate, task.family)[: size.trials]):
                yield replicate, _single(task, method, drawn, replicate=replicate, index=index, seed=replicate)
    elif method in ("tpe", "pbt"):
        count = size.trials if method == "tpe" else POPULATION
        for replicate in range(size.replicates):
            identities = tuple(Identity(task.name, method, replicate, index, replicate) for index in range(count))
            yield replicate, Unit(task=task, identities=identities)
    elif method in FLOORS:
        yield 0, Unit(task=task, identities=(Identity(FLOOR_TASK.format(task.domain), method, 0, 0, 0),))
    elif method in CONFIGURED:
        for index, given in enumerate(CONFIGURED[method]):
            for seed in range(size.seeds):
                yield seed, _single(task, method, given, index=index, seed=seed)
    else:
        task = task.prolonged(STEERED[method].length)
        for seed in range(size.seeds):
            hyperparameters = {"checkpoint": controllers.fingerprint(method, task.family)}
            yield seed, _single(task, method, hyperparameters, seed=seed)


def _single(
    task: Task, method: str, hyperparameters: Mapping[str, Any], *, replicate: int = 0, index: int = 0, seed: int
) -> Unit:
    identity = Identity(task.name, method, replicate, index, seed)
    return Unit(task=task, identities=(identity,), hyperparameters=hyperparameters)


def rerun(tasks: Sequence[Task], keys: Mapping[str, Sequence[tuple[int, int]]], seeds: int) -> list[Unit]:
    """Returns units that run sampled configurations again, with seeds 0, 1, ...

    Args:
      tasks: on which.
      keys: (replicate, index) of the configurations, by name of the task.
      seeds: how many.
    """
    drawn = {
        (task.family, replicate): sampled_configurations(replicate, task.family)
        for task in tasks
        for replicate, _ in keys[task.name]
    }
    return [
        _single(task, "sampled", drawn[task.family, replicate][index], replicate=replicate, index=index, seed=seed)
        for seed in range(seeds)
        for task in tasks
        for replicate, index in keys[task.name]
    ]


def chosen_elsewhere(tasks: Sequence[Task], recorded: Iterable[Trial]) -> dict[str, list[tuple[int, int]]]:
    """Returns which sampled configurations do best on the other domains: of a constant rate, and of any schedule.

    Returns:
      One or two (replicate, index) by name of the task; none where nothing can be chosen yet.
    """
    pools = pools_of(collect(recorded))
    keys: dict[str, list[tuple[int, int]]] = {}
    for task in tasks:
        found = [leave_one_domain_out(pools, TaskName.parse(task.name), schedule=kind) for kind in ("constant", None)]
        keys[task.name] = sorted({key for chosen in found if not isinstance(chosen, Missing) for key in chosen})
    return keys


def run_unit(unit: Unit, domains: Domains, controllers: Controllers, store: TrialStore) -> None:
    """Runs a unit and appends its trials to the store, each as soon as it has ended."""
    for trial in _trials(unit, domains[unit.task.domain], controllers, store):
        store.append([trial])


def _trials(unit: Unit, domain: Domain, controllers: Controllers, store: TrialStore) -> Iterator[Trial]:
    if unit.method == "tpe":
        yield from run_tpe(unit.identities, unit.task, domain, controllers, store.read())
    elif unit.method == "pbt":
        yield from run_population(unit.identities, unit.task, domain, controllers)
    elif unit.method in FLOORS:
        yield run_floor(unit.identities[0], domain)
    else:
        yield run_trial(unit.identities[0], unit.hyperparameters or {}, unit.task, domain, controllers)
