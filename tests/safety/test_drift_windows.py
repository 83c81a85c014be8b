"""Windows of data: stability index, maximum mean discrepancy, many tests at once, and profiles of windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions
from metalearn.profiles import profile_domain
from metalearn.safety.drift import (
    ProfileWatchConfig,
    ProfileWatchState,
    benjamini_hochberg,
    level_of_look,
    look,
    mean_discrepancy,
    population_stability,
    profile_row,
    watch_profile,
)


def test_stability_index_by_hand():
    # Two bins, split at the median 1.5 of (0, 1, 2, 3): 2 and 2 of the reference, 1 and 3 of the current window. With
    # half a count added to each: p = (.5, .5), q = (1.5/5, 3.5/5) = (.3, .7); .2 ln(.5/.3) - .2 ln(.5/.7) = 0.16946.
    found = population_stability(np.arange(4.0), np.array([0.0, 2.0, 3.0, 3.0]), num_bins=2)
    assert found.index == pytest.approx(0.2 * math.log(0.5 / 0.3) - 0.2 * math.log(0.5 / 0.7))


def test_stability_gives_its_p_value_under_the_null():
    rng = np.random.default_rng(0)
    p_values = [population_stability(rng.standard_normal(400), rng.standard_normal(300)).p_value for _ in range(600)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.027)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)


def test_values_that_go_missing_are_a_change():
    rows = np.random.default_rng(0).standard_normal(500)
    holes = np.where(np.arange(500) % 5 == 0, np.nan, rows)
    assert population_stability(rows, holes).p_value < 1e-6
    assert population_stability(np.full(10, np.nan), np.full(10, np.nan)).p_value == 1.0
    assert population_stability(np.ones(10), np.ones(10)).p_value == 1.0


def direct_discrepancy(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    """Return MMD² as its definition says, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * bandwidth**2))

    def within(rows: np.ndarray) -> float:
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(kernel(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_discrepancy_is_its_definition_at_the_median_distance():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 0.5
    both = np.concatenate([x, y])
    distances = [np.linalg.norm(both[i] - both[j]) for i in range(12) for j in range(i)]
    found = mean_discrepancy(x, y, seed=0, num_permutations=10)
    # np.median of an even number of squared distances is between two: the bandwidth is its root.
    assert found.bandwidth == pytest.approx(math.sqrt(np.median(np.square(distances))))
    assert found.square == pytest.approx(direct_discrepancy(x, y, found.bandwidth))


def test_discrepancy_permutes_as_every_split_would():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((3, 2)), rng.standard_normal((3, 2)) + 1.0
    both, found = np.concatenate([x, y]), mean_discrepancy(x, y, seed=0, num_permutations=4000)
    from itertools import combinations

    splits = [
        direct_discrepancy(both[list(part)], both[[i for i in range(6) if i not in part]], found.bandwidth)
        for part in combinations(range(6), 3)
    ]
    exact = np.mean(np.array(splits) >= found.square - 1e-12)
    assert found.p_value == pytest.approx(exact, abs=0.03)


def test_discrepancy_keeps_its_level_and_sees_what_means_do_not():
    rng = np.random.default_rng(0)
    false = sum(
        mean_discrepancy(*rng.standard_normal((2, 20, 2)), seed=seed, num_permutations=99).p_value <= 0.05
        for seed in range(300)
    )
    assert 5 <= false <= 26, "15 expected; 0.3rd and 99.7th percentile"
    x = rng.standard_normal((100, 2))
    y = rng.standard_normal((100, 2)) @ np.linalg.cholesky(np.array([[1.0, 0.9], [0.9, 1.0]])).T
    assert mean_discrepancy(x, y, seed=0, num_permutations=199).p_value <= 0.01
    assert mean_discrepancy(x, y, seed=0) == mean_discrepancy(x, y, seed=0)


@pytest.mark.parametrize(("x", "y"), [(np.zeros((1, 2)), np.zeros((5, 2))), (np.zeros((5, 2)), np.zeros((5, 3)))])
def test_windows_that_do_not_compare_are_refused(x, y):
    with pytest.raises(InvalidArgumentError):
        mean_discrepancy(x, y, seed=0)


def test_benjamini_hochberg_by_hand():
    # Of the paper's example, section 3.3: at 0.05 the four smallest are rejected, 0.0095 ≤ 4/15 · 0.05 = 0.0133.
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1.0,
    ]
    order = np.random.default_rng(0).permutation(15)
    assert benjamini_hochberg(np.array(p)[order], 0.05).sum() == 4
    # A step-up rule: 0.03 fails at 2/3 · 0.04 = 0.0267, but 0.04 passes at 0.04, and takes it along.
    assert benjamini_hochberg(np.array([0.04, 0.03, np.nan, 0.01]), 0.04).tolist() == [True, True, False, True]
    assert not benjamini_hochberg(np.array([]), 0.1).any()


@settings(max_examples=50)
@given(hnp.arrays(float, st.integers(1, 20), elements=st.floats(0, 1)), st.floats(0.001, 0.5))
def test_benjamini_hochberg_agrees_with_scipy(p_values: np.ndarray, level: float):
    from scipy.stats import false_discovery_control

    adjusted = false_discovery_control(p_values)
    clear = np.abs(adjusted - level) > 1e-9
    assert (benjamini_hochberg(p_values, level) == (adjusted <= level))[clear].all()


def test_looks_spend_the_rate_evenly():
    assert level_of_look(2.0) == 0.002
    rng, level = np.random.default_rng(0), 0.1
    reference = rng.standard_normal((20, 6))
    false = 0
    for seed in range(200):
        reference = rng.standard_normal((20, 6)) @ np.linalg.cholesky(0.7 * np.ones((6, 6)) + 0.3 * np.eye(6)).T
        current = rng.standard_normal((4, 6)) @ np.linalg.cholesky(0.7 * np.ones((6, 6)) + 0.3 * np.eye(6)).T
        false += look(reference, current, level=level, marginal="mean", seed=seed).significant
    assert false <= 32, "20 expected at most; beyond the 99.5th percentile"


def test_a_look_names_what_moved():
    rng = np.random.default_rng(0)
    reference, current = rng.standard_normal((500, 4)), rng.standard_normal((300, 4))
    current[:, 2] += 1.0
    found = look(reference, current, level=0.01, marginal="stability", seed=0)
    assert found.significant
    assert found.rejected.tolist() == [False, False, True, False]
    constant = np.concatenate([reference, np.ones((500, 1))], axis=1)
    assert not look(constant, constant[:300], level=0.01, marginal="mean", seed=0).significant


@settings(max_examples=30)
@given(st.lists(st.floats(width=32), min_size=8, max_size=8), st.integers(0, 5))
def test_whatever_is_undefined_is_left_out(values: list[float], seed: int):
    reference = np.random.default_rng(seed).standard_normal((12, 2))
    current = np.array(values).reshape(4, 2)
    found = look(reference, current, level=0.1, marginal="mean", seed=seed)
    assert isinstance(found.significant, bool)
    assert found.rejected.shape == (2,)


def window(rng: np.random.Generator, skew: float) -> tuple[float, ...]:
    """Return the meta-features of 400 interactions whose items are used by a power of their rank."""
    item = (60 * rng.random(400) ** skew).astype(int)
    return profile_row(profile_domain(Interactions.from_arrays(rng.integers(0, 80, 400), item)))


def watch(skews: list[float], seed: int, config: ProfileWatchConfig | None = None):
    rng, state, verdicts = np.random.default_rng(seed), ProfileWatchState(), []
    for skew in skews:
        state, verdict = watch_profile(state, window(rng, skew), config or ProfileWatchConfig())
        verdicts.append(verdict)
    return state, verdicts


def test_profiles_of_a_steady_domain_are_quiet():
    assert not any(said.alarm or said.kind for said in watch([1.5] * 60, 0)[1])


def test_profiles_tell_a_step():
    _, verdicts = watch([1.5] * 35 + [3.0] * 14, 1)
    first = next(i for i, said in enumerate(verdicts) if said.alarm)
    assert 35 <= first <= 38
    confirmed = next(said for said in verdicts[first + 1 :] if said.kind)
    assert (confirmed.since, confirmed.kind) == (35, "abrupt")
    assert len(confirmed.moved) > 3
    assert confirmed.size > 2.0


def test_profiles_tell_a_slope():
    kinds = []
    for seed in range(2):
        skews = [1.5] * 30 + [1.5 + 0.06 * step for step in range(30)]
        first, confirmed, *_ = (said for said in watch(skews, seed)[1] if said.kind)
        assert first.alarm
        assert not confirmed.alarm
        kinds.append(confirmed.kind)
        assert 28 <= first.since <= 45
    assert kinds == ["gradual"] * 2


def test_profiles_of_weekends_are_a_season():
    state, verdicts = watch([2.5 if day % 7 >= 5 else 1.5 for day in range(60)], 3)
    kinds = [said.kind for said in verdicts if said.kind]
    assert kinds == ["seasonal"]
    assert state.period == 7
    assert not any(said.alarm for said in verdicts)
