"""How well simulated domains surround real ones, in the space of their meta-features.

Shape legend: S simulated domains, R real ones, M meta-features. Undefined meta-features are NaN.
"""

from __future__ import annotations

import numpy as np

from metalearn.errors import InvalidArgumentError

_CLIP = 4.0
_FOLDS = 5


def robust_scale(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Scale by percentiles of a reference so that outliers do not rule: 2.56 (x - median) / (q90 - q10), within ±4.

    A meta-feature that is constant in the reference (or undefined throughout) is scaled to 0 where it is the same.

    Args:
        values: [N, M].
        reference: [S, M].

    Example:
        >>> robust_scale(np.array([[5.0], [np.nan]]), np.arange(11.0)[:, None]).tolist()
        [[0.0], [nan]]
    """
    defined = np.isfinite(reference).any(axis=0)
    low, middle, high = np.nanquantile(np.where(defined, reference, 0.0), [0.1, 0.5, 0.9], axis=0)
    return np.clip(2.56 * (values - middle) / np.maximum(high - low, 1e-3), -_CLIP, _CLIP)


def range_coverage(real: np.ndarray, simulated: np.ndarray) -> np.ndarray:
    """Share of real domains within the simulated 2.5-97.5 % range, by meta-feature; [M], NaN where undefined."""
    coverage = np.full(real.shape[1], np.nan)
    for index in range(real.shape[1]):
        mine, cloud = (values[:, index][np.isfinite(values[:, index])] for values in (real, simulated))
        if len(mine):
            low, high = np.quantile(cloud, [0.025, 0.975]) if len(cloud) else (np.nan, np.nan)
            coverage[index] = np.mean((mine >= low) & (mine <= high))
    return coverage


def cloud_distances(queries: np.ndarray, cloud: np.ndarray, *, neighbours: int = 5, own: bool = False) -> np.ndarray:
    """Distance of each query to the cloud: the mean over its nearest neighbours of the RMS difference, [N].

    A neighbour must define every meta-feature that the query defines, and only those count.

    Args:
        queries: scaled, [N, M].
        cloud: scaled, [S, M].
        neighbours: how many.
        own: the queries are the cloud itself: leave each one out.

    Returns:
        Distances; infinite where fewer than `neighbours` define what the query does.

    Example:
        >>> cloud_distances(np.array([[0.0, np.nan]]), np.array([[1.0, 9.0], [3.0, 9.0]]), neighbours=2).tolist()
        [2.0]
    """
    distances = pairwise_distances(queries, cloud)
    if own:
        np.fill_diagonal(distances, np.inf)
    if len(cloud) < neighbours:
        return np.full(len(queries), np.inf)
    return np.sort(distances, axis=1)[:, :neighbours].mean(axis=1)


def pairwise_distances(queries: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """RMS difference over the meta-features that the query defines, [N, S]; infinite where the other lacks one."""
    defined, known = np.isfinite(queries), np.isfinite(cloud)
    first, second = np.where(defined, queries, 0.0), np.where(known, cloud, 0.0)
    square = (first**2).sum(axis=1)[:, None] - 2.0 * first @ second.T + defined.astype(float) @ (second**2).T
    lacking = defined.astype(float) @ (~known).astype(float).T
    root = np.sqrt(np.maximum(square, 0.0) / np.maximum(defined.sum(axis=1)[:, None], 1))
    return np.where(lacking > 0, np.inf, root)


def two_sample_auc(
    real: np.ndarray, simulated: np.ndarray, groups: np.ndarray, *, penalty: float = 1.0, rng: np.random.Generator
) -> float:
    """Cross-validated AUC of a logistic regression that tells real from simulated: 0.5 cannot, 1 always can.

    Both samples weigh the same. Views of one real domain are in one fold, so that no domain is recognised.
    (Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", ICLR 2017.)

    Args:
        real: scaled, [R, M]; undefined counts as 0, the median.
        simulated: scaled, [S, M].
        groups: [R], the domain of each real view; at least two domains.
        penalty: of the squared weights.
        rng: generator, of the folds.

    Raises:
        InvalidArgumentError: if there is one domain only.
    """
    features = np.nan_to_num(np.concatenate([real, simulated]))
    label = np.arange(len(features)) < len(real)
    domains, group = np.unique(groups, return_inverse=True)
    if len(domains) < 2:
        raise InvalidArgumentError(f"`groups` must name at least 2 domains to hold one out, got {len(domains)}")
    folds = min(_FOLDS, len(domains))
    fold_of_domain = rng.permutation(len(domains)) % folds
    fold = np.concatenate([fold_of_domain[group], rng.permutation(len(simulated)) % folds])
    aucs = []
    # Scores of different folds do not compare, so each fold has an AUC of its own.
    for index in range(folds):
        held_out = fold == index
        weights = _fit_logistic(features[~held_out], label[~held_out], penalty)
        score = features[held_out] @ weights[:-1]
        aucs.append(_auc(score[label[held_out]], score[~label[held_out]]))
    return float(np.mean(aucs))


def rank_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of one table with the same row of another, ties by their mean rank; [N].

    0 where a row is constant.

    Example:
        >>> rank_correlations(np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, 6.0, 70.0]])).tolist()
        [1.0]
    """
    ranks = []
    for table in (first, second):
        below = (table[:, :, None] > table[:, None, :]).sum(axis=2)
        same = (table[:, :, None] == table[:, None, :]).sum(axis=2)
        rank = below + 0.5 * (same - 1)
        ranks.append(rank - rank.mean(axis=1, keepdims=True))
    scale = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    return (ranks[0] * ranks[1]).sum(axis=1) / np.maximum(scale, 1e-12)


def _fit_logistic(features: np.ndarray, label: np.ndarray, penalty: float) -> np.ndarray:
    """Weights and intercept by Newton's method, [M + 1]; each class weighs as much as half of the rows."""
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    weight = np.where(label, 0.5 / label.sum(), 0.5 / (~label).sum()) * len(label)
    ridge = penalty * np.append(np.ones(features.shape[1]), 0.0)
    weights = np.zeros(design.shape[1])
    for _ in range(30):
        chance = 1.0 / (1.0 + np.exp(-np.clip(design @ weights, -30.0, 30.0)))
        gradient = design.T @ (weight * (chance - label)) + ridge * weights
        curvature = (design * (weight * chance * (1.0 - chance))[:, None]).T @ design + np.diag(ridge + 1e-6)
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-6:
            break
    return weights


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties half."""
    return float(np.mean((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)))
