"""Hyperparameters and spaces: encoding, masks, JSON, and every refusal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalearn.errors import InvalidArgumentError, SchemaMismatchError
from metalearn.spaces import CANONICAL_SPACE, SPACE_VERSION, Hyperparameter, HyperparameterSpace

NUMERIC = [h for h in CANONICAL_SPACE if h.scale != "choice"]
CHOICES = [h for h in CANONICAL_SPACE if h.scale == "choice"]
UNIT = st.floats(0.0, 1.0)


def make_rate(**changes) -> Hyperparameter:
    arguments = {"name": "rate", "low": 1e-4, "high": 1.0, "scale": "log", "default": 1e-3, "scope": "group"}
    return Hyperparameter(**(arguments | changes))


def test_vocabulary_of_version_1_is_pinned():
    # A change of the vocabulary needs a new SPACE_VERSION: checkpoints rely on it.
    assert SPACE_VERSION == 1
    assert [(h.name, h.low, h.high, h.scale, h.scope) for h in NUMERIC] == [
        ("learning_rate", 1e-5, 1.0, "log", "group"),
        ("weight_decay", 1e-4, 10.0, "log", "group"),
        ("beta1", 0.5, 0.99, "logit", "group"),
        ("dropout", 0.0, 0.7, "linear", "global"),
        ("batch_size", 16, 65536, "log", "global"),
        ("num_negatives", 1, 1024, "log", "global"),
        ("grad_clip", 1e-2, 1e2, "log", "global"),
        ("embedding_dim", 4, 1024, "log", "global"),
    ]
    assert [(h.name, len(h.choices)) for h in CHOICES] == [
        ("trainable", 2),
        ("accumulation", 6),
        ("precision", 4),
        ("early_stop", 2),
    ]
    assert [h.name for h in CANONICAL_SPACE if h.when == "start"] == ["embedding_dim"]


@pytest.mark.parametrize("hyperparameter", NUMERIC, ids=lambda h: h.name)
@given(unit=UNIT)
def test_unit_to_value_and_back(hyperparameter: Hyperparameter, unit: float):
    value = hyperparameter.decode(unit)
    assert hyperparameter.low <= value <= hyperparameter.high
    assert hyperparameter.encode(value) == pytest.approx(unit, abs=1e-9)


@pytest.mark.parametrize("hyperparameter", NUMERIC, ids=lambda h: h.name)
@given(unit=UNIT)
def test_value_to_unit_and_back(hyperparameter: Hyperparameter, unit: float):
    value = hyperparameter.low + unit * (hyperparameter.high - hyperparameter.low)
    assert hyperparameter.decode(hyperparameter.encode(value)) == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("hyperparameter", CHOICES, ids=lambda h: h.name)
@given(unit=st.one_of(UNIT, st.floats(-1e9, 1e9)))
def test_choices_round_trip_and_every_number_decodes_to_one(hyperparameter: Hyperparameter, unit: float):
    assert [hyperparameter.decode(hyperparameter.encode(choice)) for choice in hyperparameter.choices] == list(
        hyperparameter.choices
    )
    assert hyperparameter.decode(min(unit, 0.0)) == hyperparameter.choices[0]
    assert hyperparameter.decode(max(unit, 1.0)) == hyperparameter.choices[-1]
    assert hyperparameter.decode(unit) in hyperparameter.choices


@given(st.data())
def test_space_round_trip(data: st.DataObject):
    unit = np.array(data.draw(st.lists(UNIT, min_size=len(CANONICAL_SPACE), max_size=len(CANONICAL_SPACE))))
    configuration = CANONICAL_SPACE.decode(unit)
    encoded = CANONICAL_SPACE.encode(configuration)
    assert CANONICAL_SPACE.decode(encoded) == configuration
    numeric = np.array([h.scale != "choice" for h in CANONICAL_SPACE])
    np.testing.assert_allclose(encoded[numeric], unit[numeric], atol=1e-9)


def test_golden_encodings():
    # log: (ln 0.01 - ln 1e-4) / (ln 1 - ln 1e-4) = 2 / 4; logit: 0.9 is ln 9 = 2.1972, from 0 to ln 99 = 4.5951.
    assert make_rate().encode(0.01) == pytest.approx(0.5)
    assert CANONICAL_SPACE["beta1"].encode(0.9) == pytest.approx(math.log(9) / math.log(99))
    assert CANONICAL_SPACE["dropout"].encode(0.35) == pytest.approx(0.5)
    assert CANONICAL_SPACE["precision"].encode("tf32") == 0.375  # (1 + 1/2) / 4


@pytest.mark.parametrize("hyperparameter", NUMERIC, ids=lambda h: h.name)
def test_values_out_of_range_are_clipped(hyperparameter: Hyperparameter):
    assert (hyperparameter.encode(-math.inf), hyperparameter.encode(math.inf)) == (0.0, 1.0)
    assert (hyperparameter.decode(-3.0), hyperparameter.decode(3.0)) == (hyperparameter.low, hyperparameter.high)


@pytest.mark.parametrize("hyperparameter", NUMERIC, ids=lambda h: h.name)
def test_numpy_and_jax_agree(hyperparameter: Hyperparameter):
    import jax.numpy as jnp

    unit = np.linspace(0.0, 1.0, 33, dtype=np.float32)
    value = hyperparameter.decode(unit, np)
    np.testing.assert_allclose(hyperparameter.decode(jnp.asarray(unit), jnp), value, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(hyperparameter.encode(jnp.asarray(value), jnp), unit, atol=5e-6)


def test_space_behaves_as_an_ordered_collection():
    space = CANONICAL_SPACE.subset(["dropout", "learning_rate"])
    assert space.names == ("learning_rate", "dropout")  # in the vocabulary's order
    assert len(space) == 2
    assert "dropout" in space
    assert "beta1" not in space
    assert [h.name for h in space] == list(space.names)
    assert space.defaults() == {"learning_rate": 1e-3, "dropout": 0.0}


def test_mask_marks_what_a_loop_has():
    mask = CANONICAL_SPACE.mask({"dropout", "learning_rate", "another loop's own"})
    assert mask.dtype == bool
    assert [h.name for h, on in zip(CANONICAL_SPACE, mask, strict=True) if on] == ["learning_rate", "dropout"]
    assert not CANONICAL_SPACE.mask([]).any()


@pytest.mark.parametrize("space", [CANONICAL_SPACE, CANONICAL_SPACE.subset(["precision"])], ids=["all", "one choice"])
def test_json_round_trip(space: HyperparameterSpace):
    assert HyperparameterSpace.from_json(space.to_json()) == space


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "cubic"}, "`scale` of rate must be log, linear, logit or choice, got 'cubic'"),
        ({"low": 0.0}, r"bounds of rate must be finite, ordered and fit scale 'log', got \[0.0, 1.0\]"),
        ({"low": 2.0}, "bounds of rate"),
        ({"high": math.inf}, "bounds of rate"),
        ({"low": math.nan}, "bounds of rate"),
        ({"scale": "logit"}, "bounds of rate must be finite, ordered and fit scale 'logit'"),
        ({"default": 1e-5}, r"`default` of rate must be in \[0.0001, 1.0\], got 1e-05"),
        ({"default": math.nan}, "`default` of rate"),
        ({"scale": "choice", "choices": ("a",)}, "`choices` of rate must hold at least 2 values"),
        ({"scale": "choice", "choices": ("a", "b")}, r"`default` of rate must be one of \('a', 'b'\), got 0.001"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_refused(changes: dict, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        make_rate(**changes)


def test_spaces_that_make_no_sense_are_refused():
    with pytest.raises(InvalidArgumentError, match="`hyperparameters` is empty"):
        HyperparameterSpace(())
    with pytest.raises(InvalidArgumentError, match=r"holds \['rate'\] more than once"):
        HyperparameterSpace((make_rate(), make_rate(low=1e-5)))
    with pytest.raises(InvalidArgumentError, match=r"no hyperparameter 'lr' in this space; it has \['learning_rate'"):
        CANONICAL_SPACE.subset(["lr"])


def test_values_that_cannot_be_encoded_are_refused():
    with pytest.raises(InvalidArgumentError, match="precision must be one of"):
        CANONICAL_SPACE["precision"].encode("int8")
    with pytest.raises(InvalidArgumentError, match=r"rate must be a number in \[0.0001, 1.0\], got nan"):
        make_rate().encode(math.nan)
    with pytest.raises(InvalidArgumentError, match="rate must be a number"):
        make_rate().encode(np.array([0.1, math.nan]))


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({}, r"lacks \['learning_rate', 'dropout'\] and has unknown \[\]"),
        ({"learning_rate": 0.1, "lr": 0.1}, r"lacks \['dropout'\] and has unknown \['lr'\]"),
    ],
)
def test_configurations_must_be_complete(configuration: dict, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        CANONICAL_SPACE.subset(["learning_rate", "dropout"]).encode(configuration)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (np.zeros(3), r"`unit` must have shape \(2,\), got \(3,\)"),
        (np.zeros((2, 1)), r"`unit` must have shape \(2,\)"),
        (np.array([0.5, math.nan]), "`unit` must be finite"),
        (np.array([math.inf, 0.5]), "`unit` must be finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(unit: np.ndarray, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        CANONICAL_SPACE.subset(["learning_rate", "dropout"]).decode(unit)


def test_json_of_another_version_is_refused():
    text = json.dumps({**json.loads(CANONICAL_SPACE.to_json()), "version": 2})
    with pytest.raises(SchemaMismatchError, match="space version must be 1, got 2"):
        HyperparameterSpace.from_json(text)


ROW = make_rate().as_dict()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"version": 1}',
        *(
            json.dumps({"version": 1, "hyperparameters": rows})
            for rows in (
                None,
                [3],
                [{"name": "rate"}],
                [{**ROW, "colour": "red"}],
                [{**ROW, "choices": None}],
                [{**ROW, "low": -1}],
                [ROW, ROW],
                [],
            )
        ),
    ],
)
def test_json_that_is_no_space_is_refused(text: str):
    with pytest.raises(SchemaMismatchError, match="not a hyperparameter space"):
        HyperparameterSpace.from_json(text)
