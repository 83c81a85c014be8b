"""The controller: where it is loaded from, and that untrained it is exactly the base schedule."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from metalearn.controller import CONTROLLED, Controller, load_controller
from metalearn.controller import controller as controller_module
from metalearn.controller.checkpoint import flatten, load_checkpoint
from metalearn.errors import CheckpointError, InvalidArgumentError
from metalearn.session import Session
from metalearn.spaces import CANONICAL_SPACE
from tests.controllers import BASES, FAMILIES, acting_controller
from tests.intervals import make_interval, make_profile, random_intervals


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors")


@pytest.fixture(scope="module")
def untrained(path: Path) -> Controller:
    """A controller as `network.init` makes it, with the base and the knots of the acting one."""
    import jax

    from metalearn.controller import network

    checkpoint = load_checkpoint(path)
    params = network.init(checkpoint.config, key=jax.random.key(0))
    return Controller(dataclasses.replace(checkpoint, network=flatten(params)))


@pytest.mark.parametrize("family", [None, *FAMILIES])
@pytest.mark.parametrize("horizon", [None, 2000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_untrained_is_exactly_the_base_schedule_of_its_family_whatever_it_is_told(
    untrained: Controller, seed: int, horizon: int | None, family: str | None
):
    session = untrained.start(
        make_profile(seed), roles=("embedding", "dense"), family=family, horizon=horizon, batch_size=64
    )
    start = session.ask()
    for group in start.groups:
        for name, wanted in zip(CONTROLLED, BASES[family][int(horizon is not None)], strict=True):
            assert (start.run if name == "dropout" else group)[name] == pytest.approx(wanted, rel=1e-5)
    base = untrained.checkpoint.base[list(BASES).index(family), int(horizon is not None)].tolist()
    wild = [make_interval(gradient_norm=[1e30, 1e-30], curvature=[-1e20, 1e20], validation=-1e9, loss_sum=1e12)]
    for statistics in random_intervals(seed, missing=0.3) + wild:
        decision = session.tell(statistics)
        assert (decision.groups, decision.run) == (start.groups, start.run)
        position = session.state_dict()["position"]
        assert position["group_start"] == [base[:3]] * 2
        assert position["global_start"] == base[3:]
        assert not np.any(position["group_residual"])
        assert not np.any(position["global_residual"])


def test_the_base_schedule_is_a_cosine_or_held(untrained: Controller):
    known = untrained.start(make_profile(), horizon=1000)
    cosine = np.array([1.0, 0.853553, 0.5, 0.0, 0.0])
    assert [known.multiplier(step) for step in (0, 250, 500, 1000, 1500)] == pytest.approx(0.3 + 0.7 * cosine, rel=1e-5)
    held = untrained.start(make_profile())
    assert [held.multiplier(step) for step in (0, 500, 10**9)] == [1.0] * 3


def test_an_acting_controller_does_act(path: Path):
    session = load_controller(path).start(make_profile(), horizon=2000, batch_size=64)
    start = session.ask().groups
    assert session.tell(make_interval(1)).groups != start


@pytest.mark.parametrize("horizon", [None, 2000])
def test_the_family_moves_start_and_steps(path: Path, horizon: int | None):
    """With the same base everywhere, only the embedding tells families apart."""
    checkpoint = load_checkpoint(path)
    controller = Controller(dataclasses.replace(checkpoint, base=np.broadcast_to(checkpoint.base[:1], (3, 2, 4))))
    starts, moves = set(), set()
    for family in (None, *FAMILIES):
        session = controller.start(make_profile(), family=family, horizon=horizon, batch_size=64)
        session.tell(make_interval(1))
        position = session.state_dict()["position"]
        starts.add(repr((position["group_start"], position["global_start"])))
        moves.add(repr((position["group_residual"], position["global_residual"])))
    assert len(starts) == len(moves) == 3


@pytest.mark.parametrize("family", ["click_model", "", 1])
def test_a_family_that_it_was_not_trained_on_is_refused_by_name(path: Path, family: object):
    controller = load_controller(path)
    with pytest.raises(
        InvalidArgumentError,
        match=rf"`family` must be one of \['matrix_factorization', 'two_tower'\], .* for any other, got {family!r}",
    ):
        controller.start(make_profile(), family=family)  # type: ignore[arg-type]


def test_paths_strings_and_folders_load_alike(path: Path):
    for place in (path, str(path), path.parent, str(path.parent)):
        assert load_controller(place).checkpoint.provenance == {"purpose": "tests"}


def test_a_folder_without_a_controller_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*controller\.safetensors: No such file"):
        load_controller(tmp_path)


def test_default_is_the_wheel_s_then_the_checkout_s(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = tmp_path / "wheel.safetensors", tmp_path / "checkout.safetensors"
    monkeypatch.setattr(controller_module, "_DEFAULT_PLACES", places)
    with pytest.raises(CheckpointError, match="this installation has no default checkpoint; pass `path`"):
        load_controller()
    shutil.copy(path, places[1])
    assert load_controller().checkpoint.provenance == {"purpose": "tests"}
    places[0].write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="wheel"):
        load_controller()


def test_start_passes_its_arguments_on(path: Path):
    space = CANONICAL_SPACE.subset(["learning_rate"])
    session = load_controller(path).start(
        make_profile(), space, roles=("head", "adapter"), family="two_tower", horizon=999, batch_size=32, interval=7
    )
    assert isinstance(session, Session)
    assert session.family == "two_tower"
    assert (session.num_groups, session.horizon, session.batch_size, session.interval) == (2, 999, 32, 7)
    assert [tuple(group) for group in session.ask().groups] == [("learning_rate",)] * 2


def test_one_controller_serves_many_sessions(path: Path):
    controller = load_controller(path)
    one, other = (controller.start(make_profile(), horizon=1000, batch_size=64) for _ in range(2))
    first = [one.tell(statistics) for statistics in random_intervals(0, num_groups=1)]
    assert [other.tell(statistics) for statistics in random_intervals(0, num_groups=1)] == first
