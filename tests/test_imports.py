"""What importing metalearn costs and exports, and that its version is the same wherever it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import metalearn

ROOT = Path(__file__).parents[1]
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
TABLES_AND_TRACKING = {"polars", "pandas", "scipy", "datasets", "wandb", "matplotlib"}


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_import_metalearn_is_light():
    assert modules_after("import metalearn") & (JAX | {"torch"} | TABLES_AND_TRACKING) == set()


def test_every_public_name_resolves_without_jax_or_torch():
    loaded = modules_after("import metalearn\n[getattr(metalearn, name) for name in metalearn.__all__]")
    assert loaded & (JAX | {"torch"}) == set()


def test_import_of_the_torch_adapter_loads_no_jax():
    loaded = modules_after("import metalearn.torch")
    assert "torch" in loaded
    assert loaded & JAX == set()


@pytest.mark.parametrize("name", ["metalearn", "metalearn.torch"])
def test_all_is_what_is_exported(name: str):
    module = __import__(name, fromlist=["__all__"])
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType)
    } - {"annotations"}
    exported = [key for key in module.__all__ if not key.startswith("_")]
    assert len(exported) == len(set(exported))
    assert [key for key in exported if not hasattr(module, key)] == []
    assert public - set(exported) == set()


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert newest is not None
    assert metalearn.__version__ == project["version"] == newest.group(1)


def test_wheel_holds_the_package_and_the_default_controller(tmp_path: Path):
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run = subprocess.run([*pip_wheel, "--wheel-dir", tmp_path, ROOT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("metalearn-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"metalearn", f"metalearn-{metalearn.__version__}.dist-info"}
    assert "metalearn/_checkpoints/default/controller.safetensors" in names
    assert "metalearn/__init__.py" in names
