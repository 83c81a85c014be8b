"""DomainProfile: lookup, schema, and the JSON round trip with its errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metalearn.errors import InvalidArgumentError
from metalearn.profiles import META_FEATURE_NAMES, SCHEMA_VERSION, DomainProfile

SIZE = len(META_FEATURE_NAMES)


def make_profile(**changes) -> DomainProfile:
    arguments = {
        "values": np.linspace(-1, 1, SIZE),
        "mask": np.arange(SIZE) % 3 > 0,
        "fingerprint": "0" * 64,
        "num_users": 10,
        "num_items": 20,
        "num_interactions": 100,
        "sampled_fraction": 0.5,
    }
    return DomainProfile(**(arguments | changes))


def test_names_are_distinct_and_many():
    assert len(set(META_FEATURE_NAMES)) == SIZE >= 30


def test_schema_of_version_1_is_pinned():
    # A change of names or of their order needs a new SCHEMA_VERSION: checkpoints rely on it.
    assert SCHEMA_VERSION == 1
    assert SIZE == 58
    assert META_FEATURE_NAMES[:3] == ("log_num_users", "log_num_items", "log_num_interactions")
    assert META_FEATURE_NAMES[-1] == "rating_item_variance"
    assert META_FEATURE_NAMES.index("landmark_log_gain") == 33
    assert META_FEATURE_NAMES.index("drift_distance") == 38


def test_lookup_gives_none_where_masked():
    profile = make_profile()
    assert profile[META_FEATURE_NAMES[0]] is None
    assert profile[META_FEATURE_NAMES[1]] == profile.values[1]
    assert profile.values[0] == 0
    assert tuple(profile.as_dict()) == META_FEATURE_NAMES
    assert "50.00% sampled" in repr(profile)


def test_unknown_name_lists_near_ones():
    with pytest.raises(InvalidArgumentError, match=r"no meta-feature 'item_ginny'; nearest are \['item_gini'"):
        make_profile()["item_ginny"]


def test_arrays_given_are_copied():
    values = np.full(SIZE, 7.0)
    make_profile(values=values)
    assert (values == 7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.zeros(3)}, r"`values` must have shape \(58,\), got \(3,\)"),
        ({"mask": np.zeros(3)}, r"`mask` must have shape"),
        ({"values": np.full(SIZE, np.nan)}, "'log_num_items' is not; mask it instead"),
        ({"schema_version": 2}, "`schema_version` is 2; this version of metalearn knows 1"),
        ({"names": ("a", *META_FEATURE_NAMES[1:])}, r"unknown \['a'\], missing \['log_num_users'\]"),
    ],
)
def test_constructor_errors(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make_profile(**changes)


@given(
    hnp.arrays(np.float64, SIZE, elements=st.floats(allow_nan=False, allow_infinity=False)),
    hnp.arrays(np.bool_, SIZE),
)
def test_json_round_trip_is_exact(values, mask):
    profile = make_profile(values=values, mask=mask)
    again = DomainProfile.from_json(profile.to_json())
    np.testing.assert_array_equal(again.values, profile.values)
    np.testing.assert_array_equal(again.mask, profile.mask)
    for name in ("fingerprint", "num_users", "num_items", "num_interactions", "sampled_fraction", "schema_version"):
        assert getattr(again, name) == getattr(profile, name)


def edited(**changes) -> str:
    return json.dumps(json.loads(make_profile().to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "`text` is not JSON"),
        ("[]", "is not a domain profile"),
        (
            edited(schema_version=9),
            "has schema version 9; this version of metalearn reads 1; compute the profile again",
        ),
        (edited(meta_features={"gini": 1.0}), r"unknown \['gini'\], missing \['activity_trend'"),
        (edited(meta_features=[1.0]), "differ from schema 1"),
        (edited(meta_features=dict.fromkeys(META_FEATURE_NAMES, "x")), "must be a number or null, got 'x'"),
        (edited(meta_features=dict.fromkeys(META_FEATURE_NAMES, float("nan"))), "must be finite"),
        (edited(extra=1), r"unknown are \['extra'\]"),
        (json.dumps({"schema_version": 1}), r"missing are \['fingerprint'"),
    ],
)
def test_json_errors(text, message):
    with pytest.raises(InvalidArgumentError, match=message):
        DomainProfile.from_json(text)
