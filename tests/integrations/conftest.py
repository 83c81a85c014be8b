"""The job of the contract, and the fixtures of the PyTorch tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.domains import Domain
from metalearn import Controller
from tests.integrations.contract import Job
from tests.torch.conftest import controller, controller_path, domain

__all__ = ["controller", "controller_path", "domain"]


@pytest.fixture
def job(domain: Domain, controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)  # frameworks write logs where they stand
    return Job(domain=domain, controller=controller, folder=tmp_path)
