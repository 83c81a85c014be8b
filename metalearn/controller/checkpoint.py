"""The checkpoint file: safetensors, a header of strings, one SHA-256 over all of it. Loading executes nothing.

Tensors, all float32: `network/<module>/<parameter>`, `prior/base` [1 + families, 2, S],
`normalizer/{descriptors,group,run}` [F, K], and those of the outcome model if there is one, `outcome/...`.
Header: `format_version`, `feature_schema`, `space`, `config`, `package_version`, `provenance` (JSON), `sha256`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metalearn.controller.config import CONTROLLED, GLOBAL_CONTROLLED, GROUP_CONTROLLED, ROLES, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS, Normalizer
from metalearn.controller.outcome import PREFIX as OUTCOME
from metalearn.controller.outcome import outcome_config
from metalearn.errors import CheckpointError, SchemaMismatchError
from metalearn.signals import FEATURE_SCHEMA_VERSION, GLOBAL_FEATURES, GROUP_FEATURES
from metalearn.signals.normalizer import NUM_KNOTS
from metalearn.spaces import HyperparameterSpace

FORMAT_VERSION = "5"
HEADER_KEYS = ("format_version", "feature_schema", "space", "config", "package_version", "provenance", "sha256")
MAX_BYTES = 256 * 2**20
"""A controller is well under a megabyte; a file larger than this is something else."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything a trained controller is.

    Args:
      config: architecture.
      network: flat "module/parameter" -> float32 array.
      base: [1 + families, 2, S] base configuration in unit ranges: of any other model and of each family, without and
        with a known horizon.
      normalizer: percentile knots.
      provenance: how it was trained: data, seeds, budget, commit, figures.
      outcome: parameters of the outcome model by name, "outcome/..."; empty if there is none.
    """

    config: ControllerConfig
    network: Mapping[str, np.ndarray]
    base: np.ndarray
    normalizer: Normalizer
    provenance: Mapping[str, Any]
    outcome: Mapping[str, np.ndarray] = field(default_factory=dict)


def feature_schema() -> str:
    """Returns the features and descriptors that this version computes, as JSON; a checkpoint must match it."""
    return json.dumps(
        {
            "version": FEATURE_SCHEMA_VERSION,
            "group": list(GROUP_FEATURES),
            "run": list(GLOBAL_FEATURES),
            "descriptors": list(DESCRIPTORS),
        }
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Flattens nested parameters to "module/parameter" names."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[f"{prefix}{name}"] = np.asarray(value, np.float32)
    return flat


def unflatten(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inverts `flatten`, for use with Flax."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _digest(tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
    """Hashes the header (without its digest) and every tensor with its name, dtype and shape."""
    digest = hashlib.sha256(json.dumps({k: header[k] for k in sorted(header) if k != "sha256"}).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{tensor.dtype.str}:{tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Returns what the file holds, by name."""
    arrays = {f"network/{name}": value for name, value in checkpoint.network.items()}
    arrays |= checkpoint.outcome
    arrays["prior/base"] = checkpoint.base
    arrays |= {f"normalizer/{name}": knots for name, knots in checkpoint.normalizer._asdict().items()}
    # safetensors writes memory as it lies: a transposed view would come back scrambled.
    return {name: np.asarray(array, np.float32, order="C") for name, array in arrays.items()}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns 16 hex digits that tell controllers apart: a digest of architecture and tensors, not of provenance."""
    return _digest(_tensors(checkpoint), {"config": checkpoint.config.to_json()})[:16]


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> Path:
    """Writes a checkpoint so that a crash leaves the old file or the new one, never half of one.

    Args:
      checkpoint: what to write.
      path: the file; its folder is made.

    Returns:
      The path.
    """
    from safetensors.numpy import save

    from metalearn import __version__

    path = Path(path)
    tensors = _tensors(checkpoint)
    header = {
        "format_version": FORMAT_VERSION,
        "feature_schema": feature_schema(),
        "space": checkpoint.config.space.to_json(),
        "config": checkpoint.config.to_json(),
        "package_version": __version__,
        "provenance": json.dumps(dict(checkpoint.provenance), sort_keys=True),
    }
    header["sha256"] = _digest(tensors, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(save(tensors, metadata=header))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads tensors and header as data; whatever is not a whole, unaltered checkpoint is refused."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, more than any controller; pass a checkpoint file"
            )
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read checkpoint {path}: {error.strerror}; pass the path of a .safetensors file"
        ) from error
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])["__metadata__"]
        tensors = load(content)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        # A header's length may begin with the first byte of a pickle, but not with that and the protocol of one.
        if (content[:1] == b"\x80" and content[1:2] <= b"\x05") or content[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            raise CheckpointError(
                f"{path} is a pickle or zip archive, not a checkpoint; nothing in it was executed"
            ) from error
        raise CheckpointError(
            f"{path} is not a whole safetensors checkpoint ({error}); it is truncated or altered: fetch it again"
        ) from error
    missing = [key for key in HEADER_KEYS if key not in header]
    if missing:
        raise CheckpointError(f"{path} has no {missing} in its header; it was not written by save_checkpoint")
    if _digest(tensors, header) != header["sha256"]:
        raise CheckpointError(f"{path} does not match its SHA-256; it was altered after it was written: fetch it again")
    return tensors, header


def _json_object(path: Path, header: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        content = json.loads(header[key])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no JSON in {key} of its header: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} has no JSON object in {key} of its header; fetch it again")
    return content


def _from_format_1(
    path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Migrates a checkpoint of one base for all families, which did not say what family a model is of."""
    config = _json_object(path, header, "config")
    size = config.get("code_size")
    code = size if isinstance(size, int) and 0 < size < 2**16 else 0  # anything else is refused with the config
    migrated = dict(tensors)
    if "prior/base" in tensors:  # what is missing is named when tensors are checked
        migrated["prior/base"] = tensors["prior/base"][None]
    migrated["network/family"] = np.zeros((1, code), np.float32)
    return migrated, {**header, "format_version": "2", "config": json.dumps({**config, "families": [], "at_rest": []})}


def _from_format_2(path: Path, header: Mapping[str, str]) -> dict[str, str]:
    """Migrates the header of a checkpoint whose rate decays to nothing at a known horizon."""
    config = {**_json_object(path, header, "config"), "decay_to": 0.0}
    return {**header, "format_version": "3", "config": json.dumps(config)}


def _from_format_3(path: Path, header: Mapping[str, str]) -> dict[str, str]:
    """Migrates the header of a checkpoint none of whose families goes by a cue."""
    config = {**_json_object(path, header, "config"), "cued": [], "cue_above": 1.0}
    return {**header, "format_version": "4", "config": json.dumps(config)}


def _from_format_4(
    path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Migrates a checkpoint of before there was a generalisation gap: its networks give that feature no weight."""
    config = {**_json_object(path, header, "config"), "decay_cued": [], "decay_cue_at": 0.7}
    migrated, header = dict(tensors), {**header, "format_version": "5", "config": json.dumps(config)}
    schema = _json_object(path, header, "feature_schema")
    before = {**json.loads(feature_schema()), "version": 1, "run": list(GLOBAL_FEATURES[:-1])}
    if schema != before:
        return migrated, header  # is refused, and what differs is named
    header["feature_schema"] = feature_schema()
    in_mix = len(GROUP_FEATURES) + len(GLOBAL_FEATURES) - 1
    # Of the outcome model's inputs the features come last, the run's before the groups'; its head reads them once more.
    inputs, in_outcome = f"{OUTCOME}hidden_0/kernel", -len(GROUP_FEATURES)
    for name, axis, place in (
        ("network/mix/kernel", 0, in_mix),
        (inputs, 1, in_outcome),
        (f"{OUTCOME}head/kernel", 1, in_outcome),
    ):
        tensor = migrated.get(name)
        if tensor is not None and tensor.ndim > axis and tensor.shape[axis] >= abs(place):  # others are refused
            migrated[name] = np.insert(tensor, place, 0.0, axis=axis).astype(tensor.dtype)
    knots = migrated.get("normalizer/run")
    if knots is not None and knots.ndim == 2:
        unseen = np.linspace(0.0, 1.0, knots.shape[1], dtype=knots.dtype)[None]
        migrated["normalizer/run"] = np.concatenate([knots, unseen])
    return migrated, header


def _check_tensors(path: Path, tensors: Mapping[str, np.ndarray], config: ControllerConfig) -> None:
    """Refuses tensors that are not those of the architecture, or not finite."""
    hidden, code, start = config.hidden_size, config.code_size, len(CONTROLLED)
    descriptors, group, run = len(config.descriptors), len(GROUP_FEATURES), len(GLOBAL_FEATURES)
    dense = {
        "encoder": (descriptors, code),
        "start_hidden": (code, hidden),
        "modifier": (hidden, start),
        "mix": (group + run + code + hidden, hidden),
        "recurrent/input": (hidden, 3 * hidden),
        "recurrent/hidden": (hidden, 3 * hidden),
        "group_head": (hidden, len(GROUP_CONTROLLED)),
        "run_head": (hidden, len(GLOBAL_CONTROLLED)),
    }
    families = 1 + len(config.families)
    expected: dict[str, tuple[int, ...]] = {
        "network/gate": (start,),
        "network/role": (len(ROLES), hidden),
        "network/family": (families, code),
        "prior/base": (families, 2, start),
    }
    for name, shape in dense.items():
        expected |= {f"network/{name}/kernel": shape, f"network/{name}/bias": shape[1:]}
    for name, rows in zip(Normalizer._fields, (descriptors, group, run), strict=True):
        expected[f"normalizer/{name}"] = (rows, NUM_KNOTS)
    if any(name.startswith(OUTCOME) for name in tensors):
        expected |= outcome_config(tensors).shapes(config)
    found = {name: tensor.shape for name, tensor in tensors.items() if tensor.dtype == np.float32}
    differ = sorted(name for name in {*expected, *tensors} if expected.get(name) != found.get(name))
    if differ:
        raise CheckpointError(f"{path} has missing, unknown or misshapen tensors {differ}; fetch it again")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{path} holds non-finite values in {name}; it must not steer anything")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint, checks it, and rebuilds everything from the file alone.

    Args:
      path: a file written by `save_checkpoint`.

    Returns:
      The checkpoint.

    Raises:
      CheckpointError: the file is missing, truncated, altered or something else altogether.
      SchemaMismatchError: it was written for another format, feature schema or space; the message names what differs.
    """
    path = Path(path)
    tensors, header = _read(path)
    if header["format_version"] == "1":
        tensors, header = _from_format_1(path, tensors, header)
    if header["format_version"] == "2":
        header = _from_format_2(path, header)
    if header["format_version"] == "3":
        header = _from_format_3(path, header)
    if header["format_version"] == "4":
        tensors, header = _from_format_4(path, tensors, header)
    if header["format_version"] != FORMAT_VERSION:
        raise SchemaMismatchError(
            f"{path} has format version {header['format_version']}, this metalearn reads {FORMAT_VERSION}; "
            f"use metalearn {header['package_version']}, which wrote it"
        )
    if header["feature_schema"] != feature_schema():
        theirs, ours = _json_object(path, header, "feature_schema"), json.loads(feature_schema())
        differ = [key for key in ours if theirs.get(key) != ours[key]]
        raise SchemaMismatchError(
            f"{path} was trained on another feature schema (differs in {differ}); use metalearn "
            f"{header['package_version']}, which wrote it, or meta-train anew"
        )
    config = ControllerConfig.from_json(header["config"])
    space = HyperparameterSpace.from_json(header["space"])
    if space != config.space:
        differ = [name for name in space.names if name not in config.space or space[name] != config.space[name]]
        raise SchemaMismatchError(
            f"{path} was trained on another hyperparameter space (differs in {differ or list(space.names)}); "
            f"use metalearn {header['package_version']}, which wrote it"
        )
    _check_tensors(path, tensors, config)
    return Checkpoint(
        config=config,
        network={name.removeprefix("network/"): t for name, t in tensors.items() if name.startswith("network/")},
        base=tensors["prior/base"],
        normalizer=Normalizer(*(tensors[f"normalizer/{name}"] for name in Normalizer._fields)),
        provenance=_json_object(path, header, "provenance"),
        outcome={name: tensor for name, tensor in tensors.items() if name.startswith(OUTCOME)},
    )
