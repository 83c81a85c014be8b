"""Domains: interactions with splits that respect time, the checks that nothing leaks, and what is evaluated.

Shape legend: U users, I items, N interactions, E evaluated users.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from envs.splits import Parts, is_among, pair_codes, split_by_time, split_last_out
from metalearn.errors import InvalidArgumentError, LeakageError
from metalearn.interactions import Interactions

if TYPE_CHECKING:
    from metalearn.profiles import DomainProfile

Split = Literal["time", "leave-last-out"]

MIN_EVALUABLE_USERS = 20
"""Fewest users with a target that a time split may leave in validation or test: fewer measure nothing."""


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
class Domain:
    """A recommendation problem: training, validation and test interactions in one code space.

    Args:
        name: what reports call it.
        train: what a recommender may learn from; no (user, item) pair occurs twice.
        validation: targets for choices made during training.
        test: targets for the final score.
        split: "time" (one pair of cutoffs for everyone) or "leave-last-out" (each user's last two items).
        provenance: where the data is from: source, licence, credit.
        item_titles: object [I], or None.

    Raises:
        InvalidArgumentError: if the three parts do not share one code space.
    """

    name: str
    train: Interactions
    validation: Interactions
    test: Interactions
    split: Split
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    item_titles: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = (self.num_users, self.num_items)
        for part_name in ("validation", "test"):
            part = getattr(self, part_name)
            if (part.num_users, part.num_items) != shape:
                raise InvalidArgumentError(
                    f"`{part_name}` must share the code space of `train` ({shape[0]} users, {shape[1]} items), got "
                    f"{part.num_users} users, {part.num_items} items; use make_domain, or select() parts of one table"
                )
        if self.split not in ("time", "leave-last-out"):
            raise InvalidArgumentError(f"`split` must be 'time' or 'leave-last-out', got {self.split!r}")

    @property
    def num_users(self) -> int:
        """Users that occur in training."""
        return self.train.num_users

    @property
    def num_items(self) -> int:
        """Items that occur in training."""
        return self.train.num_items

    @cached_property
    def profile(self) -> DomainProfile:
        """Meta-features of the training part only: validation and test never reach a controller."""
        from metalearn.profiles import profile_domain

        return profile_domain(self.train)


def make_domain(
    interactions: Interactions,
    *,
    name: str,
    split: Literal["auto", "time", "leave-last-out"] = "auto",
    min_user_interactions: int = 2,
    min_item_interactions: int = 1,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    provenance: Mapping[str, str] | None = None,
    item_titles: np.ndarray | None = None,
    seed: int = 0,
) -> Domain:
    """Split interactions into training, validation and test, with no future in training.

    Every row counts as a positive: call `interactions.positives()` first where ratings can be negative.

    "time": two cutoffs shared by all users, at the times closest to the wanted shares of interactions; rows of one
    time stay together, so that every training time < every validation time < every test time.
    "leave-last-out": of each user with at least 3 distinct items the last is test and the one before validation, by
    time, else by row order. Rows without times that are sorted by item carry no order (a sparse matrix, say): there
    the order is drawn at random from `seed`.

    Either way repeats of a pair count once, at the first occurrence; validation and test hold only users and items
    that training knows, and only pairs that are in no earlier part; codes are compacted on training.

    Args:
        interactions: positives of one domain.
        name: what reports call it.
        split: "auto" is "time" where there are timestamps, else "leave-last-out".
        min_user_interactions: users with fewer distinct items are dropped; counted on training under "time", since
            nothing else is known at the cutoff, and on the whole history under "leave-last-out".
        min_item_interactions: the same for items and their distinct users; both are applied until neither drops any.
        validation_fraction: share of rows wanted in validation, in (0, 1); "time" only.
        test_fraction: share of rows wanted in test, in (0, 1); "time" only.
        provenance: source, licence and credit to keep with the domain.
        item_titles: object [interactions.num_items], titles by item code.
        seed: of the random order where rows carry none.

    Returns:
        A `Domain` that passes `check_leakage`.

    Raises:
        InvalidArgumentError: if a split is left with too few users to evaluate (fewer than 20 under "time").

    Example:
        >>> from metalearn.interactions import Interactions
        >>> log = Interactions.from_arrays([0, 0, 0, 1, 1, 1], [5, 6, 7, 6, 7, 5], timestamp=[1, 2, 3, 4, 5, 6])
        >>> domain = make_domain(log, name="toy", split="leave-last-out", min_user_interactions=1)
        >>> len(domain.train), len(domain.validation), len(domain.test)
        (2, 1, 1)
    """
    _check_arguments(interactions, split, validation_fraction, test_fraction, item_titles)
    if split == "auto":
        split = "leave-last-out" if interactions.timestamp is None else "time"
    minima = (min_user_interactions, min_item_interactions)
    if split == "time":
        parts = split_by_time(interactions, validation_fraction, test_fraction, minima)
    else:
        parts = split_last_out(interactions, minima, seed)
    _check_evaluable(interactions, parts, name, split)
    domain = _assemble(interactions, parts, name, split, provenance, item_titles)
    check_leakage(domain)
    return domain


def _check_arguments(
    interactions: Interactions,
    split: str,
    validation_fraction: float,
    test_fraction: float,
    item_titles: np.ndarray | None,
) -> None:
    if split not in ("auto", "time", "leave-last-out"):
        raise InvalidArgumentError(f"`split` must be 'auto', 'time' or 'leave-last-out', got {split!r}")
    if split == "time" and interactions.timestamp is None:
        raise InvalidArgumentError(
            "`split`='time' needs timestamps and `interactions` has none; pass split='leave-last-out'"
        )
    for argument, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0.0 < value < 1.0:
            raise InvalidArgumentError(f"`{argument}` must lie in (0, 1), got {value}; the usual value is 0.1")
    if validation_fraction + test_fraction >= 1.0:
        raise InvalidArgumentError(
            f"`validation_fraction` + `test_fraction` must be below 1, got {validation_fraction + test_fraction}"
        )
    if item_titles is not None and len(item_titles) != interactions.num_items:
        raise InvalidArgumentError(
            f"`item_titles` must hold one title per item code ({interactions.num_items}), got {len(item_titles)}"
        )


def _check_evaluable(interactions: Interactions, parts: Parts, name: str, split: Split) -> None:
    if len(parts[0]) == 0:
        raise InvalidArgumentError(
            f"domain {name!r} has no training interactions left; lower `min_user_interactions` or "
            f"`min_item_interactions`, or pass more interactions (got {len(interactions)})"
        )
    validation, test = (int((np.bincount(interactions.user[rows]) > 0).sum()) for rows in parts[1:])
    if split == "time" and min(validation, test) < MIN_EVALUABLE_USERS:
        raise InvalidArgumentError(
            f"`split`='time' leaves {validation} evaluable users in validation and {test} in test of domain {name!r} "
            f"(users and items known in training, pairs that are new); at least {MIN_EVALUABLE_USERS} are needed: "
            "pass split='leave-last-out'"
        )
    if validation + test == 0:
        raise InvalidArgumentError(
            f"no user of domain {name!r} can be evaluated: leave-last-out needs users with at least 3 distinct items "
            "whose last two occur in the training part as well; pass more interactions"
        )


def _assemble(
    interactions: Interactions,
    parts: Parts,
    name: str,
    split: Split,
    provenance: Mapping[str, str] | None,
    item_titles: np.ndarray | None,
) -> Domain:
    """Compact the codes on the union of the parts, which are the codes of training since the others are warm."""
    rows = np.concatenate(parts)
    kept = interactions.select(rows).compact()
    titles = None
    if item_titles is not None:
        titles = np.empty(kept.num_items, dtype=object)
        titles[kept.item] = np.asarray(item_titles, dtype=object)[interactions.item[rows]]
    bounds = np.cumsum([0, *(len(part) for part in parts)])
    train, validation, test = (kept.select(np.arange(low, high)) for low, high in itertools.pairwise(bounds))
    return Domain(
        name=name,
        train=train,
        validation=validation,
        test=test,
        split=split,
        provenance=dict(provenance or {}),
        item_titles=titles,
    )


def check_leakage(domain: Domain) -> None:
    """Verify that training knows neither the evaluated pairs nor the future.

    Checks that (a) no (user, item) pair is in two parts; (b) under "time", the last training time < the first
    validation time and the last validation time < the first test time; (c) under "leave-last-out" with times, no
    training interaction of a user is later than that user's validation, and no validation later than the test.

    Raises:
        LeakageError: names the part, the user and item codes, the time and the cutoff that it breaks.
    """
    parts = {"train": domain.train, "validation": domain.validation, "test": domain.test}
    for earlier, later in (("train", "validation"), ("train", "test"), ("validation", "test")):
        _check_pairs(parts[earlier], parts[later], earlier, later)
        time, later_time = parts[earlier].timestamp, parts[later].timestamp
        if time is None or later_time is None or len(time) == 0 or len(later_time) == 0:
            continue
        if domain.split == "time":
            cutoff = np.full(len(time), later_time.min())
            leaks = time >= cutoff
        else:
            first = np.full(domain.num_users, np.inf)
            np.minimum.at(first, parts[later].user, later_time)
            cutoff = first[parts[earlier].user]
            leaks = time > cutoff
        if leaks.any():
            row = int(np.where(leaks, time - cutoff, -np.inf).argmax())
            raise LeakageError(
                f"{leaks.sum()} interactions in `{earlier}` lie in the future of `{later}`: user code "
                f"{parts[earlier].user[row]} has one at time {time[row]:.0f}, and the cutoff is {cutoff[row]:.0f} "
                f"(where `{later}` starts); move rows from the cutoff on out of `{earlier}`"
            )


def _check_pairs(earlier: Interactions, later: Interactions, earlier_name: str, later_name: str) -> None:
    both = is_among(pair_codes(later), pair_codes(earlier))
    if both.any():
        row = int(both.argmax())
        raise LeakageError(
            f"{both.sum()} of {len(later)} `{later_name}` pairs are in `{earlier_name}` as well, first user code "
            f"{later.user[row]} with item code {later.item[row]}; drop evaluated pairs from `{earlier_name}`"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohorts:
    """Groups of users and items to report metrics by.

    Args:
        user: int8 [U], index into `USER_COHORTS`.
        item: int8 [I], index into `ITEM_COHORTS`.
    """

    user: np.ndarray
    item: np.ndarray


USER_COHORTS = ("light", "medium", "heavy")
ITEM_COHORTS = ("head", "mid", "tail")


def cohorts(domain: Domain) -> Cohorts:
    """Group users by activity and items by popularity, both counted on training.

    Users: terciles of the number of interactions; equal counts stay together, so groups can differ in size.
    Items: in order of popularity, the head receives the first third of interactions, mid the second, tail the last.
    """
    activity = np.bincount(domain.train.user, minlength=domain.num_users)
    user = np.searchsorted(np.quantile(activity, [1 / 3, 2 / 3]), activity, side="left")
    popularity = np.bincount(domain.train.item, minlength=domain.num_items)
    order = np.argsort(-popularity, kind="stable")
    before = np.cumsum(popularity[order]) - popularity[order]
    item = np.empty(domain.num_items, dtype=np.int8)
    item[order] = np.minimum(3 * before // max(int(popularity.sum()), 1), 2)
    return Cohorts(user=user.astype(np.int8), item=item)


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
