"""The guard: each rule, their order, and that nothing gets through whatever is proposed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metalearn.safety import RULES, Proposal, judge

LABELS = ("learning_rate[0]", "beta1[0]", "dropout")


def make_proposal(proposed: list[float] | np.ndarray, **changes) -> Proposal:
    """Return a proposal of three values at 0.5, with steps of 0.1 and a trust region of 0.2 around the start at 0.5."""
    fields = {
        "labels": LABELS,
        "current": np.full(3, 0.5),
        "proposed": np.asarray(proposed, np.float64),
        "start": np.full(3, 0.5),
        "low": np.full(3, -0.2),
        "high": np.full(3, 0.2),
        "max_step": np.full(3, 0.1),
        "nonfinite_steps": 0.0,
    }
    return Proposal(**(fields | {k: np.asarray(v) if isinstance(v, list) else v for k, v in changes.items()}))


def test_what_is_allowed_is_applied_untouched():
    proposed = [0.55, 0.4, 0.5]
    verdict = judge(make_proposal(proposed))
    assert (verdict.status, verdict.reasons) == ("applied", ())
    assert verdict.values.tolist() == proposed


def test_losses_that_are_not_finite_hold_everything():
    verdict = judge(make_proposal([0.55, math.nan, 9.0], nonfinite_steps=3.0))
    assert verdict.status == "held"
    assert verdict.values.tolist() == [0.5, 0.5, 0.5]
    assert verdict.reasons == ("held: 3 steps of the interval had a loss that was not finite",)


@pytest.mark.parametrize("unknown", [0.0, math.nan])
def test_no_bad_steps_or_an_unknown_number_of_them_holds_nothing(unknown: float):
    assert judge(make_proposal([0.55, 0.5, 0.5], nonfinite_steps=unknown)).status == "applied"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_held_each_for_itself(bad: float):
    verdict = judge(make_proposal([bad, 0.55, bad]))
    assert verdict.status == "limited"
    assert verdict.values.tolist() == [0.5, 0.55, 0.5]
    assert verdict.reasons == ("held learning_rate[0], dropout: proposal was not finite",)


def test_largest_step():
    verdict = judge(make_proposal([0.65, 0.45, 0.3]))
    assert verdict.status == "limited"
    np.testing.assert_allclose(verdict.values, [0.6, 0.45, 0.4])
    assert verdict.reasons == ("limited learning_rate[0], dropout: largest step of one decision",)


def test_trust_region_around_the_start():
    verdict = judge(make_proposal([0.75, 0.25, 0.7], current=[0.68, 0.32, 0.68]))
    assert verdict.status == "limited"
    np.testing.assert_allclose(verdict.values, [0.7, 0.3, 0.7])
    assert verdict.reasons == ("limited learning_rate[0], beta1[0]: trust region around the base",)


def test_bounds_of_the_space():
    changes = {"start": [0.95, 0.05, 0.5], "current": [0.95, 0.05, 0.5]}
    verdict = judge(make_proposal([1.04, -0.04, 0.5], **changes))
    assert verdict.status == "limited"
    assert verdict.values.tolist() == [1.0, 0.0, 0.5]
    assert verdict.reasons == ("limited learning_rate[0], beta1[0]: bounds of the space",)


def test_order_of_the_rules():
    assert [rule.__name__ for rule in RULES] == [
        "finite_loss",
        "finite_values",
        "largest_step",
        "trust_region",
        "bounds",
    ]
    # A wild proposal near the bound: limited by the step first, then by the region, then by the bound.
    changes = {"start": [0.95, 0.5, 0.5], "current": [0.95, 0.65, 0.5], "high": [0.06, 0.2, 0.2]}
    verdict = judge(make_proposal([7.0, 7.0, math.nan], **changes))
    np.testing.assert_allclose(verdict.values, [1.0, 0.7, 0.5])
    assert verdict.reasons == (
        "held dropout: proposal was not finite",
        "limited learning_rate[0], beta1[0]: largest step of one decision",
        "limited learning_rate[0], beta1[0]: trust region around the base",
        "limited learning_rate[0]: bounds of the space",
    )


def test_each_rule_sees_what_the_one_before_let_through():
    seen = []

    def spy(proposal: Proposal) -> tuple[np.ndarray, str | None]:
        seen.append(proposal.proposed.tolist())
        return proposal.proposed + 1.0, None

    verdict = judge(make_proposal([0.0, 0.0, 0.0]), rules=[spy, spy])
    assert seen == [[0.0] * 3, [1.0] * 3]
    assert verdict.values.tolist() == [2.0] * 3


def test_rounding_at_a_bound_is_no_intervention():
    verdict = judge(make_proposal([0.6 + 1e-15, 0.4 - 1e-15, 0.5]))
    assert verdict.status == "applied"


def test_arguments_are_not_changed():
    proposal = make_proposal([math.nan, 9.0, -9.0])
    before = {name: np.copy(value) for name, value in vars(proposal).items() if isinstance(value, np.ndarray)}
    judge(proposal)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(proposal, name), value)


@given(
    proposed=hnp.arrays(np.float64, 3, elements=st.floats()),
    start=hnp.arrays(np.float64, 3, elements=st.floats(0, 1)),
    low=hnp.arrays(np.float64, 3, elements=st.floats(-0.5, 0)),
    high=hnp.arrays(np.float64, 3, elements=st.floats(0, 0.5)),
    share=hnp.arrays(np.float64, 3, elements=st.floats(0, 1)),
    max_step=hnp.arrays(np.float64, 3, elements=st.floats(0, 0.3)),
    nonfinite_steps=st.floats(),
)
def test_whatever_is_proposed_the_result_is_safe(proposed, start, low, high, share, max_step, nonfinite_steps):
    region = np.clip(start + low, 0, 1), np.clip(start + high, 0, 1)
    current = region[0] + share * (region[1] - region[0])
    proposal = make_proposal(
        proposed, start=start, low=low, high=high, current=current, max_step=max_step, nonfinite_steps=nonfinite_steps
    )
    verdict = judge(proposal)
    assert np.isfinite(verdict.values).all()
    assert ((verdict.values >= 0) & (verdict.values <= 1)).all()
    assert (np.abs(verdict.values - current) <= max_step + 1e-12).all()
    assert ((verdict.values >= region[0] - 1e-12) & (verdict.values <= region[1] + 1e-12)).all()
    assert (verdict.status == "applied") == (verdict.reasons == ())
    if verdict.status == "applied":
        np.testing.assert_allclose(verdict.values, proposed, rtol=0, atol=4e-9)
    if nonfinite_steps > 0:
        assert verdict.status == "held"
        np.testing.assert_array_equal(verdict.values, current)
