"""Look up public domains: by registered name, by hub id, or by the path of a folder or file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.domains import Domain
from envs.public.hub import HUB
from envs.public.prepared import DomainCache
from envs.public.sources import PublicSource, Timestamps
from envs.public.tables import ROW_FORMATS, ItemTable
from metalearn.errors import InvalidArgumentError

BUNDLED = PublicSource(
    name="uci_online_retail",
    location=str(Path(__file__).parent / "uci_online_retail"),
    config="interactions",
    items=ItemTable(location=str(Path(__file__).parent / "uci_online_retail"), config="items"),
    counts={"users": 4335, "items": 3659, "interactions": 386_278},
    role="bundled",
    licence="CC BY 4.0",
    source="https://doi.org/10.24432/C5BW33",
    citation="Chen, D. (2015). Online Retail [Dataset]. UCI Machine Learning Repository. doi:10.24432/C5BW33",
    verified="the files are in the checkout",
)
"""Purchases at a gift wholesaler, in the checkout; for quickstarts, never meta-trained or tuned on."""

REGISTRY: Mapping[str, PublicSource] = {source.name: source for source in (BUNDLED, *HUB)}
"""Public domains by name."""

_TIMESTAMPS: Mapping[str, Timestamps] = {"true timestamps": "real", "order only": "order", "none": "none"}


def find_source(
    name_or_path: str | Path,
    *,
    config: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    min_rating: float | None = None,
) -> PublicSource:
    """Look up a registered name, or describe a local folder, a local file or a hub id.

    Args:
        name_or_path: name in `REGISTRY`, path of a folder or of a parquet or CSV file, or hub id "owner/name".
        config: configuration to load, for a folder or hub id with several.
        revision: commit hash of a hub id.
        columns: names of the columns, where they are not the usual ones.
        min_rating: least rating that counts as a positive; by default above zero.

    Raises:
        InvalidArgumentError: if there is no such name, file or folder, or a hub id comes without a revision.

    Example:
        >>> find_source("uci_online_retail").licence
        'CC BY 4.0'
    """
    name = str(name_or_path)
    options = {"config": config, "revision": revision, "columns": columns, "min_rating": min_rating}
    if name in REGISTRY:
        given = sorted(key for key, value in options.items() if value is not None)
        if given:
            raise InvalidArgumentError(
                f"{name!r} is registered, so {given} must be left out; pass a path or hub id instead"
            )
        return REGISTRY[name]
    path = Path(name)
    if path.is_file() and path.suffix not in ROW_FORMATS:
        raise InvalidArgumentError(
            f"`name_or_path` {name!r} has suffix {path.suffix!r}; pass a folder or a {' or '.join(ROW_FORMATS)} file"
        )
    if path.exists() and revision is None:
        return PublicSource(name=path.stem, location=str(path), **options)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or path.suffix in ROW_FORMATS:
        raise InvalidArgumentError(
            f"`name_or_path` {name!r} is neither a file or folder here nor a registered name ({', '.join(REGISTRY)}); "
            "a hub id looks like 'owner/name'"
        )
    return PublicSource(
        name=name.split("/")[1], location=name, source=f"https://huggingface.co/datasets/{name}", **options
    )


def load_public(
    name_or_path: str | Path,
    *,
    config: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    min_rating: float | None = None,
    cache: DomainCache | str | Path | None = None,
    **options: Any,
) -> Domain:
    """Load a public data set as a split domain.

    Args:
        name_or_path: as in `find_source`, like the next four.
        config: configuration to load.
        revision: commit hash of a hub id.
        columns: names of the columns.
        min_rating: least rating that counts as a positive.
        cache: folder in which prepared domains are kept, or a `DomainCache` to count over several loads.
        **options: split, k-core, sizes and seed, as in `PublicSource.domain`.

    Raises:
        InvalidArgumentError: if it is not found, its columns do not fit, or the split leaves too few users.

    Example:
        >>> domain = load_public("uci_online_retail", max_users=1000)
        >>> domain.split, domain.train.timestamp.max() < domain.validation.timestamp.min()
        ('time', np.True_)
    """
    source = find_source(name_or_path, config=config, revision=revision, columns=columns, min_rating=min_rating)
    return source.domain(cache=DomainCache(cache) if isinstance(cache, str | Path) else cache, **options)


def load_bundled() -> Domain:
    """Load the domain that ships with the checkout, split by time, offline."""
    return BUNDLED.domain()


def load_folder(directory: str | Path, *, role: str | None = None) -> dict[str, PublicSource]:
    """Describe every *.parquet, *.csv and *.tsv in a folder as a domain named by its stem, in order of name.

    `<name>.items.parquet` or `.csv` beside it, with `item_id`, `title` and perhaps `categories`, says what the items
    are. An optional MANIFEST.json, `{"datasets": [{"name": ..., "role": ..., "has_timestamps": "true timestamps" |
    "order only" | "none", "licence": ..., "min_rating": ..., "users": ..., "items": ..., "interactions": ...}]}`, says
    what each may be used for, what its times mean and how large it should be; without an entry times are taken as real.

    Args:
        directory: the folder.
        role: keep only domains that the manifest gives this role.

    Returns:
        Sources by name; nothing is read but the manifest until `interactions()` or `domain()` is called.

    Raises:
        InvalidArgumentError: if the folder is missing, a name occurs twice, or the manifest is not understood.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InvalidArgumentError(f"`directory` {str(folder)!r} is not a folder; pass one with parquet or CSV files")
    entries = _read_manifest(folder / "MANIFEST.json")
    files = sorted(path for path in folder.iterdir() if path.suffix in ROW_FORMATS)
    items = {path.stem.removesuffix(".items"): path for path in files if path.stem.endswith(".items")}
    sources: dict[str, PublicSource] = {}
    for path in files:
        entry = entries.get(path.stem, {})
        if path.stem.endswith(".items") or (role is not None and entry.get("role") != role):
            continue
        if path.stem in sources:
            raise InvalidArgumentError(f"`directory` {str(folder)!r} has two files for domain {path.stem!r}; keep one")
        sources[path.stem] = PublicSource(
            name=path.stem,
            location=str(path),
            timestamps=_TIMESTAMPS[entry.get("has_timestamps", "true timestamps")],
            min_rating=entry.get("min_rating"),
            items=ItemTable(location=str(items[path.stem])) if path.stem in items else None,
            counts={key: entry[key] for key in ("users", "items", "interactions") if key in entry},
            role=entry.get("role"),
            licence=entry.get("licence") or "not stated",
            source=entry.get("source_repo") or "",
        )
    return sources


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        entries = {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["datasets"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f'{str(path)!r} must be JSON like {{"datasets": [{{"name": ..., "role": ...}}]}}, got {error!r}'
        ) from error
    for name, entry in entries.items():
        if entry.get("has_timestamps", "none") not in _TIMESTAMPS:
            raise InvalidArgumentError(
                f"`has_timestamps` of {name!r} in {str(path)!r} must be one of {sorted(_TIMESTAMPS)}, "
                f"got {entry['has_timestamps']!r}"
            )
    return entries
