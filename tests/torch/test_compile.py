"""Compiled steps and models: hooks run at every step, outside of the graph, and actions compile nothing anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from envs.domains import Domain
from envs.recommenders import MatrixFactorization
from metalearn import Controller
from metalearn.torch import BufferedDropout, MetaScheduler
from tests.torch.runs import Run, start

pytestmark = [  # both of torch's own making, while it compiles
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

INTERVAL, STEPS = 3, 24
WARM = 3 * INTERVAL
"""Steps after which each number has been seen to change, and is an input of the graph from then on."""


@pytest.fixture(autouse=True)
def compiled_from_nothing() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_function(optimizer: torch.optim.Optimizer, backend: Any, **options: Any) -> Callable[[], Any]:
    return torch.compile(lambda: optimizer.step(), backend=backend, **options)


def by_method(optimizer: torch.optim.Optimizer, backend: Any) -> Callable[[], Any]:
    return torch.compile(optimizer.step, backend=backend)


def uncompiled(optimizer: torch.optim.Optimizer, backend: Any) -> Callable[[], Any]:
    return optimizer.step


class Trained:
    """A steered run of STEPS steps, and the number of graphs after each."""

    def __init__(
        self,
        domain: Domain,
        controller: Controller,
        compiled: Callable[..., Callable[[], Any]],
        *,
        make: Callable[[MatrixFactorization], torch.optim.Optimizer],
        backend: str = "aot_eager",
        other: Callable[[torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.run = start(domain, controller=controller, optimizer=make, horizon=STEPS, interval=INTERVAL)
        optimizer, scheduler = self.run.optimizer, self.run.scheduler
        assert scheduler is not None
        schedule = None if other is None else other(optimizer)
        step = compiled(optimizer, self.counter)
        self.graphs: list[int] = []
        for _ in range(STEPS):
            loss = self.run.backward()
            step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
            scheduler.step(loss)
            if scheduler.should_validate:
                scheduler.report(0.1 + 0.01 * len(scheduler.decisions))  # the same for compiled and eager
            self.graphs.append(self.counter.frame_count)
        self.scheduler = scheduler


def adamw(**options: Any) -> Callable[[MatrixFactorization], torch.optim.Optimizer]:
    def make(model: MatrixFactorization) -> torch.optim.Optimizer:
        first, second = model.parameter_groups()
        rate = options.pop("rate", float)
        return torch.optim.AdamW([{**first, "lr": rate(2e-3)}, {**second, "lr": rate(5e-4)}], **options)

    return make


MAKERS: dict[str, Callable[[], Any]] = {
    "AdamW": adamw,
    "AdamW, tensor rates": lambda: adamw(rate=torch.tensor),
    "AdamW, tensor betas": lambda: adamw(betas=(torch.tensor(0.9), torch.tensor(0.999))),
    "NAdam": lambda: lambda m: torch.optim.NAdam(m.parameter_groups()),
    "SGD": lambda: lambda m: torch.optim.SGD(m.parameter_groups(), lr=0.5, momentum=0.9),
}


@pytest.mark.parametrize(
    ("name", "compiled", "backend"),
    [
        ("AdamW", by_function, "aot_eager"),
        ("AdamW, tensor rates", by_function, "eager"),
        ("SGD", by_function, "eager"),
        *(
            pytest.param(name, by_function, "aot_eager", marks=pytest.mark.slow)
            for name in MAKERS
            if name not in ("AdamW", "SGD")
        ),
        pytest.param("AdamW", by_method, "aot_eager", marks=pytest.mark.slow),
        pytest.param("AdamW", by_function, "inductor", marks=pytest.mark.slow),
    ],
)
def test_actions_compile_nothing_anew(domain: Domain, controller: Controller, name: str, compiled: Any, backend: str):
    trained = Trained(domain, controller, compiled, make=MAKERS[name](), backend=backend)
    scheduler, optimizer = trained.scheduler, trained.run.optimizer
    assert scheduler.steps == STEPS
    assert 1 <= trained.graphs[-1] == trained.graphs[WARM] <= 5
    later = [d.groups[0] for d in scheduler.decisions if d.step > WARM]
    for controlled in set(later[0]):
        assert len({row[controlled] for row in later}) > 1  # it did act
    for group in optimizer.param_groups:  # what was lent for the step is gone
        assert isinstance(group["lr"], torch.Tensor) == ("tensor rates" in name)
        assert isinstance(group.get("betas", (0.0,))[0], torch.Tensor) == ("tensor betas" in name)
    eager = Trained(domain, controller, uncompiled, make=MAKERS[name]())
    assert eager.graphs[-1] == 0
    assert [d.step for d in scheduler.decisions] == [d.step for d in eager.scheduler.decisions]
    for mine, theirs in zip(trained.run.model.parameters(), eager.run.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        assert (mine - theirs).abs().mean() < 1e-2 * (theirs - theirs.mean()).abs().mean()


def test_other_schedulers_beside_a_compiled_step(domain: Domain, controller: Controller):
    other = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    trained = Trained(domain, controller, by_function, make=adamw(), other=other, backend="eager")
    assert trained.graphs[-1] == trained.graphs[WARM]
    rates = [group["lr"] for group in trained.run.optimizer.param_groups]
    assert rates == pytest.approx([2e-3 * 0.9**STEPS, 5e-4 * 0.9**STEPS])
    eager = Trained(domain, controller, uncompiled, make=adamw(), other=other)
    assert trained.scheduler.get_last_lr() == pytest.approx(eager.scheduler.get_last_lr(), rel=1e-3)


@pytest.mark.slow
def test_static_shapes_want_tensor_rates(domain: Domain, controller: Controller):
    """With `dynamic=False` torch builds every number in; of those only the weight decay is left, once a decision."""
    graphs = []
    for make in (adamw(), adamw(rate=torch.tensor)):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=STEPS):  # type: ignore[attr-defined]
            trained = Trained(domain, controller, lambda o, b: by_function(o, b, dynamic=False), make=make)
        graphs.append(trained.graphs[-1])
    assert graphs[0] >= STEPS
    assert graphs[1] <= len({d.groups[0]["weight_decay"] for d in trained.scheduler.decisions}) + 1


class Tower(torch.nn.Module):
    """A table, a layer and dropout whose probability is a buffer."""

    def __init__(self, dropout: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 1)
        self.dropout = dropout

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layer(self.dropout(self.table(rows))).square().mean()


def steered(tower: Tower, domain: Domain, controller: Controller, **options: Any) -> tuple[Any, MetaScheduler]:
    optimizer = torch.optim.AdamW(tower.parameters())
    options = {"model": tower, "horizon": STEPS, "interval": 2, **options}
    return optimizer, MetaScheduler(optimizer, domain=domain.profile, controller=controller, **options)


def test_a_training_step_compiled_whole(domain: Domain, controller: Controller):
    tower, counter = Tower(BufferedDropout(0.1)), CompileCounterWithBackend("eager")
    optimizer, scheduler = steered(tower, domain, controller)

    @torch.compile(backend=counter)
    def train(rows: torch.Tensor) -> torch.Tensor:
        loss = tower(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    graphs = []
    for _ in range(STEPS):
        scheduler.step(train(torch.randint(20, (16,))))
        if scheduler.should_validate:
            scheduler.report(0.1 + 0.01 * len(scheduler.decisions))
        graphs.append(counter.frame_count)
    assert scheduler.steps == STEPS
    assert len({d.run["dropout"] for d in scheduler.decisions[4:]}) > 2
    assert 2 <= graphs[-1] == graphs[8] <= 8


def test_torchs_dropout_compiles_at_every_change_until_it_is_not_compiled_at_all(
    domain: Domain, controller: Controller, caplog: pytest.LogCaptureFixture
):
    graphs = []
    for dropout in (torch.nn.Dropout(0.1), BufferedDropout(0.1)):
        torch._dynamo.reset()
        tower, counter = Tower(dropout), CompileCounterWithBackend("eager")
        _, scheduler = steered(tower, domain, controller)
        model = torch.compile(tower, backend=counter)
        for probability in torch.linspace(0.1, 0.6, 12).tolist():
            scheduler.override({"dropout": probability})
            model(torch.arange(4))
        graphs.append(counter.frame_count)
        scheduler.detach()
    limit = torch._dynamo.config.recompile_limit  # type: ignore[attr-defined]
    assert limit <= graphs[0] < 12
    assert graphs[1] == 1
    assert any("recompile_limit" in record.getMessage() for record in caplog.records)


def test_an_optimizer_each_with_a_compiled_step(domain: Domain, controller: Controller):
    tower, counter = Tower(BufferedDropout(0.1)), CompileCounterWithBackend("eager")
    optimizers = [torch.optim.AdamW(tower.table.parameters()), torch.optim.AdamW(tower.layer.parameters(), lr=1e-2)]
    schedulers = [
        MetaScheduler(o, model=tower, domain=domain.profile, controller=controller, horizon=STEPS, interval=INTERVAL)
        for o in optimizers
    ]
    steps = [by_function(optimizer, counter) for optimizer in optimizers]
    graphs = []
    for _ in range(STEPS):
        loss = tower(torch.randint(20, (16,)))
        loss.backward()
        for step, optimizer, scheduler in zip(steps, optimizers, schedulers, strict=True):
            step()
            optimizer.zero_grad()
            scheduler.step(loss)
            if scheduler.should_validate:
                scheduler.report(0.1 + 0.01 * len(scheduler.decisions))
        graphs.append(counter.frame_count)
    assert [scheduler.steps for scheduler in schedulers] == [STEPS] * 2
    assert graphs[-1] == graphs[WARM] <= 10


def on_gpu(domain: Domain, controller: Controller, *, steps: int, **options: Any) -> tuple[Run, list[list[float]]]:
    """A run whose step is a CUDA graph that torch records and replays, and the rates that it stepped with."""
    run = start(domain, controller=controller, optimizer=lambda m: gpu_adamw(m, **options), horizon=steps, interval=4)
    assert run.scheduler is not None
    step = torch.compile(lambda: run.optimizer.step(), mode="reduce-overhead")
    rates = []
    for _ in range(steps):
        loss = run.model(*(rows.cuda() for rows in run.sampler.next()))
        loss.backward()
        step()
        run.optimizer.zero_grad()
        run.scheduler.step(loss)
        run.report()
        rates.append(run.scheduler.get_last_lr())
    return run, rates


def gpu_adamw(model: MatrixFactorization, **options: Any) -> torch.optim.Optimizer:
    model.cuda()
    return torch.optim.AdamW(model.parameter_groups(), lr=torch.tensor(1e-3, device="cuda"), capturable=True, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_replay_with_new_values(domain: Domain, controller: Controller):
    run, rates = on_gpu(domain, controller, steps=STEPS)
    assert run.scheduler is not None and run.scheduler.steps == STEPS
    for step, seen in enumerate(rates):
        decision = [d for d in run.scheduler.decisions if d.step <= step][-1]
        expected = [row["learning_rate"] * run.scheduler.multiplier(step) for row in decision.groups]
        assert seen == pytest.approx(expected, rel=1e-5)
    before = run.model.item.weight.detach().clone()
    assert not torch.equal(before, start(domain).model.item.weight.detach().cuda())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_forward_and_backward_with_the_step_outside(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, optimizer=gpu_adamw, horizon=STEPS, interval=4)
    assert run.scheduler is not None
    static = [rows.cuda() for rows in run.sampler.next()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run.model(*static).backward()
    torch.cuda.current_stream().wait_stream(side)
    run.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run.model(*static)
        loss.backward()
    with pytest.raises(Exception, match="captured in a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.optimizer.step()
    for _ in range(STEPS):
        for into, rows in zip(static, run.sampler.next(), strict=True):
            into.copy_(rows)
        graph.replay()
        run.optimizer.step()
        run.scheduler.step(loss)
        run.report()
    assert run.scheduler.steps == STEPS
    assert run.scheduler.decision.index == STEPS // 4
