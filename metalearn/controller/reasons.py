"""Why a decision was taken, in short: what changed, what validation did, what moved the learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from metalearn.controller.config import GROUP_CONTROLLED
from metalearn.controller.setting import Moment, Setting
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES

Values = tuple[tuple[Mapping[str, float], ...], Mapping[str, float]]
"""Of each parameter group, and of the run."""


def influences(setting: Setting, moment: Moment, count: int = 2) -> tuple[str, ...]:
    """Names the features that moved the learning rate most, each set to its median in turn (occlusion).

    Of models that go by cues, what these move counts, be it the learning rate or not.
    """
    if moment.trust == 0.0 or not np.isfinite(moment.group_action).all():
        return ()
    group, run = moment.group, moment.run
    columns, run_columns = np.flatnonzero(group.any(0)), np.flatnonzero(run)
    split, count_all = len(columns), len(columns) + len(run_columns)
    groups, runs = np.repeat(group[None], count_all, 0), np.repeat(run[None], count_all, 0)
    groups[np.arange(split), :, columns] = 0.0
    runs[np.arange(split, count_all), run_columns] = 0.0
    occluded, _, _ = setting.network.act(moment.hidden, groups, runs, setting.context)
    if np.shape(occluded) != (count_all, *moment.group_action.shape):  # no policy of ours: it shall not stop the run
        return ()
    names = [GROUP_FEATURES[i] for i in columns] + [GLOBAL_FEATURES[i] for i in run_columns]
    effect = {}
    for hyperparameter in [cue.hyperparameter for cue in setting.cues] or ["learning_rate"]:
        index = GROUP_CONTROLLED.index(hyperparameter)
        if setting.bound[0][:, index].any():
            moved = (np.tanh(moment.group_action[:, index]) - np.tanh(occluded[..., index])).mean(1).tolist()
            effect |= {(name, hyperparameter.replace("_", " ")): by for name, by in zip(names, moved, strict=True)}
    top = [key for key in sorted(effect, key=lambda key: -abs(effect[key]))[:count] if abs(effect[key]) >= 0.005]
    return tuple(f"{key[0]} moved the {key[1]}'s step by {effect[key]:+.2f} of the largest" for key in top)


def situation(run: np.ndarray, since_best: int) -> tuple[str, ...]:
    """States what validation did.

    Args:
      run: [F] run features, unscaled.
      since_best: decisions since the best validation.
    """
    named = dict(zip(GLOBAL_FEATURES, run.tolist(), strict=True))
    if named["validation_missing"] > 0:
        return ("validation: not reported for this interval",)
    if since_best == 0:
        return ("validation: best so far",)
    below, plural = -100 * named["validation_below_best"], "s" * (since_best > 1)
    return (f"validation: {below:.1f} % below the best, of {since_best} decision{plural} ago",)


def changes(before: Values, after: Values) -> tuple[str, ...]:
    """Says what changed from one configuration to another, in words."""
    sentences = []
    rows = [(f" of group {g}", old, new) for g, (old, new) in enumerate(zip(before[0], after[0], strict=True))]
    for suffix, old, new in (*rows, ("", before[1], after[1])):
        for name, value in new.items():
            if abs(value - old[name]) > 1e-3 * max(abs(old[name]), 1e-3):
                sentences.append(f"{name}{suffix}: {old[name]:.4g} -> {value:.4g}")
    return tuple(sentences) or ("no change",)
