"""Training in PyTorch: batches, full ranking, and a run's validations, best weights and test."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from envs.domains import Domain, make_domain
from envs.evaluation_sets import evaluation_set
from envs.metrics import ranking_metrics, top_k
from envs.recommenders import RECOMMENDERS, Evaluator, MatrixFactorization, TripleSampler
from envs.recommenders import evaluation as evaluation_module
from envs.recommenders.training import HeldOutLosses, PlainSchedule, TrainingSettings, train
from envs.simulated import SimulatedPrior, simulate
from metalearn.errors import InvalidArgumentError

SETTINGS = TrainingSettings(steps=45, batch_size=32, dim=4, validations=4)


@pytest.fixture(scope="module")
def domain() -> Domain:
    prior = SimulatedPrior(users=(120, 120), items=(60, 60), history=(12.0, 12.0))
    return make_domain(simulate(prior, seed=1), name="simulated", split="leave-last-out")


def model_of(domain: Domain, seed: int = 0, dropout: float = 0.0) -> MatrixFactorization:
    generator = torch.Generator().manual_seed(seed)
    return MatrixFactorization(domain.num_users, domain.num_items, 4, dropout=dropout, generator=generator)


def pairs(batches: list[Any], num_items: int) -> np.ndarray:
    return np.concatenate([(user * num_items + positive).numpy() for user, positive, _ in batches])


@pytest.mark.parametrize("batch_size", [1, 7, 64, "all"])
def test_every_positive_comes_once_an_epoch(domain: Domain, batch_size: Any):
    rows, epochs = len(domain.train), 3
    size = rows if batch_size == "all" else batch_size
    sampler = TripleSampler(domain.train, size, seed=0)
    drawn = pairs([sampler.next() for _ in range(-(-epochs * rows // size))], domain.num_items)
    every = np.sort(domain.train.user.astype(np.int64) * domain.num_items + domain.train.item)
    orders = [drawn[epoch * rows : (epoch + 1) * rows] for epoch in range(epochs)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), every)
    assert not np.array_equal(orders[0], orders[1])  # in a new order each time


def test_negatives_are_any_items(domain: Domain):
    sampler = TripleSampler(domain.train, 64, seed=0)
    negatives = torch.cat([sampler.next()[2] for _ in range(200)])
    counts = torch.bincount(negatives, minlength=domain.num_items).double()
    assert len(counts) == domain.num_items
    expected = len(negatives) / domain.num_items  # 215 each, standard deviation 15
    assert (counts - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("batch_size", [0, -1, 10**6])
def test_batches_that_cannot_be_filled_are_refused(domain: Domain, batch_size: int):
    with pytest.raises(
        InvalidArgumentError, match=rf"`batch_size` must be in \[1, {len(domain.train)}\].*got {batch_size}"
    ):
        TripleSampler(domain.train, batch_size, seed=0)


def test_a_sampler_resumes_anywhere(domain: Domain):
    sampler = TripleSampler(domain.train, 100, seed=3)
    states, batches = [], []
    for _ in range(2 * len(domain.train) // 100 + 2):
        states.append(sampler.state_dict())
        batches.append(sampler.next())
    for index, state in enumerate(states):
        resumed = TripleSampler(domain.train, 100, seed=99)
        resumed.load_state_dict(state)
        for expected in batches[index:]:
            assert all(torch.equal(mine, other) for mine, other in zip(resumed.next(), expected, strict=True))
    first = TripleSampler(domain.train, 100, seed=3).next()
    assert all(torch.equal(mine, other) for mine, other in zip(first, batches[0], strict=True))


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("k", "max_users", "batch"), [(10, None, 512), (3, 40, 16), (60, None, 7)])
def test_evaluator_ranks_as_the_metrics_do(
    domain: Domain, split: Any, k: int, max_users: int | None, batch: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluation_module, "_BATCH", batch)
    model = model_of(domain)
    popularity = np.bincount(domain.train.item, minlength=domain.num_items)
    model.bias.weight.data[:, 0] += torch.as_tensor(0.05 * popularity, dtype=torch.float32)  # so that there are hits
    evaluation = evaluation_set(domain, split, max_users=max_users)

    def score(users: np.ndarray) -> np.ndarray:
        return model.score(torch.as_tensor(users, dtype=torch.int64)).numpy()

    expected = ranking_metrics(top_k(score, evaluation, domain.num_items, k), evaluation.targets, k=k)
    mine = Evaluator(domain, split, k=k, max_users=max_users)(model)
    for name in ("ndcg", "recall", "mrr", "hit"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(expected, name), err_msg=name)
    assert 0.0 < mine.mean_ndcg < 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_users_without_finite_scores_get_nothing(domain: Domain, value: float):
    model = model_of(domain)
    evaluate = Evaluator(domain, "test")
    whole = evaluate(model)
    users = evaluation_set(domain, "test").users
    hit = int(whole.ndcg.argmax())
    assert whole.ndcg[hit] > 0.0
    with torch.no_grad():
        model.user.weight[int(users[hit])] = value
    spoilt = evaluate(model)
    assert spoilt.ndcg[hit] == 0.0
    np.testing.assert_array_equal(np.delete(spoilt.ndcg, hit), np.delete(whole.ndcg, hit))


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_model_as_it_was(domain: Domain, training: bool):
    model = model_of(domain, dropout=0.5).train(training)
    before = [p.detach().clone() for p in model.parameters()]
    evaluate = Evaluator(domain, "validation")
    assert evaluate(model).mean_ndcg == evaluate(model).mean_ndcg
    assert model.training is training
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_settings_are_checked():
    assert SETTINGS.interval == 12  # 45 steps in 4 parts, the last one shorter
    with pytest.raises(InvalidArgumentError, match="`batch_size` must be a positive int, got 0"):
        TrainingSettings(batch_size=0)
    with pytest.raises(InvalidArgumentError, match="`steps` must be at least 8, twice the validations, got 7"):
        TrainingSettings(steps=7, validations=4)


def test_a_run_is_validated_on_time_and_repeats_itself(domain: Domain):
    def run(seed: int) -> tuple[Any, MatrixFactorization, list[int]]:
        model, steps = model_of(domain, dropout=0.3), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        schedule = PlainSchedule(SETTINGS.interval)
        return train(model, optimizer, schedule, domain, SETTINGS, seed=seed, on_step=steps.append), model, steps

    (result, model, steps), (again, other, _), (third, _, _) = run(0), run(0), run(1)
    assert steps == list(range(1, 46))
    assert [step for step, _ in result.validation] == [12, 24, 36, 45]
    assert result.validation == again.validation != third.validation
    assert result.test == again.test
    assert torch.equal(model.user.weight, other.user.weight)
    assert result.steps_per_second == pytest.approx(45 / result.seconds)
    assert not result.diverged


def test_the_test_is_of_the_weights_that_validated_best(domain: Domain):
    """Let the rate jump after two validations, so that the third is far worse."""
    model = model_of(domain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    jump = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 24 else 1e4)
    kept: dict[int, Any] = {}

    def keep(step: int) -> None:
        kept[step] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    result = train(model, optimizer, PlainSchedule(12, jump), domain, SETTINGS, seed=0, on_step=keep)
    best = max(result.validation, key=lambda entry: entry[1])[0]
    assert best <= 24
    assert all(torch.equal(tensor, kept[best][name]) for name, tensor in model.state_dict().items())
    assert result.test == Evaluator(domain, "test")(model).means()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(200.0)  # the scheduler was stepped at every step


def test_a_diverged_run_scores_nothing(domain: Domain):
    model = model_of(domain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e37, weight_decay=0.0)
    result = train(model, optimizer, PlainSchedule(SETTINGS.interval), domain, SETTINGS, seed=0)
    assert result.diverged
    assert result.validation[-1] == (45, 0.0)
    assert set(result.test.values()) == {0.0}


class Averaging(PlainSchedule):
    """Swaps the first weights in for validation, as averaged ones would be."""

    reads_losses = True

    def __init__(self, model: MatrixFactorization, interval: int) -> None:
        super().__init__(interval)
        self.model, self.first = model, model.user.weight.detach().clone()
        self.reported: list[Mapping[str, float]] = []

    @contextmanager
    def averaged_parameters(self):
        trained = self.model.user.weight.detach().clone()
        self.model.user.weight.data.copy_(self.first)
        yield
        self.model.user.weight.data.copy_(trained)

    def report(self, metrics: Mapping[str, float]) -> None:
        assert not torch.equal(self.model.user.weight, self.first)  # swapped back by now
        self.reported.append(metrics)


def test_averaged_weights_are_validated_kept_and_reported(domain: Domain):
    model = model_of(domain)
    steering = Averaging(model, SETTINGS.interval)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    result = train(model, optimizer, steering, domain, SETTINGS, seed=0)
    assert [metrics["ndcg"] for metrics in steering.reported] == [value for _, value in result.validation]
    assert torch.equal(model.user.weight, steering.first)


def test_losses_of_both_parts_are_reported_of_the_same_weights(domain: Domain):
    model = model_of(domain, dropout=0.5)
    steering = Averaging(model, SETTINGS.interval)
    train(model, torch.optim.AdamW([model.user.weight], lr=0.05), steering, domain, SETTINGS, seed=0)
    first, *others = steering.reported
    assert first.keys() == {"ndcg", "validation_loss", "training_sample_loss"}
    assert all(metrics == first for metrics in others)  # of the averaged weights, which stay, and without dropout
    memory, held_out = model_of(domain), HeldOutLosses(TripleSampler(domain.train, 32, seed=0), domain)
    before = held_out(memory)
    memorise = torch.optim.AdamW(memory.parameters(), lr=0.05, weight_decay=0.0)
    train(memory, memorise, PlainSchedule(SETTINGS.interval), domain, SETTINGS, seed=0)
    after = held_out(memory)
    assert after["training_sample_loss"] < after["validation_loss"]
    assert after["training_sample_loss"] < before["training_sample_loss"]
    assert memory.training


@pytest.mark.parametrize("family", list(RECOMMENDERS))
def test_what_is_held_out_is_drawn_as_training_data_is(domain: Domain, family: str):
    model = RECOMMENDERS[family].for_domain(domain, dim=4)
    sampler = model.sampler(domain, 16, seed=0)
    position = str(sampler.state_dict())
    found = sampler.over(domain.validation, seed=0)
    if family == "self_attention":
        assert found is None
        assert HeldOutLosses(sampler, domain)(model) == {}
        return
    user, item = (column[:16].tolist() for column in found.next()[:2])
    known = set(zip(domain.validation.user.tolist(), domain.validation.item.tolist(), strict=True))
    assert set(zip(user, item, strict=True)) <= known
    assert str(sampler.state_dict()) == position
    batch = sampler.over(domain.train, seed=0).next()
    assert [part.shape for part in batch] == [part.shape for part in sampler.next()]
    assert sampler.over(domain.validation.select(np.arange(0)), seed=0) is None
    assert len(sampler.over(domain.validation.select(np.arange(3)), seed=0).next()[0]) <= 6
