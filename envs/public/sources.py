"""A public data set: where it is, how its columns are called, what its times mean, and under which terms it comes."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from envs.domains import Domain, make_domain
from envs.public.content import item_vectors
from envs.public.hygiene import HygieneReport, check_hygiene
from envs.public.layouts import Layout, read_layout
from envs.public.prepared import DomainCache
from envs.public.slices import crop
from envs.public.tables import ItemTable, Table
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

Timestamps = Literal["real", "order", "none"]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PublicSource(Table):
    """Describe one data set: the table that it is in, how to read it, and under which terms it comes.

    Takes the arguments of `Table` as well.

    Args:
        name: what the domain is called.
        layout: "rows" (one interaction a row), "lines" or "lists" (one user each, as `envs.public.layouts` says).
        columns: role ("user", "item", "timestamp", "rating") to column name, as in `Interactions.from_frame`.
        timestamps: "real", "order" (they only order the rows of a user, so they are used for that and dropped), or
            "none" (they mean nothing, and neither does the order of rows, which is shuffled).
        time_unit: unit of numeric times.
        min_rating: least rating that is a positive; by default above zero, or unrated.
        items: table with titles and descriptions of items, or None.
        counts: how many "users", "items" and "interactions" the source states; checked on load.
        role: what the domain may be used for, such as "meta-training" or "validation".
        licence: terms of use.
        source: address of the original.
        citation: how to credit it.
        verified: how revision and columns of a registered hub data set were checked.

    Raises:
        InvalidArgumentError: if a hub id has no revision.
    """

    name: str
    layout: Layout = "rows"
    columns: Mapping[str, str | None] | None = None
    timestamps: Timestamps = "real"
    time_unit: Literal["s", "ms"] = "s"
    min_rating: float | None = None
    items: ItemTable | None = None
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    role: str | None = None
    licence: str = "not stated"
    source: str = ""
    citation: str = ""
    verified: str = ""

    def describe(self) -> list[str]:
        """Say in lines where the data is from and under which terms it may be used."""
        where = self.location if self.is_local else f"{self.location}@{self.revision}"
        lines = {
            "location": where if self.config is None else f"{where}, {self.config}",
            "files": ", ".join(self.files),
            "licence": self.licence,
            "source": self.source,
            "cite": self.citation,
            "verified": self.verified,
        }
        return [self.name, *(f"  {key}: {value}" for key, value in lines.items() if value)]

    def rows(self) -> Interactions:
        """Load all rows as they are, times in seconds; nothing but a hub id touches the network.

        Raises:
            InteractionsError: if columns are missing or values invalid.
        """
        with self.open() as dataset:
            interactions = read_layout(dataset, self.layout, self.columns)
        if self.time_unit == "ms" and interactions.timestamp is not None:
            interactions = dataclasses.replace(interactions, timestamp=interactions.timestamp / 1000)
        return interactions

    def interactions(self) -> Interactions:
        """Load the positives, compacted, in the order that their times give; errors as `rows`."""
        return self._positives(self.rows())

    def _positives(self, rows: Interactions) -> Interactions:
        interactions = rows.positives(self.min_rating).compact()
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
        return self._item_tables(interactions)[0]

    def item_content(self, interactions: Interactions) -> np.ndarray | None:
        """Load what is written about items as vectors by item code, float32 [I, C]; None where nothing is written.

        `envs.public.content.item_vectors` says what the vectors are.
        """
        return self._item_tables(interactions)[1]

    def _item_tables(self, interactions: Interactions) -> tuple[np.ndarray | None, np.ndarray | None]:
        if self.items is None:
            return None, None
        known = self.items.read()
        ids = interactions.item_ids(np.arange(interactions.num_items))
        titles, texts = zip(*(known.get(str(key), ("", "")) for key in ids), strict=True)
        return np.array(titles, dtype=object), item_vectors(texts) if any(texts) else None

    def domain(
        self,
        *,
        split: Literal["auto", "time", "leave-last-out"] = "auto",
        min_user_interactions: int = 2,
        min_item_interactions: int = 1,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        max_users: int | None = None,
        max_items: int | None = None,
        seed: int = 0,
        cache: DomainCache | None = None,
    ) -> Domain:
        """Load the data, look for what is wrong with it, and split it.

        Severe findings of `check_hygiene` are logged as a warning; all are in `provenance["hygiene"]`.

        Args:
            split: as in `make_domain`.
            min_user_interactions: fewest distinct items of a user, as in `make_domain`.
            min_item_interactions: fewest distinct users of an item; with both at k the result is a k-core.
            validation_fraction: share of rows wanted in validation, under "time".
            test_fraction: share of rows wanted in test, under "time".
            max_users: keep at most this many users, drawn at random among the active, before the split.
            max_items: keep at most this many items, the most popular, before the split.
            seed: of the users drawn, and of orders that are drawn.
            cache: where prepared domains are kept; None prepares it anew.

        Raises:
            InvalidArgumentError: if the split leaves too few users, as in `make_domain`.

        Example:
            >>> from envs.public import BUNDLED
            >>> domain = BUNDLED.domain(min_user_interactions=5, min_item_interactions=5, max_users=1000)
            >>> domain.num_users <= 1000, domain.item_content.shape[1]
            (True, 32)
        """
        options = {
            "split": split,
            "min_user_interactions": min_user_interactions,
            "min_item_interactions": min_item_interactions,
            "validation_fraction": validation_fraction,
            "test_fraction": test_fraction,
            "max_users": max_users,
            "max_items": max_items,
            "seed": seed,
        }
        if cache is None:
            domain, report = self._prepare(**options)
        else:
            content = self.content_hash() + ("" if self.items is None else f" {self.items.content_hash()}")
            parameters = {"source": dataclasses.asdict(self), **options}
            domain, report = cache.get(self.name, content, parameters, lambda: self._prepare(**options))
        if report.severe:
            _LOGGER.warning("%s", dataclasses.replace(report, findings=report.severe))
        return domain

    def _prepare(self, *, max_users: int | None, max_items: int | None, **options: Any) -> tuple[Domain, HygieneReport]:
        rows = self.rows()
        interactions = self._positives(rows)
        for argument, most in (("max_users", max_users), ("max_items", max_items)):
            if most is not None and most < 2:
                raise InvalidArgumentError(f"`{argument}` must be at least 2 or None, got {most}")
        if max_users is not None or max_items is not None:
            interactions = crop(
                interactions,
                max_users=max_users or interactions.num_users,
                max_items=max_items or interactions.num_items,
                key=np.random.default_rng(options["seed"]),
            )
        titles, content = self._item_tables(interactions)
        provenance = {
            "source": self.source or self.location,
            "revision": self.revision or "",
            "licence": self.licence,
            "credit": self.citation,
        }
        domain = make_domain(
            interactions,
            name=self.name,
            provenance={key: value for key, value in provenance.items() if value},
            item_titles=titles,
            item_content=content,
            **options,
        )
        report = check_hygiene(rows, domain, self)
        return dataclasses.replace(domain, provenance={**domain.provenance, "hygiene": str(report)}), report
