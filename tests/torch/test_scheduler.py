"""MetaScheduler in a training loop: decisions, reports, refusals, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.domains import Domain
from envs.recommenders import MatrixFactorization
from metalearn import Controller, load_controller
from metalearn.audit import read_decisions
from metalearn.controller.decision import Decision
from metalearn.errors import CheckpointError, InvalidArgumentError, SessionError
from metalearn.meta_training.release import with_cues
from metalearn.torch import MetaScheduler
from metalearn.torch.scheduler import MAX_IDLE_CALLS
from tests.torch.runs import BATCH_SIZE, Run, start

ROOT = Path(__file__).parents[2]
INTERVAL = 6


def watch_rates(run: Run) -> list[list[float]]:
    """Collect the learning rates that the optimizer steps with."""
    seen: list[list[float]] = []
    run.optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
    return seen


def test_a_run_is_steered_to_its_horizon(domain: Domain, controller: Controller, tmp_path: Path):
    log = tmp_path / "logs" / "decisions.jsonl"
    run = start(domain, controller=controller, horizon=120, decision_log=log, name="first")
    scheduler = run.scheduler
    assert scheduler is not None
    assert scheduler.interval == 6  # the horizon over the controller's twenty decisions
    assert scheduler.masked == {}
    assert scheduler.confidence == 1.0
    rates = watch_rates(run)
    run.advance(120)
    assert [decision.index for decision in scheduler.decisions] == list(range(21))
    assert [decision.step for decision in scheduler.decisions] == list(range(0, 121, 6))
    assert scheduler.decision is scheduler.decisions[-1]
    decided = {tuple(row["learning_rate"] for row in decision.groups) for decision in scheduler.decisions}
    assert len(decided) > 5  # it acts until it meets its trust region, on each group by itself
    assert any(user != item for user, item in decided)
    for step, seen in enumerate(rates):
        decision = [d for d in scheduler.decisions if d.step <= step][-1]
        expected = [row["learning_rate"] * scheduler.multiplier(step) for row in decision.groups]
        assert seen == pytest.approx(expected, rel=1e-12)
    assert scheduler.get_last_lr() == rates[-1]
    assert run.model.dropout.p == scheduler.decision.run["dropout"]
    assert 0.0 < scheduler.host_seconds < 60.0
    records = read_decisions(log)
    assert [record["index"] for record in records] == list(range(21))
    assert {record["name"] for record in records} == {"first"}


def test_what_is_decided_reaches_the_loss(domain: Domain, controller: Controller):
    steered, plain = start(domain, controller=controller, horizon=120), start(domain)
    steered.advance(120)
    plain.advance(120)
    assert sum(steered.losses[-20:]) < sum(plain.losses[-20:])  # AdamW as shipped has hardly begun


def test_past_the_horizon_what_is_left_of_the_rate_is_held(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=20, interval=5)
    rates = watch_rates(run)
    run.advance(26)
    assert run.scheduler is not None
    left, peaks = controller.config.decay_to, [one.groups[0]["learning_rate"] for one in run.scheduler.decisions]
    assert left < rates[19][0] / peaks[3] < left + 0.01
    assert rates[25][0] == left * peaks[5]


def test_groups_follow_their_roles(domain: Domain, controller: Controller):
    def grouped(role: str) -> Any:
        return lambda model: torch.optim.AdamW(
            [{"params": [model.user.weight]}, {"params": [model.item.weight, model.bias.weight], "role": role}]
        )

    decisions = []
    for role in ("embedding", "head"):
        run = start(domain, controller=controller, horizon=120, optimizer=grouped(role))
        run.advance(INTERVAL)
        assert run.scheduler is not None
        decisions.append(run.scheduler.decision)
    assert decisions[0].groups[0] == decisions[1].groups[0]
    assert decisions[0].groups[1] != decisions[1].groups[1]


def test_without_reports_it_decides_at_the_next_step(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=120)
    scheduler = run.scheduler
    assert scheduler is not None
    for step in range(1, 3 * INTERVAL + 1):
        run.step()
        assert scheduler.should_validate == (step % INTERVAL == 0)
        assert len(scheduler.decisions) == 1 + (step - 1) // INTERVAL
    assert [decision.step for decision in scheduler.decisions] == [0, 6, 12]
    assert all("validation: not reported" in " ".join(d.reasons) for d in scheduler.decisions[1:])


def test_a_report_between_intervals_is_kept_for_the_next_decision(domain: Domain, controller: Controller):
    def steered(report_at: int) -> list[Any]:
        run = start(domain, controller=controller, horizon=120)
        assert run.scheduler is not None
        for step in range(1, INTERVAL + 2):
            run.step()
            if step == report_at:
                before = run.scheduler.decision
                after = run.scheduler.report(0.3)
                assert (after is before) == (step != INTERVAL)
        return run.scheduler.decisions

    early, punctual = steered(INTERVAL - 2), steered(INTERVAL)
    assert early == punctual
    assert "validation: best so far" in " ".join(early[-1].reasons)


def test_metrics_come_as_numbers_or_mappings(domain: Domain, controller: Controller):
    def decide(metrics: Any, value: Any = None, **options: Any) -> list[Any]:
        run = start(domain, controller=controller, horizon=120, **options)
        for index in range(2 * INTERVAL):
            run.step()
            if run.scheduler is not None and run.scheduler.should_validate:
                run.scheduler.report(metrics(0.3 + 0.1 * (index > INTERVAL)))
        assert run.scheduler is not None
        return run.scheduler.decisions

    plain = decide(lambda x: x)
    assert decide(lambda x: torch.tensor(x, dtype=torch.float64)) == plain
    assert decide(lambda x: {"anything": x}) == plain
    assert decide(lambda x: {"loss": 9.0, "ndcg@10": x, "mrr": 5.0}) == plain
    assert decide(lambda x: {"loss": 9.0, "mine": x}, metric="mine") == plain
    assert decide(lambda x: {"loss": -x, "mrr": 9.0}, metric="loss", mode="min") == plain
    worse = decide(lambda x: x, mode="min")
    assert worse != plain
    assert "below the best" in " ".join(worse[-1].reasons)


class Weighed:
    """A run whose weight decay goes by the losses that it reports: validation hardly follows training."""

    def __init__(self, domain: Domain, *, inside: bool, losses: bool = True) -> None:
        checkpoint = with_cues(load_controller().checkpoint, ["two_tower"], moves="weight_decay")
        self.run = start(domain, controller=Controller(checkpoint), family="two_tower", interval=INTERVAL)
        assert self.run.scheduler is not None
        self.scheduler, self.inside, self.losses, self.reports = self.run.scheduler, inside, losses, 0

    def advance(self, intervals: int) -> list[Decision]:
        for _ in range(intervals):
            for _ in range(INTERVAL):
                self.run.step()
            metrics = {
                "mine": 0.3,
                "validation_loss": 1.0 - 0.02 * self.reports,
                "training_sample_loss": 1.0 - 0.1 * self.reports,
            }
            self.reports += 1
            metrics = metrics if self.losses else {"mine": 0.3}
            with self.scheduler.averaged_parameters():
                if self.inside:
                    self.scheduler.report(metrics)
            if not self.inside:
                self.scheduler.report(metrics)
        return self.scheduler.decisions


def decays_of(decisions: Iterable[Decision]) -> list[float]:
    return [decision.groups[0]["weight_decay"] for decision in decisions]


def test_reported_losses_move_the_decay_of_models_that_go_by_them(domain: Domain):
    decisions = Weighed(domain, inside=False).advance(4)
    decays = decays_of(decisions)
    assert decays[0] == decays[1] < decays[2] < decays[3] < decays[4]
    assert Weighed(domain, inside=True).advance(4) == decisions
    assert len(set(decays_of(Weighed(domain, inside=False, losses=False).advance(4)))) == 1


def test_reported_losses_are_in_the_state(domain: Domain):
    expected = Weighed(domain, inside=False).advance(4)
    before, after = Weighed(domain, inside=False), Weighed(domain, inside=False)
    before.advance(2)
    for _ in range(INTERVAL - 1):
        before.run.step()
    with before.scheduler.averaged_parameters():
        before.scheduler.report({"mine": 0.3, "validation_loss": 0.96, "training_sample_loss": 0.8})
    after.run.model.load_state_dict(before.run.model.state_dict())
    after.run.optimizer.load_state_dict(before.run.optimizer.state_dict())
    after.scheduler.load_state_dict(copy.deepcopy(before.scheduler.state_dict()))
    for _ in range(2):
        after.run.step()  # nobody reports: what was reported before the interval's end counts
    assert decays_of([after.scheduler.decision]) == decays_of(expected[3:4])


def test_reported_losses_are_logged(domain: Domain, tmp_path: Path):
    run = start(domain, controller=load_controller(), horizon=120, decision_log=tmp_path / "log.jsonl")
    for losses in ({"validation_loss": 0.5, "training_sample_loss": 0.25}, {}):
        for _ in range(INTERVAL):
            run.step()
        assert run.scheduler is not None
        run.scheduler.report({"ndcg": 0.3, **losses})
    *_, first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert '"training_sample_loss": 0.25' in json.dumps(first)
    assert '"validation_loss": 0.5' in json.dumps(first)
    assert "training_sample_loss" not in json.dumps(second)


@pytest.mark.parametrize("name", ["validation_loss", "training_sample_loss"])
def test_a_loss_that_is_no_number_is_refused(domain: Domain, controller: Controller, name: str):
    run = start(domain, controller=controller)
    assert run.scheduler is not None
    with pytest.raises(InvalidArgumentError, match=r"`metrics` must hold numbers, got 'low'; report math\.nan"):
        run.scheduler.report({"ndcg": 0.3, name: "low"})


def test_a_validation_loss_may_be_the_metric(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, mode="min", horizon=120)
    assert run.scheduler is not None
    for value in (0.5, 0.4):
        for _ in range(INTERVAL):
            run.step()
        run.scheduler.report({"validation_loss": value})
    assert "validation: best so far" in " ".join(run.scheduler.decision.reasons)


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        ({}, {}, "`metrics` is empty"),
        ({"a": 1.0, "b": 2.0}, {}, r"cannot tell which of \['a', 'b'\] to follow; pass `metric`"),
        ({"a": 1.0}, {"metric": "b"}, r"cannot tell which of \['a'\]"),
        ("n/a", {}, "`metrics` must hold numbers, got 'n/a'; report math.nan"),
        ({"ndcg@10": None}, {}, "`metrics` must hold numbers, got None"),
    ],
)
def test_ambiguous_metrics_are_refused(
    domain: Domain, controller: Controller, metrics: Any, options: dict[str, Any], message: str
):
    run = start(domain, controller=controller, **options)
    assert run.scheduler is not None
    with pytest.raises(InvalidArgumentError, match=message):
        run.scheduler.report(metrics)


def test_accumulated_gradients_count_once(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=120)
    assert run.scheduler is not None
    for micro in range(4 * INTERVAL):
        loss = run.backward()
        if micro % 2:
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.scheduler.step(loss)
        run.report()
    assert [decision.step for decision in run.scheduler.decisions] == [0, 6, 12]


def test_steps_that_a_grad_scaler_skips_do_not_count(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=120)
    scheduler = run.scheduler
    assert scheduler is not None
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rates = watch_rates(run)
    skipped = 0
    for index in range(2 * INTERVAL):
        loss = run.model(*run.sampler.next())
        scaler.scale(loss).backward()
        if index in (2, 4, 5):  # one of them between the two steps of the probe
            run.model.bias.weight.grad[0] = math.inf
            skipped += 1
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        scheduler.step(loss)
        run.report()
    assert skipped == 3
    assert len(rates) == 2 * INTERVAL - 3
    assert [decision.step for decision in scheduler.decisions] == [0, 6]
    assert rates[8][0] == pytest.approx(scheduler.decision.groups[0]["learning_rate"] * scheduler.multiplier(8))


def test_losses_that_are_not_finite_hold_everything(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=120)
    assert run.scheduler is not None
    for index in range(INTERVAL):
        run.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step(torch.tensor(math.nan if index == 3 else 0.5))
    decision = run.scheduler.report(0.1)
    assert decision.status == "held"
    assert decision.groups == run.scheduler.decisions[0].groups
    assert "held: 1 steps" in decision.reasons[0]


class Sparse(torch.nn.Module):
    """Two sparse tables."""

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user = torch.nn.Embedding(domain.num_users, 4, sparse=True)
        self.item = torch.nn.Embedding(domain.num_items, 4, sparse=True)

    def forward(self, user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        margin = (self.user(user) * (self.item(positive) - self.item(negative))).sum(-1)
        return torch.nn.functional.softplus(-margin).mean()


def test_sparse_adam_keeps_gradients_sparse(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=60)
    assert run.scheduler is not None
    run.scheduler.detach()
    model = Sparse(domain)
    optimizer = torch.optim.SparseAdam(model.parameters())
    scheduler = MetaScheduler(optimizer, model=model, domain=domain.profile, horizon=60, controller=controller)
    assert set(scheduler.masked) == {"weight_decay", "dropout"}
    for _ in range(4 * scheduler.interval):
        loss = model(*run.sampler.next())
        loss.backward()
        assert model.user.weight.grad is not None
        optimizer.step()
        assert model.user.weight.grad.layout is torch.sparse_coo
        optimizer.zero_grad()
        scheduler.step(loss)
        if scheduler.should_validate:
            scheduler.report(0.1)
    assert scheduler.decision.index == 4
    assert set(scheduler.decision.groups[0]) == {"learning_rate", "beta1"}
    assert scheduler.decision.groups != scheduler.decisions[0].groups
    assert all(math.isfinite(value) for value in scheduler.decision.groups[0].values())


@pytest.mark.parametrize(
    ("make", "controlled"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.5), {"learning_rate"}),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9), {"learning_rate", "beta1"}),
        (lambda m: torch.optim.Adam(m.parameters(), weight_decay=0.1), {"learning_rate", "beta1"}),
        (
            lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-3)),
            {"learning_rate", "weight_decay", "beta1"},
        ),
    ],
)
def test_other_optimizers_are_steered_as_far_as_they_go(
    domain: Domain, controller: Controller, make: Any, controlled: set[str]
):
    run = start(domain, controller=controller, horizon=120, optimizer=make)
    assert run.scheduler is not None
    first = run.scheduler.decision
    if isinstance(run.optimizer, torch.optim.SGD):
        assert first.groups[0]["learning_rate"] == pytest.approx(0.5, rel=1e-9)
        assert "the optimizer's own values" in first.reasons[0]
    run.advance(3 * INTERVAL)
    for decision in run.scheduler.decisions:
        assert set(decision.groups[0]) == controlled
    assert run.scheduler.decision.groups != first.groups
    if isinstance(run.optimizer.param_groups[0]["lr"], torch.Tensor):
        rate = run.scheduler.decisions[-2].groups[0]["learning_rate"] * run.scheduler.multiplier(3 * INTERVAL - 1)
        assert run.scheduler.get_last_lr() == [pytest.approx(rate, rel=1e-6)]
        assert run.optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-3)


def test_frozen_and_idle_groups_are_no_obstacle(domain: Domain, controller: Controller):
    def frozen(model: MatrixFactorization) -> torch.optim.Optimizer:
        model.user.weight.requires_grad_(False)
        idle = torch.nn.Parameter(torch.ones(3))
        return torch.optim.AdamW([*model.parameter_groups(), {"params": [idle]}])

    run = start(domain, controller=controller, optimizer=frozen, interval=10)
    before = run.model.user.weight.detach().clone()
    assert run.scheduler is not None
    run.advance(3 * run.scheduler.interval)
    assert run.scheduler.decision.index == 3
    assert len(run.scheduler.decision.groups) == 3
    assert torch.equal(run.model.user.weight, before)
    assert all(math.isfinite(v) for group in run.scheduler.decision.groups for v in group.values())


def test_another_optimizer_is_noticed(domain: Domain, controller: Controller):
    run = start(domain, controller=controller)
    run.optimizer = torch.optim.AdamW(run.model.parameters())
    assert run.scheduler is not None
    with pytest.raises(SessionError, match=r"without an optimizer\.step\(\) in between"):
        for _ in range(MAX_IDLE_CALLS):
            run.scheduler.step(0.5)


def test_idle_calls_are_counted_anew_after_a_step(domain: Domain, controller: Controller):
    run = start(domain, controller=controller)
    assert run.scheduler is not None
    for _ in range(2):
        for _ in range(MAX_IDLE_CALLS - 1):
            run.scheduler.step(0.5)
        run.step()


def test_another_group_is_noticed(domain: Domain, controller: Controller):
    run = start(domain, controller=controller)
    run.advance(2)
    run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(SessionError, match="has 3 parameter groups and had 2"):
        run.step()


def test_one_scheduler_at_a_time_and_detach_lets_go(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=120)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]
    assert run.scheduler is not None
    options: dict[str, Any] = {"domain": domain.profile, "controller": controller, "model": run.model}
    with pytest.raises(InvalidArgumentError, match=r"already has a MetaScheduler; call its detach\(\) first"):
        MetaScheduler(run.optimizer, **options)
    run.advance(4)
    run.scheduler.detach()
    assert run.model.dropout.p == 0.2
    assert [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups] == groups
    second = MetaScheduler(run.optimizer, **options)
    run.scheduler.detach()  # again, to no effect on the second
    assert run.model.dropout.p == second.decision.run["dropout"]
    with pytest.raises(InvalidArgumentError, match="already has a MetaScheduler"):
        MetaScheduler(run.optimizer, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "`optimizer` must be a torch optimizer, got str"),
        ({"domain": None}, r"`domain` must be a DomainProfile, got NoneType; pass metalearn.profile_domain"),
        ({"mode": "maximum"}, "`mode` must be 'max' or 'min', got 'maximum'"),
        ({"family": "gru4rec"}, "`family` must be one of .*'matrix_factorization'.*, got 'gru4rec'"),
        ({"horizon": 1}, "`horizon` must be an int of at least 2, got 1"),
        ({"horizon": 10.5}, "`horizon` must be an int of at least 2, got 10.5"),
        ({"interval": 1}, "`interval` must be an int of at least 2, got 1"),
        ({"batch_size": 0}, "`batch_size` must be an int of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(domain: Domain, controller: Controller, changes: dict[str, Any], message: str):
    table = torch.nn.Embedding(3, 2)
    arguments = {
        "optimizer": torch.optim.AdamW(table.parameters()),
        "domain": domain.profile,
        "controller": controller,
        **changes,
    }
    with pytest.raises(InvalidArgumentError, match=message):
        MetaScheduler(arguments.pop("optimizer"), **arguments)
    if "optimizer" not in changes:  # a refusal leaves nothing attached
        MetaScheduler(torch.optim.AdamW(table.parameters()), domain=domain.profile, controller=controller)


def test_a_family_starts_from_its_own_base(domain: Domain, controller: Controller):
    firsts = []
    for family in (None, *controller.config.families):
        scheduler = start(domain, controller=controller, horizon=120, family=family).scheduler
        session = controller.start(
            domain.profile, roles=("embedding",) * 2, family=family, horizon=120, batch_size=BATCH_SIZE
        )
        assert scheduler is not None
        assert scheduler.decision == session.ask()
        firsts.append(scheduler.decision.groups[0]["learning_rate"])
    assert len(set(firsts)) == 3


def test_controllers_load_from_paths(domain: Domain, controller: Controller, controller_path: Path):
    decisions = []
    for given in (controller, controller_path, str(controller_path), controller_path.parent):
        run = start(domain, controller=given, horizon=120)
        run.advance(2 * INTERVAL)
        assert run.scheduler is not None
        decisions.append(run.scheduler.decisions)
    assert all(others == decisions[0] for others in decisions)
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        start(domain, controller=controller_path.with_name("none.safetensors"))


STEERED = """
import sys
from pathlib import Path
import torch
import metalearn, metalearn.torch

def forbidden():
    return sorted({"jax", "jaxlib", "flax", "optax", "orbax"} & {name.partition(".")[0] for name in sys.modules})

assert forbidden() == [], forbidden()
pairs = [(user, (user + k) % 7) for user in range(9) for k in range(3)]
rows = metalearn.Interactions.from_arrays(*zip(*pairs))
table = torch.nn.Embedding(9, 4)
optimizer = torch.optim.AdamW(table.parameters())
log = Path(sys.argv[2])
scheduler = metalearn.torch.MetaScheduler(
    optimizer, model=table, domain=metalearn.profile_domain(rows), controller=sys.argv[1], decision_log=log, interval=9
)
for _ in range(3 * scheduler.interval):
    loss = table.weight.square().mean(); loss.backward(); optimizer.step(); optimizer.zero_grad()
    scheduler.step(loss)
    if scheduler.should_validate:
        with scheduler.averaged_parameters():
            scheduler.report({"ndcg@10": -loss.item()})
scheduler.load_state_dict(scheduler.state_dict())
scheduler.detach()
assert len(scheduler.decisions) == 4
assert forbidden() == [], forbidden()
"""


def test_a_steered_run_loads_no_jax(controller_path: Path, tmp_path: Path):
    log = tmp_path / "decisions.jsonl"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", STEERED, controller_path, log],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    assert [record["index"] for record in read_decisions(log)] == [0, 1, 2, 3]


def test_a_wrapper_without_hooks_is_refused(domain: Domain):
    class Wrapper(torch.optim.AdamW):
        """As Accelerate's: an optimizer by type, never initialised as one."""

        def __init__(self) -> None:
            self.param_groups = []

    with pytest.raises(InvalidArgumentError, match="a Wrapper, a wrapper that runs no step hooks; pass the optimizer"):
        MetaScheduler(Wrapper(), domain=domain.profile)
