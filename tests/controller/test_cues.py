"""The cue: while validation rises by much the rate is raised, up to its trust region; else the run is its base."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from metalearn import Controller, load_controller
from metalearn.controller.config import DEFAULT_REACH, ControllerConfig
from metalearn.controller.cues import CUE, RAISE
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.release import with_cues
from metalearn.session import Session
from tests.intervals import make_interval, make_profile, random_intervals

FAMILY = "self_attention"
RISING = [0.02, 0.03, 0.06, 0.09, 0.12, 0.13, 0.14, 0.14]
FLAT = [0.1, 0.11, 0.12, 0.115, 0.118, 0.12, 0.119, 0.118]
FACTOR = math.exp(math.tanh(RAISE) * 0.06 * math.log(1e5))
"""Of one decision: the largest step of the rate is 0.06 of its range of five decades."""


@pytest.fixture(scope="module")
def controller() -> Controller:
    return Controller(with_cues(load_controller().checkpoint, [FAMILY]))


def start(controller: Controller, **changes) -> Session:
    arguments = {"profile": make_profile(), "family": FAMILY, "batch_size": 64, "interval": 50}
    return controller.start(**(arguments | changes))


def rates(session: Session, validations: list[float]) -> list[float]:
    decisions = [session.ask(), *(session.tell(make_interval(1, validation=value)) for value in validations)]
    assert all(decision.status in ("applied", "limited") for decision in decisions)
    return [decision.groups[0]["learning_rate"] for decision in decisions]


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
    assert starts[0].reasons == (
        f"start: base configuration, from which this controller raises the rate of {FAMILY} models on a cue",
    )


def test_a_decision_by_the_cue_is_explained_by_it(controller: Controller):
    session = start(controller)
    decisions = [session.tell(make_interval(1, validation=value)) for value in RISING[:5]]
    raised = next(d for d, before in zip(decisions[1:], decisions, strict=False) if d.groups != before.groups)
    assert any(reason.startswith(f"{CUE} moved the learning rate's step by") for reason in raised.reasons)
    (rate,) = [one for one in raised.explain().as_dict()["attributions"] if one["label"] == "learning_rate[0]"]
    assert rate["factor"] == pytest.approx(FACTOR)
    moved = {name: share for name, share in rate["contributions"].items() if abs(share) > 1e-12}
    assert moved == {CUE: pytest.approx(rate["action"])}


def test_it_resumes_to_the_bit(controller: Controller):
    whole, cut = start(controller), start(controller)
    intervals = [make_interval(1, validation=value) for value in RISING]
    expected = [whole.tell(interval) for interval in intervals]
    for interval in intervals[:4]:
        cut.tell(interval)
    again = start(controller)
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert [again.tell(interval).as_dict() for interval in intervals[4:]] == [d.as_dict() for d in expected[4:]]


def test_other_families_decide_what_they_decided(controller: Controller):
    shipped = load_controller()
    for family in {None, *controller.config.families} - {FAMILY}:
        ours, theirs = (start(one, family=family, roles=("embedding", "dense")) for one in (controller, shipped))
        for interval in random_intervals(3):
            assert ours.tell(interval).as_dict() == theirs.tell(interval).as_dict()


def test_where_the_rate_rises_is_in_the_checkpoint():
    shipped = load_controller().checkpoint
    low, high = (Controller(with_cues(shipped, [FAMILY], above=above)) for above in (0.2, 0.45))
    first = [int(np.argmax(np.diff(rates(start(one), RISING)) > 0.0)) for one in (low, high)]
    assert first[0] < first[1]
    assert low.fingerprint != high.fingerprint
    lowest = start(Controller(with_cues(shipped, [FAMILY], above=1e-3)))
    assert len(set(rates(lowest, [math.nan] * 4))) == 1  # what is not measured does not rise
    with pytest.raises(InvalidArgumentError, match="`cue_above` must be a positive number, got 0"):
        with_cues(shipped, [FAMILY], above=0.0)


def test_only_a_family_at_rest_goes_by_the_cue():
    with pytest.raises(InvalidArgumentError, match=r"`cued` must be among those at rest, \('one',\), got \('two',\)"):
        ControllerConfig(descriptors=("a",), families=("one", "two"), at_rest=("one",), cued=("two",))
    shipped = load_controller().checkpoint
    with pytest.raises(InvalidArgumentError, match="must be among those at rest"):
        with_cues(shipped, ["matrix_factorization"])
    after = with_cues(shipped, [FAMILY], domains=["one"])
    assert after.provenance["cued"] == {"families": [FAMILY], "domains": ["one"]}
    assert with_cues(after, []).config.cued == ()
