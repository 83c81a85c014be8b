"""Trials of made-up benchmarks, whose outcomes are known because they are set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metalearn.trials import Measurement, Trial

FAMILIES = {"matrix_factorization": "2000x512", "self_attention": "1000x128"}


def make_trial(
    method: str,
    test: float | None,
    *,
    task: str = "movies/matrix_factorization/2000x512",
    replicate: int = 0,
    index: int = 0,
    seed: int = 0,
    selection: float | None = None,
    curve: Sequence[float] = (),
    cost: float = 10.0,
    schedule: str = "constant",
) -> Trial:
    """Return a completed trial; the curve's values lie evenly over the steps, `selection` is `test` unless given."""
    steps = int(task.rpartition("/")[2].partition("x")[0])
    configuration = {"method": method, "replicate": replicate, "index": index, "schedule": schedule}
    rows = [
        Measurement(steps * (place + 1) // len(curve), "validation_ndcg@10", float(value))
        for place, value in enumerate(curve)
    ]
    if test is not None:
        chosen_by = test if selection is None else selection
        rows += [Measurement(steps, "selection_ndcg@10", chosen_by), Measurement(steps, "test_ndcg@10", test)]
    return Trial(task=task, configuration=configuration, seed=seed).record(*rows).complete(cost=cost)


def make_store(
    levels: dict[str, float],
    *,
    domains: Sequence[str] = ("books", "games", "music", "shops", "films"),
    families: Sequence[str] = tuple(FAMILIES),
    seeds: int = 5,
    draws: int = 64,
    replicates: int = 5,
    noise: float = 0.01,
    seed: int = 0,
) -> list[Trial]:
    """Return what a whole benchmark records: a method's test score is its level with noise, times the domain's scale.

    A draw's level is at most 1, so that the best of 64 has about 1.
    """
    rng = np.random.default_rng(seed)
    quality = 1.0 - np.abs(rng.normal(0.0, 0.5, (replicates, draws)))
    trials = []
    for scale, domain in enumerate(domains, start=1):
        for family in families:
            task = f"{domain}/{family}/{FAMILIES[family]}"

            def add(method: str, level: float, task: str = task, scale: int = scale, **more) -> None:
                test, selection = 0.01 * scale * np.maximum(level + noise * rng.normal(size=2), 0.0)
                curve = selection * (1.0 - 0.5 ** np.arange(1, 21))
                trials.append(make_trial(method, float(test), task=task, selection=selection, curve=curve, **more))

            for method, level in levels.items():
                for run in range(seeds):
                    add(method, level, seed=run)
            for (replicate, index), level in np.ndenumerate(quality):
                schedule = ("constant", "cosine", "linear")[index % 3]
                add("sampled", level, replicate=replicate, index=index, seed=replicate, schedule=schedule)
    return trials
