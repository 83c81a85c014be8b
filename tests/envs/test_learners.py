"""Matrix factorisation in JAX and in PyTorch is one learner; its ranking metric is the one that reports use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from envs.domains import evaluation_set, make_domain
from envs.learners import matrix_factorization as learner
from envs.recommenders import Evaluator, MatrixFactorization
from envs.simulated import SimulatedPrior, simulate

USERS, ITEMS, DIM, BATCH = 60, 40, 8, 32


def _models(seed=0):
    """The same weights on both sides."""
    state = learner.init(jnp.int32(USERS), jnp.int32(ITEMS), shape=(USERS, ITEMS, DIM), key=jax.random.key(seed))
    model = MatrixFactorization(USERS, ITEMS, DIM)
    with torch.no_grad():
        for mine, theirs in zip((model.user.weight, model.item.weight, model.bias.weight), state.params, strict=True):
            mine.copy_(torch.from_numpy(np.array(theirs)).reshape(mine.shape))
    return state, model


def _batch(rng, keep=None):
    arrays = [rng.integers(0, high, BATCH).astype(np.int32) for high in (USERS, ITEMS, ITEMS)]
    mask = np.ones((BATCH, DIM), np.float32) if keep is None else keep
    tensors = [torch.from_numpy(a).long() for a in arrays]
    return learner.Batch(*(jnp.asarray(a) for a in arrays), jnp.asarray(mask)), tensors


def test_jax_and_pytorch_agree_for_100_steps_under_changing_hyperparameters():
    state, model = _models()
    optimizer = torch.optim.AdamW(model.parameter_groups())
    rng = np.random.default_rng(1)
    step = jax.jit(learner.step)
    for index in range(100):
        batch, tensors = _batch(rng)
        rate = 0.01 * (1 + np.cos(index / 30)) * np.array([1.0, 0.5])
        decay, beta1 = np.array([0.1, 0.4]), np.array([0.9, 0.8 + 0.001 * index])
        hyperparameters = learner.Hyperparameters(*(jnp.asarray(v, jnp.float32) for v in (rate, decay, beta1)))
        state, loss, _ = step(state, batch, hyperparameters)
        for group, param_group in enumerate(optimizer.param_groups):
            param_group.update(lr=rate[group], weight_decay=decay[group], betas=(beta1[group], 0.999))
        optimizer.zero_grad()
        theirs = model(*tensors)
        theirs.backward()
        optimizer.step()
        assert float(loss) == pytest.approx(theirs.item(), abs=1e-5)
    for mine, other in zip(state.params, (model.user.weight, model.item.weight, model.bias.weight), strict=True):
        np.testing.assert_allclose(np.asarray(mine).ravel(), other.detach().numpy().ravel(), atol=1e-5)


def test_the_hand_written_gradient_is_that_of_the_loss():
    state, _ = _models(2)
    rng = np.random.default_rng(2)
    keep = np.where(rng.random((BATCH, DIM)) < 0.7, 1 / 0.7, 0.0).astype(np.float32)
    batch, _ = _batch(rng, keep)

    def loss_fn(params):
        return learner.loss_and_gradient(params, batch)[0]

    loss, gradient = learner.loss_and_gradient(state.params, batch)
    expected = jax.grad(loss_fn)(state.params)
    assert np.isfinite(float(loss))
    for mine, other in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


def test_dropout_acts_on_the_same_vector(monkeypatch):
    state, model = _models(3)
    rng = np.random.default_rng(3)
    keep = np.where(rng.random((BATCH, DIM)) < 0.5, 2.0, 0.0).astype(np.float32)
    batch, tensors = _batch(rng, keep)
    monkeypatch.setattr(model.dropout, "forward", lambda x: x * torch.from_numpy(keep))
    loss, gradient = learner.loss_and_gradient(state.params, batch)
    theirs = model(*tensors)
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), abs=1e-6)
    np.testing.assert_allclose(gradient.user, model.user.weight.grad.numpy(), atol=1e-6)


def test_padding_rows_start_at_zero_and_true_rows_have_xaviers_spread():
    state = learner.init(jnp.int32(3000), jnp.int32(10), shape=(4000, 20, 16), key=jax.random.key(0))
    user, item, bias = state.params
    assert not np.any(user[3000:]) and not np.any(item[10:]) and not np.any(bias)
    assert float(user[:3000].std()) == pytest.approx(np.sqrt(2 / 3016), rel=0.05)


def _ndcg(scores, targets, seen=None):
    """Scores one user whose scores are given item by item."""
    items = len(scores)
    params = learner.Params(jnp.zeros((1, 1)), jnp.zeros((items, 1)), jnp.asarray(scores, jnp.float32))
    hidden = np.zeros((1, items), bool)
    hidden[0, list(seen or ())] = True
    return float(learner.ndcg(params, jnp.zeros(1, jnp.int32), jnp.asarray([targets], jnp.int32), jnp.asarray(hidden)))


def test_ranks_by_hand():
    assert _ndcg([5.0, 4.0, 3.0, 2.0], [0, -1]) == pytest.approx(1.0)  # rank 1: 1 / log2(2)
    assert _ndcg([5.0, 4.0, 3.0, 2.0], [2, -1]) == pytest.approx(0.5)  # rank 3: 1 / log2(4)
    assert _ndcg([5.0, 4.0, 3.0, 2.0], [2, -1], seen=[0, 1]) == pytest.approx(1.0)  # hidden ones do not count
    # ranks 1 and 4: (1 + 1/log2(5)) / (1 + 1/log2(3)) = 1.43068 / 1.63093
    assert _ndcg([5.0, 4.0, 3.0, 2.0], [0, 3]) == pytest.approx(1.43068 / 1.63093, abs=1e-4)
    assert _ndcg(np.arange(20.0), [3, -1]) == 0.0  # rank 17: beyond the list


def test_scores_that_are_not_numbers_rank_last():
    assert _ndcg([float("nan")] * 20, [0, -1]) == 0.0
    assert _ndcg([1.0] * 20, [0, -1]) == 0.0  # all equal: no better than the last place


def test_the_jax_metric_is_that_of_the_evaluator():
    prior = SimulatedPrior(users=(150, 150), items=(90, 90), history=(15.0, 15.0))
    domain = make_domain(simulate(prior, seed=5), name="simulated", split="leave-last-out")
    torch.manual_seed(0)
    model = MatrixFactorization(domain.num_users, domain.num_items, DIM)
    evaluation = evaluation_set(domain, "test")
    most = int(evaluation.targets.lengths.max())
    targets = np.full((len(evaluation.users), most), -1, np.int32)
    seen = np.zeros((len(evaluation.users), domain.num_items), bool)
    for row in range(len(evaluation.users)):
        targets[row, : evaluation.targets.lengths[row]] = evaluation.targets.row(row)
        seen[row, evaluation.seen.row(row)] = True
    params = learner.Params(
        *(jnp.asarray(w.detach().numpy()) for w in (model.user.weight, model.item.weight, model.bias.weight[:, 0]))
    )
    mine = learner.ndcg(params, jnp.asarray(evaluation.users), jnp.asarray(targets), jnp.asarray(seen))
    assert float(mine) == pytest.approx(Evaluator(domain, "test")(model).mean_ndcg, abs=1e-6)
