"""How well simulated domains surround real ones: distances, coverage, two samples, ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.simulated.coverage import (
    cloud_distances,
    pairwise_distances,
    range_coverage,
    rank_correlations,
    robust_scale,
    two_sample_auc,
)
from metalearn.errors import InvalidArgumentError

ROOT = Path(__file__).resolve().parents[2]


def test_scaling_by_hand() -> None:
    # 0, 1, ..., 10: median 5, q10 1, q90 9, so 9 becomes 2.56 * 4 / 8 = 1.28; far values are clipped.
    reference = np.arange(11.0)[:, None]
    assert robust_scale(np.array([[9.0], [1e6], [np.nan]]), reference)[:, 0].tolist()[:2] == pytest.approx([1.28, 4.0])
    undefined = robust_scale(np.array([[3.0]]), np.array([[np.nan], [np.nan]]))
    assert np.isfinite(undefined).all()


def test_coverage_by_hand() -> None:
    simulated = np.stack([np.linspace(0.0, 1.0, 1001), np.full(1001, np.nan)], axis=1)
    real = np.array([[0.01, 1.0], [0.5, np.nan], [0.97, np.nan], [0.98, np.nan]])
    # 0.025 to 0.975 holds two of four; a feature that no simulated domain defines covers nothing.
    assert range_coverage(real, simulated).tolist() == [0.5, 0.0]
    assert np.isnan(range_coverage(real[1:, 1:], simulated[:, 1:])).all()


def test_distances_count_what_the_query_defines() -> None:
    cloud = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, np.nan]])
    # sqrt((9 + 16) / 2) = 3.5355; the third lacks what the first query defines.
    assert pairwise_distances(np.array([[0.0, 0.0], [1.0, np.nan]]), cloud).ravel() == pytest.approx(
        [0.0, np.sqrt(12.5), np.inf, 1.0, 2.0, 1.0]
    )
    assert cloud_distances(cloud[:2], cloud[:2], neighbours=1, own=True) == pytest.approx([np.sqrt(12.5)] * 2)
    assert np.isinf(cloud_distances(cloud[:1], cloud[:2], neighbours=3)).all()


def test_two_samples_are_told_apart_only_where_they_differ() -> None:
    rng = np.random.default_rng(0)
    real, simulated = rng.standard_normal((120, 6)), rng.standard_normal((300, 6))
    groups = np.arange(120) // 10
    assert two_sample_auc(real, simulated, groups, rng=rng) == pytest.approx(0.5, abs=0.1)
    assert two_sample_auc(real + np.array([2.0, 0, 0, 0, 0, 0]), simulated, groups, rng=rng) > 0.85
    with pytest.raises(InvalidArgumentError, match="`groups`"):
        two_sample_auc(real, simulated, np.zeros(120), rng=rng)


def test_a_domain_is_not_recognised_by_its_own_views() -> None:
    # Every domain sits somewhere of its own: a classifier that had seen other views of it would tell all apart.
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((10, 20))
    real = np.repeat(centres, 8, axis=0) + 0.01 * rng.standard_normal((80, 20))
    auc = two_sample_auc(real, rng.standard_normal((200, 20)), np.repeat(np.arange(10), 8), rng=rng)
    assert auc < 0.75


def test_rank_correlation_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (6, 12)).astype(float), rng.standard_normal((6, 12))
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert rank_correlations(first, second) == pytest.approx(expected)
    assert rank_correlations(np.ones((1, 4)), np.arange(4.0)[None]).tolist() == [0.0]


@pytest.mark.slow
def test_the_script_runs_without_data(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/simulator_coverage.py", "--quick"]
    command += ["--output", str(tmp_path / "report.json"), "--picture", str(tmp_path / "picture.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"] == summary and (tmp_path / "picture.png").stat().st_size > 10_000
    assert summary["coverage_bundled_after"] > summary["coverage_bundled_before"]
