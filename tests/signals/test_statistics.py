"""From sums over a probe to ratios: against the definitions, on real vectors."""

from __future__ import annotations

import numpy as np
import pytest

from metalearn.signals import GROUP_STATISTICS, IntervalStatistics, ProbeSums, interval_statistics

REST = {
    "steps": 10.0,
    "loss_sum": 7.0,
    "loss_square_sum": 5.0,
    "nonfinite": 1.0,
    "validation": 0.25,
    "samples": 640.0,
    "seconds": 2.0,
}


def sums_of(w: np.ndarray, g: np.ndarray, w2: np.ndarray, g2: np.ndarray, w0: np.ndarray, xp=np) -> ProbeSums:
    """Sum over matrices [G, rows, columns] as `ProbeSums` defines it."""

    def total(x: np.ndarray) -> np.ndarray:
        return x.sum((1, 2))

    sums = ProbeSums(
        gradient_square=total(g * g),
        next_gradient_square=total(g2 * g2),
        gradient_dot=total(g * g2),
        update_square=total((w2 - w) ** 2),
        weight_square=total(w2 * w2),
        curvature_dot=total((g2 - g) * (w2 - w)),
        displacement_square=total((w2 - w0) ** 2),
        rows_touched=(g2 != 0).any(2).sum(1).astype(g.dtype),
        rows=np.full(len(g), g.shape[1], g.dtype),
    )
    return ProbeSums(*(xp.asarray(value) for value in sums))


def test_ratios_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    w, g, w2, g2, w0 = rng.normal(size=(5, 3, 6, 4))
    g2[:, :2] = 0.0  # two of six rows untouched
    statistics = interval_statistics(sums_of(w, g, w2, g2, w0), **REST, xp=np)
    norm = lambda x: np.linalg.norm(x.reshape(3, -1), axis=1)  # noqa: E731
    expected = {
        "gradient_norm": norm(g2),
        "gradient_cosine": (g * g2).sum((1, 2)) / (norm(g) * norm(g2)),
        "update_ratio": norm(w2 - w) / norm(w2),
        "curvature": ((g2 - g) * (w2 - w)).sum((1, 2)) / norm(w2 - w) ** 2,
        "weight_norm": norm(w2),
        "displacement": norm(w2 - w0) / norm(w2),
        "touched": np.full(3, 4 / 6),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(statistics, name), value, rtol=1e-12, err_msg=name)
    for name, value in REST.items():
        assert getattr(statistics, name) == value


def test_group_statistics_are_those_with_a_value_for_each_group():
    statistics = interval_statistics(sums_of(*np.ones((5, 3, 2, 2))), **REST, xp=np)
    assert tuple(name for name in IntervalStatistics._fields if np.shape(getattr(statistics, name))) == GROUP_STATISTICS


def test_curvature_is_exact_on_a_quadratic():
    # loss = a/2 ‖w‖², so g = a w and the secant curvature is a, whatever the step.
    w, w2 = np.random.default_rng(1).normal(size=(2, 1, 5, 2))
    statistics = interval_statistics(sums_of(w, 3.5 * w, w2, 3.5 * w2, w), **REST, xp=np)
    np.testing.assert_allclose(statistics.curvature, [3.5])


def test_a_group_at_rest_is_defined():
    zero = np.zeros((1, 3, 2))
    statistics = interval_statistics(sums_of(zero, zero, zero, zero, zero), **REST, xp=np)
    for name in GROUP_STATISTICS:
        assert getattr(statistics, name).tolist() == [0.0], name


def test_a_group_without_matrices_has_touched_nothing():
    sums = sums_of(*np.ones((5, 1, 2, 2)))._replace(rows=np.zeros(1), rows_touched=np.zeros(1))
    assert interval_statistics(sums, **REST, xp=np).touched.tolist() == [0.0]


def test_first_probe_has_no_displacement():
    sums = sums_of(*np.ones((5, 2, 2, 2)))._replace(displacement_square=np.full(2, np.nan))
    assert np.isnan(interval_statistics(sums, **REST, xp=np).displacement).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_numpy_and_jax_agree(scale: float):
    import jax.numpy as jnp

    arrays = np.random.default_rng(2).normal(size=(5, 2, 6, 4)) * scale
    ours = interval_statistics(sums_of(*arrays), **REST, xp=np)
    theirs = interval_statistics(sums_of(*arrays.astype(np.float32), xp=jnp), **REST, xp=jnp)
    for name in GROUP_STATISTICS:
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=2e-5, err_msg=name)
