"""Rollouts: a function of their seeds, compiled once, and the same decisions as the session that serves the policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.tasks import TaskPool, simulated_domain
from envs.vectorized import VectorizedEnvironment, make_task, stack_tasks
from metalearn.controller import CONTROLLED, Checkpoint, Controller, ControllerConfig
from metalearn.controller.actions import Values
from metalearn.controller.checkpoint import flatten
from metalearn.controller.observation import profile_descriptors
from metalearn.controller.outcome import METRIC_OFFSET
from metalearn.meta_training.environment import Environment, Plan
from metalearn.meta_training.rollout import NONFINITE_PENALTY, Episode, PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, Chunk, RolloutRunner, concatenate, make_chunk, relative_scores
from metalearn.signals import GLOBAL_FEATURES
from metalearn.spaces import CANONICAL_SPACE
from tests.meta_training.conftest import BUCKET

STEPS = 6
S = len(CONTROLLED)


environment_step = jax.jit(VectorizedEnvironment(BUCKET).step)


def chunk(**changes) -> Chunk:
    arguments = {"pool": 0, "num_steps": STEPS, "task": 0, "initialization": 1, "num_start": S}
    arguments["exploration"] = np.arange(CHUNK)
    return make_chunk(**(arguments | changes))


def same(one: Episode, other: Episode) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def row(episode: Episode, index: int) -> Episode:
    return jax.tree.map(lambda leaf: leaf[index], episode)


def test_the_environment_fulfils_the_protocol(pool: TaskPool):
    assert isinstance(pool.environment, Environment)


def test_an_episode_is_a_function_of_its_seeds(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    first, again, other = runner.run([chunk(), chunk(), chunk(initialization=2)], acting, prior, explore=1.0)
    assert same(first, again)
    assert not np.array_equal(first.validation, other.validation)
    assert len({first.group_action[index].tobytes() for index in range(CHUNK)}) == CHUNK
    # A group shares initialisation and batches; only what it explores differs.
    assert np.isfinite(first.score).all()
    (quiet,) = runner.run([chunk()], acting, prior)
    assert all(same(row(quiet, 0), row(quiet, index)) for index in range(1, CHUNK))


def test_other_tasks_of_the_bucket_do_not_recompile(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    runner.run([chunk()], acting, prior, explore=1.0)
    assert runner._functions[0]._cache_size() == 1
    others = [
        chunk(task=np.arange(CHUNK) % 3, num_steps=4, horizon_told=False),
        chunk(single_group=True, start=np.full(S, 0.5), initialization=np.arange(CHUNK)),
    ]
    runner.run(others, acting, prior, explore=0.5, act=False)
    assert runner._functions[0]._cache_size() == 1


def test_untrained_and_passive_policies_hold_the_start(
    runner: RolloutRunner, untrained: PolicyParams, acting: PolicyParams, prior: Prior, config: ControllerConfig
):
    start = np.array([0.7, 0.6, 0.5, 0.4], np.float32)
    (base,) = runner.run([chunk()], untrained, prior)
    (forced,) = runner.run([chunk(start=start)], acting, prior, act=False)
    for episode, unit in ((base, prior.base[1, 1]), (forced, start)):
        for name, value in zip(CONTROLLED, unit, strict=True):
            wanted = config.space[name].decode(float(value))
            np.testing.assert_allclose(getattr(episode.values, name), wanted, rtol=1e-5, err_msg=name)
    (acted,) = runner.run([chunk(start=start)], acting, prior)
    assert np.ptp(acted.values.learning_rate[0], axis=0).min() > 0


def test_a_family_has_its_base_if_the_controller_knows_it_and_is_told(
    runner: RolloutRunner, mixed: RolloutRunner, untrained: PolicyParams, prior: Prior, config: ControllerConfig
):
    cases = [
        (runner, chunk(horizon_told=horizon, family_told=family), int(family), int(horizon))
        for family in (True, False)
        for horizon in (True, False)
    ]
    cases += [
        (mixed, chunk(pool=0), 0, 1),
        (mixed, chunk(pool=1), 2, 1),
        (mixed, chunk(pool=1, family_told=False), 0, 1),
    ]
    for its_runner, its_chunk, row, known in cases:
        (episode,) = its_runner.run([its_chunk], untrained, prior)
        np.testing.assert_array_equal(episode.family, row)
        for name, unit in zip(CONTROLLED, prior.base[row, known], strict=True):
            wanted = config.space[name].decode(float(unit))
            np.testing.assert_allclose(getattr(episode.values, name), wanted, rtol=1e-5, err_msg=name)


def test_the_family_moves_what_is_done(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    prior = prior._replace(base=np.broadcast_to(prior.base[:1], prior.base.shape))  # only the embedding is left
    told, untold = runner.run([chunk(), chunk(family_told=False)], acting, prior)
    assert np.abs(told.start_action - untold.start_action).max() > 0.01
    assert np.abs(told.group_action[:, 0] - untold.group_action[:, 0]).max() > 0.01


def test_episodes_of_fewer_groups_are_padded(mixed: RolloutRunner, acting: PolicyParams, prior: Prior):
    few, many = mixed.run([chunk(pool=0), chunk(pool=1)], acting, prior, explore=1.0)
    joined = concatenate([few, many])
    np.testing.assert_array_equal(joined.group_mask, [[1, 1, 0]] * CHUNK + [[1, 1, 1]] * CHUNK)
    np.testing.assert_array_equal(joined.family, [0] * CHUNK + [2] * CHUNK)
    for name in ("group", "group_action"):
        leaf = getattr(joined, name)
        np.testing.assert_array_equal(leaf[:CHUNK, :, :2], getattr(few, name))
        np.testing.assert_array_equal(leaf[CHUNK:], getattr(many, name))
        assert not leaf[:CHUNK, :, 2].any()
    for name, leaf in joined.values._asdict().items():
        assert leaf.shape == (2 * CHUNK, 4) + (() if name == "dropout" else (3,))
    np.testing.assert_array_equal(joined.values.learning_rate[:CHUNK, :, :2], few.values.learning_rate)
    assert same(concatenate([few, few]), jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), few))
    np.testing.assert_allclose(relative_scores(joined), np.concatenate([relative_scores(few), relative_scores(many)]))


def test_a_single_group_is_one_group(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    (episode,) = runner.run([chunk(single_group=True)], acting, prior, explore=1.0)
    np.testing.assert_array_equal(episode.group_mask, np.tile([1.0, 0.0], (CHUNK, 1)))
    for values in (episode.values.learning_rate, episode.values.weight_decay, episode.values.beta1):
        np.testing.assert_array_equal(values[..., 0], values[..., 1])
    assert np.isnan(episode.group[:, :, 1, 0]).all()
    assert np.isfinite(episode.group[:, 1:, 0]).all()


def test_a_horizon_that_is_not_told_is_not_seen(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    told, untold = runner.run([chunk(), chunk(horizon_told=False)], acting, prior)
    progress, known = GLOBAL_FEATURES.index("progress"), GLOBAL_FEATURES.index("horizon_known")
    np.testing.assert_allclose(told.run[0, :, progress], [0.25, 0.5, 0.75])
    assert np.isnan(untold.run[..., progress]).all()
    assert (told.run[..., known] == 1).all()
    assert (untold.run[..., known] == 0).all()
    assert np.isnan(untold.descriptors[:, -3]).all()  # log_horizon_epochs


def test_rewards_add_up_to_the_score(runner: RolloutRunner, acting: PolicyParams, prior: Prior, pool: TaskPool):
    (episode,) = runner.run([chunk(task=np.arange(CHUNK) % 3)], acting, prior, explore=1.0)
    floor = pool.tasks.validation_floor[np.arange(CHUNK) % 3]
    nothing = np.log(METRIC_OFFSET / (floor + METRIC_OFFSET))
    np.testing.assert_allclose(episode.reward.sum(1), relative_scores(episode) - nothing, atol=1e-5)
    np.testing.assert_array_equal(episode.floor, pool.tasks.test_floor[np.arange(CHUNK) % 3])


def test_a_diverged_run_scores_nothing(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    # Decoupled decay of 10 at a rate of 1 multiplies weights by 1 - 10 each step: past float32 within 48 steps.
    wild = chunk(start=np.ones(S), num_steps=48, task=np.arange(CHUNK) % 3)
    (episode,) = runner.run([wild], acting, prior, act=False)
    assert (episode.score == 0).all()
    assert (episode.score <= episode.floor).all()
    assert (relative_scores(episode) < 0).all()
    assert np.isfinite(episode.reward).all()
    assert (episode.reward[:, 1:-1] == np.float32(-NONFINITE_PENALTY)).all()


def test_scores_that_are_not_finite_count_as_nothing(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    (episode,) = runner.run([chunk()], acting, prior)
    bad = np.array([np.nan, np.inf, -np.inf, 0.0, *episode.score[4:]], np.float32)
    scores = relative_scores(episode._replace(score=bad))
    np.testing.assert_allclose(scores[:4], np.log(METRIC_OFFSET / (episode.floor[:4] + METRIC_OFFSET)), rtol=1e-5)
    np.testing.assert_array_equal(scores[4:], relative_scores(episode)[4:])


def test_chunks_come_back_in_the_order_given(runner: RolloutRunner, untrained: PolicyParams, prior: Prior):
    chunks = [chunk(num_steps=steps, initialization=steps) for steps in (2, 8, 5)]
    together = runner.run(chunks, untrained, prior)
    alone = [runner.run([one], untrained, prior)[0] for one in chunks]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert len(concatenate(together).score) == 3 * CHUNK


@pytest.mark.parametrize(
    ("told", "factor", "family_told", "kept"),
    [
        (True, 1.0, True, ()),
        (True, 0.5, False, ()),
        (True, 2.0, True, ("dropout",)),
        (False, 1.0, True, ("weight_decay", "beta1")),
    ],
)
def test_the_session_decides_as_the_rollout_did(
    acting: PolicyParams,
    prior: Prior,
    config: ControllerConfig,
    told: bool,
    factor: float,
    family_told: bool,
    kept: tuple[str, ...],
):
    """Train and serve the same run: JAX rollout against NumPy session steering the same environment."""
    domain = simulated_domain(BUCKET, np.random.default_rng(5))
    tasks = stack_tasks([make_task(domain, BUCKET)])
    profiles = profile_descriptors(domain.profile)[None].astype(np.float32)
    pool = TaskPool(bucket=BUCKET, tasks=tasks, profiles=profiles, names=("simulated",))
    runner = RolloutRunner([pool], config, devices=jax.local_devices()[:1])
    own = np.array([config.space[name].encode(config.space[name].default) for name in CONTROLLED])
    spec = {"horizon_told": told, "horizon_factor": factor, "family_told": family_told}
    spec["kept"] = np.where(np.isin(CONTROLLED, kept), own, np.nan)
    (episode,) = runner.run([chunk(**spec)], acting, prior)
    horizon = round(STEPS * config.num_decisions * factor) if told else None

    network = flatten(jax.tree.map(np.asarray, acting.network))
    checkpoint = Checkpoint(config=config, network=network, base=prior.base, normalizer=prior.normalizer, provenance={})
    session = Controller(checkpoint).start(
        domain.profile,
        CANONICAL_SPACE.subset([name for name in CANONICAL_SPACE.names if name not in kept]),
        roles=("embedding", "embedding"),
        family=BUCKET.learner if family_told else None,
        horizon=horizon,
        batch_size=BUCKET.batch,
        interval=STEPS,
    )
    task, key = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), tasks), jax.random.key(jnp.uint32(1))
    state = pool.environment.reset(task, key=jax.random.fold_in(key, 0))
    decision = session.ask()
    for index in range(config.num_decisions):
        values = Values(
            *(
                jnp.array([group.get(n, CANONICAL_SPACE[n].default) for group in decision.groups], jnp.float32)
                for n in CONTROLLED[:3]
            ),
            jnp.float32(decision.run.get("dropout", CANONICAL_SPACE["dropout"].default)),
        )
        for name in kept:
            assert np.isnan(getattr(episode.values, name)).all()
        for name in set(CONTROLLED) - set(kept):
            recorded = np.asarray(getattr(episode.values, name))[0, index]
            np.testing.assert_allclose(getattr(values, name), recorded, rtol=2e-3, err_msg=f"{name}, {index}")
        plan = Plan(
            jnp.int32(STEPS),
            jnp.int32(index * STEPS),
            jnp.float32(horizon if told else np.nan),
            jnp.bool_(False),
            config.decay_to,
        )
        state, statistics = environment_step(task, state, values, plan, key=jax.random.fold_in(key, index + 1))
        np.testing.assert_allclose(statistics.validation, episode.validation[0, index], atol=0.02)
        decision = session.tell(jax.tree.map(np.asarray, statistics))
    moved = np.asarray(episode.values.learning_rate)[0]
    assert np.abs(np.log(moved[-1] / moved[0])).min() > 0.01
