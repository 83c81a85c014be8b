"""What is settled before the policy learns: draws, the base, the normaliser and the supervised start."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.tasks import TaskPool
from metalearn.controller import CONTROLLED, ControllerConfig, network
from metalearn.controller.observation import DESCRIPTORS
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training import warm_start
from metalearn.meta_training.rollout import PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, RolloutRunner, make_chunk
from metalearn.meta_training.warm_start import SEARCH_BOX, SearchResult, balanced_tasks, draw_steps
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, fit_knots, percentile_scale
from tests.meta_training.toy import ToyPool

S = len(CONTROLLED)
pytestmark = pytest.mark.usefixtures("standard_promotion")


def synthetic_search(
    config: ControllerConfig,
    *,
    optimum: float = 0.6,
    optimum_shift: float = 0.0,
    noise: float = 0.3,
    pool: int = 0,
    family: int = 0,
    told: bool = True,
) -> SearchResult:
    """Return trials whose score falls with the distance from an optimum, given as a share of the box.

    The learning rate's optimum goes with the first descriptor, by `optimum_shift` unit ranges to either side.
    """
    rng = np.random.default_rng(pool)
    low, high = warm_start.search_box(config, None)
    num_tasks, per_task = 24, 16
    task = np.repeat(np.arange(num_tasks), per_task)
    start = np.concatenate([warm_start.draw_configurations(per_task, config, None, rng) for _ in range(num_tasks)])
    side = np.where(np.arange(num_tasks) % 2 == 0, -1.0, 1.0)
    best = np.tile(low + optimum * (high - low), (num_tasks, 1))
    best[:, 0] += side * optimum_shift
    distance = np.square((start - best[task]) / (high - low)).sum(1)
    difficulty = rng.normal(0.0, 10.0, num_tasks)[task]  # domains differ by more than configurations do
    descriptors = np.tile(rng.normal(0.0, 1.0, len(DESCRIPTORS)), (num_tasks, 1))
    descriptors[:, 0] = 20.0 * side
    return SearchResult(
        task=task,
        pool=np.full(len(task), pool),
        family=np.full(len(task), family),
        told=np.full(len(task), told),
        start=start.astype(np.float32),
        score=difficulty - 5.0 * distance + rng.normal(0.0, noise, len(task)),
        descriptors=descriptors[task].astype(np.float32),
    )


def joined(*results: SearchResult) -> SearchResult:
    """Put searches together; their tasks are different ones."""
    columns = {
        name: np.concatenate([getattr(result, name) for result in results])
        for name in vars(results[0])
        if name != "task"
    }
    return SearchResult(task=np.concatenate([24 * i + result.task for i, result in enumerate(results)]), **columns)


def chosen(result: SearchResult, config: ControllerConfig) -> tuple[np.ndarray, float]:
    """Return the base for any model with a known horizon, and its predicted score."""
    bases, scores = warm_start.choose_bases(result, config, seed=0)
    return bases[0, 1], scores[0, 1]


def test_configurations_are_a_latin_hypercube_of_the_box(config: ControllerConfig):
    low, high = warm_start.search_box(config, None)
    drawn = warm_start.draw_configurations(20, config, None, np.random.default_rng(0))
    assert drawn.shape == (20, S)
    strata = np.floor((drawn - low) / (high - low) * 20).astype(int)
    for column in strata.T:
        assert sorted(column) == list(range(20))
    decoded = [config.space[name].decode(unit) for name, unit in zip(CONTROLLED, low, strict=True)]
    assert decoded == pytest.approx([SEARCH_BOX[name][0] for name in CONTROLLED])


def test_a_family_has_a_box_of_its_own(config: ControllerConfig):
    config = dataclasses.replace(config, families=("matrix_factorization", "two_tower"))
    drawn = warm_start.draw_configurations(64, config, "two_tower", np.random.default_rng(0))
    rates = np.array([config.space["learning_rate"].decode(unit) for unit in drawn[:, 0]])
    low, high = warm_start.FAMILY_RATES["two_tower"]
    assert low <= rates.min() < SEARCH_BOX["learning_rate"][0] < rates.max() <= high < SEARCH_BOX["learning_rate"][1]


def test_a_base_stays_in_the_box_of_its_family(config: ControllerConfig):
    config = dataclasses.replace(config, families=("matrix_factorization", "two_tower"))
    low, high = warm_start.search_box(config, "two_tower")
    trials = synthetic_search(config)
    start = low + (high - low) * np.random.default_rng(1).random(trials.start.shape)
    # The lower the rate the better: the best of a box lies at its lower edge.
    trials = dataclasses.replace(trials, start=start.astype(np.float32), score=(low[0] - start[:, 0]) / (high - low)[0])
    results = [
        dataclasses.replace(trials, family=np.full(len(start), family), pool=np.full(len(start), family - 1))
        for family in (1, 2)
    ]
    bases, _ = warm_start.choose_bases(joined(*results), config, seed=0)
    rates = [[config.space["learning_rate"].decode(float(unit)) for unit in base[:, 0]] for base in bases]
    assert min(rates[0] + rates[1]) >= SEARCH_BOX["learning_rate"][0] * 0.999
    assert max(rates[2]) < SEARCH_BOX["learning_rate"][0]


def test_domains_take_turns():
    domains = ["movies"] * 10, ["books"] * 2, ["games"], ["music"]
    names = [name for domain in domains for name in domain] + ["simulated"] * 5
    picked = balanced_tasks(names, 16, np.random.default_rng(0))
    counts = Counter(names[index] for index in picked)
    assert counts == {"movies": 3, "books": 3, "games": 3, "music": 3, "simulated": 4}  # simulated ones: one in four
    assert len({index for index in picked if names[index] == "movies"}) == 3  # none twice while there are others
    assert len({index for index in picked if names[index] == "simulated"}) == 4


@pytest.mark.parametrize("names", [["simulated"] * 3, ["movies"], ["a", "b", "simulated"]])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_as_many_tasks_as_asked_for(names: list[str], count: int):
    picked = balanced_tasks(names, count, np.random.default_rng(0))
    assert len(picked) == count
    assert set(picked) <= set(range(len(names)))
    if len(set(names)) == 1 and count >= len(names):
        assert set(picked) == set(range(len(names)))


def test_epochs_are_log_uniform_whatever_the_size(config: ControllerConfig):
    runner, rng = RolloutRunner([ToyPool()], config), np.random.default_rng(0)
    per_epoch = runner.steps_per_epoch(0, [0])
    assert per_epoch == ToyPool().tasks.num_interactions[0] / ToyPool().environment.samples_per_step
    steps = [draw_steps((4.0, 64.0), (1, 10_000), runner, 0, [0], rng) for _ in range(2000)]
    epochs = np.array(steps) * config.num_decisions / per_epoch
    assert epochs.min() == pytest.approx(4.0, rel=0.05)
    assert epochs.max() == pytest.approx(64.0, rel=0.05)
    assert np.mean(epochs <= 16) == pytest.approx(0.5, abs=0.05)
    assert {draw_steps((4.0, 64.0), (5, 5), runner, 0, [0, 1], rng) for _ in range(9)} == {5}


def test_the_base_is_where_the_optimum_is_not_where_luck_was(config: ControllerConfig):
    low, high = warm_start.search_box(config, None)
    base, score = chosen(synthetic_search(config), config)
    assert base.dtype == np.float32
    assert np.abs((base - low) / (high - low) - 0.6).max() < 0.15
    assert 0 < score < 5


@pytest.mark.parametrize("optimum", [0.2, 0.8])
def test_the_base_drifts_little_to_the_edges_of_the_box(config: ControllerConfig, optimum: float):
    """A kernel average, which looks better where an edge cuts it off, drifts by 0.12 and 0.13 here."""
    result = joined(*(synthetic_search(config, optimum=optimum, pool=pool) for pool in range(3)))
    result = dataclasses.replace(result, score=0.2 * result.score, pool=np.zeros_like(result.pool))
    base, _ = chosen(result, config)
    assert np.abs(share(base, config) - optimum).mean() < 0.1


def test_the_base_does_not_depend_on_how_hard_tasks_are(config: ControllerConfig):
    result = synthetic_search(config)
    harder = dataclasses.replace(result, score=result.score - 100.0 * result.task)
    one, other = (chosen(r, config) for r in (result, harder))
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == pytest.approx(other[1], abs=1e-5)


def share(base: np.ndarray, config: ControllerConfig) -> np.ndarray:
    """Return a base as a share of the box."""
    low, high = warm_start.search_box(config, None)
    return (base - low) / (high - low)


@pytest.fixture(scope="module")
def families() -> ControllerConfig:
    """Three families; nothing was run for the last."""
    return ControllerConfig(descriptors=DESCRIPTORS, families=("matrix_factorization", "two_tower", "click_model"))


@pytest.fixture(scope="module")
def two_families(families: ControllerConfig) -> SearchResult:
    """The first family has a small pool that wants the opposite of its large one; the second depends on the horizon."""
    return joined(
        synthetic_search(families, optimum=0.1, pool=0, family=1),
        synthetic_search(families, optimum=0.6, pool=1, family=1),
        synthetic_search(families, optimum=0.4, pool=2, family=2),
        synthetic_search(families, optimum=0.55, pool=2, family=2, told=False),
    )


def test_every_family_gets_its_own_optimum(families: ControllerConfig, two_families: SearchResult):
    bases, scores = warm_start.choose_bases(two_families, families, seed=0)
    assert (bases.shape, bases.dtype, scores.shape) == ((4, 2, S), np.float32, (4, 2))
    where = share(bases, families).mean(-1)  # over hyperparameters, whose optima are alike: half of the luck
    for family, told, optimum in ((1, 1, 0.6), (2, 1, 0.4), (2, 0, 0.55)):
        assert where[family, told] == pytest.approx(optimum, abs=0.1)
    assert (scores > 0).all()
    np.testing.assert_array_equal(bases[1, 0], bases[1, 1])  # it has no trials without a horizon
    # Any other model gets what is best for both on average, and so does a family without trials.
    assert where[2, 1] + 0.05 < where[0, 1] < where[1, 1] - 0.05
    np.testing.assert_array_equal(bases[3], bases[0])
    np.testing.assert_array_equal(scores[3], scores[0])


def test_only_the_largest_pool_of_a_family_counts(config: ControllerConfig):
    one_family = dataclasses.replace(config, families=("matrix_factorization",))
    result = joined(synthetic_search(config, family=1), synthetic_search(config, pool=1, family=1))
    both = warm_start.choose_bases(result, one_family, seed=0)
    for pool, counts in ((0, False), (1, True)):
        turned = dataclasses.replace(result, score=np.where(result.pool == pool, -result.score, result.score))
        again = warm_start.choose_bases(turned, one_family, seed=0)
        assert all(np.array_equal(one, other) for one, other in zip(both, again, strict=True)) != counts


def test_without_families_there_is_one_base(config: ControllerConfig):
    alone = dataclasses.replace(config, families=())
    bases, scores = warm_start.choose_bases(synthetic_search(alone), alone, seed=0)
    np.testing.assert_array_equal(bases, np.broadcast_to(bases[0, 1], (1, 2, S)))
    assert scores[0, 0] <= scores[0, 1]  # nothing was run without a horizon: it promises less


def test_supervised_start_learns_what_families_ask_for(config: ControllerConfig, prior: Prior):
    """Domains alike, one base for all: what is left is the family."""
    result = synthetic_search(config, optimum_shift=0.1)
    result = dataclasses.replace(
        result,
        family=1 + (result.descriptors[:, 0] > 0),
        descriptors=np.broadcast_to(result.descriptors[:1], result.descriptors.shape),
    )
    base, _ = chosen(result, config)
    prior = prior._replace(base=np.broadcast_to(base, prior.base.shape))
    params = network.init(config, key=jax.random.key(0))
    fitted, _ = warm_start.fit_start(result, config, params, prior, seed=0, num_steps=200)
    scaled = percentile_scale(jnp.asarray(result.descriptors[0]), prior.normalizer.descriptors, jnp)
    proposals = [network.start(config, fitted, scaled, family) for family in range(3)]
    other, low, high = (float((proposal.gate * jnp.tanh(proposal.modifier))[0]) for proposal in proposals)
    assert low < -0.1 < 0.1 < high
    assert low < other < high


def test_supervised_start_learns_what_domains_ask_for(config: ControllerConfig, prior: Prior):
    result = synthetic_search(config, optimum_shift=0.1, family=1)
    bases, _ = warm_start.choose_bases(result, config, seed=0)
    prior = prior._replace(base=bases)
    params = network.init(config, key=jax.random.key(0))
    fitted, values = warm_start.fit_start(result, config, params, prior, seed=0)
    assert np.isfinite(values).all()
    assert values[-50:].mean() > values[:10].mean()
    shift = []
    for side in (0, 1):
        row = np.flatnonzero(result.task == side)[0]
        scaled = percentile_scale(jnp.asarray(result.descriptors[row]), prior.normalizer.descriptors, jnp)
        proposal = network.start(config, fitted, scaled, 1)
        shift.append(np.asarray(proposal.gate * jnp.tanh(proposal.modifier)))
    assert shift[0][0] < -0.1 < 0.1 < shift[1][0]
    # Only the start was fitted: what acts in the run is as it was, at zero.
    for name in ("group_head", "run_head"):
        assert not np.any(fitted[name]["kernel"])


def test_identity_normaliser_leaves_everything_in_range(config: ControllerConfig):
    normalizer = warm_start.identity_normalizer(config)
    assert [len(knots) for knots in normalizer] == [len(DESCRIPTORS), len(GROUP_FEATURES), len(GLOBAL_FEATURES)]
    values = np.linspace(-40.0, 40.0, len(GLOBAL_FEATURES))
    np.testing.assert_allclose(percentile_scale(values, normalizer.run, np), values / 50.0, atol=1e-6)


def test_normaliser_is_of_what_was_seen(runner: RolloutRunner, acting: PolicyParams, prior: Prior, pool: TaskPool):
    chunks = [
        make_chunk(0, 6, task=np.arange(CHUNK) % len(pool), initialization=3, single_group=single, num_start=S)
        for single in (False, True)
    ]
    episodes = runner.run(chunks, acting, prior, explore=1.0)
    normalizer = warm_start.fit_normalizer(episodes, np.random.default_rng(0))
    ratio = np.concatenate([episodes[0].group[..., 4].ravel(), episodes[1].group[:, :, 0, 4].ravel()])
    knots = normalizer.group[4]
    assert ratio.min() <= knots[0] < knots[-1] <= ratio.max() + 0.01
    for part in normalizer:
        assert np.isfinite(part).all()
        assert (np.diff(part, axis=1) > 0).all()


def test_padded_groups_do_not_enter_the_normaliser(mixed: RolloutRunner, acting: PolicyParams, prior: Prior):
    chunks = [make_chunk(pool, 6, task=0, initialization=3, num_start=S) for pool in (0, 1)]
    episodes = mixed.run(chunks, acting, prior, explore=1.0)
    normalizer = warm_start.fit_normalizer(episodes, np.random.default_rng(0))
    rows = np.concatenate([episode.group.reshape(-1, len(GROUP_FEATURES)) for episode in episodes])
    np.testing.assert_array_equal(normalizer.group, fit_knots(rows))


def test_search_runs_every_configuration_on_its_task(runner: RolloutRunner, untrained: PolicyParams, prior: Prior):
    arguments = {
        "tasks_per_pool": (3,),
        "configurations": (16,),
        "epochs_range": (1.0, 8.0),
        "steps_range": ((3, 6),),
        "told_share": 0.5,
    }
    result = warm_start.run_search(runner, untrained, prior, **arguments, seed=0)
    assert result.score.shape == (48,)
    assert Counter(result.task.tolist()) == {0: 16, 1: 16, 2: 16}
    assert result.start.shape == (48, S)
    assert (result.family == 1).all()  # the bucket's
    low, high = warm_start.search_box(runner.config, None)
    assert ((result.start >= low - 1e-6) & (result.start <= high + 1e-6)).all()
    for task in range(3):
        rows = result.task == task
        assert len(np.unique(result.told[rows])) == 1
        assert len(np.unique(np.nan_to_num(result.descriptors[rows]), axis=0)) == 1
        assert len(np.unique(result.score[rows])) > 8
    again = warm_start.run_search(runner, untrained, prior, **arguments, seed=0)
    for name, value in vars(result).items():
        np.testing.assert_array_equal(value, getattr(again, name), err_msg=name)
    other = warm_start.run_search(runner, untrained, prior, **arguments, seed=1)
    assert not np.array_equal(result.start, other.start)


def test_candidates_are_what_other_tasks_would_have_chosen(families: ControllerConfig):
    result = synthetic_search(families, optimum=0.5, optimum_shift=0.1, family=2)
    bases, _ = warm_start.choose_bases(result, families, seed=0)
    found = warm_start.candidate_bases(result, families, "two_tower", count=3, seed=0)
    np.testing.assert_allclose(found[0], bases[2, 1], atol=1e-6)
    assert len(np.unique(found, axis=0)) == 3
    where = np.stack([share(row, families) for row in found])
    assert np.abs(where.mean(1) - 0.5).max() < 0.2
    with pytest.raises(InvalidArgumentError, match="no trials of 'click_model'"):
        warm_start.candidate_bases(result, families, "click_model", count=4, seed=0)
    with pytest.raises(InvalidArgumentError, match="`count` must be at most"):
        warm_start.candidate_bases(result, families, "two_tower", count=4000, seed=0)


def test_searches_of_several_pools_are_joined_with_tasks_of_their_own(config: ControllerConfig):
    one, other = synthetic_search(config), synthetic_search(config, pool=1)
    both = warm_start.join_searches([one, other])
    assert len(np.unique(both.task)) == 48
    np.testing.assert_array_equal(both.task[len(one.task) :], other.task + 24)
    np.testing.assert_array_equal(both.score, np.concatenate([one.score, other.score]))
