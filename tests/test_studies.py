"""What choose_base.py and choose_cue.py of scripts choose, and when the rules of compare_rules.py change a rate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from metalearn import load_controller
from metalearn.controller import load_checkpoint, save_checkpoint

LOW, MIDDLE, HIGH = ({"learning_rate": rate, "weight_decay": 0.1, "beta1": 0.9, "dropout": 0.0} for rate in (1, 2, 3))


def row(family: str, configuration: dict[str, float], score: float, horizon: str = "unknown") -> dict[str, Any]:
    return {"family": family, "horizon": horizon, "configuration": configuration, "score": score}


def test_a_base_is_the_best_of_its_family_and_that_of_others_the_best_of_what_all_share(scripts: Any):
    choose = scripts("choose_base").choose
    rows = [row("one", LOW, 0.0), row("one", MIDDLE, 0.3), row("one", HIGH, 0.4)]
    rows += [row("two", LOW, -1.0), row("two", MIDDLE, -1.1)]
    rows += [row("one", LOW, 0.2, "known")]
    assert choose(rows) == {
        "one": {"unknown": HIGH, "known": LOW},
        "two": {"unknown": LOW},
        "other": {"unknown": MIDDLE},  # HIGH is nothing that both have; LOW lies 0.2 below on average
    }


def test_families_that_share_no_candidate_leave_others_alone(scripts: Any):
    assert "other" not in scripts("choose_base").choose([row("one", LOW, 0.0), row("two", HIGH, 0.0)])
    assert "other" not in scripts("choose_base").choose([row("one", LOW, 0.0)])


def test_recorded_rows_count_for_the_same_domains_and_seeds_only(scripts: Any, tmp_path: Path):
    read, path = scripts("choose_base").read_recorded, tmp_path / "bases.json"
    assert read(path, ["a", "b"], 2) == []
    path.write_text('{"runs": [{"family": "one"}], "provenance": {"domains": ["b", "a"], "seeds": [0, 1]}}')
    assert read(path, ["a", "b"], 2) == [{"family": "one"}]
    for domains, seeds in ((["a"], 2), (["a", "b"], 1)):
        with pytest.raises(ValueError, match=r"of the domains .* pass another path"):
            read(path, domains, seeds)
    path.write_text("[]")
    with pytest.raises(ValueError, match="`--output` is there and no output of this script"):
        read(path, ["a"], 1)


def test_the_cue_goes_to_the_families_that_gain_by_it(scripts: Any, tmp_path: Path):
    script = scripts("choose_cue")
    families = ("two_tower", "self_attention")

    def runs(family: str, domain: str, without: float, cued: float) -> list[dict[str, Any]]:
        both = ((False, without), (True, cued))
        return [
            {"family": family, "domain": domain, "seed": 0, "cued": c, "validation": v, "test": v, "acted": int(c)}
            for c, v in both
        ]

    rows = runs("two_tower", "a", 0.08, 0.0805) + runs("two_tower", "b", 0.08, 0.0799)
    rows += runs("self_attention", "a", 0.08, 0.09) + runs("self_attention", "b", 0.08, 0.08)
    rows += runs("click_model", "a", 0.08, 0.09)[:1]  # interrupted: there is nothing to compare yet
    figures = script.summarise(rows)
    gain = math.log(0.11 / 0.10) / 2
    assert figures["self_attention_validation"] == pytest.approx(gain, abs=1e-4)
    assert figures["self_attention_test_worst"] == 0.0
    assert figures["self_attention_validation_low"] < 0.0 < figures["self_attention_validation_high"]
    assert figures["self_attention_domains"] == figures["self_attention_acted_on"] == 2
    assert "click_model_domains" not in figures
    path = save_checkpoint(load_controller().checkpoint, tmp_path / "controller.safetensors")
    assert script.save_into(path, figures, families, "learning_rate") == ["self_attention"]
    after = load_checkpoint(path)
    assert after.config.cued == ("self_attention",)
    assert after.provenance["cued"]["domains"] == {"self_attention": 2}
    card = path.with_name("README.md").read_text()
    assert "of self_attention the\nlearning rate is raised" in card
    assert f"{gain:+.3f} for self_attention on 2 of them" in card
    more = {"click_model_validation": 0.2, "click_model_domains": 3.0}
    assert script.save_into(path, more, ["click_model"], "learning_rate") == ["click_model"]
    again = load_checkpoint(path)
    assert again.config.cued == ("self_attention", "click_model")
    assert again.provenance["cued"]["gains"].keys() == {"self_attention", "click_model"}
    none = {**more, "click_model_validation": 0.0}
    assert script.save_into(path, none, ["click_model"], "learning_rate") == []
    assert load_checkpoint(path).config.cued == ("self_attention",)
    assert script.save_into(path, more, ["click_model"], "weight_decay") == ["click_model"]
    both = load_checkpoint(path)
    assert (both.config.cued, both.config.decay_cued) == (("self_attention",), ("two_tower", "click_model"))
    card = path.with_name("README.md").read_text()
    assert "of two_tower, click_model the\nweight decay is raised" in card
    assert "+0.200 for click_model on 3 of them" in card


def test_runs_of_another_base_are_refused(scripts: Any, tmp_path: Path):
    script, path = scripts("choose_cue"), tmp_path / "cue.json"
    assert script.read_recorded(path, "learning_rate") == []
    about = script.controller_of_runs("learning_rate")
    path.write_text(json.dumps({"runs": [{"family": "one"}], "controller": about}))
    assert script.read_recorded(path, "learning_rate") == [{"family": "one"}]
    others = [{**about, "at": 0.1}, script.controller_of_runs("weight_decay")]
    for other in others:
        path.write_text(json.dumps({"runs": [], "controller": other}))
        with pytest.raises(ValueError, match="is of a controller with other bases or cues; pass another path"):
            script.read_recorded(path, "learning_rate")
    path.write_text("[]")
    with pytest.raises(ValueError, match="`--output` is there and no output of this script"):
        script.read_recorded(path, "learning_rate")


def test_a_plateau_cuts_the_rate_three_times_at_most(scripts: Any):
    rule = scripts("compare_rules").RULES["plateau"]
    assert rule.factor_after([0.1, 0.3, 0.2, 0.2], 1.0) == 1.0
    assert rule.factor_after([0.1, 0.3, 0.2, 0.2, 0.3], 1.0) == pytest.approx(0.3)
    assert rule.factor_after([0.1, 0.3, 0.2, 0.2, 0.31], 1.0) == 1.0
    assert rule.factor_after([0.3, 0.2, 0.2, 0.2], 0.3**2) == pytest.approx(0.3**3)
    assert rule.factor_after([0.3, 0.2, 0.2, 0.2], 0.3**3) == 0.3**3


def test_a_trend_raises_the_rate_up_to_a_bound(scripts: Any):
    rule = scripts("compare_rules").RULES["trend"]
    rising, flat = [0.1, 0.1, 0.1, 0.11, 0.11, 0.11], [0.1, 0.1, 0.1, 0.1, 0.1, 0.105]
    assert rule.factor_after(rising, 1.0) == 1.7
    assert rule.factor_after(rising[:-1], 1.0) == rule.factor_after(flat, 1.0) == 1.0
    assert rule.factor_after(rising, 6.0) == 8.0
