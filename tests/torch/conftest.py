"""A small domain, and a controller that acts on every signal."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.domains import Domain, make_domain
from envs.simulated import SimulatedPrior, simulate
from metalearn import Controller, load_controller
from tests.controllers import acting_controller


@pytest.fixture(scope="session")
def controller_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors")


@pytest.fixture(scope="session")
def controller(controller_path: Path) -> Controller:
    return load_controller(controller_path)


@pytest.fixture(scope="session")
def domain() -> Domain:
    prior = SimulatedPrior(users=(60, 60), items=(40, 40), history=(10.0, 10.0))
    return make_domain(simulate(prior, seed=0), name="simulated", split="leave-last-out")
