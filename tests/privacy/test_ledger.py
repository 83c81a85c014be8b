"""The ledger: what releases cost together, what it refuses, and what becomes of it in bad hands."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalearn.errors import InvalidArgumentError, MetalearnError, PrivacyError
from metalearn.privacy import PrivacyLedger
from metalearn.privacy.ledger import composed_epsilon


def ledger(folder: Path, epsilon: float = 2.0, delta: float = 0.0) -> PrivacyLedger:
    return PrivacyLedger(folder / "ledger.jsonl", epsilon=epsilon, delta=delta)


def test_charges_add_up_for_each_tenant_and_outlive_the_object(tmp_path: Path):
    first = ledger(tmp_path)
    assert first.charge("a", 0.5, release="x") == 0.5
    assert first.charge("a", 1.0, release="y") == 1.5
    assert first.charge("b", 2.0, release="z") == 2.0
    again = ledger(tmp_path)
    assert (again.spent("a"), again.spent("b"), again.spent("c")) == (1.5, 2.0, 0.0)
    assert [(c.tenant, c.epsilon, c.release) for c in again.charges()] == [
        ("a", 0.5, "x"),
        ("a", 1.0, "y"),
        ("b", 2.0, "z"),
    ]


def test_what_would_exceed_the_budget_is_refused_and_not_written(tmp_path: Path):
    kept = ledger(tmp_path)
    kept.charge("a", 1.5, release="x")
    before = kept.path.read_bytes()
    with pytest.raises(PrivacyError, match=r"would bring tenant 'a' to 2\.1 .* budget .* is 2; it has spent 1\.5 in 1"):
        kept.charge("a", 0.6, release="y")
    assert kept.path.read_bytes() == before
    assert kept.charge("a", 0.5, release="y") == 2.0


def test_two_releases_compose_as_worked_by_hand():
    pytest.importorskip("dp_accounting")
    # Randomised response with epsilon 1 says the truth with p = e / (1 + e) = 0.7311. Of two, both speak for the one
    # neighbour with probability p² under it and (1 - p)² = p² / e² under the other; one each speaks for neither. So
    # delta(eps) = p² - e^eps (1 - p)² = p² (1 - e^(eps - 2)) for eps from 0 to 2, and delta = 0.1 gives
    # eps = 2 + ln(1 - 0.1 / 0.5344) = 1.7929.
    p = math.e / (1 + math.e)
    assert composed_epsilon([1.0, 1.0], 0.1) == pytest.approx(2 + math.log(1 - 0.1 / p**2), abs=2e-3)
    assert composed_epsilon([1.0, 1.0], 0.0) == 2.0


def test_many_small_releases_cost_less_than_their_sum_and_never_less_than_optimal():
    pytest.importorskip("dp_accounting")
    count, epsilon, delta = 60, 0.1, 1e-5
    found = composed_epsilon([epsilon] * count, delta)
    # Theorem 3.3 of Kairouz, Oh and Viswanath: at (k - 2i) eps the least delta is a sum of binomial terms.
    for i in range(count // 2 + 1):
        terms = [
            math.comb(count, j) * (math.exp(epsilon * (count - j)) - math.exp(epsilon * (count - 2 * i + j)))
            for j in range(i)
        ]
        at = (count - 2 * i) * epsilon
        least = sum(terms) / (1 + math.exp(epsilon)) ** count
        if least > delta:
            assert found > at
        else:
            highest_allowed = at
    assert found <= highest_allowed + 1e-3
    assert found < 0.7 * count * epsilon


def test_a_ledger_with_a_delta_allows_what_the_sum_would_not(tmp_path: Path):
    pytest.importorskip("dp_accounting")
    kept = ledger(tmp_path, epsilon=3.9, delta=1e-2)
    for number in range(5):
        spent = kept.charge("a", 0.79, release=str(number))
    assert spent <= 3.9 < 5 * 0.79


@given(st.lists(st.floats(0.01, 3.0), max_size=6))
def test_without_a_delta_epsilons_add(epsilons: list[float]):
    assert composed_epsilon(epsilons, 0.0) == pytest.approx(sum(epsilons))


@pytest.mark.parametrize(
    ("epsilon", "delta", "name"),
    [
        *((epsilon, 0.0, "epsilon") for epsilon in (0, -1, math.nan, math.inf, True)),
        *((1.0, delta, "delta") for delta in (1.0, -0.1, math.nan)),
    ],
)
def test_a_budget_that_is_none_is_refused(epsilon: float, delta: float, name: str, tmp_path: Path):
    with pytest.raises(InvalidArgumentError, match=f"`{name}`"):
        PrivacyLedger(tmp_path / "ledger.jsonl", epsilon=epsilon, delta=delta)
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, "1"])
def test_a_charge_that_is_none_is_refused(epsilon: float, tmp_path: Path):
    kept = ledger(tmp_path)
    with pytest.raises(InvalidArgumentError, match="`epsilon`"):
        kept.charge("a", epsilon, release="x")
    assert kept.charges() == []


def test_another_budget_does_not_open_the_ledger(tmp_path: Path):
    ledger(tmp_path)
    with pytest.raises(PrivacyError, match=r"with the budget \{'epsilon': 2.0, 'delta': 0.0\}"):
        ledger(tmp_path, epsilon=20.0)


def test_a_line_that_a_kill_cut_off_is_dropped_and_the_rest_stays(tmp_path: Path):
    kept = ledger(tmp_path)
    kept.charge("a", 0.5, release="x")
    whole = kept.path.read_bytes()
    kept.charge("a", 0.25, release="y")
    for cut in range(len(whole), len(kept.path.read_bytes())):
        kept.path.write_bytes(kept.path.read_bytes()[:cut] if cut < kept.path.stat().st_size else whole)
        assert kept.spent("a") == 0.5
        kept.charge("a", 0.25, release="y")
        assert [c.epsilon for c in ledger(tmp_path).charges("a")] == [0.5, 0.25]


@given(content=st.binary(max_size=80), headed=st.booleans())
def test_whatever_a_file_holds_it_is_read_or_refused_by_name(
    content: bytes, headed: bool, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    header = json.dumps({"ledger": 1, "epsilon": 2.0, "delta": 0.0}).encode() + b"\n"
    path.write_bytes((header if headed else b"") + content + b"\n")
    try:
        charges = PrivacyLedger(path, epsilon=2.0, delta=0.0).charges()
    except MetalearnError as error:
        assert str(path) in str(error)
        assert path.read_bytes().endswith(content + b"\n")
    else:
        assert charges == []


def test_threads_and_processes_never_exceed_the_budget_together(tmp_path: Path):
    kept = ledger(tmp_path, epsilon=2.0)
    code = (
        "import sys; from metalearn.privacy import PrivacyLedger; from metalearn.errors import PrivacyError\n"
        "ledger = PrivacyLedger(sys.argv[1], epsilon=2.0, delta=0.0)\n"
        "for n in range(20):\n"
        "    try: ledger.charge('a', 0.125, release=str(n))\n"
        "    except PrivacyError: pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(kept.path)]) for _ in range(2)]

    def charge(number: int) -> bool:
        try:
            kept.charge("a", 0.125, release=f"thread {number}")
        except PrivacyError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(charge, range(20)))
    assert [process.wait() for process in processes] == [0, 0]
    assert len(kept.charges("a")) == 16 and kept.spent("a") == 2.0
