"""A public data set: where it is, how its columns are called, what its times mean, and under which terms it comes."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from envs.domains import Domain, make_domain
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

if TYPE_CHECKING:
    import datasets

FILE_FORMATS = {".parquet": "parquet", ".csv": "csv"}
"""Suffixes of local files and the `datasets` builder that reads them."""

Timestamps = Literal["real", "order", "none"]


@dataclass(frozen=True, kw_only=True)
class PublicSource:
    """Describe one data set that `datasets.load_dataset` can open: a hub id, a local folder or a local file.

    Args:
        name: what the domain is called.
        location: hub id "owner/name", or path of a folder (with a README that has a `configs:` block) or of a
            parquet or CSV file.
        config: configuration with the interactions; None for the default one.
        dataset_split: split that holds all interactions.
        revision: commit hash; required for a hub id, so that a result can be repeated.
        columns: role ("user", "item", "timestamp", "rating") to column name, as in `Interactions.from_frame`.
        timestamps: "real" (seconds), "order" (they only order the rows of a user, so they are used for that and
            dropped), or "none" (they mean nothing, and neither does the order of rows, which is shuffled).
        min_rating: least rating that is a positive; by default above zero, or unrated.
        items: configuration or file with `item_id` and `title`, or None.
        role: what the domain may be used for, such as "meta-training" or "validation".
        licence: terms of use.
        source: address of the original.
        citation: how to credit it.

    Raises:
        InvalidArgumentError: if a hub id has no revision.
    """

    name: str
    location: str
    config: str | None = None
    dataset_split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str | None] | None = None
    timestamps: Timestamps = "real"
    min_rating: float | None = None
    items: str | None = None
    role: str | None = None
    licence: str = "not stated"
    source: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        if not self.is_local and self.revision is None:
            raise InvalidArgumentError(
                f"`revision` of hub data set {self.location!r} is missing; pass the commit hash to pin (a local "
                "folder or file must exist under that path)"
            )

    @property
    def is_local(self) -> bool:
        """Whether the location is a path on this machine."""
        return Path(self.location).exists()

    def interactions(self) -> Interactions:
        """Load the positives, compacted; nothing but a hub id touches the network.

        Raises:
            InteractionsError: if columns are missing or values invalid.
        """
        with _open(self, self.config) as dataset:
            interactions = Interactions.from_dataset(dataset, columns=self.columns)
        interactions = interactions.positives(self.min_rating).compact()
        if self.timestamps == "real":
            return interactions
        if self.timestamps == "none":
            order = np.random.default_rng(zlib.crc32(self.name.encode())).permutation(len(interactions))
        elif interactions.timestamp is None:
            order = np.arange(len(interactions))
        else:
            order = np.argsort(interactions.timestamp, kind="stable")
        return dataclasses.replace(interactions.select(order), timestamp=None)

    def item_titles(self, interactions: Interactions) -> np.ndarray | None:
        """Load the titles by item code of `interactions`, object [I], "" where unknown; None without an item table."""
        if self.items is None:
            return None
        with _open(self, self.items) as dataset:
            table = dataset.with_format(None)
            pairs = zip(list(table["item_id"]), list(table["title"]), strict=True)
            titles = {str(key): (title or "").strip() for key, title in pairs}
        ids = interactions.item_ids(np.arange(interactions.num_items))
        return np.array([titles.get(str(key), "") for key in ids], dtype=object)

    def domain(self, *, split: Literal["auto", "time", "leave-last-out"] = "auto", **options: Any) -> Domain:
        """Load the data and split it; `options` go to `make_domain`.

        Raises:
            InvalidArgumentError: if the split leaves too few users, as in `make_domain`.
        """
        interactions = self.interactions()
        provenance = {
            "source": self.source or self.location,
            "revision": self.revision or "",
            "licence": self.licence,
            "credit": self.citation,
        }
        return make_domain(
            interactions,
            name=self.name,
            split=split,
            provenance={key: value for key, value in provenance.items() if value},
            item_titles=self.item_titles(interactions),
            **options,
        )


@contextlib.contextmanager
def _open(source: PublicSource, config: str | None) -> Iterator[datasets.Dataset]:
    """Open a table of the source; a local one goes through a cache that is removed again."""
    import datasets

    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet(datasets))
        if not source.is_local:
            yield datasets.load_dataset(source.location, config, split=source.dataset_split, revision=source.revision)
            return
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="metalearn-"))
        path = Path(config) if config is not None and Path(config).is_file() else Path(source.location)
        if path.is_dir():
            yield datasets.load_dataset(str(path), config, split=source.dataset_split, cache_dir=cache)
            return
        if path.suffix not in FILE_FORMATS:
            raise InvalidArgumentError(
                f"`location` {str(path)!r} has suffix {path.suffix!r}; pass a folder or a "
                f"{' or '.join(FILE_FORMATS)} file"
            )
        yield datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train", cache_dir=cache)


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Switch progress bars off and back to what they were."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
