"""What of an optimizer is bound, why the rest is not, and that values are in force during a step only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.torch import MetaScheduler
from metalearn.torch.bindings import Bindings, dropout_modules, infer_roles
from tests.torch.test_host_syncs import Operations

VALUES = {"learning_rate": 0.02, "weight_decay": 0.3, "beta1": 0.8}


class Model(torch.nn.Module):
    """A table, a tower, and dropout in both usual places."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(6, 4)
        self.tower = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.25), torch.nn.Linear(4, 1))
        self.dropout = torch.nn.Dropout2d(0.5)


class Watch:
    """Reads the groups while a step runs, as the optimizer does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen: list[list[dict[str, Any]]] = []
        optimizer.register_step_pre_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.seen.append(own_values(optimizer))


def own_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def bound(optimizer: torch.optim.Optimizer, model: Model | None = None, factors: Any = lambda: [0.5]) -> Bindings:
    bindings = Bindings(optimizer, model)
    bindings.take([{n: v for n, v in VALUES.items() if n not in bindings.masked}] * len(optimizer.param_groups))
    bindings.attach(factors, None)
    return bindings


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def test_roles_are_said_or_inferred():
    model = Model()
    groups = [{"params": [model.table.weight]}, {"params": list(model.tower.parameters())}]
    assert infer_roles(torch.optim.AdamW(groups), model) == ["embedding", "dense"]
    assert infer_roles(torch.optim.AdamW(groups), None) == ["embedding", "dense"]
    assert infer_roles(torch.optim.AdamW(model.parameters()), model) == ["dense"]  # 24 of 49 elements lie in the table
    groups[1]["role"] = "head"  # type: ignore[assignment]
    assert infer_roles(torch.optim.AdamW(groups), model) == ["embedding", "head"]
    groups[0]["role"] = "tail"  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match=r"`role` of parameter group 0 must be among .*, got 'tail'"):
        infer_roles(torch.optim.AdamW(groups), model)


@pytest.mark.parametrize(
    ("make", "masked"),
    [
        (lambda p: torch.optim.AdamW(p), {}),
        (lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=True), {}),
        (lambda p: torch.optim.Adam(p), {"weight_decay": "not decoupled"}),
        (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True), {}),
        (lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True), {}),
        (lambda p: torch.optim.RAdam(p), {"weight_decay": "not decoupled"}),
        (lambda p: torch.optim.SparseAdam(p), {"weight_decay": "SparseAdam has no weight decay"}),
        (
            lambda p: torch.optim.SGD(p, lr=0.1),
            {"weight_decay": "not decoupled", "beta1": "no betas and no momentum"},
        ),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"weight_decay": "not decoupled"}),
        (
            lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.3),
            {"learning_rate": "3 lies outside", "weight_decay": "not decoupled", "beta1": "0.3 lies outside"},
        ),
        (
            lambda p: torch.optim.RMSprop(p),
            {"weight_decay": "not decoupled", "beta1": "no betas and no momentum"},
        ),
        (lambda p: torch.optim.Adagrad(p), {"weight_decay": "not decoupled", "beta1": "no betas and no momentum"}),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)), {}),
        (lambda p: torch.optim.AdamW(p, betas=(torch.tensor(0.9), torch.tensor(0.999))), {}),
        (lambda p: torch.optim.AdamW(p, fused=True), {}),
        (
            lambda p: torch.optim.LBFGS(p),
            {"weight_decay": "LBFGS has no weight decay", "beta1": "no betas and no momentum"},
        ),
    ],
)
def test_masks_say_why(make: Any, masked: dict[str, str]):
    model = Model()
    bindings = Bindings(make(list(model.table.parameters())), model)
    assert set(bindings.masked) == set(masked)
    for name, reason in masked.items():
        assert reason in bindings.masked[name]
    assert set(bindings.space.names) == {"learning_rate", "weight_decay", "beta1", "dropout"} - set(masked)


def test_dropout_is_masked_without_a_model_or_a_layer():
    table = torch.nn.Embedding(3, 2)
    optimizer = torch.optim.AdamW(table.parameters())
    assert "not given" in Bindings(optimizer, None).masked["dropout"]
    assert "no dropout layer" in Bindings(optimizer, table).masked["dropout"]
    assert len(dropout_modules(Model())) == 2


def test_nothing_to_control_and_no_rate_are_refused():
    table = torch.nn.Embedding(3, 2)
    with pytest.raises(InvalidArgumentError, match="nothing of `optimizer` can be controlled"):
        _ = Bindings(torch.optim.SGD(table.parameters(), lr=3.0), None).space
    with pytest.raises(InvalidArgumentError, match=r"learning rate of parameter group 0 must be positive, got 0\.0"):
        Bindings(torch.optim.AdamW(table.parameters(), lr=0.0), None)


def test_own_values_start_what_the_prior_does_not_cover():
    model = Model()
    optimizer = torch.optim.SGD(
        [{"params": [model.table.weight], "lr": 0.2}, {"params": model.tower.parameters()}], lr=0.1, momentum=0.9
    )
    bindings = Bindings(optimizer, model)
    assert not bindings.uses_prior
    assert bindings.initial() == [{"learning_rate": 0.2, "beta1": 0.9}, {"learning_rate": 0.1, "beta1": 0.9}]
    assert Bindings(torch.optim.Adam(model.parameters()), model).uses_prior


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.95, 0.98), weight_decay=0.05),
            {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.98)},
        ),
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-5),
            {"lr": 0.01, "weight_decay": 1e-5, "momentum": 0.8},
        ),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.999)}),
    ],
)
def test_values_are_in_force_during_the_step_only(make: Any, expected: dict[str, Any]):
    optimizer = make(list(Model().parameters()))
    before = own_values(optimizer)
    bound(optimizer)
    watch = Watch(optimizer)
    for _ in range(3):
        step(optimizer)
        assert own_values(optimizer) == before
    for seen in watch.seen:
        assert {key: seen[0][key] for key in expected} == expected
        assert all(type(seen[0][key]) is float for key in ("lr", "weight_decay"))


def test_factors_are_asked_for_when_they_are_used_up():
    optimizer = torch.optim.AdamW(Model().parameters())
    rows = iter([[1.0, 0.5, 0.25], [0.125], [2.0, 2.0]])
    bindings = bound(optimizer, factors=lambda: next(rows))
    watch = Watch(optimizer)
    for _ in range(5):
        step(optimizer)
    assert [seen[0]["lr"] for seen in watch.seen] == [0.02, 0.01, 0.005, 0.0025, 0.04]
    assert bindings.steps == 5
    assert bindings.last_rates() == [0.04]


def test_tensors_are_tensors_during_the_step_and_the_groups_own_are_never_written_to():
    model = Model()
    shared, betas = torch.tensor(1e-3), (torch.tensor(0.95), torch.tensor(0.98))  # one tensor for both groups
    groups = [{"params": list(model.table.parameters())}, {"params": list(model.tower.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=shared, betas=betas)
    bindings = bound(optimizer, factors=lambda: [0.5, 0.25])
    assert bindings.last_rates() == [pytest.approx(1e-3)] * 2
    watch, versions = Watch(optimizer), [tensor._version for tensor in (shared, *betas)]
    for index, scheduled in enumerate((1.0, 0.1)):
        shared.mul_(scheduled)  # as torch's schedulers do, in place
        versions[0] += 1
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        with Operations() as operations:
            for hook in list(optimizer._optimizer_step_pre_hooks.values()):
                hook(optimizer, (optimizer,), {})
            for hook in list(optimizer._optimizer_step_post_hooks.values()):
                hook(optimizer, (optimizer,), {})
        assert operations.reads == {}
        for seen, group in zip(watch.seen[-1], optimizer.param_groups, strict=True):
            assert seen["lr"].shape == () and seen["lr"].dtype is torch.float32
            assert seen["lr"].item() == pytest.approx(0.02 * (0.5, 0.25)[index] * (1.0, 0.1)[index], rel=1e-6)
            assert seen["betas"][0].item() == pytest.approx(0.8) and seen["betas"][1] is betas[1]
            assert group["lr"] is shared and group["betas"] == betas and group["betas"][0] is betas[0]
    assert [tensor._version for tensor in (shared, *betas)] == versions
    shared.fill_(7.0)
    assert bindings.last_rates() == [pytest.approx(0.02 * 0.25 * 0.1, rel=1e-6)] * 2  # of the step, not of now


def test_a_tensor_rate_trains_as_a_number_does():
    weights = []
    for rate in (1e-3, torch.tensor(1e-3, dtype=torch.float64)):
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)
        bound(optimizer)
        for _ in range(5):
            step(optimizer)
        weights.append(model.table.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(weights[0], torch.nn.Embedding(6, 4).weight)


def test_dropout_layers_have_one_master():
    model = Model()
    table, tower = torch.optim.AdamW(model.table.parameters()), torch.optim.AdamW(model.tower.parameters())
    first = bound(table, model)
    second = Bindings(tower, model)
    assert "dropout" not in first.masked
    assert "another MetaScheduler steers the dropout layers" in second.masked["dropout"]
    assert "dropout" not in second.space
    first.release()
    assert "dropout" not in Bindings(tower, model).masked


def test_a_step_under_capture_is_refused(monkeypatch: pytest.MonkeyPatch):
    optimizer = torch.optim.AdamW(Model().parameters(), capturable=True, lr=torch.tensor(1e-3))
    bound(optimizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(SessionError, match=r"captured in a CUDA graph.* step outside of the graph"):
        step(optimizer)


class Failing(torch.optim.AdamW):
    """An optimizer whose step can be made to raise, and which calls its parent's."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise FloatingPointError("no memory")
        return super().step(closure)


def failed(optimizer: Failing) -> None:
    optimizer.fails = True
    with pytest.raises(FloatingPointError):
        step(optimizer)
    optimizer.fails = False
    assert optimizer.param_groups[0]["weight_decay"] == 0.3  # nothing could clean up yet


@pytest.fixture
def failing() -> Failing:
    return Failing(Model().parameters(), lr=1e-3, weight_decay=0.05)


def test_a_step_that_raised_is_cleaned_up_by_the_next(failing: Failing):
    before = own_values(failing)
    asked: list[int] = []

    def prepare() -> list[float]:
        asked.append(bindings.steps)
        return [1.0, 0.5, 0.25, 0.125][bindings.steps :]

    bindings = bound(failing, factors=prepare)
    watch = Watch(failing)
    step(failing)
    failed(failing)
    step(failing)
    assert own_values(failing) == before
    assert bindings.steps == 2
    assert watch.seen[-1][0]["lr"] == 0.02 * 0.5  # the factor of the step that raised, not the one after
    assert asked == [0]


def test_a_subclass_that_calls_its_parents_step_counts_once(failing: Failing):
    torch.optim.AdamW(Model().parameters())  # torch hooks AdamW's own step when the first is made
    bindings, finished = bound(failing), []
    bindings._finish = lambda: finished.append(bindings.steps)
    before = own_values(failing)
    for _ in range(3):
        step(failing)
        assert own_values(failing) == before
    assert bindings.steps == 3
    assert finished == [1, 2, 3]


def test_values_in_force_are_never_saved(failing: Failing):
    before = own_values(failing)
    bindings = bound(failing)
    failed(failing)
    saved = failing.state_dict()["param_groups"][0]
    assert {key: saved[key] for key in before[0]} == before[0]
    assert own_values(failing) == before
    step(failing)
    assert bindings.steps == 1


def test_a_checkpoint_written_in_a_hook_holds_own_values():
    optimizer = torch.optim.AdamW(Model().parameters(), weight_decay=0.05)
    saved: list[float] = []
    optimizer.register_step_post_hook(lambda o, *_: saved.append(o.state_dict()["param_groups"][0]["weight_decay"]))
    bindings = bound(optimizer)
    for _ in range(3):
        step(optimizer)
    assert saved == [0.05] * 3
    assert bindings.steps == 3


def test_a_rollback_after_a_step_that_raised_keeps_what_was_loaded(failing: Failing):
    failing.param_groups[0]["lr"] = 5e-4
    good = failing.state_dict()
    failing.param_groups[0]["lr"] = 1e-3
    bound(failing)
    failed(failing)
    failing.load_state_dict(good)
    step(failing)
    assert failing.param_groups[0]["lr"] == 5e-4
    assert failing.param_groups[0]["weight_decay"] == 0.05


def test_another_group_is_refused_before_anything_is_changed():
    model = Model()
    optimizer = torch.optim.AdamW(model.table.parameters())
    bound(optimizer)
    step(optimizer)
    before = own_values(optimizer)
    optimizer.add_param_group({"params": list(model.tower.parameters())})
    with pytest.raises(SessionError, match=r"has 2 parameter groups and had 1 .* new one after add_param_group"):
        optimizer.step()
    assert own_values(optimizer)[:1] == before


def test_release_gives_everything_back_once():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = own_values(optimizer)
    bindings = bound(optimizer, model)
    bindings.set_dropout(0.1)
    assert {layer.p for layer in dropout_modules(model)} == {0.1}
    step(optimizer)
    assert bindings.release()
    assert [layer.p for layer in dropout_modules(model)] == [0.25, 0.5]
    watch = Watch(optimizer)
    step(optimizer)
    assert watch.seen == [before]
    dropout_modules(model)[0].p = 0.7
    assert not bindings.release()
    assert dropout_modules(model)[0].p == 0.7


def test_factors_of_other_schedulers_stay_relative_to_the_initial_rate_after_a_resume():
    def make(rate: float) -> tuple[torch.optim.Optimizer, Bindings, Watch]:
        optimizer = torch.optim.AdamW(Model().parameters(), lr=rate)
        return optimizer, bound(optimizer), Watch(optimizer)

    optimizer, bindings, _ = make(1e-3)
    optimizer.param_groups[0]["lr"] = 1e-4  # as ReduceLROnPlateau does, which leaves no `initial_lr`
    step(optimizer)
    state = bindings.state_dict()
    assert bindings.last_rates() == pytest.approx([0.02 * 0.5 * 0.1])

    other, restored, watch = make(1e-4)  # made on an optimizer that was loaded before
    restored.load_state_dict(state)
    assert restored.last_rates() == bindings.last_rates()
    restored.take([VALUES])
    step(other)
    step(optimizer)
    assert watch.seen[0][0]["lr"] == pytest.approx(0.02 * 0.5 * 0.1)
    assert restored.steps == bindings.steps == 2


def test_groups_without_weight_decay_stay_so(controller: Controller, domain: Domain):
    table, bias = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [table]}, {"params": [bias], "weight_decay": 0.0}])
    scheduler = MetaScheduler(optimizer, domain=domain.profile, controller=controller, horizon=40)
    assert scheduler.masked["weight_decay[1]"] == "parameter group 1 has weight_decay=0, which it keeps"
    seen = []
    optimizer.register_step_post_hook(lambda *_: None)
    for _ in range(40):
        loss = table.square().sum() + bias.square().sum()
        loss.backward()
        for hook in list(optimizer._optimizer_step_pre_hooks.values()):
            hook(optimizer, (), {})
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
        for hook in list(optimizer._optimizer_step_post_hooks.values()):
            hook(optimizer, (), {})
        scheduler.step(loss)
        if scheduler.should_validate:
            scheduler.report(0.1)
    assert all(decay == 0.0 for _, decay in seen)
    assert all(decay > 0.0 for decay, _ in seen)
    assert all("weight_decay" in d.groups[0] and "weight_decay" not in d.groups[1] for d in scheduler.decisions)


def test_a_loop_without_any_weight_decay_gets_the_controllers(controller: Controller, domain: Domain):
    table = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([table], weight_decay=0.0)
    scheduler = MetaScheduler(optimizer, domain=domain.profile, controller=controller, horizon=40)
    assert scheduler.decision.groups[0]["weight_decay"] > 0.0
