"""A private profile as released: its noise, its price, and that nothing but the extra makes it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from metalearn import DomainProfile, Interactions, load_controller
from metalearn.errors import InvalidArgumentError, PrivacyError
from metalearn.privacy import PrivacyLedger, release_profile
from metalearn.privacy.release import ACTIVITY_SHARE, interactions_kept, laplace, noisy_statistics
from metalearn.privacy.statistics import activity_histogram


def table(users: int = 400, items: int = 60) -> Interactions:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users), 10)
    item = (items * rng.random(10 * users) ** 2).astype(int)
    return Interactions(user=user, item=item, num_users=users, num_items=items).compact()


def ledger(folder: Path, epsilon: float = 4.0) -> PrivacyLedger:
    return PrivacyLedger(folder / "ledger.jsonl", epsilon=epsilon, delta=0.0)


@pytest.mark.parametrize(("sensitivity", "epsilon"), [(1, 0.3), (7, 0.7)])
def test_noise_is_discrete_laplace_and_as_wide_as_epsilon_asks(sensitivity: int, epsilon: float):
    pytest.importorskip("opendp")
    measurement = laplace(sensitivity, epsilon)
    assert measurement.map(sensitivity) == pytest.approx(epsilon, rel=1e-9)
    noise = np.array(measurement([0] * 20_000))
    oracle = scipy.stats.dlaplace(epsilon / sensitivity)
    low, high = int(oracle.ppf(0.005)), int(oracle.ppf(0.995))
    observed = np.array(
        [(noise == k).sum() for k in range(low, high + 1)] + [(noise < low).sum(), (noise > high).sum()]
    )
    expected = 20_000 * np.append(oracle.pmf(np.arange(low, high + 1)), [oracle.cdf(low - 1), oracle.sf(high)])
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-6


@pytest.mark.parametrize(("sensitivity", "epsilon"), [(1, 0.3), (7, 0.7)])
def test_the_noise_bounds_the_ratio_of_likelihoods_of_neighbours(sensitivity: int, epsilon: float):
    oracle = scipy.stats.dlaplace(epsilon / sensitivity)
    outputs = np.arange(-200, 200)
    loss = oracle.logpmf(outputs) - oracle.logpmf(outputs - sensitivity)
    assert np.abs(loss).max() == pytest.approx(epsilon)


def test_a_release_costs_the_epsilon_asked_for_and_its_noise_is_independent_each_time():
    pytest.importorskip("opendp")
    rows = table()
    releases = [noisy_statistics(rows, num_items=rows.num_items, epsilon=1.0) for _ in range(40)]
    assert all(spent == pytest.approx(1.0, rel=1e-9) for _, spent in releases)
    noise = np.stack([statistics.activity for statistics, _ in releases]) - activity_histogram(rows)
    # Variance of the discrete Laplace distribution with e^-a = q: 2 q / (1 - q)².
    q = math.exp(-ACTIVITY_SHARE)
    assert noise.std() == pytest.approx(math.sqrt(2 * q) / (1 - q), rel=0.15)
    assert len({statistics.activity.tobytes() for statistics, _ in releases}) == len(releases)


def test_a_profile_is_released_charged_and_taken_by_a_controller(tmp_path: Path):
    pytest.importorskip("opendp")
    rows, kept = table(), ledger(tmp_path)
    profile = release_profile(rows, num_items=60, epsilon=2.0, ledger=kept, tenant="shop")
    (charge,) = kept.charges("shop")
    assert charge.release == profile.fingerprint and charge.epsilon == pytest.approx(2.0, rel=1e-9)
    assert DomainProfile.from_json(profile.to_json()).fingerprint == profile.fingerprint
    assert abs(profile.num_users - rows.num_users) < 100
    session = load_controller().start(profile, family="matrix_factorization", horizon=200, batch_size=64)
    assert np.isfinite(session.ask().groups[0]["learning_rate"])


def test_a_release_beyond_the_budget_yields_no_profile(tmp_path: Path):
    pytest.importorskip("opendp")
    kept = ledger(tmp_path, epsilon=1.0)
    with pytest.raises(PrivacyError, match="budget"):
        release_profile(table(), num_items=60, epsilon=1.5, ledger=kept, tenant="shop")
    assert kept.charges() == []


def test_what_is_kept_of_a_user_depends_on_public_numbers_only():
    assert [interactions_kept(n, e) for n, e in ((10, 0.5), (10_000, 1.0), (10_000, 8.0))] == [1, 34, 277]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_items": 1}, "num_items"),
        ({"num_items": 59}, "60 items occur"),
        ({"num_items": 60.0}, "num_items"),
        ({"epsilon": 0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"epsilon": "1"}, "epsilon"),
        ({"ledger": None}, "ledger"),
        ({"interactions": [[1, 2]]}, "interactions"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(options: dict, name: str, tmp_path: Path):
    arguments = {"interactions": table(), "num_items": 60, "epsilon": 1.0, "ledger": ledger(tmp_path), "tenant": "t"}
    arguments |= options
    with pytest.raises(InvalidArgumentError, match=name):
        release_profile(arguments.pop("interactions"), **arguments)
    assert ledger(tmp_path).charges() == []


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("opendp", "opendp.prelude", "dp_accounting", "dp_accounting.pld"):
        monkeypatch.setitem(sys.modules, module, None)
    kept = ledger(tmp_path)
    with pytest.raises(PrivacyError, match=r"pip install 'metalearn\[privacy\]'"):
        release_profile(table(), num_items=60, epsilon=1.0, ledger=kept, tenant="shop")
    assert kept.charges() == []
    other = PrivacyLedger(tmp_path / "other.jsonl", epsilon=4.0, delta=1e-6)
    other.charge("shop", 1.0, release="x")
    with pytest.raises(PrivacyError, match=r"pip install 'metalearn\[privacy\]'"):
        other.charge("shop", 1.0, release="y")
    assert len(other.charges()) == 1
