"""Measures drift detection: false alarms on undrifted learning curves, delay on drifted ones, and which kind was told.

    python scripts/bench_drift.py --output docs/results/drift   # a quarter of an hour on one core
    python scripts/bench_drift.py --quick                       # under a minute, few curves

Learning curves are simulated, 600 points each: of several shapes, with noise of 0.5 to 8 % of what is learnt, of which
neighbours are correlated, that may shrink to a quarter and may have heavy tails. The detector's settings were chosen on
the tuning shapes and seeds; figures are of others. (Seeds from 500 000 were looked at as well, while the rule by which
ADWIN is compared and the confirmation of kinds were settled; so the reported ones begin at 900 000.) An alarm either
way counts as false on an undrifted curve.

A drifted curve falls, after point 100, by 2, 3 or 5 standard deviations of its noise at once, or by 6 over 100 points.
Delay is the number of points from the first after the change to the alarm, missed if more than 150; a missed one counts
as infinite in the median. ADWIN (river) is given each curve raw, raw in units of its true noise, detrended and scaled
by the detector's own front end, and whitened by it too; it looks at every point, not at every 32nd, and any alarm of
it counts, only those downward of ours. Of these inputs and a range of deltas, the one is taken that has the smallest
median delay *on the reported curves* at the detector's rate of false alarms: at most the upper end of the interval of
that. Both are also compared at their best with at most 1 false alarm per 1000, each chosen in hindsight.

Kinds are told apart on the same curves with abrupt, gradual and seasonal changes, and on simulated domains: windows of
interactions whose popularity and noise change, each profiled. Alarms on recorded validation curves (`--curves`, the
benchmark's trials by default) are reported apart: some of those runs did overfit.

The last line is JSON. Targets: `false_alarms_per_1000` at most 1, `median_delay` below `adwin_median_delay`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from metalearn.safety.drift import DetectorConfig, ProfileWatchConfig, ProfileWatchState, init, profile_row, update
from metalearn.safety.drift.baseline import Baseline, follow, predict
from metalearn.safety.drift.profile_watch import watch_profile
from provenance import provenance

LENGTH, LATEST, WINDOWS = 600, 150, 70
ROOT = Path(__file__).resolve().parent.parent
RATES = (0.3, 1.0, 2.0, 4.0)
DELTAS = (2e-3, 2e-2, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
CHANGES = {"abrupt 2": (2.0, 1), "abrupt 3": (3.0, 1), "abrupt 5": (5.0, 1), "gradual 6": (6.0, 100)}
FIRST_SEED = {"tuning": 1_000, "reported": 900_000}
Curve = tuple[np.ndarray, np.ndarray]
"""Values, and the standard deviation of their noise, both [LENGTH]."""


def shapes(suite: str, rng: np.random.Generator) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Returns learning curves from 0 to about 1 over t in points."""
    pace = rng.uniform(5, 0.25 * LENGTH)
    if suite == "tuning":
        start, width = rng.uniform(0.05, 0.25) * LENGTH, rng.uniform(0.02, 0.08) * LENGTH
        scale, power = rng.uniform(2, 30), rng.uniform(0.5, 1.5)
        return {
            "power": lambda t: 1 - (1 + t / scale) ** -power,
            "exponential": lambda t: 1 - np.exp(-t / pace),
            "logistic": lambda t: 1 / (1 + np.exp(-(t - start) / width)),
            "annealed": lambda t: 0.75 * (1 - np.exp(-1.5 * t / pace)) + 0.125 * (1 - np.cos(np.pi * t / LENGTH)),
            "flat": lambda t: np.zeros(len(t)),
        }
    rate, bend, share = rng.uniform(0.01, 0.06), rng.uniform(0.5, 1.4), rng.uniform(0.3, 0.8)
    return {
        "gompertz": lambda t: np.exp(-rng.uniform(2, 6) * np.exp(-rate * t)),
        "weibull": lambda t: 1 - np.exp(-((t / pace) ** bend)),
        "two speeds": lambda t: share * (1 - np.exp(-8 * t / pace)) + (1 - share) * (1 - np.exp(-t / (2 * pace))),
        "hyperbolic": lambda t: t / (t + pace),
        "still rising": lambda t: np.log1p(t / pace) / np.log1p(LENGTH / pace),
    }


def curve(suite: str, seed: int) -> Curve:
    """Draws an undrifted learning curve."""
    rng = np.random.default_rng(FIRST_SEED[suite] + seed)
    known = shapes(suite, rng)
    mean = known[list(known)[rng.integers(len(known))]](np.arange(LENGTH, dtype=float))
    relative = float(np.exp(rng.uniform(np.log(0.005), np.log(0.08))))
    correlation, tail = rng.uniform(0.0, 0.65), rng.choice([0, 5])
    draws = rng.standard_t(tail, LENGTH) / math.sqrt(tail / (tail - 2)) if tail else rng.standard_normal(LENGTH)
    noise = draws.copy()
    for index in range(1, LENGTH):
        noise[index] = correlation * noise[index - 1] + math.sqrt(1 - correlation**2) * draws[index]
    left = rng.choice([1.0, 0.5, 0.25])
    spread = 0.3 * relative * (left + (1 - left) * np.exp(-3 * np.arange(LENGTH) / LENGTH))
    return 0.05 + 0.3 * mean + spread * noise, spread


def drifted(plain: Curve, seed: int, size: float, over: int) -> tuple[np.ndarray, int]:
    """Returns the curve with a fall of `size` standard deviations over so many points, and where it begins."""
    values, spread = plain
    onset = int(np.random.default_rng(seed).integers(100, LENGTH - LATEST))
    fall = np.clip((np.arange(LENGTH) - onset + 1) / over, 0.0, 1.0)
    return values - size * spread[onset] * fall, onset


def seasonal(plain: Curve, seed: int) -> np.ndarray:
    """Returns the curve with a weekly pattern of 2 standard deviations of its last noise."""
    values, spread = plain
    pattern = np.random.default_rng(seed).standard_normal(7)
    pattern = (pattern - pattern.mean()) / pattern.std()
    return values + 2.0 * spread[-1] * pattern[np.arange(LENGTH) % 7]


def run(values: np.ndarray, config: DetectorConfig) -> list[tuple]:
    """Returns point and verdict of each alarm, confirmation and new season."""
    state, events = init(config), []
    for index, value in enumerate(values):
        state, verdict = update(state, float(value), config)
        if verdict.kind is not None:
            events.append((index, verdict))
    return events


def detector_alarms(values: np.ndarray, config: DetectorConfig, downward: bool = False) -> list[int]:
    return [i for i, said in run(values, config) if said.alarm and (said.direction == "down" or not downward)]


def residuals(values: np.ndarray, config: DetectorConfig, *, whiten: bool) -> np.ndarray:
    """Returns the detector's own standardised residuals, without its restarts, for ADWIN to watch."""
    baseline, square, product, last, result = Baseline(), 0.0, 0.0, 0.0, np.zeros(len(values))
    for index, value in enumerate(values):
        expected, width = predict(baseline, index, config.harmful)
        residual = (value - expected) / width if index else 0.0
        sigma, warm = math.sqrt(square), index >= config.warm_up
        bounded = min(max(residual, -2 * sigma), 2 * sigma) if warm else residual
        if warm:
            rho = min(max(product / square, 0.0), 0.9) if whiten else 0.0
            standard = (residual - rho * last) / (sigma * math.sqrt(1 - rho**2))
            result[index] = min(max(standard, -config.clip), config.clip)
        if index >= 2:
            weight, factor = min(index - 1, config.scale_memory), 0.9205 if warm else 1.0
            square += (bounded**2 / factor - square) / weight
            product += (bounded * last / factor - product) / weight
        memory = min(max(index / config.growth, 4.0), config.memory)
        baseline = follow(baseline, index, expected + bounded * width if index else value, memory)
        last = bounded
    return result


def adwin_alarms(values: np.ndarray, delta: float) -> list[int]:
    from river.drift import ADWIN

    detector, alarms = ADWIN(delta=delta, clock=1), []
    for index, value in enumerate(values.tolist()):
        detector.update(value)
        if detector.drift_detected:
            alarms.append(index)
    return alarms


def interval(statistic: Callable[[np.ndarray], float], values: Sequence[float]) -> list[float]:
    """Returns the 95 % bootstrap interval over curves."""
    drawn, rng = np.asarray(values, float), np.random.default_rng(0)
    draws = [statistic(drawn[rng.integers(len(drawn), size=len(drawn))]) for _ in range(1000)]
    return [float(bound) for bound in np.quantile(draws, [0.025, 0.975], method="nearest")]


def judged(false: list[int], delays: dict[str, list[float]]) -> dict:
    """Returns false alarms per 1000, and detection share and median delay by change and over all changes."""
    pooled = [delay for each in delays.values() for delay in each]

    def median(values: np.ndarray) -> float:
        return float(np.median(values))

    return {
        "false_alarms_per_1000": 1000.0 * sum(false) / (len(false) * LENGTH),
        "false_alarms_interval": interval(lambda counts: 1000.0 * float(counts.mean()) / LENGTH, false),
        "median_delay": median(np.array(pooled)),
        "median_delay_interval": interval(median, pooled),
        "detection_share": float(np.isfinite(pooled).mean()),
        "detection_share_interval": interval(lambda each: float(np.isfinite(each).mean()), pooled),
        "by_change": {
            name: {"median_delay": median(np.array(each)), "detection_share": float(np.isfinite(each).mean())}
            for name, each in delays.items()
        },
    }


def delay(alarms: list[int], onset: int) -> float:
    after = [index - onset + 1 for index in alarms if onset <= index < onset + LATEST]
    return float(after[0]) if after else math.inf


class Curves:
    """A suite's undrifted curves, and for each change as many others that have it."""

    def __init__(self, suite: str, undrifted: int, changed: int) -> None:
        self.plain = [curve(suite, seed) for seed in range(undrifted)]
        self.changed = {
            name: [
                (plain[1], *drifted(plain, seed, *how))
                for seed in range(10_000 * rank, 10_000 * rank + changed)
                for plain in [curve(suite, seed)]
            ]
            for rank, (name, how) in enumerate(CHANGES.items(), start=1)
        }

    def judge(self, false: Callable, found: Callable) -> dict:
        counts = [len(false(values)) for values, _ in self.plain]
        return judged(
            counts,
            {name: [delay(found(values), onset) for _, values, onset in each] for name, each in self.changed.items()},
        )

    def prepared(self, prepare: Callable) -> Curves:
        """Returns the same curves as another detector's input."""
        other = object.__new__(Curves)
        other.plain = [(prepare(*plain), plain[1]) for plain in self.plain]
        other.changed = {
            name: [(spread, prepare(values, spread), onset) for spread, values, onset in each]
            for name, each in self.changed.items()
        }
        return other


def fastest(points: dict[str, dict], allowed: float) -> str:
    """Returns the name with the smallest median delay among those with so few false alarms, or the fewest of all."""
    fit = [name for name, point in points.items() if point["false_alarms_per_1000"] <= allowed]
    if not fit:
        return min(points, key=lambda name: points[name]["false_alarms_per_1000"])
    return min(fit, key=lambda name: (points[name]["median_delay"], -points[name]["detection_share"]))


def told_kind(values: np.ndarray, onset: int, config: DetectorConfig) -> str:
    """Returns the kind as known in the end: confirmed where it was, of the first alarm after the onset."""
    said = None
    for index, verdict in run(values, config):
        if verdict.kind == "seasonal":
            return "seasonal"
        if index >= onset and (verdict.alarm or said is not None):
            said = verdict.kind
            if not verdict.alarm:
                break
    return said or "none"


def confusion_on_curves(suite: str, number: int) -> tuple[dict, dict]:
    """Returns truth by kind told, and what seasons do before and after they are learnt."""
    config = DetectorConfig()
    table: dict[str, Counter] = {truth: Counter() for truth in ("none", "abrupt", "gradual", "seasonal")}
    alarms, points = [0, 0], [0, 0]
    for seed in range(number):
        plain = curve(suite, 90_000 + seed)
        table["none"][told_kind(plain[0], 100, config)] += 1
        for truth, how in (("abrupt", (4.0, 1)), ("gradual", (8.0, 100))):
            table[truth][told_kind(*drifted(plain, seed, *how), config)] += 1
        periodic = seasonal(plain, seed)
        table["seasonal"][told_kind(periodic, 0, config)] += 1
        events = run(periodic, config)
        learnt = next((index for index, said in events if said.kind == "seasonal"), LENGTH)
        for index, said in events:
            alarms[index > learnt] += said.alarm
        points = [points[0] + learnt, points[1] + LENGTH - learnt]
    rate = [1000.0 * count / max(total, 1) for count, total in zip(alarms, points, strict=True)]
    return (
        {truth: dict(counts) for truth, counts in table.items()},
        {"false_alarms_per_1000_before": rate[0], "false_alarms_per_1000_after": rate[1]},
    )


def domain_windows(truth: str, seed: int) -> tuple[list[tuple[float, ...]], int]:
    """Returns meta-features of simulated windows of interactions, and the first window of the change."""
    from envs.simulated.generator import generate
    from envs.simulated.prior import SimulatedPrior, draw_params
    from metalearn.profiles import profile_domain

    rng = np.random.default_rng(FIRST_SEED["reported"] + seed)
    prior = SimulatedPrior(users=(200, 200), items=(150, 150), explicit=0.0, click=0.0, shifting=0.0, untimed=0.0)
    params, onset, rows = draw_params(prior, rng), int(rng.integers(35, 45)), []
    for window in range(WINDOWS):
        share = {
            "none": 0.0,
            "abrupt": float(window >= onset),
            "gradual": float(np.clip((window - onset + 1) / 20, 0, 1)),
            "seasonal": float(window % 7 >= 5),
        }[truth]
        now = dataclasses.replace(
            params, popularity_std=params.popularity_std + 0.8 * share, noise=min(params.noise + 0.3 * share, 1.0)
        )
        rows.append(profile_row(profile_domain(generate(now, rng=rng).interactions.positives())))
    return rows, onset


def confusion_on_domains(number: int) -> dict:
    """Returns truth by kind told of simulated domains, false alarms per 1000 windows, and the median delay."""
    config, delays, false, looked = ProfileWatchConfig(), {"abrupt": [], "gradual": []}, 0, 0
    table: dict[str, Counter] = {truth: Counter() for truth in ("none", "abrupt", "gradual", "seasonal")}
    for truth, counts in table.items():
        for seed in range(number):
            (rows, onset), state, told, settled = domain_windows(truth, seed), ProfileWatchState(), "none", False
            for window, row in enumerate(rows):
                state, verdict = watch_profile(state, row, config)
                changed = truth in delays and window >= onset
                false += verdict.alarm and not changed
                looked += not changed and window >= config.reference_windows + config.current_windows - 1
                if settled or verdict.kind is None or (truth in delays and not changed):
                    continue
                # The kind that counts is the confirmed one; an alarm says that, and when, but not yet surely how.
                told, settled = verdict.kind, not verdict.alarm
                if changed and verdict.alarm:
                    delays[truth].append(window - onset + 1)
            counts[told] += 1
    return {
        "confusion": {truth: dict(counts) for truth, counts in table.items()},
        "false_alarms_per_1000_looks": 1000.0 * false / looked,
        "looks": looked,
        "median_delay": {truth: float(np.median(each)) if each else None for truth, each in delays.items()},
    }


def recorded_curves(path: Path) -> dict | None:
    """Returns alarms on recorded validation curves of runs that had no drift; None without the file."""
    if not path.is_file():
        return None
    config, alarms, points, curves = DetectorConfig(), Counter(), 0, 0
    for line in path.read_text().splitlines():
        values = [measured[2] for measured in json.loads(line)["measurements"] if measured[1].startswith("validation")]
        points, curves = points + len(values), curves + 1
        alarms.update(said.direction for _, said in run(np.array(values, float), config) if said.alarm)
    return {"curves": curves, "points": points, "alarms": dict(alarms), "per_1000": 1000 * alarms.total() / points}


def finite(record: Any) -> Any:
    """Returns the record with None for infinity (more than half were missed), which JSON does not know."""
    if isinstance(record, dict):
        return {key: finite(value) for key, value in record.items()}
    if isinstance(record, list):
        return [finite(value) for value in record]
    return None if isinstance(record, float) and math.isinf(record) else record


def table(record: dict) -> str:
    """Writes the figures as Markdown."""
    lines = ["# Drift detection", "", *(f"- {key}: {value}" for key, value in record["provenance"].items()), ""]
    lines += ["## False alarms against delay", "", "| detector | false alarms per 1000 | detected | median delay |"]
    lines += ["|---|---|---|---|"]
    for name, point in record["roc"].items():
        low, high = point["false_alarms_interval"]
        lines.append(
            f"| {name} | {point['false_alarms_per_1000']:.2f} [{low:.2f}, {high:.2f}] | "
            f"{point['detection_share']:.2f} | {point['median_delay']:.0f} |"
        )
    chosen = record["adwin_choice"]
    lines += [
        "",
        f"ADWIN at its best at the detector's false alarms: {chosen}. With at most 1 per 1000, in hindsight: "
        f"{record['fastest_within_1_per_1000']}.",
        "",
        "## By change",
        "",
    ]
    lines += ["| change, standard deviations | detector: detected, delay | ADWIN: detected, delay |", "|---|---|---|"]
    ours, theirs = (record["roc"][name]["by_change"] for name in ("detector, rate 1", chosen))
    for name in CHANGES:
        cells = [f"{each[name]['detection_share']:.2f}, {each[name]['median_delay']:.0f}" for each in (ours, theirs)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    for title, counts in (("curves", record["curves"]["confusion"]), ("domains", record["domains"]["confusion"])):
        lines += ["", f"## Kinds told on simulated {title}", "", "| truth | none | abrupt | gradual | seasonal |"]
        lines += ["|---|---|---|---|---|"]
        kinds = ("none", "abrupt", "gradual", "seasonal")
        lines += [
            f"| {truth} | {' | '.join(str(row.get(kind, 0)) for kind in kinds)} |" for truth, row in counts.items()
        ]
    rest = {"tuning": record["tuning"], "seasons": record["curves"]["seasons"], "recorded": record["recorded"]}
    rest["domains"] = {key: value for key, value in record["domains"].items() if key != "confusion"}
    return "\n".join([*lines, "", "## Besides", "", *(f"- {key}: {value}" for key, value in rest.items())]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few curves, under a minute")
    parser.add_argument("--output", type=Path, help="a folder for summary.json and table.md")
    parser.add_argument("--curves", type=Path, default=ROOT / "docs/results/benchmark/trials.jsonl")
    arguments = parser.parse_args()
    undrifted, changed, kinds, domains = (25, 10, 8, 1) if arguments.quick else (200, 60, 60, 8)
    rates, deltas = ((1.0,), DELTAS[1:6:2]) if arguments.quick else (RATES, DELTAS)

    reported, config, roc = Curves("reported", undrifted, changed), DetectorConfig(), {}

    def record_point(name: str, point: dict) -> None:
        roc[name] = point
        print(
            f"{name}: {point['false_alarms_per_1000']:.2f} false alarms per 1000, {point['detection_share']:.0%} "
            f"detected, median delay {point['median_delay']:.0f}",
            flush=True,
        )

    def ours(suite: Curves, rate: float) -> dict:
        at = dataclasses.replace(config, false_alarms_per_1000=rate)
        return suite.judge(lambda values: detector_alarms(values, at), lambda values: detector_alarms(values, at, True))

    for rate in rates:
        record_point(f"detector, rate {rate:g}", ours(reported, rate))
    inputs = {
        "raw": lambda values, spread: values,
        "raw, true scale": lambda values, spread: values / spread[-1],
        "detrended": lambda values, spread: residuals(values, config, whiten=False),
        "whitened": lambda values, spread: residuals(values, config, whiten=True),
    }
    for name, prepare in inputs.items():
        fed = reported.prepared(prepare)
        for delta in deltas:
            alarms = lambda values, delta=delta: adwin_alarms(values, delta)  # noqa: E731
            record_point(f"ADWIN {name}, delta {delta:g}", fed.judge(alarms, alarms))
    headline = roc["detector, rate 1"]
    rivals = {name: point for name, point in roc.items() if name.startswith("ADWIN")}
    choice = fastest(rivals, headline["false_alarms_interval"][1])
    within = {
        name: fastest(points, 1.0)
        for name, points in (("adwin", rivals), ("detector", {name: roc[name] for name in roc if name not in rivals}))
    }

    confusion, seasons = confusion_on_curves("reported", kinds)
    tuning = ours(Curves("tuning", undrifted // 2, changed // 4), 1.0)
    record = {
        "provenance": provenance(seeds={suite: first for suite, first in FIRST_SEED.items()}, curves=undrifted),
        "config": dataclasses.asdict(config),
        "roc": roc,
        "adwin_choice": choice,
        "fastest_within_1_per_1000": within,
        "curves": {"confusion": confusion, "seasons": seasons},
        "domains": confusion_on_domains(domains),
        "recorded": recorded_curves(arguments.curves),
        "tuning": {name: tuning[name] for name in ("false_alarms_per_1000", "median_delay", "detection_share")},
    }
    print("\n" + table(record))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "summary.json").write_text(json.dumps(finite(record), indent=1) + "\n")
        (arguments.output / "table.md").write_text(table(record))
    names = ("false_alarms_per_1000", "median_delay", "detection_share")
    figures = {name: headline[name] for name in names}
    figures |= {f"{name}_interval": headline[f"{name.replace('_per_1000', '')}_interval"] for name in names}
    figures |= {f"adwin_{name}": rivals[choice][name] for name in names}
    figures |= {f"{who}_delay_within_1_per_1000": roc[name]["median_delay"] for who, name in within.items()}
    figures |= {"adwin_median_delay_interval": rivals[choice]["median_delay_interval"]}
    print(json.dumps(finite(figures)))


if __name__ == "__main__":
    main()
