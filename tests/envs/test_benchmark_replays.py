"""Replayed searches against brute force, hand-worked cases, and what they must not look at."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from envs.benchmark.outcomes import Missing, Outcome, TaskName, collect, recorded_search
from envs.benchmark.replays import (
    best_so_far,
    expected_best,
    greedy_portfolio,
    halve,
    halving_cost,
    leave_one_domain_out,
    pools_of,
    portfolio,
    random_search,
    successive_halving,
)
from metalearn.errors import InvalidArgumentError
from metalearn.trials import Measurement, Trial
from tests.envs.benchmark_trials import make_trial

TASK = "movies/matrix_factorization/2000x512"
MOVIES = TaskName.parse(TASK)


def runs_of(trials: list[Trial], method: str = "sampled", task: TaskName = MOVIES):
    return collect(trials)[task][method]


def draws(selections, tests=None, *, task: str = TASK, replicate: int = 0, **more) -> list[Trial]:
    """Return sampled trials with these selection and test scores, index by index."""
    pairs = zip(selections, selections if tests is None else tests, strict=True)
    return [
        make_trial(
            "sampled", test, selection=chosen, task=task, replicate=replicate, index=index, seed=replicate, **more
        )
        for index, (chosen, test) in enumerate(pairs)
    ]


def outcome(found: Outcome | Missing) -> Outcome:
    assert isinstance(found, Outcome), found
    return found


@given(st.data(), st.integers(1, 7))
def test_expected_best_is_the_mean_over_all_subsets(data: st.DataObject, count: int) -> None:
    selection = data.draw(arrays(np.float64, count, elements=st.integers(0, 100).map(float), unique=True))
    test = data.draw(arrays(np.float64, count, elements=st.integers(0, 9).map(float)))
    budget = data.draw(st.integers(1, count))
    winners = [max(subset, key=lambda draw: selection[draw]) for subset in combinations(range(count), budget)]
    np.testing.assert_allclose(expected_best(selection, test, budget), np.mean(test[winners]))


def test_random_search_counts_the_selected_draws_own_test_score() -> None:
    trials = draws([0.1, 0.3, 0.2], [0.5, 0.1, 0.9]) + draws([0.2, 0.1, 0.4], [0.2, 0.9, 0.3], replicate=1)
    found = outcome(random_search(runs_of(trials), 3))
    assert found.test.tolist() == [0.1, 0.3]
    assert (found.runs, found.seconds) == (3.0, 30.0)


def test_random_search_leaves_out_replicates_that_are_too_small() -> None:
    trials = draws(np.arange(16.0)) + draws([99.0] * 3, replicate=1)
    assert outcome(random_search(runs_of(trials), 16)).test.tolist() == [15.0]
    assert len(outcome(random_search(runs_of(trials), 1)).test) == 2
    found = random_search(runs_of(trials), 64)
    assert isinstance(found, Missing) and "64" in found.reason and "16" in found.reason


def test_reruns_with_other_seeds_choose_nothing() -> None:
    trials = draws([0.1, 0.2])
    rerun = make_trial("sampled", 9.0, replicate=0, index=0, seed=3)
    assert outcome(random_search(runs_of([*trials, rerun]), 2)).test.tolist() == [0.2]
    assert list(pools_of(collect([*trials, rerun]))[MOVIES]) == [(0, 0), (0, 1)]


def test_a_draw_that_never_gave_a_score_is_never_selected() -> None:
    broken = make_trial("sampled", None, index=2)
    diverged = Trial(task=TASK, configuration=dict(broken.configuration), seed=0).diverge(cost=4.0)
    runs = runs_of([*draws([0.1, 0.2]), diverged])
    assert outcome(random_search(runs, 3)).test.tolist() == [0.2]
    # Drawn alone it counts as 0.
    np.testing.assert_allclose(outcome(random_search(runs, 1)).test, [0.1])


def test_halving_by_hand() -> None:
    """9 configurations, 9 validations: rungs after 1, 3 and 9; 9, 3, then 1 of them go on."""
    final = np.array([9.0, 1, 2, 3, 4, 5, 6, 7, 8])
    curves = np.repeat(final[:, None], 9, axis=1)
    curves[0, :2] = 0.0  # best of all, but slow: out at the first rung
    curves[8, :] = np.maximum.accumulate([5.5, 6, 6.5, 7, 8, 8, 8, 8, 8])  # goes through as third
    winner, shares = halve(curves, final)
    assert winner == 7  # 7 > 6.5 at the second rung
    np.testing.assert_allclose(shares * 9, [1, 1, 1, 1, 1, 1, 3, 9, 3])
    np.testing.assert_allclose(shares.sum(), halving_cost(9, 9))


@given(st.integers(1, 40), st.integers(1, 25), st.randoms(use_true_random=False))
def test_halving_costs_what_it_trains(size: int, validations: int, random) -> None:
    curves = np.maximum.accumulate([[random.random() for _ in range(validations)] for _ in range(size)], axis=1)
    winner, shares = halve(curves, curves[:, -1])
    np.testing.assert_allclose(shares.sum(), halving_cost(size, validations))
    assert shares[winner] == 1.0


def test_successive_halving_spends_what_16_runs_cost() -> None:
    scores = np.linspace(0.1, 0.2, 64)
    curve = np.linspace(0.5, 1.0, 20)
    trials = [
        t for s, i in zip(scores, range(64), strict=True) for t in [make_trial("sampled", s, index=i, curve=s * curve)]
    ]
    found = outcome(successive_halving(runs_of(trials)))
    assert found.test.tolist() == [0.2]  # curves do not cross
    np.testing.assert_allclose([found.runs, found.seconds], [15.5, 155.0])
    few = successive_halving(runs_of(trials[:40]))
    assert isinstance(few, Missing) and "40" in few.reason


def test_running_maxima_survive_gaps_and_early_ends() -> None:
    trials = draws([0.1], curve=[0.3, float("nan"), 0.2, 0.4]) + draws([0.1], curve=[float("nan"), 0.2], replicate=1)
    expected = [[0.3, 0.3, 0.3, 0.4], [-np.inf, 0.2, 0.2, 0.2]]
    assert best_so_far(runs_of(trials)).tolist() == expected


@given(arrays(np.float64, st.tuples(st.integers(3, 9), st.integers(1, 4)), elements=st.floats(0, 1)))
def test_the_greedy_portfolio_is_the_literal_one(scores: np.ndarray) -> None:
    literal: list[int] = []
    for _ in range(3):
        rest = [row for row in range(len(scores)) if row not in literal]
        literal.append(
            max(rest, key=lambda row: np.mean([scores[[*literal, row], t].max() for t in range(scores.shape[1])]))
        )
    assert greedy_portfolio(scores, 3) == literal


def other(domain: str) -> str:
    return TASK.replace("movies", domain)


def test_the_fixed_configuration_is_chosen_on_other_domains_alone() -> None:
    # Geometric means over books and games: 0.2 · 0.2 = 0.04, 0.5 · 0.05 = 0.025, 0.1 · 0.3 = 0.03.
    elsewhere = draws([0.2, 0.5, 0.1], task=other("books")) + draws([0.2, 0.05, 0.3], task=other("games"))
    for here in ([0.0, 0.9, 0.1], [0.9, 0.0, 0.1]):
        pools = pools_of(collect(elsewhere + draws(here)))
        assert leave_one_domain_out(pools, MOVIES) == [(0, 0)]


def test_other_families_and_budgets_teach_nothing() -> None:
    foreign = draws([0.1, 0.9], task=other("books").replace("2000", "1000"))
    foreign += draws([0.1, 0.9], task=other("books").replace("matrix_factorization", "two_tower"))
    found = leave_one_domain_out(pools_of(collect(foreign + draws([0.5, 0.1]))), MOVIES)
    assert isinstance(found, Missing) and "another domain" in found.reason


def test_the_fixed_configuration_has_a_constant_schedule() -> None:
    trials = []
    for task in (TASK, other("books")):
        trials += [make_trial("sampled", 0.5, task=task, index=0, schedule="cosine")]
        trials += [make_trial("sampled", 0.4, task=task, index=1, schedule="constant")]
        trials += [make_trial("sampled", 0.3, task=task, index=2, schedule="constant")]
    pools = pools_of(collect(trials))
    assert leave_one_domain_out(pools, MOVIES) == [(0, 0)]
    assert leave_one_domain_out(pools, MOVIES, schedule="constant") == [(0, 1)]
    found = leave_one_domain_out(pools, MOVIES, schedule="constant", size=3)
    assert isinstance(found, Missing) and "constant" in found.reason


def test_a_domain_that_has_barely_begun_does_not_narrow_the_choice() -> None:
    trials = draws([0.1, 0.2, 0.3, 0.9], task=other("books")) + draws([0.5], task=other("games")) + draws([0.1] * 4)
    assert leave_one_domain_out(pools_of(collect(trials)), MOVIES) == [(0, 3)]


def test_a_portfolio_complements_and_is_selected_here() -> None:
    # First 0 (0.4 on both), then 2 (raises games to 0.9) rather than 1 (raises books to 0.5).
    trials = draws([0.4, 0.5, 0.1], task=other("books")) + draws([0.4, 0.1, 0.9], task=other("games"))
    trials += draws([0.2, 0.9, 0.1], [0.7, 0.8, 0.6])
    records = collect(trials)
    pools = pools_of(records)
    assert leave_one_domain_out(pools, MOVIES, size=2) == [(0, 0), (0, 2)]
    found = outcome(portfolio(records[MOVIES]["sampled"], pools, MOVIES, size=2))
    assert (found.test.tolist(), found.runs, found.seconds) == ([0.7], 2.0, 20.0)


def test_a_portfolio_has_a_value_for_each_seed_that_all_its_configurations_have() -> None:
    trials = draws([0.9, 0.8, 0.1], task=other("books")) + draws([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    trials += [make_trial("sampled", 0.4 + 0.1 * seed, index=0, seed=seed) for seed in (1, 2)]
    trials += [make_trial("sampled", 0.05, index=1, seed=2)]
    records = collect(trials)
    arguments = records[MOVIES]["sampled"], pools_of(records), MOVIES
    np.testing.assert_allclose(outcome(portfolio(*arguments)).test, [0.5, 0.5, 0.6])
    assert len(outcome(portfolio(*arguments)).trained) == 3
    # Seeds 0 and 2 have both: on seed 0 configuration 1 is selected, on seed 2 configuration 0.
    np.testing.assert_allclose(outcome(portfolio(*arguments, size=2)).test, [0.6, 0.6])


def test_a_recorded_search_is_cut_at_its_budget() -> None:
    scores = [0.1, 0.3, 0.2, 0.5]
    trials = [make_trial("tpe", score, index=index) for index, score in enumerate(scores)]
    trials += [make_trial("tpe", score, index=index, replicate=1) for index, score in enumerate(scores) if index != 1]
    runs = runs_of(trials, "tpe")
    assert outcome(recorded_search(runs, 2)).test.tolist() == [0.3]  # replicate 1 lacks its second trial
    assert outcome(recorded_search(runs, 1)).test.tolist() == [0.1, 0.1]
    assert isinstance(recorded_search(runs, 5), Missing)


def test_searches_are_won_by_the_selection_score() -> None:
    """Selection and test disagree: the second of two is selected, the first would have tested better."""
    chosen, tests, curve = [0.1, 0.2], [0.9, 0.3], np.linspace(0.1, 1.0, 20)
    trials = [make_trial("tpe", t, selection=s, index=i) for i, (s, t) in enumerate(zip(chosen, tests, strict=True))]
    assert outcome(recorded_search(runs_of(trials, "tpe"), 2)).test.tolist() == [0.3]
    # 18 alike, of which 6, then the first 2 go on: 18 · 0.1 + 6 · 0.2 + 2 · 0.7 runs.
    found = successive_halving(runs_of(draws(chosen + [0.0] * 16, tests + [0.0] * 16, curve=curve)), budget=4.4)
    assert (outcome(found).test.tolist(), outcome(found).runs) == ([0.3], 4.4)


def test_only_ended_and_tested_trials_are_collected_and_the_last_of_equals() -> None:
    first, last = make_trial("default", 0.1), make_trial("default", 0.2)
    running = Trial(task=TASK, configuration={"method": "default", "replicate": 0, "index": 0}, seed=1)
    untested = running.record(Measurement(2000, "validation_ndcg@10", 0.1)).complete()
    records = collect([first, running, untested, last])
    assert [run.test for run in records[MOVIES]["default"]] == [0.2]


@pytest.mark.parametrize(
    ("trial", "argument"),
    [
        (Trial(task="movies", configuration={"method": "a", "replicate": 0, "index": 0}, seed=0), "task"),
        (Trial(task=TASK, configuration={"learning_rate": 0.1}, seed=0), "trial"),
    ],
)
def test_trials_of_something_else_are_refused(trial: Trial, argument: str) -> None:
    ended = trial.record(Measurement(1, "test_ndcg@10", 0.1)).complete()
    with pytest.raises(InvalidArgumentError, match=f"`{argument}`"):
        collect([ended])


def test_only_the_checkpoint_recorded_last_counts():
    """Else some seeds would be another controller's. A base goes by the untrained checkpoint's name."""

    def steered(method: str, checkpoint: str, seed: int, test: float) -> Trial:
        trial = make_trial(method, test, seed=seed)
        return replace(trial, configuration={**trial.configuration, "checkpoint": checkpoint})

    trials = [make_trial("default", 0.1), *(steered("controller", "old", seed, 0.2) for seed in range(3))]
    trials += [steered("base", "old base", 0, 0.15), steered("controller_half", "old", 0, 0.2)]
    trials += [steered("controller", "new", 0, 0.3)]
    methods = collect(trials)[MOVIES]
    assert [run.test for run in methods["controller"]] == [0.3]
    assert {name: len(runs) for name, runs in methods.items()} == {"default": 1, "controller": 1, "base": 1}
    other = replace(
        steered("controller", "of another family", 0, 0.4), task=TASK.replace("matrix_factorization", "two_tower")
    )
    assert [run.test for run in collect([*trials, other])[MOVIES]["controller"]] == [0.3]  # its family's, not the last
