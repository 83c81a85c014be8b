"""Every family in JAX and in PyTorch is one learner; the JAX metric is the one that reports use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from envs.evaluation_sets import evaluation_set
from envs.learners import LEARNERS, Shape
from envs.learners.learner import probe_sums, xavier_normal
from envs.learners.matrix_factorization import MatrixFactorization
from envs.learners.ranking import ndcg
from envs.recommenders import RECOMMENDERS, Evaluator
from envs.recommenders import MatrixFactorization as TorchMatrixFactorization
from envs.vectorized import Bucket
from metalearn.controller.config import ROLES
from metalearn.errors import InvalidArgumentError
from metalearn.torch.monitor import Monitor
from tests.envs.twins import BATCH, DIM, arguments, draw, make_twins, small_domain, train_both

FAMILIES = sorted(LEARNERS)


@pytest.fixture(scope="module")
def domain():
    return small_domain()


def test_every_learner_has_a_twin():
    assert set(LEARNERS) == set(RECOMMENDERS)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", FAMILIES)
def test_jax_and_pytorch_agree_for_100_steps_under_changing_hyperparameters(domain, name, optimizer):
    loss, weights = train_both(name, optimizer, domain)
    assert loss < 1e-5
    # AdamW divides by the root of squared gradients: where those are tiny, the last bits of deep models' sums show.
    assert weights < (1e-5 if name == "matrix_factorization" else 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_score_alike(domain, name):
    learner, data, params, model = make_twins(name, domain, seed=1)
    users = np.arange(0, domain.num_users, 3)
    model.eval()
    theirs = model.score(torch.from_numpy(users)).numpy()
    np.testing.assert_allclose(learner.scores(params, data, jnp.asarray(users)), theirs, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if LEARNERS[name].learns_pairs])
def test_held_out_pairs_have_the_loss_that_pytorch_gives_them(domain, name):
    learner, data, params, model = make_twins(name, domain, seed=3)
    pairs = domain.validation.select(np.arange(2 * BATCH))
    user, item = (jnp.asarray(column, jnp.int32).reshape(2, BATCH) for column in (pairs.user, pairs.item))
    model.eval()
    theirs = []
    for key, users, items in zip(jax.random.split(jax.random.key(0), 2), user, item, strict=True):
        uniforms = jax.random.uniform(key, (learner.num_uniforms - BATCH,))
        batch = learner.make_batch(data, users, items, uniforms, jnp.ones(learner.num_keep))
        theirs.append(float(model(*arguments(batch)).detach()))
    assert float(learner.mean_loss(params, data, user.ravel(), item.ravel())) == pytest.approx(
        np.mean(theirs), rel=1e-4
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_have_the_roles_that_are_said(domain, name):
    learner, _, params, model = make_twins(name, domain)
    assert learner.roles == RECOMMENDERS[name].roles == tuple(group["role"] for group in model.parameter_groups())
    assert set(learner.roles) <= set(ROLES)
    assert set(jax.tree.leaves(learner.groups(params))) == set(range(learner.num_groups))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_the_loss_with_dropout(domain, name):
    learner, data, params, _ = make_twins(name, domain, seed=2)
    rng = np.random.default_rng(2)
    keep = np.where(rng.random(learner.num_keep) < 0.7, 1 / 0.7, 0.0).astype(np.float32)
    batch = learner.draw(data, jnp.asarray(rng.random(learner.num_uniforms), jnp.float32), jnp.asarray(keep))
    loss, gradient = jax.jit(learner.loss_and_gradient)(params, data, batch)
    assert float(loss) == pytest.approx(float(jax.jit(learner.loss)(params, data, batch)), rel=1e-6)
    expected = jax.jit(jax.grad(learner.loss))(params, data, batch)
    for mine, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    without = learner.draw(data, jnp.asarray(rng.random(learner.num_uniforms), jnp.float32), jnp.ones(learner.num_keep))
    assert float(loss) != float(jax.jit(learner.loss)(params, data, without))  # the mask is used


@pytest.mark.parametrize("name", FAMILIES)
def test_probes_measure_alike(domain, name):
    learner, data, params, model = make_twins(name, domain, seed=3)
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=0.0, weight_decay=0.0)
    monitor = Monitor(optimizer, 2)
    gradients = []
    for index in range(2):
        batch, tensors = draw(learner, data, jax.random.key(index))
        gradients.append(jax.jit(learner.loss_and_gradient)(params, data, batch)[1])
        optimizer.zero_grad()
        loss = model(*tensors)
        loss.backward()
        monitor.before_step(2 - index)
        monitor.record(loss)
    theirs = monitor.statistics(validation=0.0, batch_size=BATCH)
    sums = probe_sums(learner, data, params, gradients[0], params, gradients[1], params)
    np.testing.assert_allclose(np.sqrt(sums.next_gradient_square), theirs.gradient_norm, rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(sums.weight_square), theirs.weight_norm, rtol=1e-4)
    np.testing.assert_allclose(sums.rows_touched / jnp.maximum(sums.rows, 1), theirs.touched, atol=1e-6)


def test_padding_rows_start_at_zero_and_true_rows_have_xaviers_spread():
    table = xavier_normal(jax.random.key(0), 4000, jnp.int32(3000), 16)
    assert not np.any(table[3000:])
    assert float(table[:3000].std()) == pytest.approx(np.sqrt(2 / 3016), rel=0.05)


def test_sizes_that_cannot_be_are_refused():
    shape = Shape(10, 10, 0, 0)
    with pytest.raises(InvalidArgumentError, match="`dim` must be a positive int, got 0"):
        MatrixFactorization(shape=shape, dim=0)
    with pytest.raises(InvalidArgumentError, match="`learner` must be one of"):
        Bucket(users=8, items=8, interactions=8, dim=2, batch=2, evaluated=2, learner="random_forest")


def _ndcg(scores, targets, seen=None):
    """Scores one user whose scores are given item by item."""
    hidden = np.zeros((1, len(scores)), bool)
    hidden[0, list(seen or ())] = True
    return float(ndcg(jnp.asarray([scores], jnp.float32), jnp.asarray([targets], jnp.int32), jnp.asarray(hidden)))


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


def test_the_jax_metric_is_that_of_the_evaluator(domain):
    torch.manual_seed(0)
    model = RECOMMENDERS["matrix_factorization"].for_domain(domain, dim=DIM)
    evaluation = evaluation_set(domain, "test")
    most = int(evaluation.targets.lengths.max())
    targets = np.full((len(evaluation.users), most), -1, np.int32)
    seen = np.zeros((len(evaluation.users), domain.num_items), bool)
    for row in range(len(evaluation.users)):
        targets[row, : evaluation.targets.lengths[row]] = evaluation.targets.row(row)
        seen[row, evaluation.seen.row(row)] = True
    scores = model.score(torch.from_numpy(evaluation.users).long()).numpy()
    mine = ndcg(jnp.asarray(scores), jnp.asarray(targets), jnp.asarray(seen))
    assert float(mine) == pytest.approx(Evaluator(domain, "test")(model).mean_ndcg, abs=1e-6)


def test_matrix_factorization_is_captured_whole_and_runs_in_mixed_precision(domain):
    learner, data, _, model = make_twins("matrix_factorization", domain, seed=4)
    _, tensors = draw(learner, data, jax.random.key(0))
    plain = model(*tensors)
    captured = torch.compile(model, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(captured, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(*tensors)
    assert torch.isfinite(mixed)
    assert mixed.item() == pytest.approx(plain.item(), rel=0.05)


def test_sparse_gradients_are_those_of_the_dense_tables(domain):
    dense, sparse = (
        TorchMatrixFactorization(domain.num_users, domain.num_items, DIM, sparse=flag) for flag in (False, True)
    )
    sparse.load_state_dict(dense.state_dict())
    batch = dense.sampler(domain, BATCH, seed=0).next()
    for model in (dense, sparse):
        model(*batch).backward()
    assert sparse.user.weight.grad.is_sparse and sparse.bias.weight.grad.is_sparse
    for mine, other in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.to_dense(), other.grad)
