"""The monitor: statistics worked out by hand, gaps as NaN, one transfer an interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metalearn.errors import InvalidArgumentError
from metalearn.signals import GROUP_STATISTICS, IntervalStatistics
from metalearn.torch import monitor as module
from metalearn.torch.monitor import RING, Monitor

INTERVAL = 4


@pytest.fixture(autouse=True, params=["host", "accelerator"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Runs every test as if tensors lay in the host's memory, and as if on an accelerator."""
    monkeypatch.setattr(module, "HOST_DEVICES", ("cpu",) if request.param == "host" else ())


def optimizer_of(*groups: list[torch.Tensor], rate: float = 0.5) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": params} for params in groups], lr=rate)


def train(optimizer: torch.optim.SGD, monitor: Monitor, gradients: list[list[torch.Tensor | None]]) -> None:
    """Step once for each list of gradients, the last two of an interval being its probe."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for given in gradients:
        for param, gradient in zip(params, given, strict=True):
            param.grad = gradient
        monitor.before_step(INTERVAL - monitor.steps)
        optimizer.step()
        monitor.record(torch.tensor(1.0))


def read(monitor: Monitor) -> IntervalStatistics:
    return monitor.statistics(validation=0.25, batch_size=10)


def test_probe_by_hand():
    table = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [0.0, 2.0], [4.0, 0.0]]))
    optimizer = optimizer_of([table])
    monitor = Monitor(optimizer, INTERVAL)
    idle, first = torch.zeros(3, 2), torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    train(optimizer, monitor, [[idle], [idle], [first], [second]])
    row = read(monitor)
    # SGD at rate 0.5: w' = w - 0.5 g, so w' - w = [[-1, 0], [0, 0], [0, -1]] and w' = [[0, 2], [0, 2], [4, -1]].
    assert row.gradient_norm[0] == pytest.approx(math.sqrt(2.0))  # of g'
    assert row.gradient_cosine[0] == pytest.approx(1.0)
    assert row.weight_norm[0] == pytest.approx(5.0)  # 4 + 4 + 16 + 1
    assert row.update_ratio[0] == pytest.approx(math.sqrt(2.0) / 5.0)
    assert row.curvature[0] == pytest.approx(1.0)  # (g' - g)·(w' - w) = 1 + 1, over 2
    assert row.touched[0] == pytest.approx(2 / 3)
    assert math.isnan(row.displacement[0])  # no probe before
    assert (row.steps, row.samples, row.validation, row.nonfinite) == (4.0, 40.0, 0.25, 0.0)
    assert (row.loss_sum, row.loss_square_sum) == (4.0, 4.0)

    train(optimizer, monitor, [[idle], [idle], [idle], [second]])
    row = read(monitor)
    # Since the probe's w' only g' was applied: w - 0.5 [[1, 0], [0, 0], [0, 1]] = [[-.5, 2], [0, 2], [4, -1.5]].
    assert row.displacement[0] == pytest.approx(math.sqrt(0.5) / math.sqrt(0.25 + 4 + 4 + 16 + 2.25))
    assert row.update_ratio[0] == 0.0
    assert row.gradient_cosine[0] == 0.0


def test_groups_are_measured_apart():
    table, dense = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_of([table], [dense])
    monitor = Monitor(optimizer, INTERVAL)
    train(optimizer, monitor, [[torch.ones(4, 2), 2 * torch.ones(3)]] * INTERVAL)
    row = read(monitor)
    assert row.gradient_norm.tolist() == pytest.approx([math.sqrt(8), math.sqrt(12)])
    assert row.touched[0] == 1.0
    assert math.isnan(row.touched[1])  # no matrix, no rows


def test_biases_in_a_column_are_no_rows():
    table, bias = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(4, 1))
    optimizer = optimizer_of([table, bias])
    monitor = Monitor(optimizer, INTERVAL)
    half = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    train(optimizer, monitor, [[half, torch.ones(4, 1)]] * INTERVAL)
    assert read(monitor).touched[0] == 0.5


def test_what_is_not_there_is_not_measured():
    frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    unused, partly, used = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = optimizer_of([frozen], [unused], [partly, used])
    monitor = Monitor(optimizer, INTERVAL)
    train(optimizer, monitor, [[None, None, None, torch.ones(2, 2)]] * INTERVAL)
    row = read(monitor)
    for name in GROUP_STATISTICS:
        assert math.isnan(getattr(row, name)[0]), name
    assert np.isnan(row.gradient_norm).tolist() == [True, True, False]
    assert row.weight_norm[1] == 2.0
    assert row.update_ratio[1] == 0.0
    assert row.gradient_norm[2] == 2.0
    assert row.touched[2] == 1.0  # of the rows that have a gradient at all


class Densified(TorchDispatchMode):
    """Notes what makes a sparse tensor dense, sorts it, or waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("to_dense", "_to_dense", "coalesce", "_coalesce", "_unique2", "nonzero", "_local_scalar_dense"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("most", [2**14, 20])
def test_sparse_gradients_are_measured_as_dense_ones_and_stay_sparse(most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_PROBED", most)
    rng, rows = torch.Generator().manual_seed(0), []
    for sparse in (False, True):
        rng.manual_seed(0)
        table = torch.nn.Parameter(torch.randn(40, 3, generator=rng))
        optimizer = optimizer_of([table], rate=0.1)
        monitor = Monitor(optimizer, INTERVAL)
        reads = []
        for step in range(2 * INTERVAL):
            # with repeated rows, an explicit zero row, and not coalesced: as embedding tables give them
            index, values = torch.randint(40, (30,), generator=rng), torch.randn(30, 3, generator=rng)
            values[0] = 0.0
            gradient = torch.sparse_coo_tensor(index[None], values, (40, 3), check_invariants=False)
            table.grad = gradient if sparse else gradient.to_dense()
            with Densified() as densified:
                monitor.before_step(INTERVAL - monitor.steps)
            reads += densified.calls
            optimizer.step()
            assert table.grad.layout is (torch.sparse_coo if sparse else torch.strided)
            monitor.record(torch.tensor(1.0))
            if step % INTERVAL == INTERVAL - 1:
                rows.append(read(monitor))
        assert reads == []
    for dense, sparse in zip(rows[:2], rows[2:], strict=True):
        for name in GROUP_STATISTICS:
            np.testing.assert_allclose(getattr(sparse, name), getattr(dense, name), rtol=1e-5, err_msg=name)
    assert 0.0 < rows[3].touched[0] < 1.0
    assert rows[3].displacement[0] > 0.0


def test_gradients_sparse_in_columns_too_are_not_measured():
    table = torch.nn.Parameter(torch.ones(4, 2))
    gradient = torch.sparse_coo_tensor([[1], [0]], [1.0], (4, 2), check_invariants=False)
    optimizer = optimizer_of([table])
    monitor = Monitor(optimizer, INTERVAL)
    train(optimizer, monitor, [[gradient]] * INTERVAL)
    row = read(monitor)
    assert math.isnan(row.gradient_norm[0]) and math.isnan(row.touched[0]) and math.isnan(row.curvature[0])
    assert row.update_ratio[0] > 0.0


def test_the_sample_of_all_groups_together_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_SAMPLED", 100)
    rng = torch.Generator().manual_seed(0)
    tables = [torch.nn.Parameter(torch.randn(40, 2, generator=rng)) for _ in range(5)]
    optimizer = optimizer_of(*[[table] for table in tables])
    monitor = Monitor(optimizer, INTERVAL)
    train(optimizer, monitor, [[torch.ones(40, 2)] * 5] * INTERVAL)
    # 100 elements for 5 groups are 20 for each, of 80: every fourth row
    assert read(monitor).weight_norm[3] == pytest.approx((tables[3].detach() + 0.5)[::4].norm().item(), rel=1e-6)


def test_large_groups_are_sampled_by_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_PROBED", 20)
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.randn(40, 4, generator=generator))
    optimizer = optimizer_of([table])
    monitor = Monitor(optimizer, INTERVAL)
    train(optimizer, monitor, [[torch.randn(40, 4, generator=generator)] for _ in range(INTERVAL)])
    sampled = table.detach()[::8] + 0.5 * table.grad[::8]  # the weights before the last step
    row = read(monitor)
    assert row.weight_norm[0] == pytest.approx(sampled.norm().item(), rel=1e-6)
    assert row.gradient_norm[0] == pytest.approx(table.grad[::8].norm().item(), rel=1e-6)


def test_half_precision_is_summed_in_single():
    table = torch.nn.Parameter(torch.full((64, 64), 16.0, dtype=torch.float16))
    optimizer = optimizer_of([table])
    monitor = Monitor(optimizer, INTERVAL)
    train(optimizer, monitor, [[torch.full((64, 64), 8.0, dtype=torch.float16)]] * INTERVAL)
    assert read(monitor).gradient_norm[0] == pytest.approx(512.0)  # sqrt(4096 · 64): its square exceeds float16


@pytest.mark.parametrize("steps", [1, RING - 1, RING, RING + 1, 3 * RING, 3 * RING + 5])
def test_every_loss_counts_once(steps: int):
    table = torch.nn.Parameter(torch.ones(2, 2))
    monitor = Monitor(optimizer_of([table]), 4 * RING)
    values = np.random.default_rng(steps).random((2, steps)).astype(np.float32)
    for losses in values:
        for loss in losses:
            monitor.record(torch.tensor(loss))
        row = read(monitor)
        assert row.steps == steps
        assert row.loss_sum == pytest.approx(losses.astype(np.float64).sum())
        assert row.loss_square_sum == pytest.approx(np.square(losses.astype(np.float64)).sum())
        assert np.isnan(row.gradient_norm).all()  # no probe was taken


def test_losses_are_copied_and_may_come_in_any_form():
    table = torch.nn.Parameter(torch.ones(()))
    monitor = Monitor(optimizer_of([table]), INTERVAL)
    changed = table * 2.0
    monitor.record(changed)
    with torch.no_grad():
        changed.mul_(100.0)
    monitor.record(3.0)
    monitor.record(torch.ones(1, 1, dtype=torch.float64))
    monitor.record(torch.tensor(float("inf")))
    row = read(monitor)
    assert row.nonfinite == 1.0
    assert row.loss_sum == math.inf
    monitor.record(changed / 100.0)
    assert read(monitor).loss_sum == 2.0
    with pytest.raises(InvalidArgumentError, match=r"`loss` must be a scalar, got shape \(3,\)"):
        monitor.record(torch.ones(3))


class Readbacks(TorchFunctionMode):
    """Counts calls that bring a tensor to the host."""

    names = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.names:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_everything_is_read_back_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HOST_DEVICES", ())
    table, bias = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(4, 1))
    optimizer = optimizer_of([table], [bias])
    monitor = Monitor(optimizer, INTERVAL)
    table.grad, bias.grad = torch.ones(4, 2), torch.ones(4, 1)
    for _ in range(2):
        with Readbacks() as reads:
            for step in range(INTERVAL):
                monitor.before_step(INTERVAL - step)
                monitor.record((table.sum() + bias.sum()) * 0.1)
        assert reads.calls == []
        with Readbacks() as reads:
            read(monitor)
        assert reads.calls == ["cpu", "numpy"]  # one transfer, and a view of what arrived


@pytest.mark.parametrize("cut", range(2 * INTERVAL))
def test_a_restored_monitor_goes_on_to_the_bit(cut: int):
    def fresh() -> tuple[torch.optim.SGD, Monitor]:
        table, dense = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(3))
        optimizer = optimizer_of([table], [dense], rate=0.1)
        return optimizer, Monitor(optimizer, INTERVAL)

    def go(optimizer: torch.optim.SGD, monitor: Monitor, first: int, last: int) -> list[IntervalStatistics]:
        rows = []
        for step in range(first, last):
            draw = torch.Generator().manual_seed(step)
            train(optimizer, monitor, [[torch.randn(4, 2, generator=draw), None if step < 3 else torch.ones(3)]])
            if monitor.steps == INTERVAL:
                rows.append(read(monitor))
        return rows

    whole = go(*fresh(), 0, 3 * INTERVAL)
    optimizer, monitor = fresh()
    rows = go(optimizer, monitor, 0, cut)
    other, restored = fresh()
    state = monitor.state_dict()
    restored.load_state_dict(state)
    for old, new in zip(optimizer.param_groups, other.param_groups, strict=True):
        for theirs, mine in zip(old["params"], new["params"], strict=True):
            mine.data.copy_(theirs.data)
    go(optimizer, monitor, cut, cut + 1)  # the first run goes on: nothing of its state may be shared
    for tensor in (state["losses"], *(t for t in state["sample"].values() if isinstance(t, torch.Tensor))):
        tensor.fill_(math.nan)
    rows += go(other, restored, cut, 3 * INTERVAL)
    for row, expected in zip(rows, whole, strict=True):
        np.testing.assert_equal(row._replace(seconds=0.0)._asdict(), expected._replace(seconds=0.0)._asdict())
