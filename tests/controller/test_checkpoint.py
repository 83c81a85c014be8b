"""The checkpoint file: bit-exact, whole or refused, and never executed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

import metalearn
from metalearn.controller import checkpoint as checkpoint_module
from metalearn.controller.checkpoint import (
    FORMAT_VERSION,
    HEADER_KEYS,
    MAX_BYTES,
    Checkpoint,
    feature_schema,
    flatten,
    load_checkpoint,
    save_checkpoint,
    unflatten,
)
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS, Normalizer
from metalearn.errors import CheckpointError, SchemaMismatchError
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, fit_knots

ROOT = Path(__file__).parents[2]
CONFIG = ControllerConfig(descriptors=DESCRIPTORS, hidden_size=4, code_size=3, families=("two_tower",))


def make_checkpoint(seed: int = 0, **changes) -> Checkpoint:
    """Return a small checkpoint whose parameters hold every kind of finite float32."""
    import jax

    from metalearn.controller import network

    rng = np.random.default_rng(seed)
    params = flatten(network.init(CONFIG, key=jax.random.key(seed)))
    params["gate"] = np.array([-0.0, np.finfo(np.float32).tiny / 8, np.finfo(np.float32).max, 1 / 3], np.float32)
    sizes = {"descriptors": len(DESCRIPTORS), "group": len(GROUP_FEATURES), "run": len(GLOBAL_FEATURES)}
    fields = {
        "config": CONFIG,
        "network": params,
        "base": rng.random((2, 2, len(CONTROLLED))),
        "normalizer": Normalizer(**{name: fit_knots(rng.normal(size=(50, size))) for name, size in sizes.items()}),
        "provenance": {"purpose": "tests of files", "seed": seed, "domains": ["größe"]},
    }
    return Checkpoint(**(fields | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file that no test changes."""
    return save_checkpoint(make_checkpoint(), tmp_path_factory.mktemp("written") / "controller.safetensors")


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    """A checkpoint file to tamper with."""
    return Path(shutil.copy(written, tmp_path / "controller.safetensors"))


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return load(content), json.loads(content[8 : 8 + length])["__metadata__"]


def digest(tensors: dict[str, np.ndarray], header: dict[str, str]) -> str:
    """Compute the checkpoint's SHA-256 as format versions 1 and 2 define it."""
    sha = hashlib.sha256(json.dumps({key: header[key] for key in sorted(header) if key != "sha256"}).encode())
    for name in sorted(tensors):
        sha.update(f"{name}:{tensors[name].dtype.str}:{tensors[name].shape}".encode() + tensors[name].tobytes())
    return sha.hexdigest()


def rewrite(path: Path, tensors: dict[str, np.ndarray] | None = None, drop: str = "", **header: str) -> None:
    """Change tensors and header of a file and sign it anew, as an attacker or another version would."""
    old_tensors, old_header = contents(path)
    new_tensors = {name: value for name, value in (old_tensors | (tensors or {})).items() if name != drop}
    new_header = old_header | header
    new_header["sha256"] = digest(new_tensors, new_header)
    path.write_bytes(save(new_tensors, metadata=new_header))


def test_round_trip_is_exact_to_the_bit(written: Path):
    before, after = make_checkpoint(), load_checkpoint(written)
    assert after.config == before.config
    assert after.provenance == before.provenance
    assert set(after.network) == set(before.network)
    pairs = [(before.network[name], after.network[name]) for name in before.network]
    pairs += [(np.float32(before.base), after.base), *zip(before.normalizer, after.normalizer, strict=True)]
    for one, other in pairs:
        assert (other.dtype, other.shape) == (np.float32, one.shape)
        assert other.tobytes() == one.tobytes()


def test_writing_what_was_read_gives_the_same_content(written: Path, tmp_path: Path):
    again = save_checkpoint(load_checkpoint(written), tmp_path / "deep" / "er" / "again.safetensors")
    assert contents(again)[1] == contents(written)[1]
    assert again.stat().st_mode & 0o777 == 0o644


def test_memory_layout_does_not_matter(tmp_path: Path):
    plain = make_checkpoint()
    odd = {name: np.asfortranarray(value) for name, value in plain.network.items()}
    base = np.repeat(plain.base, 2, axis=2)[..., ::2]
    assert not odd["mix/kernel"].flags.c_contiguous
    path = save_checkpoint(dataclasses.replace(plain, network=odd, base=base), tmp_path / "odd.safetensors")
    loaded = load_checkpoint(path)
    np.testing.assert_array_equal(loaded.base, np.float32(plain.base))
    for name, value in plain.network.items():
        np.testing.assert_array_equal(loaded.network[name], value, err_msg=name)


def test_header_is_pinned(written: Path):
    tensors, header = contents(written)
    assert set(header) == set(HEADER_KEYS)
    assert header["format_version"] == FORMAT_VERSION == "5"
    assert header["package_version"] == metalearn.__version__
    assert header["sha256"] == digest(tensors, header)
    assert {name.partition("/")[0] for name in tensors} == {"network", "prior", "normalizer"}


def test_unflatten_inverts_flatten():
    flat = make_checkpoint().network
    again = flatten(unflatten(flat))
    assert all(np.array_equal(flat[name], again[name]) for name in flat)
    assert list(unflatten({"a/b/c": flat["gate"], "a/d": flat["gate"]})["a"]) == ["b", "d"]


@pytest.mark.parametrize("prefix", [b"\x80", b"PK"])
def test_a_valid_file_may_begin_like_a_pickle_or_a_zip(path: Path, prefix: bytes):
    # The first bytes are the header's length: padding the provenance gives them any value.
    tensors, header = contents(path)
    header["provenance"] = json.dumps({"padding": ""})
    wanted = int.from_bytes(prefix, "little")
    for _ in range(3):
        length = int.from_bytes(save(tensors, metadata=header)[:8], "little")
        missing = (wanted - length) % 256 ** len(prefix)
        header["provenance"] = header["provenance"].replace('"}', "x" * missing + '"}')
    rewrite(path, provenance=header["provenance"])
    content = path.read_bytes()
    assert content.startswith(prefix)
    assert load_checkpoint(path).config == CONFIG
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_truncated_files_are_refused(path: Path, share: float):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for size in {round(share * len(content)), round(8 + share * length), 7, 8, 9, 8 + length, len(content) - 1}:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated or altered"):
            load_checkpoint(path)


def test_files_with_something_appended_are_refused(path: Path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load_checkpoint(path)


def test_any_single_flipped_bit_is_refused(path: Path):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    flips = [(position, bit) for position in range(8) for bit in range(8)]
    flips += [(int(position), int(rng.integers(8))) for position in rng.choice(np.arange(8, start), 300, replace=False)]
    flips += [(int(position), int(rng.integers(8))) for position in rng.integers(start, len(content), 200)]
    for position, bit in flips:
        altered = bytearray(content)
        altered[position] ^= 1 << bit
        path.write_bytes(altered)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path).config == CONFIG


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_in_its_place_is_not_executed(tmp_path: Path, protocol: int):
    marker, path = tmp_path / "executed", tmp_path / "controller.safetensors"
    content = pickle.dumps(Trap(marker), protocol)
    pickle.loads(content)
    assert marker.exists()  # the trap works
    marker.unlink()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is a pickle" if protocol > 1 else "not a whole safetensors checkpoint"):
        load_checkpoint(path)
    assert not marker.exists()


def test_a_zip_in_its_place_is_not_opened(tmp_path: Path):
    marker, path = tmp_path / "executed", tmp_path / "controller.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(marker)))
    with pytest.raises(
        CheckpointError, match="is a pickle or zip archive, not a checkpoint; nothing in it was executed"
    ):
        load_checkpoint(path)
    assert not marker.exists()


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint at all",
        b"\0" * 64,
        b"\xff" * 64,
        with_length(b"{}"),
        with_length(b"[]"),
        with_length(b'{"__metadata__": 3}'),
        with_length(b'{"__metadata__": ["sha256"]}'),
        with_length(b"[" * 100_000),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "controller.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors checkpoint"):
        load_checkpoint(path)


def test_safetensors_of_something_else_are_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"weight": np.zeros(3, np.float32)}, metadata={"format": "pt"}))
    with pytest.raises(CheckpointError, match=r"has no \['format_version', .*'sha256'\] in its header"):
        load_checkpoint(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"cannot read checkpoint .*absent: No such file or directory; pass the path"
    ):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="Is a directory"):
        load_checkpoint(tmp_path)


def test_huge_files_are_refused_unread(tmp_path: Path):
    path = tmp_path / "controller.safetensors"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than any controller"):
        load_checkpoint(path)


def test_another_format_version_is_named(path: Path):
    rewrite(path, format_version="6", package_version="9.9")
    with pytest.raises(SchemaMismatchError, match=r"format version 6, this metalearn reads 5; use metalearn 9\.9"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 1}, "version"),
        ({"run": [*GLOBAL_FEATURES[1:], GLOBAL_FEATURES[0]]}, "run"),
        ({"group": ["temperature", *GROUP_FEATURES[1:]]}, "group"),
        ({"descriptors": list(DESCRIPTORS[:-1])}, "descriptors"),
    ],
)
def test_another_feature_schema_is_named(path: Path, changes: dict, named: str):
    rewrite(path, feature_schema=json.dumps({**json.loads(feature_schema()), **changes}))
    with pytest.raises(SchemaMismatchError, match=rf"another feature schema \(differs in \['{named}'\]\)"):
        load_checkpoint(path)


def test_another_space_is_named(path: Path):
    space = json.loads(CONFIG.space.to_json())
    space["hyperparameters"][2]["high"] = 0.95
    rewrite(path, space=json.dumps(space))
    with pytest.raises(SchemaMismatchError, match=r"another hyperparameter space \(differs in \['beta1'\]\)"):
        load_checkpoint(path)


def test_another_config_is_named(path: Path):
    rewrite(path, config=json.dumps({**json.loads(CONFIG.to_json()), "layers": 2}))
    with pytest.raises(SchemaMismatchError, match=r"controller config has keys .*'layers'"):
        load_checkpoint(path)


@pytest.mark.parametrize("key", ["feature_schema", "space", "config", "provenance"])
@pytest.mark.parametrize("value", ["", "null", "[1]", "{"])
def test_headers_that_are_no_json_are_refused(path: Path, key: str, value: str):
    rewrite(path, **{key: value})
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["network/mix/kernel", "network/family", "prior/base", "normalizer/run"])
def test_values_that_are_not_finite_are_refused(path: Path, name: str, value: float):
    tensor = contents(path)[0][name].copy()
    tensor.flat[-1] = value
    rewrite(path, {name: tensor})
    with pytest.raises(CheckpointError, match=f"non-finite values in {name}; it must not steer anything"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["network/mix/bias", "network/family", "prior/base", "normalizer/group"])
def test_missing_tensors_are_named(path: Path, name: str):
    rewrite(path, drop=name)
    with pytest.raises(CheckpointError, match=rf"misshapen tensors \['{name}'\]"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("network/mix/bias", np.zeros(5, np.float32)),
        ("network/gate", np.zeros(4, np.float64)),
        ("normalizer/run", np.zeros((3, 17), np.float32)),
        ("prior/base", np.zeros((1, 2, 4), np.float32)),
        ("prior/base", np.zeros((2, 4), np.float32)),
        ("network/family", np.zeros((1, 3), np.float32)),
        ("network/more/bias", np.zeros(4, np.float32)),
    ],
)
def test_tensors_that_do_not_fit_are_named(path: Path, name: str, tensor: np.ndarray):
    rewrite(path, {name: tensor})
    with pytest.raises(CheckpointError, match=rf"missing, unknown or misshapen tensors \['{name}'\]"):
        load_checkpoint(path)


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module.os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(make_checkpoint(seed=1), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file(path: Path):
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(make_checkpoint(provenance={"seed": object()}), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_written_file_replaces_the_old_one(path: Path):
    save_checkpoint(make_checkpoint(seed=1), path)
    assert load_checkpoint(path).provenance["seed"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_the_installed_wheel_brings_its_checkpoint(written: Path, tmp_path: Path):
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    shutil.copytree(
        ROOT / "metalearn", tree / "metalearn", ignore=shutil.ignore_patterns("__pycache__", "_checkpoints")
    )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    (tree / "checkpoints" / "default").mkdir(parents=True)
    shutil.copy(written, tree / "checkpoints" / "default" / "controller.safetensors")
    shutil.copytree(ROOT / "checkpoints" / "golden", tree / "checkpoints" / "golden")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    build = subprocess.run([*pip, "--wheel-dir", tmp_path, tree], capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("metalearn-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        checkpoints = [name for name in archive.namelist() if name.endswith(".safetensors")]
        assert checkpoints == ["metalearn/_checkpoints/default/controller.safetensors"]
        assert not any("golden" in name for name in archive.namelist())
        archive.extractall(tmp_path / "installed")
    elsewhere.mkdir()
    code = (
        "import json, metalearn\n"
        "provenance = metalearn.load_controller().checkpoint.provenance\n"
        "print(json.dumps([metalearn.__file__, provenance]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert run.returncode == 0, run.stderr
    file, provenance = json.loads(run.stdout)
    assert Path(file).is_relative_to(tmp_path / "installed")
    assert provenance == make_checkpoint().provenance
