"""Settings that every test runs under: CPU, offline, deterministic, nothing written outside temporary folders."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from hypothesis.internal.conjecture import providers

# In the environment rather than through `jax.config`, so that they hold in subprocesses too, and no test that does
# without JAX or PyTorch pays for importing them. They must be set before those are imported, so before any test module.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    JAX_ENABLE_X64="0",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)

hypothesis.settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("deterministic")
# Constants of whatever modules happen to be loaded are drawn, too: which those are depends on what ran before, so that
# one file alone, or the files of one of several workers, would see other examples than the whole suite.
providers._get_local_constants = lambda: providers._local_constants  # type: ignore[attr-defined]


def pytest_configure(config: pytest.Config) -> None:
    """Send what third-party libraries cache and log to a folder that goes when the run ends."""
    folder = tempfile.TemporaryDirectory(prefix="metalearn-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    for variable in ("HF_DATASETS_CACHE", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        path = Path(folder.name, variable.lower())
        path.mkdir()
        os.environ[variable] = str(path)


@pytest.fixture(scope="module")
def scripts() -> Iterator[Callable[[str], ModuleType]]:
    """Return what imports a script by name, as Python does that runs it: with its folder in the path."""
    folder = str(Path(__file__).resolve().parent.parent / "scripts")
    sys.path.insert(0, folder)
    try:
        yield import_module
    finally:
        sys.path.remove(folder)
