"""The networks: Flax and NumPy are one function, and untrained they do nothing."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn.controller import load_controller, network
from metalearn.controller.checkpoint import Checkpoint, flatten, load_checkpoint, unflatten
from metalearn.controller.config import CONTROLLED, GLOBAL_CONTROLLED, GROUP_CONTROLLED, ROLES, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS, profile_descriptors
from metalearn.controller.runtime import NumpyNetwork
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, featurize, initial_history, percentile_scale
from tests.controllers import FAMILIES, acting_controller
from tests.intervals import make_controls
from tests.recorded_run import BATCH_SIZE, NUM_DECISIONS, STEPS, load_recorded_run

CONFIG = ControllerConfig(descriptors=DESCRIPTORS, families=FAMILIES)
EVERY_FAMILY = range(1 + len(FAMILIES))
STEPS_OF_RECURRENCE = 20
Step = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Every parameter of it is perturbed."""
    return load_checkpoint(acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors"))


@pytest.fixture
def double_precision():
    """JAX in the runtime's precision, so that what is left is the function itself."""
    with jax.enable_x64(True):
        yield


def run_flax(
    params: dict,
    descriptors: np.ndarray,
    role: np.ndarray,
    observations: list[Step],
    *,
    family: int = 0,
    config: ControllerConfig = CONFIG,
    mask: np.ndarray | None = None,
) -> list[tuple[np.ndarray, ...]]:
    dtype = jnp.result_type(float)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    mask = np.ones(len(role)) if mask is None else mask
    act = jax.jit(lambda hidden, observation: network.act(config, params, hidden, observation))
    hidden, outputs = jnp.zeros((len(role), CONFIG.hidden_size), dtype), []
    for group, run in observations:
        arrays = (jnp.asarray(value, dtype) for value in (group, run, descriptors))
        rest = (jnp.int32(family), jnp.asarray(role), jnp.asarray(mask, dtype))
        action, hidden = act(hidden, network.Observation(*arrays, *rest))
        outputs.append((np.asarray(action.group), np.asarray(action.run), np.asarray(hidden)))
    return outputs


def run_numpy(
    params: dict, descriptors: np.ndarray, role: np.ndarray, observations: list[Step], *, family: int = 0
) -> list[tuple[np.ndarray, ...]]:
    serving = NumpyNetwork(flatten(params))
    context = serving.context(serving.code(descriptors, family), role)
    hidden, outputs = np.zeros((len(role), serving.hidden_size)), []
    for group, run in observations:
        group_action, run_action, hidden = serving.act(hidden, group, run, context)
        outputs.append((group_action, run_action, hidden))
    return outputs


def numpy_start(params: dict, descriptors: np.ndarray, family: int = 0) -> tuple[np.ndarray, np.ndarray]:
    serving = NumpyNetwork(params)
    return serving.start(serving.code(descriptors, family))


def random_observations(seed: int, num_groups: int) -> tuple[np.ndarray, np.ndarray, list[Step]]:
    rng = np.random.default_rng(seed)
    observations = [
        (rng.uniform(-1.6, 1.6, (num_groups, len(GROUP_FEATURES))), rng.uniform(-1.6, 1.6, len(GLOBAL_FEATURES)))
        for _ in range(STEPS_OF_RECURRENCE)
    ]
    return rng.uniform(-1.6, 1.6, len(DESCRIPTORS)), rng.permutation(len(ROLES))[:num_groups], observations


def recorded_observations(checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray, list[Step]]:
    """Scale the signals of a recorded training run as the session does."""
    run, knots = load_recorded_run(), checkpoint.normalizer
    history, observations = initial_history(2, np, np.float64), []
    for index, statistics in enumerate(run.intervals):
        features, history = featurize(statistics, make_controls(index), history, np)
        observations.append(
            (percentile_scale(features.group, knots.group, np), percentile_scale(features.run, knots.run, np))
        )
    budget = np.log([NUM_DECISIONS * STEPS * BATCH_SIZE / run.profile.num_interactions, 0.5, 0.5])
    raw = np.concatenate([profile_descriptors(run.profile), budget])
    return percentile_scale(raw, knots.descriptors, np), np.zeros(2, int), observations


def assert_agree(ours: list[tuple[np.ndarray, ...]], theirs: list[tuple[np.ndarray, ...]], tolerance: float) -> None:
    assert len(ours) == len(theirs) == STEPS_OF_RECURRENCE
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
    assert np.abs(ours[-1][0]).max() > 0.005  # it does act


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_numpy_and_flax_agree_on_random_observations(
    checkpoint: Checkpoint, num_groups: int, family: int, double_precision: None
):
    arguments = (unflatten(checkpoint.network), *random_observations(family, num_groups))
    assert_agree(run_numpy(*arguments, family=family), run_flax(*arguments, family=family), 1e-9)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_numpy_and_flax_agree_on_a_recorded_run(checkpoint: Checkpoint, family: int, double_precision: None):
    arguments = (unflatten(checkpoint.network), *recorded_observations(checkpoint))
    assert_agree(run_numpy(*arguments, family=family), run_flax(*arguments, family=family), 1e-9)


@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_the_shipped_networks_agree_in_single_precision_too(num_groups: int):
    shipped = load_controller().checkpoint
    config, last = shipped.config, len(shipped.config.families)
    assert config == ControllerConfig(
        descriptors=DESCRIPTORS,
        families=config.families,
        at_rest=config.at_rest,
        cued=config.cued,
        decay_cued=config.decay_cued,
        decay_to=config.decay_to,
    )
    for observed in (random_observations(4, num_groups), recorded_observations(shipped)):
        arguments = (unflatten(shipped.network), *observed)
        assert_agree(run_numpy(*arguments, family=last), run_flax(*arguments, family=last, config=config), 1e-6)


@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_single_precision_of_meta_training_costs_little(checkpoint: Checkpoint, num_groups: int):
    arguments = (unflatten(checkpoint.network), *random_observations(4, num_groups))
    assert_agree(run_numpy(*arguments), run_flax(*arguments), 2e-5)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_starts_agree(checkpoint: Checkpoint, family: int, double_precision: None):
    params = unflatten(checkpoint.network)
    descriptors = np.random.default_rng(0).uniform(-1.6, 1.6, len(DESCRIPTORS))
    gate, modifier = numpy_start(checkpoint.network, descriptors, family)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    theirs = network.start(CONFIG, wide, jnp.asarray(descriptors), jnp.int32(family))
    np.testing.assert_allclose(theirs.gate, gate, rtol=0, atol=1e-12)
    np.testing.assert_allclose(theirs.modifier, modifier, rtol=0, atol=1e-12)
    assert ((gate > 0) & (gate < 1)).all()


def test_padding_groups_change_nothing(checkpoint: Checkpoint, double_precision: None):
    params = unflatten(checkpoint.network)
    descriptors, role, observations = random_observations(5, 2)
    alone = [(group[:1], run) for group, run in observations]
    padded = [(np.stack([group[0], np.zeros(group.shape[1])]), run) for group, run in observations]
    one = run_numpy(params, descriptors, role[:1], alone)
    two = run_flax(params, descriptors, role, padded, mask=np.array([1.0, 0.0]))
    assert_agree(one, [(group[:1], run, hidden[:1]) for group, run, hidden in two], 1e-9)


def test_groups_are_interchangeable(checkpoint: Checkpoint):
    params = unflatten(checkpoint.network)
    descriptors, role, observations = random_observations(6, 5)
    order = np.array([3, 0, 4, 1, 2])
    plain = run_numpy(params, descriptors, role, observations)
    shuffled = run_numpy(params, descriptors, role[order], [(group[order], run) for group, run in observations])
    assert_agree([(group[order], run, hidden[order]) for group, run, hidden in plain], shuffled, 1e-12)


def test_variants_in_leading_axes_are_single_observations(checkpoint: Checkpoint):
    serving = NumpyNetwork(checkpoint.network)
    descriptors, role, observations = random_observations(7, 3)
    context = serving.context(serving.code(descriptors, 1), role)
    group, run = (np.stack(part) for part in zip(*observations, strict=True))
    hidden = np.random.default_rng(8).normal(size=(3, serving.hidden_size))
    together = serving.act(hidden, group, run, context)
    for index in range(STEPS_OF_RECURRENCE):
        alone = serving.act(hidden, group[index], run[index], context)
        for many, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(many[index], one, rtol=0, atol=1e-12)


def test_roles_matter(checkpoint: Checkpoint):
    descriptors, _, observations = random_observations(9, 1)
    params = unflatten(checkpoint.network)
    actions = [run_numpy(params, descriptors, np.array([role]), observations)[-1][0] for role in range(len(ROLES))]
    assert len({action.tobytes() for action in actions}) == len(ROLES)


def test_the_family_matters(checkpoint: Checkpoint):
    descriptors, role, observations = random_observations(9, 2)
    params = unflatten(checkpoint.network)
    actions = [run_numpy(params, descriptors, role, observations, family=family)[-1][0] for family in EVERY_FAMILY]
    starts = [numpy_start(checkpoint.network, descriptors, family) for family in EVERY_FAMILY]
    for one in EVERY_FAMILY:
        for other in range(one):
            assert np.abs(actions[one] - actions[other]).max() > 0.01
            assert np.abs(starts[one][1] - starts[other][1]).max() > 0.01
            np.testing.assert_array_equal(starts[one][0], starts[other][0])  # the gate is everybody's
    # The embedding is all that tells them apart, and it is added before tanh.
    serving = NumpyNetwork(checkpoint.network)
    codes = [np.arctanh(serving.code(0.1 * descriptors, family)) for family in EVERY_FAMILY]
    np.testing.assert_allclose(codes - codes[0], params["family"] - params["family"][0], atol=1e-6)


def test_untrained_networks_do_nothing_for_any_family():
    params = network.init(CONFIG, key=jax.random.key(0))
    descriptors, role, observations = random_observations(10, 5)
    codes = [NumpyNetwork(flatten(params)).code(descriptors, family) for family in EVERY_FAMILY]
    np.testing.assert_array_equal(codes, [codes[0]] * len(codes))
    for family in EVERY_FAMILY:
        for group, run, _ in run_flax(params, descriptors, role, observations, family=family):
            assert not group.any()
            assert not run.any()
        _, modifier = numpy_start(flatten(params), descriptors, family)
        assert not modifier.any()


def test_init_is_a_function_of_the_key():
    one, same, other = (flatten(network.init(CONFIG, key=jax.random.key(seed))) for seed in (0, 0, 1))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["mix/kernel"], other["mix/kernel"])


def test_sizes_of_the_outputs(checkpoint: Checkpoint):
    descriptors, role, observations = random_observations(11, 5)
    group, run, hidden = run_numpy(unflatten(checkpoint.network), descriptors, role, observations)[0]
    assert group.shape == (5, len(GROUP_CONTROLLED))
    assert run.shape == (len(GLOBAL_CONTROLLED),)
    assert hidden.shape == (5, CONFIG.hidden_size)
    gate, modifier = numpy_start(checkpoint.network, descriptors)
    assert gate.shape == modifier.shape == (len(CONTROLLED),)


def test_acting_does_not_recompile(checkpoint: Checkpoint):
    params = jax.tree.map(jnp.asarray, unflatten(checkpoint.network))
    act = jax.jit(network.act, static_argnums=0)
    descriptors, role, observations = random_observations(12, 2)
    hidden = jnp.zeros((2, CONFIG.hidden_size))
    for family, (group, run) in enumerate(observations[:3]):
        arrays = (jnp.asarray(value, jnp.float32) for value in (group, run, descriptors))
        rest = (jnp.int32(family), jnp.asarray(role), jnp.ones(2))
        _, hidden = act(CONFIG, params, hidden, network.Observation(*arrays, *rest))
    assert act._cache_size() == 1


def test_serving_reads_the_file_that_training_wrote(tmp_path: Path):
    path = acting_controller(tmp_path / "controller.safetensors", seed=3)
    checkpoint = load_checkpoint(path)
    served = load_controller(path).network
    descriptors, role, ((group, run), *_) = random_observations(13, 2)
    hidden, context = np.zeros((2, CONFIG.hidden_size)), served.context(served.code(descriptors, 1), role)
    for one, other in zip(
        served.act(hidden, group, run, context),
        NumpyNetwork(checkpoint.network).act(hidden, group, run, context),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
