"""Cues: while validation rises by much the rate is raised; by how much is memorised the decay is raised or lowered."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import numpy as np
import pytest

from metalearn import Controller, load_controller
from metalearn.controller.config import DEFAULT_REACH, ControllerConfig
from metalearn.controller.cues import ACTION, DEAD_BAND
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.release import with_cues
from metalearn.session import Session
from metalearn.signals import IntervalStatistics
from tests.intervals import make_interval, make_profile, random_intervals

FAMILY = "self_attention"
TREND, GAP = "validation_trend", "generalization_gap"
RISING = [0.02, 0.03, 0.06, 0.09, 0.12, 0.13, 0.14, 0.14]
FLAT = [0.1, 0.11, 0.12, 0.115, 0.118, 0.12, 0.119, 0.118]
FACTOR = math.exp(math.tanh(ACTION) * 0.06 * math.log(1e5))
"""Of one decision: the largest step of rate and decay is 0.06 of their range of five decades."""


@pytest.fixture(scope="module")
def controller() -> Controller:
    return Controller(with_cues(load_controller().checkpoint, [FAMILY]))


def start(controller: Controller, **changes) -> Session:
    arguments = {"profile": make_profile(), "family": FAMILY, "batch_size": 64, "interval": 50}
    return controller.start(**(arguments | changes))


def interval(index: int = 0, *, validation: float = 0.1, gap: float = math.nan) -> IntervalStatistics:
    """Return one whose training loss has fallen by 0.05 an interval since it was 1; of that a share is memorised."""
    fallen = 0.05 * index
    losses = {"training_sample_loss": 1.0 - fallen, "validation_loss": 1.0 - fallen + gap * fallen}
    return make_interval(1, validation=validation, **losses)


def in_force(session: Session, name: str, intervals: Iterable[IntervalStatistics]) -> list[float]:
    decisions = [session.ask(), *(session.tell(one) for one in intervals)]
    assert all(decision.status in ("applied", "limited") for decision in decisions)
    return [decision.groups[0][name] for decision in decisions]


def rates(session: Session, validations: list[float]) -> list[float]:
    return in_force(session, "learning_rate", (interval(validation=value) for value in validations))


def decays(session: Session, gaps: list[float]) -> list[float]:
    return in_force(session, "weight_decay", (interval(index, gap=gap) for index, gap in enumerate(gaps)))


def test_the_rate_rises_with_validation_up_to_its_trust_region(controller: Controller):
    session = start(controller)
    before = session.ask()
    row = controller.config.family_index(FAMILY)
    base = controller.config.space["learning_rate"].decode(float(controller.checkpoint.base[row, 0, 0]))
    found = rates(session, RISING)
    assert found[0] == pytest.approx(base)
    steps = np.diff(np.log(found))
    assert (steps >= 0.0).all()
    first = int(np.argmax(steps > 0.0))
    assert steps[first] == pytest.approx(math.log(FACTOR), rel=1e-6)
    largest = controller.config.space["learning_rate"]
    reach = math.exp(DEFAULT_REACH["learning_rate"].high * math.log(largest.high / largest.low))
    assert found[-1] == pytest.approx(base * reach, rel=1e-6)
    after = session.ask()
    assert {**after.groups[0], "learning_rate": 0.0} == {**before.groups[0], "learning_rate": 0.0}
    assert after.run == before.run


@pytest.mark.parametrize("validations", [FLAT, FLAT[::-1], [math.nan] * 8, [-0.7, -0.6, -0.55, -0.54]])
def test_without_the_cue_the_run_is_its_base(controller: Controller, validations: list[float]):
    assert len(set(rates(start(controller), validations))) == 1


def test_the_start_is_the_base_whatever_the_domain(controller: Controller):
    starts = [start(controller, profile=make_profile(seed, size=size)).ask() for seed, size in ((0, 3.0), (1, 5.0))]
    assert starts[0].groups == starts[1].groups
    assert {decision.confidence for decision in starts} == {1.0}
    assert starts[0].reasons == (f"start: base configuration, from which learning_rate of {FAMILY} models go by cues",)


def test_a_decision_by_the_cue_is_explained_by_it(controller: Controller):
    session = start(controller)
    decisions = [session.tell(interval(validation=value)) for value in RISING[:5]]
    raised = next(d for d, before in zip(decisions[1:], decisions, strict=False) if d.groups != before.groups)
    assert any(reason.startswith(f"{TREND} moved the learning rate's step by") for reason in raised.reasons)
    (rate,) = [one for one in raised.explain().as_dict()["attributions"] if one["label"] == "learning_rate[0]"]
    assert rate["factor"] == pytest.approx(FACTOR)
    moved = {name: share for name, share in rate["contributions"].items() if abs(share) > 1e-12}
    assert moved == {TREND: pytest.approx(rate["action"])}


def test_it_resumes_to_the_bit(controller: Controller):
    whole, cut = start(controller), start(controller)
    intervals = [interval(validation=value) for value in RISING]
    expected = [whole.tell(one) for one in intervals]
    for one in intervals[:4]:
        cut.tell(one)
    again = start(controller)
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert [again.tell(one).as_dict() for one in intervals[4:]] == [d.as_dict() for d in expected[4:]]


def test_other_families_decide_what_they_decided(controller: Controller):
    shipped = load_controller()
    for family in {None, *controller.config.families} - {FAMILY}:
        ours, theirs = (start(one, family=family, roles=("embedding", "dense")) for one in (controller, shipped))
        for one in random_intervals(3):
            assert ours.tell(one).as_dict() == theirs.tell(one).as_dict()


def test_where_the_rate_rises_is_in_the_checkpoint():
    shipped = load_controller().checkpoint
    low, high = (Controller(with_cues(shipped, [FAMILY], at=above)) for above in (0.2, 0.45))
    first = [int(np.argmax(np.diff(rates(start(one), RISING)) > 0.0)) for one in (low, high)]
    assert first[0] < first[1]
    assert low.fingerprint != high.fingerprint
    lowest = start(Controller(with_cues(shipped, [FAMILY], at=1e-3)))
    assert len(set(rates(lowest, [math.nan] * 4))) == 1  # what is not measured does not rise
    with pytest.raises(InvalidArgumentError, match="`cue_above` must be a positive number, got 0"):
        with_cues(shipped, [FAMILY], at=0.0)


def test_only_a_family_at_rest_goes_by_the_cue():
    with pytest.raises(InvalidArgumentError, match=r"`cued` must be among those at rest, \('one',\), got \('two',\)"):
        ControllerConfig(descriptors=("a",), families=("one", "two"), at_rest=("one",), cued=("two",))
    shipped = load_controller().checkpoint
    with pytest.raises(InvalidArgumentError, match="must be among those at rest"):
        with_cues(shipped, ["matrix_factorization"])
    after = with_cues(shipped, [FAMILY], domains=["one"])
    assert after.provenance["cued"] == {"families": [FAMILY], "domains": ["one"]}
    assert with_cues(after, []).config.cued == ()


@pytest.fixture(scope="module")
def weighing() -> Controller:
    """One whose weight decay goes by what is memorised, and whose rate does not go by a cue."""
    checkpoint = with_cues(with_cues(load_controller().checkpoint, []), [FAMILY], moves="weight_decay")
    return Controller(checkpoint)


@pytest.mark.parametrize(("gap", "reach"), [(0.1, "low"), (-0.5, "low"), (1.0, "high"), (40.0, "high")])
def test_the_decay_goes_by_what_is_memorised_up_to_its_trust_region(weighing: Controller, gap: float, reach: str):
    session = start(weighing)
    before = session.ask()
    found = decays(session, [gap] * 8)
    steps = np.diff(np.log(found))
    assert steps[0] == 0.0  # nothing has fallen yet
    assert steps[1] == pytest.approx(math.log(FACTOR) * (1 if reach == "high" else -1), rel=1e-6)
    decay = weighing.config.space["weight_decay"]
    furthest = getattr(DEFAULT_REACH["weight_decay"], reach) * math.log(decay.high / decay.low)
    assert math.log(found[-1] / found[0]) == pytest.approx(furthest, rel=1e-6)
    after = session.ask()
    assert {**after.groups[0], "weight_decay": 0.0} == {**before.groups[0], "weight_decay": 0.0}
    assert after.run == before.run
    assert before.reasons == (f"start: base configuration, from which weight_decay of {FAMILY} models go by cues",)


@pytest.mark.parametrize("gap", [math.nan, 0.7 - 0.9 * DEAD_BAND, 0.7 + 0.9 * DEAD_BAND])
def test_the_decay_stays_where_nothing_is_told_or_the_gap_is_about_right(weighing: Controller, gap: float):
    assert len(set(decays(start(weighing), [gap] * 6))) == 1


def test_where_the_rate_decays_the_weight_decay_does_not_move(weighing: Controller):
    decaying, held = (start(weighing, horizon=1000, decays=falls) for falls in (True, False))
    assert decaying.ask().reasons[0].startswith("start: base configuration, which is all that")
    before = decaying.ask().groups
    assert all(decaying.tell(interval(index, gap=1.2)).groups == before for index in range(4))
    assert len(set(decays(held, [1.2] * 4))) == 4


def test_losses_are_read_where_the_decay_goes_by_them(weighing: Controller, controller: Controller):
    assert start(weighing).reads_losses
    others = [start(controller), start(weighing, family="click_model"), start(weighing, family="matrix_factorization")]
    assert not any(session.reads_losses for session in (*others, start(weighing, horizon=1000, decays=True)))


def test_the_decay_comes_back_when_the_gap_does(weighing: Controller):
    found = decays(start(weighing), [0.7, 1.2, 1.2, 0.7, 0.2, 0.2, 0.7])
    base = found[0]
    assert found[3] == found[4] == pytest.approx(base * FACTOR**2)
    assert found[-1] == pytest.approx(base)


def test_a_decision_by_the_gap_is_explained_by_it(weighing: Controller):
    session = start(weighing)
    session.tell(interval(0))
    decision = session.tell(interval(1, gap=1.5))
    assert any(reason.startswith(f"{GAP} moved the weight decay's step by") for reason in decision.reasons)
    (decay,) = [one for one in decision.explain().as_dict()["attributions"] if one["label"] == "weight_decay[0]"]
    moved = {name: share for name, share in decay["contributions"].items() if abs(share) > 1e-12}
    assert moved == {GAP: pytest.approx(decay["action"])}


def test_a_family_may_go_by_both_cues():
    both = Controller(with_cues(load_controller().checkpoint, [FAMILY], moves="weight_decay"))
    session = start(both)
    before = session.ask().groups[0]
    for index, validation in enumerate(RISING):
        after = session.tell(interval(index, validation=validation, gap=0.1)).groups[0]
    assert after["learning_rate"] > before["learning_rate"]
    assert after["weight_decay"] < before["weight_decay"]


def test_a_state_of_before_losses_were_reported_goes_on(weighing: Controller):
    whole, again = start(weighing), start(weighing)
    whole.tell(interval())
    state = json.loads(json.dumps(whole.state_dict()))
    del state["history"]["training_sample_loss_first"]
    again.load_state_dict(state)
    assert decays(again, [1.2] * 4)[-1] > whole.ask().groups[0]["weight_decay"]
