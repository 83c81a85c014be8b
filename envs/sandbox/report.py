"""What the arms of many episodes lost, by incident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs.sandbox.incidents import CATALOGUE
from envs.sandbox.judgement import bound, false_positive_rate, systematically_worse

RATE = 0.001
"""Rate at which a run falls below the bound by chance: of a thousand runs of the fallback itself one does."""
REPEAT_RATE = 0.05
"""Rate at which repeats that are as good as the fallback confirm by chance that a run below the bound is worse."""
FURTHER_RATES = (0.01, 0.05)
"""At which runs are judged as well, to show what the verdict's wide bound may hide."""
ARMS = ("guarded", "unguarded")

Record = Mapping[str, Any]
"""An episode as stored: incident, variant, cell, the fallback's group, and an outcome for each arm."""


def below_bound(outcome: Mapping[str, Any], fallback: Sequence[float]) -> bool:
    """Says whether a run ended below the bound that one in a thousand runs of the fallback would end below.

    Args:
      outcome: of an arm.
      fallback: final metrics of the fallback's seeds.
    """
    return outcome["metric"] is not None and outcome["metric"] < bound(fallback, rate=RATE).low


def worse_than_fallback(outcome: Mapping[str, Any], fallback: Sequence[float]) -> bool:
    """Says whether a run ended below the bound, and not by chance.

    By chance it was if its weights are finite, and its repeats with other seeds all ended, and on average not below
    the fallback's.

    Args:
      outcome: of an arm, with the metrics of its repeats (None if one was lost) where it is below the bound.
      fallback: final metrics of the fallback's seeds.
    """
    if not below_bound(outcome, fallback):
        return False
    repeats: Sequence[float | None] = outcome.get("repeats", ())
    ended = [metric for metric in repeats if metric is not None]
    may_be_chance = outcome["finite"] and ended and len(ended) == len(repeats)
    return not may_be_chance or systematically_worse(ended, fallback, rate=REPEAT_RATE)


def summarize(records: Sequence[Record], fallbacks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Counts, over all and by incident, what each arm lost.

    Args:
      records: of episodes.
      fallbacks: group to the final metrics of the fallback's seeds.
    """
    names = [name for name in CATALOGUE if any(record["incident"] == name for record in records)]
    rows = {name: _row([r for r in records if r["incident"] == name], fallbacks) for name in names}
    groups = [metrics for metrics in fallbacks.values() if len(metrics) > 3]
    rates = (RATE, *FURTHER_RATES)
    deviations = [float(np.std(group, ddof=1) / np.mean(group)) for group in groups]
    return {
        "all": _row(records, fallbacks),
        "incidents": rows,
        "rule": {
            "rate": RATE,
            "fallback_groups": len(groups),
            "fallback_runs": sum(map(len, groups)),
            "relative_deviation_of_seeds": float(np.median(deviations)) if deviations else None,
            "false_positive_rate": {f"{rate:g}": false_positive_rate(groups, rate=rate) for rate in rates},
        },
    }


def _row(records: Sequence[Record], fallbacks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"episodes": len(records)}
    for arm in ARMS:
        ended = [(r[arm], fallbacks[r["fallback"]]) for r in records if r[arm]["metric"] is not None]
        ratios = [outcome["metric"] / float(np.mean(metrics)) for outcome, metrics in ended]
        cells: dict[str, Any] = {
            f"below_at_{rate:g}": sum(o["metric"] < bound(metrics, rate=rate).low for o, metrics in ended)
            for rate in FURTHER_RATES
        }
        cells |= {
            "below_bound": sum(below_bound(o, metrics) for o, metrics in ended),
            "worse_than_fallback": sum(worse_than_fallback(o, metrics) for o, metrics in ended),
            "ended": len(ended),
            "nonfinite": sum(not r[arm]["finite"] for r in records),
            "lost": sum(r[arm]["lost"] for r in records),
            "raised": sum(r[arm]["error"] is not None for r in records),
            "rolled_back": sum(r[arm]["rollbacks"] > 0 for r in records),
            "fallen_back": sum(r[arm]["fallen_back"] for r in records),
            "mean_ratio": float(np.mean(ratios)) if ratios else None,
            "least_ratio": float(np.min(ratios)) if ratios else None,
        }
        row |= {name if arm == "guarded" else f"unguarded_{name}": value for name, value in cells.items()}
    return row


def table(summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Returns the report in Markdown."""
    rule = summary["rule"]
    measured = ", ".join(f"{share:.4f} at {rate}" for rate, share in rule["false_positive_rate"].items())
    deviation = rule["relative_deviation_of_seeds"] or 0.0
    rows = [*summary["incidents"].items(), ("**all**", summary["all"])]
    lines = [
        "# Sandbox",
        "",
        *(f"- {name}: {value}" for name, value in provenance.items()),
        f"- fallback: {rule['fallback_runs']} runs in {rule['fallback_groups']} groups; deviation over seeds "
        f"{100 * deviation:.1f} % of the metric in the middle group",
        f"- share of fallback runs below the bound, each judged by the other seeds: {measured}",
        "",
        "Each cell: guarded / unguarded. Below: of the runs that ended, those whose test metric lies below the bound "
        f"under which one in {1 / rule['rate']:.0f} runs of the fallback would lie; at 5 %: one in 20. Worse: of those "
        "below, those that are not finite, or whose repeats with other seeds lie below the fallback on average. Ratio: "
        "mean of the metric over the fallback's mean, and the least.",
        "",
        "| incident | episodes | worse | below | below at 5 % | non-finite | lost | rolled back | fallen back "
        "| mean ratio | least ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    columns = ("worse_than_fallback", "below_bound", "below_at_0.05", "nonfinite", "lost", "rolled_back", "fallen_back")
    for name, row in rows:
        pairs = [f"{row[column]} / {row[f'unguarded_{column}']}" for column in columns]
        pairs += [
            " / ".join("-" if value is None else f"{value:.3f}" for value in (row[column], row[f"unguarded_{column}"]))
            for column in ("mean_ratio", "least_ratio")
        ]
        lines.append(f"| {name} | {row['episodes']} | " + " | ".join(pairs) + " |")
    lines += ["", "What the incidents are:", ""]
    lines += [f"- {name}: {CATALOGUE[name].what}" for name in summary["incidents"]]
    return "\n".join(lines) + "\n"
