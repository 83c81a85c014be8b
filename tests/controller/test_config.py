"""The controller's config: what it accepts, and its JSON."""

from __future__ import annotations

import json

import pytest

from metalearn.controller.config import CONTROLLED, ControllerConfig, Reach
from metalearn.errors import InvalidArgumentError, SchemaMismatchError

CONFIG = ControllerConfig(
    descriptors=("log_density", "log_horizon_epochs"), hidden_size=8, code_size=4, families=("two_tower", "click_model")
)
FIELDS = json.loads(CONFIG.to_json())


def test_json_round_trip():
    assert ControllerConfig.from_json(CONFIG.to_json()) == CONFIG
    reach = tuple(Reach(start=0.1 * n, low=-0.2, high=0.3) for n in range(len(CONTROLLED)))
    other = ControllerConfig(descriptors=(), num_decisions=7, reach=reach)
    assert ControllerConfig.from_json(other.to_json()) == other


def test_space_is_the_controlled_part_of_the_vocabulary():
    assert CONFIG.space.names == CONTROLLED


def test_trust_regions_hold_the_start():
    for reach in CONFIG.reach:
        assert reach.low < 0 < reach.high
        assert reach.start > 0


@pytest.mark.parametrize("name", ["hidden_size", "code_size", "num_decisions"])
def test_sizes_must_be_positive(name: str):
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must be a positive int, got 0"):
        ControllerConfig(descriptors=(), **{name: 0})


def test_reach_must_cover_what_is_controlled():
    with pytest.raises(InvalidArgumentError, match=r"`reach` must have one entry for each of .* got 1"):
        ControllerConfig(descriptors=(), reach=CONFIG.reach[:1])


def test_families_must_not_repeat():
    with pytest.raises(InvalidArgumentError, match=r"`families` must not repeat, got \('two_tower', 'two_tower'\)"):
        ControllerConfig(descriptors=(), families=("two_tower",) * 2)


def test_families_are_rows_after_that_of_any_other():
    assert [CONFIG.family_index(family) for family in (None, "two_tower", "click_model")] == [0, 1, 2]
    assert ControllerConfig(descriptors=()).family_index(None) == 0
    assert CONFIG.rows == ("other", "two_tower", "click_model")
    with pytest.raises(InvalidArgumentError, match="`families` must not have 'other'"):
        ControllerConfig(descriptors=(), families=("two_tower", "other"))


@pytest.mark.parametrize("family", ["matrix_factorization", "", "TWO_TOWER"])
def test_an_unknown_family_is_refused_by_name(family: str):
    with pytest.raises(
        InvalidArgumentError,
        match=rf"`family` must be one of \['two_tower', 'click_model'\], .* or None for any other, got '{family}'",
    ):
        CONFIG.family_index(family)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="layers"):
        ControllerConfig(descriptors=(), layers=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a controller config"),
        ("3", "not a controller config"),
        ("null", "not a controller config"),
        (json.dumps({**FIELDS, "layers": 2}), "has keys .*'layers'"),
        (json.dumps({k: v for k, v in FIELDS.items() if k != "reach"}), "this version expects .*'reach'"),
        (json.dumps({**FIELDS, "hidden_size": 0}), "`hidden_size` must be a positive int"),
        (json.dumps({**FIELDS, "hidden_size": "8"}), "not a controller config"),
        (json.dumps({**FIELDS, "reach": [{"start": 1}] * 4}), "not a controller config"),
        (json.dumps({**FIELDS, "descriptors": None}), "not a controller config"),
        (json.dumps({**FIELDS, "families": None}), "not a controller config"),
        (json.dumps({**FIELDS, "families": ["two_tower"] * 2}), "`families` must not repeat"),
    ],
)
def test_text_that_is_no_config_is_refused(text: str, message: str):
    with pytest.raises(SchemaMismatchError, match=message):
        ControllerConfig.from_json(text)
