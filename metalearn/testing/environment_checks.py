"""What every environment must do; see `metalearn.testing.EnvironmentContract` for how to run the checks.

A statistic may be NaN, "not measured", in some intervals; checks go by those in which it was measured.

Shape legend: G parameter group, T interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from metalearn.controller.actions import Values
from metalearn.controller.config import ROLES
from metalearn.meta_training.environment import Environment, Status
from metalearn.signals import GROUP_STATISTICS, IntervalStatistics
from metalearn.testing.environment_contract import EnvironmentContract, Run

COUNTS = ("steps", "samples", "nonfinite")
"""Statistics that may be integers."""
WILD_RATES = (1e2, 1e10, 1e30)
BATCH_TOLERANCE = 1e-2
"""Relative; a batched program sums in another order."""


def fulfils_the_protocol(contract: EnvironmentContract) -> None:
    """It has every member of `Environment`: a known role for each of at least one group, a family or None, samples."""
    environment = contract.environment
    _require(isinstance(environment, Environment), "the environment must have every member of `Environment`")
    _require(environment.num_groups >= 1, f"`num_groups` must be 1 or more, got {environment.num_groups}")
    _require(
        len(environment.roles) == environment.num_groups and set(environment.roles) <= set(ROLES),
        f"`roles` must name one of {ROLES} for each of {environment.num_groups} groups, got {environment.roles}",
    )
    _require(isinstance(environment.family, str | None), f"`family` must be a str or None, got {environment.family!r}")
    _require(
        environment.samples_per_step >= 1, f"`samples_per_step` must be 1 or more, got {environment.samples_per_step}"
    )


def statistics_have_their_shapes(contract: EnvironmentContract) -> None:
    """Group statistics are [G], the others scalars; all are floating (float32 under jit), counts may be integers."""
    for name, values in contract.run(intervals=1).statistics._asdict().items():  # shapes were checked on the way
        dtype = values.dtype
        floating = dtype == np.float32 if contract.jitted else np.issubdtype(dtype, np.floating)
        _require(
            floating or (name in COUNTS and np.issubdtype(dtype, np.integer)),
            f"`{name}` must be {'float32' if contract.jitted else 'floating'}"
            f"{' or integer' if name in COUNTS else ''}, got {dtype}",
        )


def statistics_are_in_range(contract: EnvironmentContract) -> None:
    """Cosines are in [-1, 1], shares in [0, 1], norms not negative, and a sum of squares is not below its mean's."""
    statistics = contract.run().statistics
    bounds = {name: (0.0, math.inf) for name in ("gradient_norm", "update_ratio", "weight_norm", "displacement")}
    bounds |= {"gradient_cosine": (-1.0, 1.0), "touched": (0.0, 1.0), "validation": (0.0, 1.0)}
    for name, (low, high) in bounds.items():
        values = _measured(statistics, name)
        _require(
            bool((values >= low - 1e-5).all() and (values <= high + 1e-5).all()),
            f"`{name}` must be in [{low:g}, {high:g}], got {values.min():g} to {values.max():g}",
        )
    least = statistics.loss_sum**2 / statistics.steps
    _require(
        bool((statistics.loss_square_sum >= least * (1.0 - 1e-3)).all()),
        f"`loss_square_sum` must be at least loss_sum² / steps, {least}, got {statistics.loss_square_sum}",
    )


def steps_and_samples_are_counted(contract: EnvironmentContract) -> None:
    """`steps` is the plan's, and `samples` is steps times `samples_per_step`."""
    for steps in (contract.steps, 2):
        statistics = contract.run(steps=steps, intervals=1).statistics
        _require(
            float(statistics.steps[0]) == steps,
            f"`steps` must be the plan's `num_steps`, {steps}, got {statistics.steps[0]}",
        )
        samples = steps * contract.environment.samples_per_step
        _require(
            float(statistics.samples[0]) == samples,
            f"`samples` must be steps × samples_per_step, {samples}, got {statistics.samples[0]}",
        )


def equal_keys_give_equal_bits(contract: EnvironmentContract) -> None:
    """The same task, keys, values and plans give the same statistics and score, to the bit."""
    first, second = contract.run(), contract.run()
    _require_equal(first, second, "equal keys must give equal bits")


def other_keys_give_another_run(contract: EnvironmentContract) -> None:
    """Keys decide initial weights, batches and dropout: other keys, other losses."""
    losses = [contract.run(seed=seed).statistics.loss_sum for seed in (0, 1)]
    _require(
        not np.array_equal(*losses), f"other keys must give another run, got the losses {losses[0]} from two seeds"
    )


def score_and_status_only_look(contract: EnvironmentContract) -> None:
    """To ask for score and status in the middle of a run changes nothing of what follows."""
    _require_equal(contract.run(), contract.run(look=True), "`score` and `status` must not change the run")


def runs_do_not_touch_each_other(contract: EnvironmentContract) -> None:
    """All that a run is lies in its state: two runs that take turns go as each would alone."""
    alone = [contract.run(task=task, seed=task, intervals=2).statistics for task in (0, 1)]
    states = [contract.reset(task=task, seed=task) for task in (0, 1)]
    for index in (0, 1):
        for task in (0, 1):
            states[task], statistics = contract.step(states[task], contract.plan(index), index, task=task, seed=task)
            _require(
                _same(statistics.loss_sum, alone[task].loss_sum[index]),
                f"runs must not touch each other: alone the loss sum is {alone[task].loss_sum[index]}, beside another "
                f"run {statistics.loss_sum}; keep what a run is in its state",
            )


def a_sound_run_is_running(contract: EnvironmentContract) -> None:
    """Under ordinary values every task has status RUNNING, from reset on, and no loss that is not finite."""
    for task in range(len(contract.tasks)):
        for intervals in (1, 3):
            run = contract.run(task=task, intervals=intervals)
            _require(
                run.status == Status.RUNNING,
                f"`status` must be RUNNING (0) under ordinary values, got {run.status} for task {task}",
            )
            _require(
                not run.statistics.nonfinite.any(),
                f"`nonfinite` must be 0 in a sound run, got {run.statistics.nonfinite}",
            )
    status = int(contract.call("status", contract.reset()))
    _require(status == Status.RUNNING, f"`status` must be RUNNING (0) before the first step, got {status}")


def score_is_a_share(contract: EnvironmentContract) -> None:
    """The score is in [0, 1], before the first interval as after any."""
    for task in range(len(contract.tasks)):
        for score in (
            float(contract.call("score", contract.converted_tasks[task], contract.reset(task=task))),
            contract.run(task=task).score,
        ):
            _require(0.0 <= score <= 1.0, f"`score` must be in [0, 1], got {score} for task {task}")


def lost_weights_score_nothing(contract: EnvironmentContract) -> None:
    """A run whose first update makes its weights NaN scores 0 and has status NONFINITE."""
    for horizon in (math.nan, 3.0 * contract.steps):
        run = contract.run(learning_rate=math.nan, horizon=horizon)
        _require(run.score == 0.0, f"`score` of weights that are NaN must be 0, got {run.score}")
        _require(run.status == Status.NONFINITE, f"`status` must be NONFINITE (2) for NaN weights, got {run.status}")
        validation = run.statistics.validation
        _require(not np.nan_to_num(validation).any(), f"`validation` of NaN weights must be 0 or NaN, got {validation}")


def losses_that_are_not_finite_are_counted(contract: EnvironmentContract) -> None:
    """`nonfinite` counts the steps with a loss that is not finite, at most all of them."""
    run = contract.run(learning_rate=math.nan, intervals=2).statistics
    _require(
        bool((run.nonfinite >= 1).all() and (run.nonfinite <= run.steps).all()),
        f"`nonfinite` must count the steps whose loss is not finite, 1 to {contract.steps} of each interval with NaN "
        f"weights, got {run.nonfinite}",
    )


def a_huge_rate_is_survived(contract: EnvironmentContract) -> None:
    """Whatever the learning rate, nothing is raised, the score is in [0, 1], and the status of a wreck tells."""
    run = None
    for rate in WILD_RATES:
        run = contract.run(learning_rate=rate)
        _require(0.0 <= run.score <= 1.0, f"`score` must be in [0, 1] at learning rate {rate:g}, got {run.score}")
        wild = run.statistics.validation[~np.isnan(run.statistics.validation)]
        _require(
            bool(((wild >= 0.0) & (wild <= 1.0)).all()),
            f"`validation` must be in [0, 1] or NaN at learning rate {rate:g}, got {wild}",
        )
    assert run is not None
    _require(
        run.status in (Status.DIVERGED, Status.NONFINITE),
        f"`status` must be DIVERGED (1) or NONFINITE (2) at learning rate {WILD_RATES[-1]:g}, got {run.status}",
    )


def a_rate_of_zero_changes_nothing(contract: EnvironmentContract) -> None:
    """At learning rate 0 no weight moves, by its decay neither, and validation stays where it is."""
    for horizon in (math.nan, 1e6):
        statistics = contract.run(learning_rate=0.0, horizon=horizon).statistics
        moved = _measured(statistics, "update_ratio")
        _require(not moved.any(), f"`update_ratio` must be 0 at learning rate 0, got {moved}")
        validation = _measured(statistics, "validation")
        _require(bool(np.ptp(validation) <= 1e-6), f"`validation` must not change at learning rate 0, got {validation}")


def a_rate_of_zero_holds_one_group(contract: EnvironmentContract) -> None:
    """Values act on their own group: rate 0 in one holds that one, and no other."""
    groups = contract.environment.num_groups
    for held in range(groups):
        rates = np.where(np.arange(groups) == held, 0.0, contract.values.learning_rate)
        ratio = contract.run(learning_rate=rates).statistics.update_ratio
        for group in range(groups):
            moved = ratio[~np.isnan(ratio[:, group]), group]
            _require(
                len(moved) > 0 and bool((moved > 0.0).all() if group != held else (moved == 0.0).all()),
                f"rate 0 in group {held} must hold it and no other, got update ratios {moved} in group {group}",
            )


def every_value_has_an_effect(contract: EnvironmentContract) -> None:
    """Each hyperparameter that is not inert changes the training losses."""
    ordinary = contract.run()
    for name in [name for name in Values._fields if name not in contract.inert]:
        value = getattr(contract.values, name)
        changed = contract.run(**{name: 0.5 * value})
        _require(
            not np.array_equal(changed.statistics.loss_sum, ordinary.statistics.loss_sum),
            f"`{name}` must have an effect, got the same losses at {value} and {0.5 * value}; if the model has no use "
            "for it, name it in `inert`",
        )


def one_group_is_measured_as_one(contract: EnvironmentContract) -> None:
    """With `single_group` the first value holds for all parameters, and statistics of other groups are NaN."""
    groups = contract.environment.num_groups
    values: dict[str, Any] = {
        name: np.where(np.arange(groups) == 0, getattr(contract.values, name), math.nan)
        for name in ("learning_rate", "weight_decay", "beta1")
    }
    run = contract.run(single_group=True, **values)
    _require(
        run.status == Status.RUNNING and not run.statistics.nonfinite.any(),
        f"with `single_group` the first group's value must hold for all, got status {run.status} with NaN for others",
    )
    for name in GROUP_STATISTICS:
        rows = getattr(run.statistics, name)
        _require(
            not np.isnan(rows[:, 0]).all() and bool(np.isnan(rows[:, 1:]).all()),
            f"with `single_group` `{name}` must be measured in the first group and NaN in the others, got {rows[-1]}",
        )


def an_unknown_horizon_has_no_schedule(contract: EnvironmentContract) -> None:
    """With a horizon of NaN the rate holds: training goes as under a horizon so far that the cosine has not begun."""
    unknown, far = (contract.run(horizon=horizon).statistics.loss_sum for horizon in (math.nan, 1e9))
    _require(
        bool(np.allclose(unknown, far, rtol=1e-4)),
        f"with an unknown horizon the rate must hold, got losses {unknown}, with one of 1e9 steps {far}",
    )


def the_rate_keeps_its_share(contract: EnvironmentContract) -> None:
    """The rate decays to the plan's share of it: where that is all, training goes as without a horizon."""
    steps = float(contract.steps)
    unknown = contract.run(intervals=1).statistics.loss_sum
    kept = contract.run(intervals=1, horizon=steps, decay_to=1.0).statistics.loss_sum
    _require(
        bool(np.allclose(unknown, kept, rtol=1e-4)),
        f"with a `decay_to` of 1 the rate must hold, got losses {kept}, without a horizon {unknown}",
    )


def the_rate_ends_at_zero(contract: EnvironmentContract) -> None:
    """With a known horizon, nothing being kept, the rate falls to zero; after it a tenth of the rate is held."""
    steps = contract.steps

    def movement(horizon: float) -> np.ndarray:
        runs = [contract.run(seed=seed, intervals=1, horizon=horizon).statistics for seed in range(4)]
        return np.concatenate([_measured(run, "update_ratio", required=False) for run in runs])

    ended, held = movement(float(steps)).mean(), movement(math.nan).mean()
    _require(
        bool(ended < 0.2 * held),
        f"the rate must fall to zero at the horizon, got an update ratio of {ended:.3g} in its last steps, "
        f"{held:.3g} without a horizon",
    )
    after = _measured(contract.run(first_step=steps, horizon=float(steps)).statistics, "update_ratio").mean()
    _require(
        # Not a tenth: where the rate was low all along, gradients are still large.
        bool(after < 0.6 * held),
        f"after a horizon that was too short a tenth of the rate must be held, got an update ratio of {after:.3g}, "
        f"{held:.3g} without a horizon",
    )


def one_program_serves_all(contract: EnvironmentContract) -> None:
    """Tasks of one shape, values and plans are traced: nothing is compiled twice."""
    for task in range(len(contract.tasks)):
        contract.run(task=task, intervals=2)
    contract.run(steps=2, first_step=8, horizon=64.0, single_group=True, learning_rate=0.5, dropout=0.0)
    _require(
        max(contract.traces.values()) == 1,
        f"one program must serve every task of one shape, got traces {dict(contract.traces)}; give states the same "
        "shapes and dtypes from reset on, and beware of weak types such as that of jnp.full((), jnp.nan)",
    )


def runs_in_batches(contract: EnvironmentContract) -> None:
    """Whole runs work under jax.lax.map of jax.vmap, as rollouts use them, and give what they give one by one."""
    import jax
    import jax.numpy as jnp

    environment, count = contract.environment, len(contract.tasks)
    tasks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *contract.converted_tasks)

    def run(arguments: tuple[Any, Any]) -> tuple[Any, Any]:
        """Runs an episode of one task and seed."""
        task, seed = arguments

        def interval(state: Any, index: Any) -> tuple[Any, Any]:
            plan = contract.plan(0)._replace(first_step=index * jnp.int32(contract.steps))
            state, statistics = environment.step(
                task, state, contract.group_values(), plan, key=contract.key(seed, index + 1)
            )
            return state, statistics.loss_sum

        state = environment.reset(task, key=contract.key(seed, 0))
        state, losses = jax.lax.scan(interval, state, jnp.arange(2))
        return losses, environment.score(task, state)

    try:
        losses, scores = jax.jit(lambda inputs: jax.lax.map(run, inputs, batch_size=count))((tasks, jnp.arange(count)))
    except Exception as error:
        raise AssertionError(
            f"runs must work in batches, under jax.lax.map of jax.vmap; this raised {type(error).__name__}: {error}"
        ) from error
    alone = [contract.run(task=task, seed=task, intervals=2) for task in range(count)]
    expected = np.stack([one.statistics.loss_sum for one in alone])
    _require(
        bool(np.allclose(losses, expected, rtol=BATCH_TOLERANCE)),
        f"runs in a batch must go as they do one by one, got losses {losses} instead of {expected}",
    )
    apart = np.abs(np.asarray(scores) - [one.score for one in alone])
    _require(bool((apart <= 0.05).all()), f"runs in a batch must score as they do one by one, got scores {apart} apart")


Check = Callable[[EnvironmentContract], None]

ENVIRONMENT_CHECKS: tuple[Check, ...] = (
    fulfils_the_protocol,
    statistics_have_their_shapes,
    statistics_are_in_range,
    steps_and_samples_are_counted,
    equal_keys_give_equal_bits,
    other_keys_give_another_run,
    score_and_status_only_look,
    runs_do_not_touch_each_other,
    a_sound_run_is_running,
    score_is_a_share,
    lost_weights_score_nothing,
    losses_that_are_not_finite_are_counted,
    a_huge_rate_is_survived,
    a_rate_of_zero_changes_nothing,
    a_rate_of_zero_holds_one_group,
    every_value_has_an_effect,
    one_group_is_measured_as_one,
    an_unknown_horizon_has_no_schedule,
    the_rate_keeps_its_share,
    the_rate_ends_at_zero,
)
"""For every environment, each a function of an `EnvironmentContract`."""

JITTED_ENVIRONMENT_CHECKS: tuple[Check, ...] = (one_program_serves_all, runs_in_batches)
"""Further ones for jitted environments."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def _same(first: Any, second: Any) -> bool:
    return np.array_equal(first, second, equal_nan=True)


def _require_equal(first: Run, second: Run, sentence: str) -> None:
    """Compares all but seconds, which may be of a clock."""
    for name in IntervalStatistics._fields:
        if name != "seconds":
            values = getattr(first.statistics, name), getattr(second.statistics, name)
            _require(_same(*values), f"{sentence}, got `{name}` {values[0]} and {values[1]}")
    _require(first.score == second.score, f"{sentence}, got scores {first.score} and {second.score}")


def _measured(statistics: IntervalStatistics, name: str, *, required: bool = True) -> np.ndarray:
    """Returns a statistic where it was measured, flat."""
    values = getattr(statistics, name)
    values = values[~np.isnan(values)]
    _require(not required or len(values) > 0, f"`{name}` must be measured in some interval, got NaN in all")
    return values
