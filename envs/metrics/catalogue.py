"""What ranked lists show of the catalogue: how much of it, how evenly, and how varied each list is.

Shape legend: E users, k places of a list, I items, C content dimensions.
"""

from __future__ import annotations

import math

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.profiles.meta_features.distribution import gini

_BATCH = 4096
"""Lists whose content vectors are gathered at once."""


def exposures(lists: np.ndarray, num_items: int) -> np.ndarray:
    """Count the lists that each item is in.

    Args:
        lists: int [E, k], item codes; -1 is an empty place.
        num_items: I.

    Returns:
        int64 [I].

    Raises:
        InvalidArgumentError: if a code is not below `num_items`.

    Example:
        >>> exposures(np.array([[0, 1], [1, -1]]), num_items=4).tolist()
        [1, 2, 0, 0]
    """
    shown = np.asarray(lists)
    if shown.size and shown.max() >= num_items:
        raise InvalidArgumentError(
            f"`lists` holds item code {shown.max()}, but `num_items` is {num_items}; pass the size of the catalogue"
        )
    return np.bincount(shown[shown >= 0], minlength=num_items)


def catalogue_coverage(counts: np.ndarray) -> float:
    """Share of the items that are in at least one list.

    Args:
        counts: int [I], `exposures` of the catalogue, or of a part of it.

    Example:
        >>> catalogue_coverage(np.array([1, 2, 0, 0]))
        0.5
    """
    return float(np.mean(counts > 0))


def exposure_gini(counts: np.ndarray) -> float:
    """Gini coefficient of exposures x, ascending: 2 sum i x_i / (I sum x) - (I + 1) / I with i from 1.

    0 if all items are in equally many lists, 1 - 1 / I if one item has all places, NaN if no item is in any.

    Args:
        counts: int [I], `exposures` of the catalogue, or of a part of it.

    Example:
        >>> exposure_gini(np.array([2, 0, 2, 0]))  # 2 (3 * 2 + 4 * 2) / (4 * 4) - 5 / 4
        0.5
    """
    return gini(np.sort(counts)) if counts.any() else math.nan


def intra_list_diversity(lists: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Mean of 1 - cosine over the pairs of items in each list.

    Items without content, which have a vector of zeros, are left out.

    Args:
        lists: int [E, k], item codes; -1 is an empty place.
        content: [I, C], a vector of what each item is.

    Returns:
        float64 [E] in [0, 2]; NaN for a list with fewer than 2 items that have content.

    Example:
        >>> content = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> intra_list_diversity(np.array([[0, 1], [0, 2]]), content).tolist()
        [0.0, 1.0]

    Source: Ziegler et al. (2005), Improving recommendation lists through topic diversification, WWW.
    """
    vectors = np.asarray(content, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    described = np.append(norms[:, 0] > 0, False)  # code -1 finds the last
    diversity = np.full(len(lists), np.nan)
    for low in range(0, len(lists), _BATCH):
        places = np.asarray(lists[low : low + _BATCH])
        valid = described[places]
        size = valid.sum(axis=1)
        total = np.where(valid[..., None], unit[places], 0.0).sum(axis=1)
        # The square of a sum of unit vectors is their number and, for each pair, twice its cosine.
        pairs = size * (size - 1)
        cosines = np.sum(total**2, axis=1) - size
        diversity[low : low + _BATCH] = np.where(pairs > 0, 1.0 - cosines / np.maximum(pairs, 1), np.nan)
    return diversity
