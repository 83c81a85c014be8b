"""The guard: each rule, their order, and that nothing gets through whatever is proposed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metalearn.errors import InvalidArgumentError
from metalearn.safety import (
    OVERRIDE_RULES,
    RULES,
    Acceptance,
    Bar,
    GuardConfig,
    GuardState,
    Proposal,
    Region,
    after_decision,
    after_rollback,
    judge,
)

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


@pytest.mark.parametrize(
    ("proposed", "was"),
    [
        (np.array([0.5, 0.5]), "float64 of shape (2,)"),
        (np.array([[0.5, 0.5, 0.5]]), "float64 of shape (1, 3)"),
        (np.array([0.5, 0.5, 0.5j]), "complex128 of shape (3,)"),
        (np.array([True, False, True]), "bool of shape (3,)"),
        (np.array(["0.5", "0.5", "0.5"]), "<U3 of shape (3,)"),
    ],
)
def test_what_is_not_a_number_for_each_value_holds_everything(proposed: np.ndarray, was: str):
    verdict = judge(replace(make_proposal([0.5, 0.5, 0.5]), proposed=proposed))
    assert verdict.status == "held"
    assert verdict.values.tolist() == [0.5, 0.5, 0.5]
    assert verdict.reasons == (f"held: the proposal was {was}, not 3 numbers",)


def test_what_is_withheld_does_not_move():
    verdict = judge(make_proposal([0.55, 0.45, 0.55], free=np.array([True, False, True])))
    assert verdict.status == "limited"
    assert verdict.values.tolist() == [0.55, 0.5, 0.55]
    assert verdict.reasons == ("held beta1[0]: not to be moved",)
    assert judge(make_proposal([0.55, 0.5, 0.5], free=np.array([True, False, True]))).status == "applied"


def test_a_barred_direction_is_held_and_the_other_is_free():
    bars = (Bar(0, 1, 3), Bar(1, 1, 2), Bar(2, -1, 9))
    verdict = judge(make_proposal([0.55, 0.45, 0.5], bars=bars))
    assert verdict.values.tolist() == [0.5, 0.45, 0.5]
    assert verdict.reasons == ("held learning_rate[0]: this direction is barred, for 3 decisions at most",)
    # A human may go where the policy may not.
    assert judge(make_proposal([0.55, 0.45, 0.5], bars=bars), OVERRIDE_RULES).status == "applied"


def test_largest_deviation_from_the_base():
    # The start lies 0.1 above the base of 0.4: its trust region of 0.2 alone would allow 0.7.
    region = Region(np.full(3, 0.15), np.full(3, 0.65))
    verdict = judge(make_proposal([0.69, 0.5, 0.5], current=[0.64, 0.5, 0.5], deviation=region))
    assert verdict.values.tolist() == [0.65, 0.5, 0.5]
    assert verdict.reasons == ("limited learning_rate[0]: largest deviation from the base",)


def test_caps_of_the_user():
    verdict = judge(make_proposal([0.5, 0.45, 0.56], caps=Region(np.array([0, 0.48, 0]), np.array([1, 1, 0.52]))))
    assert verdict.values.tolist() == [0.5, 0.48, 0.52]
    assert verdict.reasons == ("limited beta1[0], dropout: caps set by the user",)


@pytest.mark.parametrize(
    ("risk", "status"), [(0.0, "applied"), (0.5, "applied"), (0.51, "rejected"), (math.nan, "rejected")]
)
def test_acceptance_weighs_the_risk(risk: float, status: str):
    asked = []

    def weigh(values: np.ndarray, tolerance: float) -> float:
        asked.append((values.tolist(), tolerance))
        return risk

    rules = GuardConfig(acceptance=Acceptance(tolerance=0.02, max_risk=0.5)).rules
    verdict = judge(make_proposal([0.55, 0.5, 0.7], risk=weigh), rules)
    assert asked == [([0.55, 0.5, 0.6], 0.02)]  # what the other rules let through
    assert verdict.status == ("limited" if status == "applied" else status)
    if status == "rejected":
        assert verdict.values.tolist() == [0.5, 0.5, 0.5]
        assert verdict.rejected is not None and verdict.rejected.tolist() == [0.55, 0.5, 0.6]
        assert (
            verdict.reasons[-1] == f"rejected: with probability {risk:.2f} it ends over 2 % worse than without a change"
        )


def test_acceptance_abstains_without_a_model_and_where_nothing_changes():
    rules = GuardConfig(acceptance=Acceptance()).rules
    assert judge(make_proposal([0.55, 0.5, 0.5]), rules).status == "applied"

    def never(values: np.ndarray, tolerance: float) -> float:
        raise AssertionError("asked about no change")

    assert judge(make_proposal([0.5, 0.5, 0.5], risk=never), rules).status == "applied"


def test_a_rollback_bars_the_move_and_halves_the_step():
    state = after_rollback(GuardState(), np.array([0.1, 0.0, -0.1]), GuardConfig(cool_down=3))
    assert state == GuardState(bars=(Bar(0, 1, 3), Bar(2, -1, 3)), step_scale=0.5, rollbacks=1)
    proposal, config = make_proposal([0.5, 0.5, 0.5]), GuardConfig()
    seen = []
    for _ in range(9):
        state = after_decision(state, proposal, judge(proposal), config)
        seen.append((len(state.bars), state.step_scale))
    assert [bars for bars, _ in seen] == [2, 2, 0, 0, 0, 0, 0, 0, 0]
    assert [scale for _, scale in seen[:2]] == pytest.approx([0.55, 0.605])
    assert seen[-1] == (0, 1.0)
    assert state.rollbacks == 1


def test_what_was_barred_and_halved_before_outlives_the_way_back():
    first = after_rollback(GuardState(), np.array([0.1, 0.0, 0.0]), GuardConfig())
    again = after_rollback(GuardState(), np.array([0.0, -0.1, 0.0]), GuardConfig(), erased=first)
    assert again == GuardState(bars=(Bar(0, 1, 5), Bar(1, -1, 5)), step_scale=0.25, rollbacks=2)
    for _ in range(9):
        again = after_rollback(GuardState(), np.zeros(3), GuardConfig(), erased=again)
    assert again.step_scale == 1 / 16
    assert GuardState.from_dict(json.loads(json.dumps(again.as_dict()))) == again


def test_a_limited_direction_cools_down_and_comes_back():
    config, state = GuardConfig(limit_cool_down=2), GuardState()
    statuses = []
    for _ in range(7):
        proposal = make_proposal([0.65, 0.5, 0.5], bars=state.bars)
        verdict = judge(proposal, config.rules)
        statuses.append(float(verdict.values[0]))
        state = after_decision(state, proposal, verdict, config)
    # Limited, then barred for two decisions although the policy goes on asking, then limited again.
    assert statuses == pytest.approx([0.6, 0.5, 0.5, 0.6, 0.5, 0.5, 0.6])
    assert after_decision(GuardState(), proposal, judge(proposal), GuardConfig()) == GuardState()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deviation": {"learning_rate": -0.1}}, "`deviation` of learning_rate must be at least 0, got -0.1"),
        ({"caps": {"dropout": (0.5, 0.1)}}, r"`caps` of dropout must be \(lowest, highest\), got \(0.5, 0.1\)"),
        ({"cool_down": -1}, "`cool_down` must be an int of at least 0, got -1"),
        ({"limit_cool_down": 1.5}, "`limit_cool_down` must be an int"),
    ],
)
def test_bad_limits_are_named(arguments: dict, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        GuardConfig(**arguments)
    with pytest.raises(InvalidArgumentError, match="`max_risk` must be at least 0 and less than 1"):
        Acceptance(max_risk=1.5)


def test_order_of_the_rules():
    assert [rule.__name__ for rule in RULES] == [
        "finite_loss",
        "real_numbers",
        "finite_values",
        "mask",
        "cool_down",
        "kept_constraints",
        "largest_step",
        "trust_region",
        "largest_deviation",
        "caps",
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
    free=hnp.arrays(np.bool_, 3),
    directions=hnp.arrays(np.int64, 3, elements=st.integers(-1, 1)),
    cap=hnp.arrays(np.float64, (2, 3), elements=st.floats(0, 0.5)),
)
def test_whatever_is_proposed_the_result_is_safe(
    proposed, start, low, high, share, max_step, nonfinite_steps, free, directions, cap
):
    region = np.clip(start + low, 0, 1), np.clip(start + high, 0, 1)
    current = region[0] + share * (region[1] - region[0])
    caps = Region(current - cap[0], current + cap[1])
    proposal = make_proposal(
        proposed,
        start=start,
        low=low,
        high=high,
        current=current,
        max_step=max_step,
        nonfinite_steps=nonfinite_steps,
        free=free,
        bars=tuple(Bar(i, int(d), 1) for i, d in enumerate(directions) if d),
        caps=caps,
    )
    verdict = judge(proposal)
    moved = verdict.values - current
    assert (moved[~free] == 0).all()
    assert (moved * directions <= 1e-12).all()
    assert ((verdict.values >= caps.low - 1e-12) & (verdict.values <= caps.high + 1e-12)).all()
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
