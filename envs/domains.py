"""Domains: interactions with splits that respect time, and the checks that nothing leaks.

Shape legend: U users, I items, N interactions, C content features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from envs.splits import Parts, is_among, pair_codes, split_by_time, split_last_out
from metalearn.errors import InvalidArgumentError, LeakageError
from metalearn.interactions import Interactions

if TYPE_CHECKING:
    from metalearn.profiles import DomainProfile

Split = Literal["time", "leave-last-out"]

MIN_EVALUABLE_USERS = 20
"""Fewest users with a target that a time split may leave in validation or test: fewer measure nothing."""


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
        item_content: float32 [I, C], a vector of what each item is, or None.
        exposures: pairs that were shown in the time of training and not taken, or None where nothing was recorded.

    Raises:
        InvalidArgumentError: if the parts do not share one code space.
    """

    name: str
    train: Interactions
    validation: Interactions
    test: Interactions
    split: Split
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    item_titles: np.ndarray | None = None
    item_content: np.ndarray | None = None
    exposures: Interactions | None = None

    def __post_init__(self) -> None:
        shape = (self.num_users, self.num_items)
        for part_name in ("validation", "test", "exposures"):
            part = getattr(self, part_name)
            if part is not None and (part.num_users, part.num_items) != shape:
                raise InvalidArgumentError(
                    f"`{part_name}` must share the code space of `train` ({shape[0]} users, {shape[1]} items), got "
                    f"{part.num_users} users, {part.num_items} items; use make_domain, or select() parts of one table"
                )
        if self.item_content is not None and len(self.item_content) != self.num_items:
            raise InvalidArgumentError(
                f"`item_content` must have a row per item ({self.num_items}), got {len(self.item_content)}"
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
    item_content: np.ndarray | None = None,
    exposures: Interactions | None = None,
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
        item_content: float32 [interactions.num_items, C], vectors by item code.
        exposures: pairs shown and not taken, in the codes of `interactions`; kept are those of the time of training (of
            the user's, under "leave-last-out"), of users and items that training knows, and of pairs that no part has.
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
    _check_arguments(interactions, split, validation_fraction, test_fraction, item_titles, item_content, exposures)
    if split == "auto":
        split = "leave-last-out" if interactions.timestamp is None else "time"
    minima = (min_user_interactions, min_item_interactions)
    if split == "time":
        parts = split_by_time(interactions, validation_fraction, test_fraction, minima)
    else:
        parts = split_last_out(interactions, minima, seed)
    _check_evaluable(interactions, parts, name, split)
    domain = _assemble(interactions, parts, name, split, provenance, item_titles, item_content, exposures)
    check_leakage(domain)
    return domain


def _check_arguments(
    interactions: Interactions,
    split: str,
    validation_fraction: float,
    test_fraction: float,
    item_titles: np.ndarray | None,
    item_content: np.ndarray | None,
    exposures: Interactions | None,
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
    for argument, rows in (("item_titles", item_titles), ("item_content", item_content)):
        if rows is not None and len(rows) != interactions.num_items:
            raise InvalidArgumentError(
                f"`{argument}` must have a row per item code ({interactions.num_items}), got {len(rows)}"
            )
    shape = (interactions.num_users, interactions.num_items)
    if exposures is not None and (exposures.num_users, exposures.num_items) != shape:
        raise InvalidArgumentError(
            f"`exposures` must share the code space of `interactions` ({shape[0]} users, {shape[1]} items), got "
            f"{exposures.num_users} users, {exposures.num_items} items; select() both from one table"
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
    item_content: np.ndarray | None,
    exposures: Interactions | None,
) -> Domain:
    """Compact the codes on the union of the parts, which are the codes of training since the others are warm."""
    rows = np.concatenate(parts)
    kept = interactions.select(rows).compact()
    item_of = np.zeros(kept.num_items, dtype=np.int64)
    item_of[kept.item] = interactions.item[rows]
    bounds = np.cumsum([0, *(len(part) for part in parts)])
    train, validation, test = (kept.select(np.arange(low, high)) for low, high in itertools.pairwise(bounds))
    if exposures is not None:
        exposures = _recode(exposures, interactions, rows, kept)
        exposures = exposures.select(_is_before(exposures, (validation, test), split))
    return Domain(
        name=name,
        train=train,
        validation=validation,
        test=test,
        split=split,
        provenance=dict(provenance or {}),
        item_titles=None if item_titles is None else np.asarray(item_titles, dtype=object)[item_of],
        item_content=None if item_content is None else np.asarray(item_content, dtype=np.float32)[item_of],
        exposures=exposures,
    )


def _recode(exposures: Interactions, interactions: Interactions, rows: np.ndarray, kept: Interactions) -> Interactions:
    """Put exposures into the codes of `kept`, without users and items that it lacks and pairs that it has."""
    code = {}
    for side in ("user", "item"):
        code[side] = np.full(getattr(interactions, f"num_{side}s"), -1, dtype=np.int32)
        code[side][getattr(interactions, side)[rows]] = getattr(kept, side)
    user, item = code["user"][exposures.user], code["item"][exposures.item]
    keep = (user >= 0) & (item >= 0)
    keep &= ~is_among(user.astype(np.int64) * kept.num_items + item, pair_codes(kept))
    time = None if exposures.timestamp is None else exposures.timestamp[keep]
    return dataclasses.replace(kept, user=user[keep], item=item[keep], timestamp=time, rating=None)


def _is_before(exposures: Interactions, evaluated: tuple[Interactions, ...], split: Split) -> np.ndarray:
    """Whether exposures are earlier than what is evaluated: anything under "time", else anything of the same user."""
    first = np.full(exposures.num_users, np.inf)
    for part in evaluated:
        if part.timestamp is not None:
            np.minimum.at(first, part.user, part.timestamp)
    if split == "time":
        first[:] = first.min()
    return first[exposures.user] > (-1.0 if exposures.timestamp is None else exposures.timestamp)


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
