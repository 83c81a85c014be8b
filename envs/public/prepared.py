"""Prepared domains on disk: what was loaded, split and checked once is read back, if it is still what it was.

An entry is two files: `<name>-<parameters>.npz` with the arrays, and a JSON header of the same name with the SHA-256 of
that file, of the data and the code that it was made from, and of itself. Nothing is pickled, and nothing is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import envs.domains
import envs.splits
import metalearn.interaction_columns
import metalearn.interactions
from envs.domains import Domain
from envs.public.hygiene import HygieneReport
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

FORMAT = 1
"""Version of the layout of an entry."""

_PARTS = ("train", "validation", "test", "exposures")
_COLUMNS = ("user", "item", "timestamp", "rating")
_LABELS = ("user_labels", "item_labels")
_LOGGER = logging.getLogger(__name__)

Prepared = tuple[Domain, HygieneReport]


@dataclasses.dataclass
class CacheStatistics:
    """Count what a cache was asked for.

    Args:
        hits: entries that were read back.
        misses: domains that had to be prepared.
        rebuilt: those of the misses that had an entry, which was broken or of other data or code.
    """

    hits: int = 0
    misses: int = 0
    rebuilt: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of hits, in [0, 1]; 0 if nothing was asked for."""
        return self.hits / max(self.hits + self.misses, 1)

    def __str__(self) -> str:
        return (
            f"prepared domains: {self.hits} of {self.hits + self.misses} from the cache ({self.hit_rate:.0%}), "
            f"{self.rebuilt} broken or stale entries rebuilt"
        )


class DomainCache:
    """Keep prepared domains in a folder, by the parameters that they were prepared with.

    Several processes may share a folder: files are replaced whole. An entry that fails any check is prepared again.

    Args:
        directory: the folder; made when the first entry is written.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.statistics = CacheStatistics()

    def get(
        self, name: str, content: str, parameters: Mapping[str, Any], prepare: Callable[[], Prepared]
    ) -> tuple[Domain, HygieneReport]:
        """Read the entry of these parameters if it is whole and of this content, else prepare and write it.

        Args:
            name: name of the domain, which the entry's file names begin with.
            content: identifies the data.
            parameters: everything else that the result depends on; plain values.
            prepare: makes the domain and its report.

        Raises:
            InvalidArgumentError: if ids are of a type that cannot be written; those of `prepare`.
        """
        # Through JSON, so that they compare equal with what the header holds.
        parameters = json.loads(json.dumps(parameters, sort_keys=True))
        path = self.directory / f"{name}-{_digest(parameters)[:16]}.npz"
        wanted = {"format": FORMAT, "content": content, "code": _code_digest(), "parameters": parameters}
        if path.exists() or path.with_suffix(".json").exists():
            try:
                prepared = _read(path, wanted)
            except (OSError, ValueError, KeyError, TypeError) as error:
                _LOGGER.info("prepared domain %s is built again: %s", path.name, error)
                self.statistics.rebuilt += 1
            else:
                self.statistics.hits += 1
                return prepared
        self.statistics.misses += 1
        domain, report = prepare()
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(path, wanted, domain, report)
        return domain, report


def _write(path: Path, wanted: Mapping[str, Any], domain: Domain, report: HygieneReport) -> None:
    buffer = io.BytesIO()
    arrays, meta = _pack(domain)
    np.savez(buffer, allow_pickle=False, **arrays)
    header = {
        **wanted,
        "arrays": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "domain": meta,
        "hygiene": report.to_dict(),
    }
    header["checksum"] = _digest(header)
    _replace(path, buffer.getvalue())
    _replace(path.with_suffix(".json"), json.dumps(header, indent=1).encode())


def _read(path: Path, wanted: Mapping[str, Any]) -> Prepared:
    """Read an entry; any error means that it is not to be used."""
    header = json.loads(path.with_suffix(".json").read_bytes())
    if not isinstance(header, dict) or header.pop("checksum", None) != _digest(header):
        raise ValueError("its header is damaged")
    for key, value in wanted.items():
        if header[key] != value:
            raise ValueError(f"it was made with another {key}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != header["arrays"]:
        raise ValueError("its arrays are damaged")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return _unpack(arrays, header["domain"]), HygieneReport.from_dict(header["hygiene"])


def _pack(domain: Domain) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays: dict[str, np.ndarray] = {}
    for part in _PARTS:
        interactions = getattr(domain, part)
        for column in _COLUMNS if interactions is not None else ():
            values = getattr(interactions, column)
            if values is not None:
                arrays[f"{part}.{column}"] = values
    optional = {
        "item_titles": domain.item_titles,
        "item_content": domain.item_content,
        **{name: getattr(domain.train, name) for name in _LABELS},
    }
    for name, values in optional.items():
        if values is not None:
            # Arrays of objects would be pickled: they go as JSON text.
            arrays[name] = _as_bytes(name, values) if values.dtype.kind == "O" else values
    meta = {
        "name": domain.name,
        "split": domain.split,
        "provenance": dict(domain.provenance),
        "num_users": domain.num_users,
        "num_items": domain.num_items,
        "objects": [name for name, values in optional.items() if values is not None and values.dtype.kind == "O"],
    }
    return arrays, meta


def _unpack(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Domain:
    optional: dict[str, Any] = {
        name: _from_bytes(arrays[name]) if name in meta["objects"] else arrays[name]
        for name in ("item_titles", "item_content", *_LABELS)
        if name in arrays
    }
    space = {"num_users": meta["num_users"], "num_items": meta["num_items"]}
    space |= {name: optional.pop(name, None) for name in _LABELS}
    parts: dict[str, Any] = {}
    for part in _PARTS:
        columns = {column: arrays[f"{part}.{column}"] for column in _COLUMNS if f"{part}.{column}" in arrays}
        parts[part] = Interactions(**columns, **space) if columns else None
    return Domain(name=meta["name"], split=meta["split"], provenance=meta["provenance"], **parts, **optional)


def _as_bytes(name: str, values: np.ndarray) -> np.ndarray:
    try:
        return np.frombuffer(json.dumps(values.tolist()).encode(), dtype=np.uint8)
    except TypeError as error:
        raise InvalidArgumentError(
            f"`{name}` cannot be cached: {error}; pass ids that are text or numbers, or cache=None"
        ) from error


def _from_bytes(values: np.ndarray) -> np.ndarray:
    found = json.loads(values.tobytes())
    return np.fromiter(found, dtype=object, count=len(found))


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code_digest() -> str:
    """Identify the code that prepares domains, so that a change of it makes entries stale."""
    modules = (envs.domains, envs.splits, metalearn.interaction_columns, metalearn.interactions)
    files = [Path(module.__file__) for module in modules if module.__file__]
    files += sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
