"""Hygiene of data: what in a domain would make a result wrong, or would make it look better than it is.

Checks duplicates, impossible times, label leakage, metadata that disagrees with the data, and drift between splits.
Nothing is changed: the report says what was found and what to do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from envs.domains import Domain
from envs.splits import is_among, pair_codes
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

if TYPE_CHECKING:
    from envs.public.sources import PublicSource

EARLIEST = 788_918_400.0
"""1995-01-01 in seconds: there is hardly a log of recommendations before."""
SEVERE_SHARE = 0.1
"""Share of rows from which a finding about rows is severe."""
ID_ORDER = (0.8, 0.95)
"""Rank correlation of ids with time, rating or popularity that is noted, and that is severe."""
DRIFT = (0.1, 0.5)
"""Excess of the drift over that of a random split that is noted, and that is severe."""

Severity = Literal["severe", "notice"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """State one thing that was found.

    Args:
        name: which check.
        severity: "severe" if results on this domain are doubtful until it is resolved, else "notice".
        count: rows, pairs or ids concerned.
        detail: what was found.
        remedy: what to do.
    """

    name: str
    severity: Severity
    count: int
    detail: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}: {self.detail}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class HygieneReport:
    """Hold what `check_hygiene` found on one domain, severe findings first.

    Args:
        domain: name of the domain.
        findings: what was found; empty if nothing was.
    """

    domain: str
    findings: tuple[Finding, ...] = ()

    @property
    def severe(self) -> tuple[Finding, ...]:
        """The findings that make results doubtful."""
        return tuple(finding for finding in self.findings if finding.severity == "severe")

    def __str__(self) -> str:
        if not self.findings:
            return f"{self.domain}: no findings"
        return "\n".join([f"{self.domain}: {len(self.findings)} findings", *(f"  {line}" for line in self.findings)])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HygieneReport:
        """Read what `to_dict` returned."""
        return cls(domain=values["domain"], findings=tuple(Finding(**finding) for finding in values["findings"]))


def check_hygiene(
    interactions: Interactions, domain: Domain, source: PublicSource, *, now: float | None = None
) -> HygieneReport:
    """Look for what is wrong with a domain and with the data it was made from.

    Args:
        interactions: all rows as loaded, before anything was dropped.
        domain: what was made from them.
        source: how they were described: what times mean, how many rows there should be.
        now: seconds since 1970; later times are impossible. The clock by default.

    Returns:
        The report.

    Example:
        >>> from envs.public import BUNDLED
        >>> report = check_hygiene(BUNDLED.rows(), BUNDLED.domain(), BUNDLED)
        >>> len(report.severe), [finding.name for finding in report.findings]
        (0, ['repeated pairs', 'drift'])
    """
    if len(interactions) == 0:
        raise InvalidArgumentError("`interactions` is empty; pass the rows that the domain was made from")
    findings = [
        *_duplicates(interactions),
        *_metadata(interactions, source),
        *_id_order(interactions, source),
        *_labels(interactions, domain),
        *_drift(interactions, domain),
    ]
    if source.timestamps == "real" and interactions.timestamp is not None:
        findings += _times(interactions.timestamp, time.time() if now is None else now)
    findings.sort(key=lambda finding: finding.severity != "severe")
    return HygieneReport(domain=domain.name, findings=tuple(findings))


def _duplicates(interactions: Interactions) -> Iterator[Finding]:
    columns = [interactions.timestamp, interactions.rating]
    keys = [np.nan_to_num(column, nan=-1.0) for column in columns if column is not None]
    pairs = pair_codes(interactions)
    order = np.lexsort((*keys, pairs))
    same_pair = np.diff(pairs[order]) == 0
    same_row = same_pair.copy()
    for key in keys:
        same_row &= np.diff(key[order]) == 0
    exact, again = int(same_row.sum()), int(same_pair.sum() - same_row.sum())
    if exact:
        share = exact / len(interactions)
        yield Finding(
            name="exact duplicates",
            severity="severe" if share >= SEVERE_SHARE else "notice",
            count=exact,
            detail=f"{exact} rows ({share:.1%}) repeat another in every column",
            remedy="each pair counts once here; find out why the source writes rows twice before counting repeats",
        )
    if again:
        yield Finding(
            name="repeated pairs",
            severity="notice",
            count=again,
            detail=f"{again} rows ({again / len(interactions):.1%}) repeat a pair with another time or rating",
            remedy="each pair counts once, at its first occurrence; nothing to do unless repeats are to be predicted",
        )


def _times(times: np.ndarray, now: float) -> Iterator[Finding]:
    future, early = int((times > now).sum()), int((times < EARLIEST).sum())
    if future:
        yield Finding(
            name="future times",
            severity="severe",
            count=future,
            detail=f"{future} rows lie in the future, the latest at {times.max():.0f} s",
            remedy="are they milliseconds? say so with `time_unit`; else drop these rows",
        )
    if early:
        yield Finding(
            name="early times",
            severity="severe",
            count=early,
            detail=f"{early} rows lie before 1995, the earliest at {times.min():.0f} s",
            remedy="if they merely order rows, say 'order only' in the manifest; else drop these rows",
        )
    values, counts = np.unique(times, return_counts=True)
    share = counts.max() / len(times)
    midnight = float((times % 86_400 == 0).mean())
    if midnight > 0.9:
        yield Finding(
            name="days only",
            severity="notice",
            count=round(midnight * len(times)),
            detail=f"{midnight:.0%} of the times are midnight",
            remedy="the order within a day is unknown: prefer the time split to leave-last-out",
        )
    elif share > 0.01:
        yield Finding(
            name="one second",
            severity="severe" if share >= SEVERE_SHARE else "notice",
            count=int(counts.max()),
            detail=f"{share:.1%} of the rows have the time {values[counts.argmax()]:.0f} s",
            remedy="an import or a default value: drop these rows, or do not split by time",
        )


def _metadata(interactions: Interactions, source: PublicSource) -> Iterator[Finding]:
    found = {"users": interactions.num_users, "items": interactions.num_items, "interactions": len(interactions)}
    for name, stated in source.counts.items():
        if found[name] != stated:
            yield Finding(
                name="counts disagree",
                severity="severe" if abs(found[name] - stated) > 0.01 * stated else "notice",
                count=abs(found[name] - stated),
                detail=f"{found[name]} {name}, but {stated} are stated",
                remedy="the file is cut, filtered or another version: compare it with its source",
            )
    if source.timestamps == "real" and interactions.timestamp is None:
        yield Finding(
            name="no times",
            severity="notice",
            count=len(interactions),
            detail="times are taken as real, but there are none, or all are equal",
            remedy="nothing can be split by time; say 'none' in the manifest",
        )


def _id_order(interactions: Interactions, source: PublicSource) -> Iterator[Finding]:
    """Find ids that follow time, rating or popularity: they tell it to whatever takes ids as numbers."""
    for side in ("user", "item"):
        codes, size = getattr(interactions, side), getattr(interactions, f"num_{side}s")
        if size < 20:
            continue
        counts = np.bincount(codes, minlength=size)
        known = {"popularity" if side == "item" else "activity": counts.astype(np.float64)}
        if interactions.timestamp is not None and source.timestamps == "real":
            known["time"] = _mean_by(codes, interactions.timestamp, counts)
        if interactions.rating is not None and np.isfinite(interactions.rating).all():
            known["rating"] = _mean_by(codes, interactions.rating, counts)
        for what, values in known.items():
            correlation = _rank_correlation(values)
            if abs(correlation) >= ID_ORDER[0]:
                yield Finding(
                    name=f"{side} ids follow {what}",
                    severity="severe" if what != "time" and abs(correlation) >= ID_ORDER[1] else "notice",
                    count=size,
                    detail=f"rank correlation {correlation:.2f} of {side} ids with {what}, counted on all rows",
                    remedy=f"never use {side} ids as numbers, and never break ties by them",
                )


def _mean_by(codes: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.bincount(codes, weights=values, minlength=len(counts)) / np.maximum(counts, 1)


def _rank_correlation(values: np.ndarray) -> float:
    """Spearman's correlation of values with their position, ties at their mean rank; 0 where all are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return 0.0 if len(counts) == 1 else float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def _labels(interactions: Interactions, domain: Domain) -> Iterator[Finding]:
    known = pair_codes(domain.train)
    for name, part in (("validation", domain.validation), ("test", domain.test)):
        leaked = int(is_among(pair_codes(part), known).sum())
        if leaked:
            yield Finding(
                name="evaluated pairs in training",
                severity="severe",
                count=leaked,
                detail=f"{leaked} of {len(part)} {name} pairs are in training",
                remedy="split again with make_domain, which drops them",
            )
    ratings = interactions.rating
    if ratings is not None and np.unique(ratings).size == 1:
        yield Finding(
            name="one rating",
            severity="notice",
            count=len(interactions),
            detail=f"every row has the rating {ratings[0]:g}",
            remedy="rows were chosen by their label, or it says nothing: do not use it as a feature",
        )
    before, after = domain.train.rating, domain.test.rating
    if before is not None and after is not None and len(before) and len(after):
        before, after = (np.nan_to_num(part, nan=-1.0) for part in (before, after))
        if not np.isin(after, before).any():
            yield Finding(
                name="rating tells the part",
                severity="severe",
                count=len(after),
                detail="no rating of the test part occurs in training",
                remedy="the column was written by the split or changed its meaning: drop it",
            )


def _drift(interactions: Interactions, domain: Domain) -> Iterator[Finding]:
    """Compare test with training, each against a random split of the same rows into parts of the same sizes."""
    rng = np.random.default_rng(0)
    train, test = (np.bincount(part.item, minlength=domain.num_items) for part in (domain.train, domain.test))
    if train.sum() and test.sum():
        pooled = train + test
        draws = rng.multivariate_hypergeometric(pooled, int(test.sum()), size=10, method="marginals")
        expected = float(np.mean([_total_variation(pooled - draw, draw) for draw in draws]))
        excess = _total_variation(train, test) - expected
        if excess > DRIFT[0]:
            yield Finding(
                name="drift",
                severity="severe" if excess > DRIFT[1] else "notice",
                count=int(test.sum()),
                detail=f"total variation of item popularity between training and test is {excess + expected:.2f}, "
                f"{expected:.2f} if split at random",
                remedy="popularity has moved: report the popularity baseline, and a later validation period",
            )
    if domain.split == "time" and interactions.timestamp is not None and len(domain.validation) and len(domain.test):
        times = interactions.timestamp
        assert domain.validation.timestamp is not None and domain.test.timestamp is not None
        is_train, is_test = times < domain.validation.timestamp.min(), times >= domain.test.timestamp.min()
        share = _unseen(interactions.item, is_train, is_test)
        order = rng.permutation(len(times))
        expected = _unseen(interactions.item[order], is_train, is_test)
        if share - expected > DRIFT[0]:
            yield Finding(
                name="new items",
                severity="severe" if share - expected > DRIFT[1] else "notice",
                count=round(share * int(is_test.sum())),
                detail=f"{share:.0%} of the rows in the test period are of items that training has not seen, "
                f"{expected:.0%} if split at random",
                remedy="they are not evaluated: scores speak of known items only",
            )


def _total_variation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first / first.sum() - second / second.sum()).sum() / 2)


def _unseen(item: np.ndarray, is_train: np.ndarray, is_test: np.ndarray) -> float:
    return 1.0 - float(is_among(item[is_test], item[is_train]).mean())
