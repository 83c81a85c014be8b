"""How a budget of false alarms is shared: among features within one look, and over looks without end."""

from __future__ import annotations

import numpy as np


def level_of_look(false_alarms_per_1000: float) -> float:
    """Returns the level at which each look may test.

    Alpha-spending at a constant rate (Lan & DeMets, "Discrete sequential boundaries for clinical trials", Biometrika
    70, 1983, with a spending function linear in looks): by linearity of expectation, looks at level rate / 1000 raise
    at most `rate` false alarms per 1000 of them, however much they depend on each other, as overlapping windows do.

    LORD (Javanmard & Montanari, "Online rules for control of false discovery rate and false discovery exceedance",
    Annals of Statistics 46, 2018) is not used. It controls the share of false ones among discoveries, and needs
    independent p-values; while there is nothing to discover, which is what a healthy service looks like, its level
    falls like 1 / (t log² t): at the 1000th look it would be hundreds of times below this one. A rate of alarms per
    time that does not wane is also what CUSUMs have, so that streams and windows share one budget.

    >>> level_of_look(1.0)
    0.001
    """
    return false_alarms_per_1000 / 1000.0


def benjamini_hochberg(p_values: np.ndarray, level: float) -> np.ndarray:
    """Returns bool [F], which hypotheses to reject at a false discovery rate.

    Rejects those with the k smallest p-values, k the largest with p₍ₖ₎ ≤ level · k / F. If all are true nulls, any is
    rejected with probability at most `level`: one look raises a false alarm no more often than its level says. Holds
    for independent p-values (Benjamini & Hochberg, "Controlling the false discovery rate", JRSS B 57, 1995) and for
    positively dependent ones (Benjamini & Yekutieli, Annals of Statistics 29, 2001).

    Args:
      p_values: [F]; NaN (not tested) is not rejected, and does not count.
      level: in (0, 1).

    >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5]), 0.05).tolist()
    [True, False, False, False]
    """
    tested = np.isfinite(p_values)
    ranked = np.sort(p_values[tested])
    passing = np.flatnonzero(ranked <= level * np.arange(1, len(ranked) + 1) / max(len(ranked), 1))
    if not passing.size:
        return np.zeros(len(p_values), bool)
    return tested & (np.where(tested, p_values, np.inf) <= ranked[passing[-1]])
