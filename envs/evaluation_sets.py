"""Evaluation sets: whom to rank items for, what to hide from their lists and what they are scored on.

Shape legend: U users, I items, E evaluated users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from envs.domains import Domain
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions


class CSR(NamedTuple):
    """Lists of item codes of varying length, one per row, in compressed form.

    Row `r` is `indices[indptr[r]:indptr[r + 1]]`, ascending and without repeats.
    """

    indptr: np.ndarray
    """int64 [E + 1]."""
    indices: np.ndarray
    """int32 [total]."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of entries of each row, int64 [E]."""
        return np.diff(self.indptr)

    @property
    def rows(self) -> np.ndarray:
        """Row of each entry, int64 [total]."""
        return np.repeat(np.arange(len(self.indptr) - 1), self.lengths)

    def row(self, index: int) -> np.ndarray:
        """Entries of one row."""
        return self.indices[self.indptr[index] : self.indptr[index + 1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationSet:
    """Users to rank items for, what to hide from their lists and what they are scored on.

    Args:
        users: int32 [E], ascending user codes.
        seen: items to hide, E rows: training items, for test those of validation as well.
        targets: relevant items, E rows of at least one.
        num_items: size of the catalogue.
    """

    users: np.ndarray
    seen: CSR
    targets: CSR
    num_items: int

    def __len__(self) -> int:
        return len(self.users)


def evaluation_set(
    domain: Domain, split: Literal["validation", "test"], *, max_users: int | None = None, seed: int = 0
) -> EvaluationSet:
    """Collect the users of a split that have a target, what they have seen and what they should be offered.

    Args:
        domain: the domain.
        split: "validation" or "test".
        max_users: evaluate a random sample of at most this many users; all by default.
        seed: of that sample.

    Raises:
        InvalidArgumentError: if `split` is unknown or `max_users` is not positive.
    """
    if split not in ("validation", "test"):
        raise InvalidArgumentError(f"`split` must be 'validation' or 'test', got {split!r}")
    if max_users is not None and max_users < 1:
        raise InvalidArgumentError(f"`max_users` must be a positive int or None, got {max_users}")
    evaluated = domain.validation if split == "validation" else domain.test
    users = np.flatnonzero(np.bincount(evaluated.user, minlength=domain.num_users)).astype(np.int32)
    if max_users is not None and len(users) > max_users:
        users = np.sort(np.random.default_rng(seed).choice(users, size=max_users, replace=False))
    known = [domain.train] if split == "validation" else [domain.train, domain.validation]
    return EvaluationSet(
        users=users, seen=_csr(known, users), targets=_csr([evaluated], users), num_items=domain.num_items
    )


def _csr(parts: list[Interactions], users: np.ndarray) -> CSR:
    num_items = parts[0].num_items
    row_of_user = np.full(parts[0].num_users, -1, dtype=np.int64)
    row_of_user[users] = np.arange(len(users))
    row = np.concatenate([row_of_user[part.user] for part in parts])
    item = np.concatenate([part.item for part in parts])
    key = np.sort(row[row >= 0] * num_items + item[row >= 0])
    key = key[np.diff(key, prepend=-1) != 0]
    indptr = np.zeros(len(users) + 1, dtype=np.int64)
    np.cumsum(np.bincount(key // num_items, minlength=len(users)), out=indptr[1:])
    return CSR(indptr=indptr, indices=(key % num_items).astype(np.int32))
