"""Co-occurrence: how much structure beyond popularity there is, seen on a small dense block of the domain.

The block holds the most popular items and a seeded sample of the users who have at least two of them.
Shapes: U users of the block, I items of the block.
"""

from __future__ import annotations

import math

import numpy as np

from metalearn.profiles.canonical import CanonicalTable

NAMES = (
    "spectral_gap",
    "spectral_effective_rank",
    "spectral_energy_1",
    "spectral_energy_8",
    "spectral_energy_32",
    "item_cosine",
    "user_cosine",
)

BLOCK_ITEMS = 256
BLOCK_USERS = 1024
_SMALLEST = 4


def dense_block(table: CanonicalTable, *, seed: int) -> np.ndarray:
    """Return the block as a float64 0/1 matrix [U, I]; every row has two ones or more, every column one or more."""
    items = np.argsort(-table.item_counts, kind="stable")[:BLOCK_ITEMS]
    column_of = np.full(table.num_items, -1, dtype=np.int64)
    column_of[items] = np.arange(len(items))
    columns = column_of[table.item]
    inside = (columns >= 0) & table.first_of_pair
    users, columns = table.user[inside], columns[inside]
    eligible = np.flatnonzero(np.bincount(users, minlength=table.num_users) >= 2)
    if len(eligible) > BLOCK_USERS:
        eligible = np.sort(np.random.default_rng([seed, 0]).choice(eligible, BLOCK_USERS, replace=False))
    row_of = np.full(table.num_users, -1, dtype=np.int64)
    row_of[eligible] = np.arange(len(eligible))
    rows = row_of[users]
    block = np.zeros((len(eligible), len(items)))
    block[rows[rows >= 0], columns[rows >= 0]] = 1.0
    return block[:, block.any(axis=0)]


def degree_normalised(block: np.ndarray) -> np.ndarray:
    """Return D_u^(-1/2) R D_i^(-1/2) of a 0/1 matrix R; its largest singular value is 1. Empty rows stay zero."""
    users, items = block.sum(axis=1, keepdims=True), block.sum(axis=0, keepdims=True)
    return block / np.sqrt(np.maximum(users, 1.0)) / np.sqrt(np.maximum(items, 1.0))


def co_occurrence_features(block: np.ndarray) -> dict[str, float]:
    """Compute the co-occurrence family of a block [U, I]; all NaN if the block has fewer than 4 users or items."""
    if min(block.shape) < _SMALLEST:
        return dict.fromkeys(NAMES, math.nan)
    values = (*spectrum_features(block), mean_cosine(block.T), mean_cosine(block))
    return dict(zip(NAMES, values, strict=True))


def spectrum_features(block: np.ndarray) -> tuple[float, ...]:
    """Compute gap, effective rank and shares of energy of the degree-normalised singular values s_1 >= s_2 >= ...

    s_1 belongs to popularity. Gap: 1 - s_2 / s_1. Energy of k: (s_2² + ... + s_(k+1)²) / (s_2² + ...). Effective rank:
    the exponential of the entropy of these shares, over their number (Roy and Vetterli 2007). NaN if there is nothing
    beyond popularity.
    """
    normalised = degree_normalised(block)
    gram = normalised.T @ normalised if block.shape[0] >= block.shape[1] else normalised @ normalised.T
    energies = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    gap = 1.0 - math.sqrt(energies[1] / energies[0])
    beyond = energies[1:]
    total = float(beyond.sum())
    if total < 1e-9:
        return gap, math.nan, math.nan, math.nan, math.nan
    shares = beyond / total
    positive = shares[shares > 0]
    effective_rank = math.exp(-float(np.dot(positive, np.log(positive)))) / len(beyond)
    return gap, effective_rank, *(float(shares[:top].sum()) for top in (1, 8, 32))


def mean_cosine(rows: np.ndarray) -> float:
    """Mean cosine of two different rows, through the square of the sum of unit rows: (‖Σ r̂‖² - n) / (n (n - 1))."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    size = len(rows)
    return float((np.sum(unit.sum(axis=0) ** 2) - size) / (size * (size - 1)))
