"""Steps that compute their gradients in a closure: the same, to the bit, as steps that find them computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from envs.domains import Domain
from envs.recommenders import MatrixFactorization
from metalearn import Controller
from metalearn.torch import RollbackConfig
from metalearn.torch.closures import on_gradients
from tests.torch.loops import assert_equal
from tests.torch.runs import Run, start

INTERVAL, STEPS = 5, 43


def train(run: Run, how: str, steps: int = STEPS) -> list[float]:
    """Take steps, with or without a closure; return the losses."""
    losses: list[float] = []
    for _ in range(steps):
        batch = run.sampler.next()

        def closure(batch: Any = batch) -> torch.Tensor:
            run.optimizer.zero_grad()
            loss = run.model(*batch)
            loss.backward()
            return loss

        if how == "none":
            loss = closure()
            run.optimizer.step()
        else:
            loss = run.optimizer.step(closure) if how == "positional" else run.optimizer.step(closure=closure)  # type: ignore[arg-type]
        losses.append(loss.item())
        if run.scheduler is not None:
            run.scheduler.step(loss)
        run.report()
    return losses


def contents(run: Run) -> dict[str, Any]:
    return {
        "weights": dict(run.model.state_dict()),
        "moments": run.optimizer.state_dict(),
        "decisions": [] if run.scheduler is None else [d.as_dict() for d in run.scheduler.decisions],
    }


class CallsItsParent(torch.optim.AdamW):
    """Torch runs the hooks for its own step, and for its parent's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


MAKERS: dict[str, Any] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameter_groups()),
    "a subclass": lambda m: CallsItsParent(m.parameter_groups()),
    "fused": lambda m: torch.optim.AdamW(m.parameter_groups(), fused=True),
    "SGD": lambda m: torch.optim.SGD(m.parameter_groups(), lr=0.5, momentum=0.9),
}


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_closure_changes_nothing(domain: Domain, controller: Controller, name: str, how: str):
    options = {"controller": controller, "optimizer": MAKERS[name], "horizon": STEPS, "interval": INTERVAL}
    plain, closed = start(domain, **options), start(domain, **options)
    torch.manual_seed(1)
    losses = train(plain, "none")
    torch.manual_seed(1)
    assert train(closed, how) == losses
    assert plain.scheduler is not None
    assert len({row["learning_rate"] for d in plain.scheduler.decisions for row in d.groups}) > 4
    assert_equal(contents(closed), contents(plain))


def test_a_rollback_is_the_same_with_a_closure(domain: Domain, controller: Controller):
    def diverged(how: str) -> Run:
        run = start(domain, controller=controller, horizon=STEPS, interval=INTERVAL, rollback=RollbackConfig())
        train(run, how, 4 * INTERVAL - 2)
        with torch.no_grad():
            run.model.item.weight.fill_(torch.nan)
        train(run, how, 8)
        return run

    plain, closed = diverged("none"), diverged("positional")
    assert plain.scheduler is not None and closed.scheduler is not None
    assert len(plain.scheduler.rollbacks) == 1
    assert closed.scheduler.steps == plain.scheduler.steps
    assert_equal(contents(closed), contents(plain))


def test_lbfgs_evaluates_as_often_as_without(domain: Domain, controller: Controller):
    def lbfgs(model: MatrixFactorization) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, history_size=4)

    steered = start(domain, controller=controller, optimizer=lbfgs, horizon=20, interval=INTERVAL)
    rates: list[float] = []
    steered.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    steered.model.dropout.p = 0.2  # what the other run has: this is about the optimizer
    scheduler = steered.scheduler
    assert scheduler is not None
    assert set(scheduler.masked) == {"weight_decay", "beta1"}
    scheduler.switch("frozen")
    plain = start(domain, optimizer=lbfgs)
    torch.manual_seed(1)
    train(steered, "positional", 12)
    plain.model.dropout.p = scheduler.decision.run["dropout"]
    torch.manual_seed(1)
    for rate in rates:
        plain.optimizer.param_groups[0]["lr"] = rate
        train(plain, "positional", 1)
    assert len(set(rates)) == 12  # the schedule's
    evaluations = [
        run.optimizer.state[run.optimizer.param_groups[0]["params"][0]]["func_evals"] for run in (steered, plain)
    ]
    assert evaluations[0] == evaluations[1] > 12
    assert_equal(steered.model.state_dict(), plain.model.state_dict())
    assert scheduler.decision.step == 10


class SharpnessAware(torch.optim.Optimizer):
    """Steps by the gradient at a point uphill, where the closure computes it (Foret et al., 2021)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            closure()
        uphill = [0.05 * p.grad for p in params]
        torch._foreach_add_(params, uphill)
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(params, uphill)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])
        return loss


def test_optimizers_that_move_weights_between_evaluations_do_as_without(domain: Domain, controller: Controller):
    runs = []
    for options in ({}, {"controller": controller, "steering": "shadow", "horizon": 20, "interval": INTERVAL}):
        run = start(domain, optimizer=lambda m: SharpnessAware(m.parameters(), lr=0.1), **options)
        torch.manual_seed(1)
        runs.append((train(run, "positional", 20), run.model.state_dict()))
    assert_equal(*runs)


def test_a_closure_that_raises_is_probed_when_it_is_called_again(domain: Domain, controller: Controller):
    def trained(*, fails: bool) -> Run:
        run = start(domain, controller=controller, horizon=40, interval=INTERVAL)
        torch.manual_seed(1)
        train(run, "positional", INTERVAL - 2)  # the next step is probed

        def closure() -> torch.Tensor:
            raise torch.OutOfMemoryError("in forward")

        if fails:
            with pytest.raises(torch.OutOfMemoryError):
                run.optimizer.step(closure)  # type: ignore[arg-type]
        train(run, "positional", 10)
        return run

    assert_equal(contents(trained(fails=True)), contents(trained(fails=False)))


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("positional", [False, True])
def test_acts_after_the_first_call_or_each(every: bool, positional: bool):
    calls: list[str] = []

    def closure() -> int:
        calls.append("closure")
        return 7

    arguments, keywords = (
        (("optimizer", closure, "more"), {"a": 1}) if positional else (("optimizer",), {"closure": closure})
    )
    changed = on_gradients(lambda: calls.append("act"), arguments, keywords, every=every)
    assert changed is not None and calls == []
    new_arguments, new_keywords = changed
    evaluate = new_arguments[1] if positional else new_keywords["closure"]
    assert [evaluate(), evaluate()] == [7, 7]
    assert calls == ["closure", "act", "closure"] + ["act"] * every
    if positional:
        assert (new_arguments[0], *new_arguments[2:], new_keywords) == ("optimizer", "more", {"a": 1})


def test_acts_at_once_without_a_closure():
    calls: list[str] = []
    assert on_gradients(lambda: calls.append("act"), ("optimizer", None), {}) is None
    assert on_gradients(lambda: calls.append("act"), ("optimizer",), {"closure": None}) is None
    assert calls == ["act"] * 2
