"""The hardware cost model: golden costs, a fit that finds what it was made from, and measurements of real steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.hardware import (
    HardwareModel,
    StepCost,
    StepMeasurement,
    Workload,
    fit_hardware,
    measure_steps,
    relative_errors,
    terms,
)
from metalearn.errors import InvalidArgumentError

COST = StepCost(4e-4, 2e-10, 1e-9, 3e-7, 12.0, 4.0, 2.0, 40.0)
MODEL = HardwareModel(device="cpu", costs={"float32": COST}, power=15.0)


def made_measurements(cost=COST, precision="float32", noise=0.0, seed=0):
    """Return measurements over a grid, as the model would have them, times noise."""
    model, rng = HardwareModel(device="made", costs={precision: cost}), np.random.default_rng(seed)
    grid = [
        Workload(entities * dim, batch_size, dim, precision)
        for entities in (1_000, 10_000, 100_000)
        for dim in (8, 32, 128)
        for batch_size in (64, 1_024)
    ]
    return [StepMeasurement(one, model.seconds(one) * np.exp(noise * rng.normal()), model.memory(one)) for one in grid]


def test_costs_worked_by_hand():
    workload = Workload(num_parameters=100_000, batch_size=500, dim=16)
    # bytes moved 8 × 4 × 1e5 = 3.2e6; flops 12 × 500 × 16 = 96 000
    assert terms(workload) == (1.0, 3_200_000, 96_000, 500)
    # 0.4 ms + 3.2e6 × 0.2 ns = 0.64 ms + 96 000 × 1 ns = 0.096 ms + 500 × 300 ns = 0.15 ms
    assert MODEL.seconds(workload) == pytest.approx(1.286e-3)
    # 12 + 4 × 400 000 + 2 × 96 000 + 40 × 500
    assert MODEL.memory(workload) == pytest.approx(1_812_012)
    assert MODEL.energy(workload) == pytest.approx(15.0 * 1.286e-3)


def test_sizes_may_be_traced():
    def seconds(parameters):
        return MODEL.seconds(Workload(parameters, 500, 16))

    traced = jax.jit(jax.vmap(seconds))(jnp.array([1e5, 2e5], jnp.float32))
    np.testing.assert_allclose(traced, [1.286e-3, 1.926e-3], rtol=1e-5)


def test_a_fit_finds_the_costs_that_measurements_were_made_from():
    half = COST._replace(seconds_per_byte=4e-10)
    rows = made_measurements() + made_measurements(half, "bfloat16")
    model = fit_hardware(rows, device="made", power=7.0)
    np.testing.assert_allclose(model.costs["float32"], COST, rtol=1e-4)
    np.testing.assert_allclose(model.costs["bfloat16"], half, rtol=1e-4)
    assert (model.device, model.power) == ("made", 7.0)
    seconds, memory = relative_errors(model, rows)
    assert max(seconds.max(), memory.max()) < 1e-5


def test_relative_errors_worked_by_hand():
    (row, *_) = made_measurements()
    doubled = row._replace(seconds=2.0 * row.seconds, memory=0.8 * row.memory)
    seconds, memory = relative_errors(MODEL, [row, doubled])
    np.testing.assert_allclose(seconds, [0.0, 0.5], atol=1e-12)  # half of what was measured
    np.testing.assert_allclose(memory, [0.0, 0.25], atol=1e-12)  # 1 / 0.8 = 1.25 of it


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.05, 1.5))
def test_the_fit_is_that_of_scipy(seed, noise):
    rows = made_measurements(COST._replace(overhead=1e-5, seconds_per_sample=1e-9), noise=noise, seed=seed)
    ours = np.array(fit_hardware(rows).costs["float32"][:4])
    matrix = np.array([terms(row.workload) for row in rows]) / np.array([row.seconds for row in rows])[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    theirs, residual = scipy.optimize.nnls(matrix / scale, np.ones(len(rows)))
    assert np.linalg.norm(matrix @ ours - 1.0) == pytest.approx(residual, rel=1e-6)
    np.testing.assert_allclose(ours * scale, theirs, atol=1e-6)


def test_costs_are_never_negative():
    rows = [row._replace(seconds=1.0 / row.workload.batch_size) for row in made_measurements()]
    assert min(fit_hardware(rows).costs["float32"]) >= 0.0


def test_real_steps_are_measured():
    rounds = []
    rows = measure_steps(
        entities=(200, 20_000), dims=(8,), batch_sizes=(16, 256), rounds=2, on_round=rounds.append, seed=1
    )
    assert rounds == [1, 2]
    assert [row.workload.batch_size for row in rows] == [16, 256, 16, 256]
    # tables of 200 × 8 numbers and 100 biases
    assert [row.workload.num_parameters for row in rows] == [1_700, 1_700, 170_000, 170_000]
    assert rows[2].seconds > rows[0].seconds > 0.0  # a hundred times the table
    for row in rows:
        # weight, gradient and two moments of 4 bytes each, and three step counters; then what the batch keeps
        assert row.memory > 16 * row.workload.num_parameters + 12
    kept = [row.memory - 16 * row.workload.num_parameters - 12 for row in rows]
    assert kept[0] == kept[2] and kept[1] == pytest.approx(16 * kept[0], rel=0.01)  # it scales with the batch alone
    _, memory = relative_errors(fit_hardware(rows), rows)
    assert memory.max() < 0.01


def test_half_precision_needs_half_the_memory():
    sizes = {"entities": (5_000,), "dims": (8,), "batch_sizes": (16,), "rounds": 1}
    full, half = measure_steps(**sizes, precisions=("float32", "bfloat16"))
    assert half.memory == pytest.approx(0.5 * full.memory, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_hardware([]), "`measurements` must not be empty"),
        (lambda: fit_hardware(made_measurements()[:3]), "must be 4 or more of each precision, got 3 of float32"),
        (
            lambda: fit_hardware([made_measurements()[0]._replace(seconds=0.0)]),
            "`measurements` must be of positive seconds",
        ),
        (
            lambda: MODEL.seconds(Workload(1, 1, 1, "float16")),
            "`precision` must be one of .* got .float16.",
        ),
        (lambda: HardwareModel(device="cpu", costs={}).energy(Workload(1, 1, 1)), "`power` is not known"),
        (lambda: HardwareModel(device="cpu", costs={}, power=0.0), "`power` must be above 0 watts"),
        (
            lambda: HardwareModel(device="cpu", costs={"float32": COST._replace(overhead=-1.0)}),
            "`costs` must not be negative",
        ),
        (
            lambda: measure_steps(entities=(10,), dims=(2,), batch_sizes=(2,), precisions=("int8",)),
            r"`precisions` must be among .*, got \['int8'\]",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
