"""The loop: draws are pure functions of the config, a killed run resumes to the bit, and a checkpoint comes out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from envs.tasks import TaskPool
from metalearn.controller import CONTROLLED, Checkpoint, Controller, ControllerConfig, load_controller, save_checkpoint
from metalearn.controller.observation import DESCRIPTORS
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.meta_training import ppo
from metalearn.meta_training.config import MetaTrainConfig
from metalearn.meta_training.loop import evaluate, iteration_chunks, meta_train, validation_chunks
from metalearn.meta_training.model_card import write_model_card
from metalearn.meta_training.outcome import OutcomeFitConfig
from metalearn.meta_training.release import rebased, tempered, with_bases, with_harmed_at_rest
from metalearn.meta_training.rollout import PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, Chunk, RolloutRunner
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES
from tests.intervals import make_interval, make_profile
from tests.meta_training.conftest import BASES
from tests.meta_training.toy import ToyPool

CONFIG = MetaTrainConfig(
    num_iterations=4,
    groups_per_pool=(1, 1),
    steps_range=((2, 5), (2, 5)),
    search_tasks=(3, 2),
    search_configurations=(8, 8),
    validate_every=2,
    validation_episodes=6,
    ppo=ppo.PPOConfig(num_epochs=1, num_minibatches=2),
    outcome_rounds=4,
    outcome=OutcomeFitConfig(blocks=4, steps_per_evaluation=2, max_evaluations=1),
)
PROVENANCE = {
    "domains": [],
    "validation_domains": [],
    "tasks": [2, 2],
    "buckets": [{"learner": "two_tower", "users": 128, "items": 96, "dim": 4, "batch": 32}],
    "commit": "unknown",
    "preset": "tests",
}


TOYS = (ToyPool(), ToyPool(family="two_tower", num_groups=3))


def of_one_pool(**changes: Any) -> MetaTrainConfig:
    """Return the settings for a single pool."""
    columns = {name: getattr(CONFIG, name)[:1] for name in ("steps_range", "search_tasks", "search_configurations")}
    return replace(CONFIG, groups_per_pool=(2,), **columns, **changes)


class Interrupted(Exception):
    """Stands for a kill."""


def same_chunks(one: list[Chunk], other: list[Chunk]) -> bool:
    return [(a.pool, a.num_steps) for a in one] == [(b.pool, b.num_steps) for b in other] and all(
        np.array_equal(x, y, equal_nan=True)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a.spec, b.spec, strict=True)
    )


@pytest.fixture(scope="module")
def toy(config: ControllerConfig) -> RolloutRunner:
    return RolloutRunner(TOYS[:1], config, devices=jax.local_devices()[:1])


@pytest.mark.parametrize("name", ["num_iterations", "validate_every", "validation_episodes", "patience"])
def test_counts_must_be_positive(name: str):
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must be a positive int, got 0"):
        replace(CONFIG, **{name: 0})


def test_groups_must_fill_the_minibatches():
    with pytest.raises(
        InvalidArgumentError, match=r"`groups_per_pool` must sum to a multiple of 2 minibatches, got \(3,\)"
    ):
        replace(CONFIG, groups_per_pool=(3,))


def test_an_iteration_s_draws_are_a_function_of_config_and_iteration(toy: RolloutRunner):
    config = replace(CONFIG, groups_per_pool=(8,))
    one, again, other = (iteration_chunks(config, toy, iteration) for iteration in (3, 3, 4))
    assert same_chunks(one, again)
    assert not same_chunks(one, other)
    assert not same_chunks(one, iteration_chunks(replace(config, seed=1), toy, 3))
    assert len(one) == 8
    for chunk in one:
        assert 2 <= chunk.num_steps <= 5
        assert len(set(chunk.spec.task.tolist())) == len(set(chunk.spec.initialization.tolist())) == 1
        assert len(set(chunk.spec.exploration.tolist())) == CHUNK
        assert np.isnan(chunk.spec.start).all()
    assert Counter(int(chunk.spec.task[0]) for chunk in one) == {0: 4, 1: 4}


def test_shares_of_what_is_told_and_of_single_groups(toy: RolloutRunner):
    config = replace(CONFIG, told_share=0.75, family_told_share=0.6, single_group_share=0.3, groups_per_pool=(400,))
    chunks = iteration_chunks(config, toy, 0)
    assert np.mean([chunk.spec.horizon_told[0] for chunk in chunks]) == pytest.approx(0.75, abs=0.06)
    assert np.mean([chunk.spec.family_told[0] for chunk in chunks]) == pytest.approx(0.6, abs=0.06)
    assert np.mean([chunk.spec.single_group[0] for chunk in chunks]) == pytest.approx(0.3, abs=0.06)


def test_validation_episodes_are_fixed(toy: RolloutRunner):
    told, untold = (validation_chunks(CONFIG, toy, horizon_told=told) for told in (True, False))
    assert all(chunk.spec.family_told.all() for chunk in told + untold)
    assert same_chunks(told, validation_chunks(CONFIG, toy, horizon_told=True))
    assert all(chunk.spec.horizon_told.all() for chunk in told)
    assert not any(chunk.spec.horizon_told.any() for chunk in untold)
    for a, b in zip(told, untold, strict=True):
        np.testing.assert_array_equal(a.spec.initialization, b.spec.initialization)


def test_the_baseline_is_the_base_of_the_family_whatever_the_policy(
    config: ControllerConfig, untrained: PolicyParams, acting: PolicyParams, prior: Prior
):
    toy = RolloutRunner(TOYS, config, devices=jax.local_devices()[:1])
    results = [evaluate(CONFIG, toy, params, prior, act=False, base=True) for params in (untrained, acting)]
    acted = evaluate(CONFIG, toy, acting, prior, act=True, base=False)
    idle = evaluate(CONFIG, toy, untrained, prior, act=True, base=False)
    for told in (True, False):
        np.testing.assert_array_equal(results[0][told][0], results[1][told][0])
        np.testing.assert_allclose(idle[told][0], results[0][told][0], atol=1e-5)
        assert not np.allclose(acted[told][0], results[0][told][0], atol=1e-3)
        assert Counter(results[0][told][1]) == {"toy": CHUNK, "two_tower": CHUNK}


def run(
    config: MetaTrainConfig,
    controller: ControllerConfig,
    pools: Sequence[Any],
    directory: Path,
    *,
    interrupt_at: int | None = None,
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        records.append(record)
        if record["phase"] == "train" and record["iteration"] == interrupt_at:
            raise Interrupted

    checkpoint = meta_train(config, controller, pools, pools, directory=directory, log=log, provenance=PROVENANCE)
    return checkpoint, records


def assert_same_checkpoint(one: Checkpoint, other: Checkpoint) -> None:
    assert json.dumps(one.provenance, sort_keys=True) == json.dumps(other.provenance, sort_keys=True)
    assert set(one.network) == set(other.network)
    pairs = [(one.network[name], other.network[name]) for name in one.network]
    for a, b in [*pairs, (one.base, other.base), *zip(one.normalizer, other.normalizer, strict=True)]:
        np.testing.assert_array_equal(a, b)


def losses(records: list[dict[str, Any]]) -> dict[int, float]:
    return {record["iteration"]: record["critic_loss"] for record in records if record["phase"] == "train"}


@pytest.fixture(scope="module")
def whole_run(
    config: ControllerConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """A run of two families from start to end, and its log."""
    with jax.numpy_dtype_promotion("standard"):
        return run(CONFIG, config, TOYS, tmp_path_factory.mktemp("whole"))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "interrupt_at", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_resumes_to_the_bit(
    config: ControllerConfig, whole_run: tuple[Checkpoint, list[dict[str, Any]]], tmp_path: Path, interrupt_at: int
):
    whole, whole_records = whole_run
    with pytest.raises(Interrupted):
        run(CONFIG, config, TOYS, tmp_path / "cut", interrupt_at=interrupt_at)
    resumed, resumed_records = run(CONFIG, config, TOYS, tmp_path / "cut")
    assert_same_checkpoint(whole, resumed)
    # It went on from the last iteration that it had ended, and saw the same losses from there on.
    assert losses(resumed_records) == {k: v for k, v in losses(whole_records).items() if k >= interrupt_at}
    assert all(record["phase"] != "search" for record in resumed_records)
    finished, records = run(CONFIG, config, TOYS, tmp_path / "cut")  # nothing is left to do
    assert_same_checkpoint(whole, finished)
    assert losses(records) == {}


@pytest.mark.usefixtures("standard_promotion")
def test_a_finished_run_taken_further_is_the_longer_run_to_the_bit(
    config: ControllerConfig, whole_run: tuple[Checkpoint, list[dict[str, Any]]], tmp_path: Path
):
    whole, whole_records = whole_run
    finished, _ = run(replace(CONFIG, num_iterations=2, patience=1), config, TOYS, tmp_path)
    assert finished.provenance["best_iteration"] <= 2
    extended, records = run(CONFIG, config, TOYS, tmp_path)
    assert_same_checkpoint(extended, whole)
    assert extended.provenance["meta_training"]["num_iterations"] == 4
    assert [record["phase"] for record in records[:3]] == ["train", "train", "validate"]  # nothing is searched again
    assert losses(records) == {k: v for k, v in losses(whole_records).items() if k > 2}


def test_every_family_has_its_base_in_the_checkpoint_and_in_the_log(
    config: ControllerConfig, whole_run: tuple[Checkpoint, list[dict[str, Any]]]
):
    checkpoint, records = whole_run
    search = records[0]
    for row, family in enumerate(config.rows):
        for known, horizon in enumerate(("unknown", "known")):
            for name, unit in zip(CONTROLLED, checkpoint.base[row, known].tolist(), strict=True):
                assert search[f"base/{family}/{horizon}/{name}"] == config.space[name].decode(unit)
            assert np.isfinite(search[f"base/{family}/{horizon}/gain"])
    np.testing.assert_array_equal(checkpoint.base[1], checkpoint.base[0])  # no toy is of that family
    assert not np.array_equal(checkpoint.base[2], checkpoint.base[0])
    validated = [record for record in records if record["phase"] == "validate"]
    assert all({"validation/gain/known/toy", "validation/gain/unknown/two_tower"} <= set(r) for r in validated)
    trained = [record for record in records if record["phase"] == "train"]
    assert all({"return/real/toy", "return/real/two_tower"} <= set(record) for record in trained)


@pytest.mark.usefixtures("standard_promotion")
def test_a_folder_of_another_config_is_refused(config: ControllerConfig, tmp_path: Path):
    with pytest.raises(Interrupted):
        run(CONFIG, config, TOYS, tmp_path, interrupt_at=1)
    with pytest.raises(
        SessionError, match="holds a meta-training run with another config or other tasks; pass another --output"
    ):
        run(replace(CONFIG, seed=1), config, TOYS, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_patience_ends_a_run(config: ControllerConfig, tmp_path: Path):
    frozen = replace(CONFIG, num_iterations=50, patience=1, ppo=replace(CONFIG.ppo, learning_rate=0.0))
    checkpoint, records = run(frozen, config, TOYS, tmp_path)
    assert max(losses(records)) < 5
    assert checkpoint.provenance["best_iteration"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_training_on_recommenders_makes_a_controller(config: ControllerConfig, pool: TaskPool, tmp_path: Path):
    """About a minute: compiles search, rollouts and update for the tiny bucket."""
    checkpoint, records = run(of_one_pool(), config, [pool], tmp_path / "state")
    path = save_checkpoint(checkpoint, tmp_path / "controller.safetensors")
    controller = load_controller(path)
    assert_same_checkpoint(controller.checkpoint, checkpoint)
    assert_controls(controller)
    phases = Counter(record["phase"] for record in records)
    assert phases.items() >= {"search": 1, "supervised start": 1, "validate": 3, "train": 4}.items()
    assert all(np.isfinite(value) for r in records for value in r.values() if isinstance(value, float))
    write_model_card(checkpoint, path.with_name("README.md"))
    card = path.with_name("README.md").read_text()
    for name in (*CONTROLLED, "validation/gain/known", "128 x 96", "simulated ones"):
        assert name in card


def test_the_model_card_shows_the_base_of_every_family(
    config: ControllerConfig, whole_run: tuple[Checkpoint, list[dict[str, Any]]], prior: Prior, tmp_path: Path
):
    checkpoint = replace(whole_run[0], base=np.asarray(prior.base))
    write_model_card(checkpoint, tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text().splitlines()
    for family, bases in zip(config.rows, BASES, strict=True):
        for rate, base in zip(("held", "decays"), bases, strict=True):
            assert f"| {family} | {rate} | " + " | ".join(f"{value:.4g}" for value in base) + " |" in card
    assert any("two_tower 128 x 96 (d 4, batch 32)" in line for line in card)


def assert_controls(controller: Controller) -> None:
    session = controller.start(make_profile(), roles=("embedding", "embedding"), horizon=100, batch_size=32)
    decisions = [session.ask(), *(session.tell(make_interval()) for _ in range(4))]
    assert all(np.isfinite(value) for d in decisions for group in d.groups for value in group.values())


@pytest.mark.parametrize("epochs", [(0.0, 4.0), (4.0, 1.0), (1.0, float("nan"))])
def test_epochs_are_checked(epochs: tuple[float, float]):
    with pytest.raises(InvalidArgumentError, match="`epochs_range` must be low and high"):
        replace(CONFIG, epochs_range=epochs)


def test_a_family_that_validation_speaks_against_is_released_at_rest():
    controller = ControllerConfig(descriptors=DESCRIPTORS, families=("good", "harmed", "given"), at_rest=("given",))
    gains = {"known/good/64": -0.1, "known/good/512": 0.2, "unknown/good/64": 0.0, "unknown/good/512": 0.0}
    gains |= {"known/harmed/64": 0.05, "unknown/harmed/64": -0.02, "known": 1.0, "unknown": 1.0}
    validation = {f"validation/gain/{name}": gain for name, gain in gains.items()}
    assert with_harmed_at_rest(controller, validation).at_rest == ("given", "harmed")
    assert with_harmed_at_rest(controller, {}).at_rest == ("given",)


def test_chosen_bases_replace_those_of_their_family_and_horizon_only():
    controller = ControllerConfig(descriptors=DESCRIPTORS, families=("one", "two"))
    before = np.full((3, 2, len(CONTROLLED)), 0.5, np.float32)
    after = with_bases(before, controller, [("two", True, (0.01, 0.1, 0.9, 0.2))])
    decoded = [controller.space[name].decode(float(u)) for name, u in zip(CONTROLLED, after[2, 1], strict=True)]
    assert decoded == pytest.approx([0.01, 0.1, 0.9, 0.2], rel=1e-5)
    assert (before == 0.5).all()
    assert (after != 0.5).all(axis=2).tolist() == [[False, False], [False, False], [False, True]]


def test_a_released_checkpoint_is_rebased_only_where_its_policy_is_at_rest():
    shipped = load_controller().checkpoint
    family = shipped.config.at_rest[0]
    row = shipped.config.family_index(family)
    after = rebased(shipped, [(family, True, (0.01, 0.1, 0.9, 0.2))])
    assert np.flatnonzero((after.base != shipped.base).any(axis=2).ravel()).tolist() == [2 * row + 1]
    assert after.provenance["rebased"] == [[family, True, [0.01, 0.1, 0.9, 0.2]]]
    with pytest.raises(InvalidArgumentError, match="acts on matrix_factorization, whose base it was trained with"):
        rebased(shipped, [("matrix_factorization", True, (0.01, 0.1, 0.9, 0.2))])


def test_a_tempered_policy_acts_by_a_share_under_another_schedule():
    shipped = load_controller().checkpoint
    after = tempered(shipped, decay_to=0.5, policy_share=0.25, domains=["one"])
    assert after.provenance["tempered"] == {"decay_to": 0.5, "policy_share": 0.25, "domains": ["one"]}
    changed = {name for name in shipped.network if not np.array_equal(after.network[name], shipped.network[name])}
    assert changed == {name for name in shipped.network if name.startswith(("group_head/", "run_head/"))}
    inputs = np.zeros((1, 32)), np.ones((1, len(GROUP_FEATURES))), np.ones(len(GLOBAL_FEATURES))
    mine, theirs = (
        network.act(*inputs, network.context(np.ones(16), np.zeros(1, int)))
        for network in (Controller(checkpoint).network for checkpoint in (after, shipped))
    )
    np.testing.assert_allclose(mine[0], 0.25 * theirs[0], rtol=1e-6)
    np.testing.assert_allclose(mine[1], 0.25 * theirs[1], rtol=1e-6)
    assert load_controller().start(make_profile(), horizon=100).multiplier(100) != 0.5
    assert Controller(after).start(make_profile(), horizon=100).multiplier(100) == 0.5
    with pytest.raises(InvalidArgumentError, match="`policy_share` must be between 0 and 1, got 2"):
        tempered(shipped, decay_to=0.5, policy_share=2)
