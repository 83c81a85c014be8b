"""Incidents: what is drawn, what is read from a file, and what the rule calls worse."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from envs.sandbox import (
    CATALOGUE,
    Incident,
    Mix,
    bound,
    draw_episodes,
    false_positive_rate,
    read_mix,
    summarize,
    systematically_worse,
    table,
)
from metalearn.errors import InvalidArgumentError


def test_the_built_in_mix_has_a_thousand_episodes_and_every_variant_of_every_incident() -> None:
    episodes = draw_episodes(Mix())
    assert len(episodes) == 1000
    assert Counter(episode.name for episode in episodes) == {name: kind.episodes for name, kind in CATALOGUE.items()}
    drawn = {(episode.name, episode.incidents[0].variant) for episode in episodes}
    assert drawn == {(name, variant) for name, kind in CATALOGUE.items() for variant in kind.variants}
    assert len({episode.key for episode in episodes}) == 1000
    share = np.mean([len(episode.incidents) > 1 for episode in episodes])
    assert 0.2 < share < 0.3


def test_draws_follow_the_seed_and_do_not_depend_on_how_many_there_are() -> None:
    assert draw_episodes(Mix()) == draw_episodes(Mix())
    few = {dataclasses.replace(episode, index=0) for episode in draw_episodes(Mix().scaled(100))}
    assert few < {dataclasses.replace(episode, index=0) for episode in draw_episodes(Mix())}
    assert draw_episodes(Mix(seed=1))[0].seed != draw_episodes(Mix())[0].seed


def test_a_larger_batch_comes_only_where_it_can_be_taken_back() -> None:
    for episode in draw_episodes(Mix()):
        if any(incident.variant == "batch_size" for incident in episode.incidents):
            assert episode.rewinds


def test_a_file_of_incidents_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    content = {"incidents": {"loss_spike": {"episodes": 3, "size": [50, 60]}, "drift": {"episodes": 2}}, "seed": 7}
    path.write_text(json.dumps(content))
    mix = read_mix(path)
    episodes = draw_episodes(mix)
    assert [episode.name for episode in episodes] == ["loss_spike"] * 3 + ["drift"] * 2
    assert all(50 <= episode.incidents[0].size <= 60 for episode in episodes[:3])
    assert mix.kinds["drift"].variants == CATALOGUE["drift"].variants


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold an object with `incidents`"),
        ("{", "not a JSON file"),
        ('{"incidents": {}, "compounds": 1}', "must hold an object"),
        ('{"incidents": {"earthquake": {}}}', "no incident is called 'earthquake'"),
        ('{"incidents": {"drift": {"variant": "abrupt"}}}', "must be an object of"),
        ('{"incidents": {"drift": {"variants": ["slow"]}}}', "variants must be among"),
        ('{"incidents": {"loss_spike": {"size": [5, 1]}}}', "low <= high"),
        ('{"incidents": {}, "compound": 2}', "`compound` must lie in"),
    ],
)
def test_a_file_that_is_no_mix_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mix.json"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=message):
        read_mix(path)


def test_an_incident_has_a_known_name_and_variant() -> None:
    with pytest.raises(InvalidArgumentError, match="no incident is called"):
        Incident(name="fire")
    with pytest.raises(InvalidArgumentError, match="`variant` of drift"):
        Incident(name="drift", variant="nan")


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_the_rule_has_the_rate_of_false_positives_that_it_says(rate: float) -> None:
    groups = np.random.default_rng(0).normal(0.1, 0.01, (400, 16))
    wrong = false_positive_rate(groups.tolist(), rate=rate) * groups.size
    # Members of a group are judged with the same seeds, so they are not quite independent: a wide binomial interval.
    low, high = stats.binom.interval(0.9999, groups.size, rate)
    assert low <= wrong <= high


def test_the_bound_is_the_t_interval_of_one_more_observation() -> None:
    metrics = [0.10, 0.12, 0.11, 0.13]
    # mean .115, s = sqrt(.0005 / 3) = .012910, t(.95, 3) = 2.3534: .115 - 2.3534 * .012910 * sqrt(1.25) = .08103
    assert bound(metrics, rate=0.05).low == pytest.approx(0.08103, abs=2e-5)
    with pytest.raises(InvalidArgumentError, match="at least 3"):
        bound(metrics[:2], rate=0.05)


def outcome(
    metric: float | None, *, finite: bool = True, lost: bool = False, repeats: Sequence[float | None] = ()
) -> dict:
    return {
        "repeats": list(repeats),
        "metric": metric,
        "finite": finite,
        "lost": lost,
        "error": "RuntimeError" if metric is None else None,
        "rollbacks": 1,
        "fallen_back": False,
    }


def test_the_report_counts_each_arm_apart() -> None:
    fallbacks = {"cell": np.random.default_rng(0).normal(0.1, 0.002, 16).tolist()}
    pairs = [
        (outcome(0.1), outcome(0.0, finite=False)),
        (outcome(0.101), outcome(None, lost=True)),
        (outcome(0.05, repeats=[0.06, 0.07, 0.05]), outcome(0.1)),
        (outcome(0.05, repeats=[0.1, 0.101, 0.103]), outcome(0.05, repeats=[0.1, 0.101, None])),
    ]
    records = [
        {"incident": "loss_spike", "fallback": "cell", "guarded": guarded, "unguarded": unguarded}
        for guarded, unguarded in pairs
    ]
    summary = summarize(records, fallbacks)
    total = summary["all"]
    assert total == summary["incidents"]["loss_spike"]
    counted = {name: total[name] for name in ("episodes", "worse_than_fallback", "below_bound", "nonfinite", "lost")}
    assert counted == {"episodes": 4, "worse_than_fallback": 1, "below_bound": 2, "nonfinite": 0, "lost": 0}
    twin = {name: total[f"unguarded_{name}"] for name in ("worse_than_fallback", "below_bound", "nonfinite", "lost")}
    assert twin == {"worse_than_fallback": 2, "below_bound": 2, "nonfinite": 1, "lost": 1}
    assert total["unguarded_ended"] == 3
    assert "| loss_spike | 4 | 1 / 2 | 2 / 2 |" in table(summary, {"seed": 0})


def test_repeats_of_a_harmless_run_confirm_at_the_rate() -> None:
    rng = np.random.default_rng(1)
    found = [systematically_worse(*rng.normal(0.1, 0.01, (2, 16)), rate=0.05) for _ in range(600)]
    low, high = stats.binom.interval(0.9999, len(found), 0.05)
    assert low <= sum(found) <= high
    assert systematically_worse([0.1, 0.1], [0.11, 0.11], rate=0.05)
    assert not systematically_worse([0.1, 0.1], [0.1, 0.1], rate=0.05)
