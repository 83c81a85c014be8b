"""Why a decision was taken: shares that sum to it, what would have turned it, precedents, prior; words and numbers."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn import Controller, Decision, load_controller
from metalearn.controller import network as flax_network
from metalearn.controller.attribution import FAMILY, USUAL_MOVE, WENT_BEFORE, attribute_step, path_shares
from metalearn.controller.checkpoint import flatten
from metalearn.controller.config import GROUP_CONTROLLED
from metalearn.controller.counterfactual import NOT_SIGNALS, find_counterfactual
from metalearn.controller.explanation import LIMITS, Explanation
from metalearn.controller.observation import DESCRIPTORS
from metalearn.controller.setting import Moment
from metalearn.session import Session
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, SignalFeatures
from tests.controllers import acting_controller
from tests.intervals import make_interval, make_profile, random_intervals

INTERVALS = random_intervals(11)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    return load_controller(acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors"))


def start(controller: Controller, **changes) -> Session:
    arguments = {
        "profile": make_profile(),
        "roles": ("embedding", "dense"),
        "horizon": 1000,
        "batch_size": 64,
        "family": "two_tower",
    }
    return controller.start(**(arguments | changes))


def unit_values(controller: Controller, decision: Decision) -> dict[str, float]:
    """Return the values that a decision intends, by label, in unit ranges."""
    groups, run = decision.intended
    space = controller.config.space
    named = {f"{name}[{g}]": space[name].encode(value) for g, row in enumerate(groups) for name, value in row.items()}
    return named | {name: space[name].encode(value) for name, value in run.items()}


def hand_made(controller: Controller, **weights: float) -> Controller:
    """Return a controller that moves the learning rate by the given weights of run features, and nothing else."""
    params = {name: np.zeros_like(value) for name, value in controller.checkpoint.network.items()}
    hidden = controller.config.hidden_size
    for name, weight in weights.items():
        # From run feature to hidden unit 0, through the new gate's candidate, to the learning rate's head.
        params["mix/kernel"][len(GROUP_FEATURES) + GLOBAL_FEATURES.index(name), 0] = weight
    params["recurrent/input/kernel"][0, 2 * hidden] = 1.0
    params["recurrent/input/bias"][hidden : 2 * hidden] = -60.0  # forgets what went before
    params["group_head/kernel"][0, 0] = 1.0
    return Controller(replace(controller.checkpoint, network=params))


def test_shares_of_a_product_and_a_sum_by_hand():
    # Of x y² + 3 x the Aumann-Shapley values are ∫ (t² + 3) dt = 10/3 and ∫ 2 t · t dt = 2/3.
    shares = path_shares(lambda x: x[..., :1] * x[..., 1:] ** 2 + 3 * x[..., :1], 2, segments=400)
    np.testing.assert_allclose(shares.ravel(), [10 / 3, 2 / 3], atol=1e-5)
    for segments in (1, 2, 7):
        shares = path_shares(lambda x: np.exp(x.sum(-1, keepdims=True) * x[..., :1]), 3, segments=segments)
        assert shares.sum() == pytest.approx(math.exp(3) - 1, abs=1e-12)
    # Arguments that play the same part get the same share, but for the width of the segments.
    second, third = path_shares(lambda x: np.exp(x.sum(-1, keepdims=True) * x[..., :1]), 3, segments=200)[1:, 0]
    assert second == pytest.approx(third, rel=1e-3)


@pytest.mark.parametrize("horizon", [None, 1000])
@pytest.mark.parametrize("family", [None, "two_tower"])
def test_contributions_sum_to_the_action(controller: Controller, horizon: int | None, family: str | None):
    session = start(controller, horizon=horizon, family=family)
    base = controller.checkpoint.base[controller.config.family_index(family), int(horizon is not None)].astype(float)
    before = dict(zip([f"{n}[{g}]" for g in range(2) for n in GROUP_CONTROLLED], [*base[:3]] * 2, strict=True))
    before["dropout"] = base[3]
    free = 0
    for decision in [session.ask(), *(session.tell(statistics) for statistics in INTERVALS[:6])]:
        now, explanation = unit_values(controller, decision), decision.explain()
        assert [one.label for one in explanation.attributions] == list(now)
        for one in explanation.attributions:
            assert one.action == pytest.approx(now[one.label] - before[one.label], abs=1e-9)
            assert sum(one.contributions.values()) == pytest.approx(one.action, abs=1e-9)
            if abs(one.contributions[LIMITS]) < 1e-9:
                free += 1  # then the network's own shares sum to the action
                shares = [share for name, share in one.contributions.items() if name != LIMITS]
                assert sum(shares) == pytest.approx(one.action, abs=1e-9)
            assert (FAMILY in one.contributions) == (family is not None)
            assert (WENT_BEFORE in one.contributions) == (decision.index > 1)
        before = now
    assert free > 10


def test_shares_are_integrated_gradients_of_the_flax_network(controller: Controller):
    """The oracle: gradients by JAX along the path, on a fine grid."""
    session = start(controller, family=None)
    session.tell(INTERVALS[0])
    hidden = np.array(session.state_dict()["hidden"])
    decision = session.tell(INTERVALS[1])
    _, _, group, run, *_ = session.state_dict()["past"][-1]
    config, flat, setting = controller.config, controller.checkpoint.network, session._setting
    template = flax_network.init(config, key=jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(flat["/".join(part.key for part in path)]), template
    )
    assert flatten(params).keys() == flat.keys()

    def rate(descriptors, hidden, group, run):
        observation = flax_network.Observation(
            group, run, descriptors, jnp.int32(0), jnp.asarray(setting.roles, jnp.int32), jnp.ones(2)
        )
        action, _ = flax_network.act(config, params, hidden, observation)
        return config.space["learning_rate"].max_step * jnp.tanh(action.group[0, 0]) * session.confidence

    ends = [jnp.asarray(end, jnp.float32) for end in (setting.descriptors, hidden, group, run)]
    levels = jnp.asarray((np.arange(256) + 0.5) / 256, jnp.float32)
    gradients = jax.vmap(lambda t: jax.grad(rate, argnums=(0, 1, 2, 3))(*(t * end for end in ends)))(levels)
    d, h, g, r = (np.asarray(part.mean(0) * end) for part, end in zip(gradients, ends, strict=True))
    oracle = dict(zip(DESCRIPTORS, d.tolist(), strict=True))
    oracle |= {WENT_BEFORE: h.sum()} | dict(zip(GLOBAL_FEATURES, r.tolist(), strict=True))
    oracle |= dict(zip(GROUP_FEATURES, g.sum(0).tolist(), strict=True))
    shares = dict(decision.explain().attributions[0].contributions)
    del shares[USUAL_MOVE], shares[LIMITS]
    assert len(shares) > 30 and max(map(abs, shares.values())) > 5e-3
    assert shares == pytest.approx({name: oracle[name] for name in shares}, abs=2e-4)


def test_signs_and_names_on_a_network_made_by_hand(controller: Controller):
    # Validation below its best lowers the rate; a trend upwards raises it; nothing else counts.
    session = start(hand_made(controller, validation_below_best=2.0, validation_trend=1.0))
    session.tell(make_interval(validation=0.2))
    decision = session.tell(make_interval(validation=0.02))
    one = decision.explain().attributions[0]
    active = {name for name, share in one.contributions.items() if abs(share) > 1e-12}
    assert active <= {"validation_below_best", "validation_trend", LIMITS}
    seen = session.state_dict()["past"][-1][3]
    for name in ("validation_below_best", "validation_trend"):
        scaled = seen[GLOBAL_FEATURES.index(name)]
        assert np.sign(one.contributions[name]) == np.sign(scaled)
    assert one.contributions[USUAL_MOVE] == 0.0


def test_a_counterfactual_turns_the_step_when_it_is_fed_back(controller: Controller):
    session, found = start(controller), 0
    for statistics in INTERVALS:
        hidden = np.array(session.state_dict()["hidden"])
        decision = session.tell(statistics)
        turned = decision.explain().counterfactual
        if turned is None:
            continue
        found += 1
        setting, seen = session._setting, session.state_dict()["past"][-1]
        group, run = np.array(seen[2]), np.array(seen[3])
        value = setting.labels.index(turned.label)
        was = setting.network.act(hidden, group, run, setting.context)[0].ravel()[value]
        assert np.sign(was) == turned.direction
        for change in turned.changes:
            assert change.name not in NOT_SIGNALS
            if change.group is None:
                assert run[GLOBAL_FEATURES.index(change.name)] == change.scaled
                run[GLOBAL_FEATURES.index(change.name)] = change.scaled_instead
            else:
                assert group[change.group, GROUP_FEATURES.index(change.name)] == change.scaled
                group[change.group, GROUP_FEATURES.index(change.name)] = change.scaled_instead
        now = setting.network.act(hidden, group, run, setting.context)[0].ravel()[value]
        assert np.sign(now) == -turned.direction
        assert 1 <= len(turned.changes) <= 2
        assert turned.distance == pytest.approx(
            math.hypot(*(change.scaled_instead - change.scaled for change in turned.changes))
        )
    assert found >= 5


def test_the_smallest_change_of_a_network_made_by_hand(controller: Controller):
    # The rate's action has the sign of 2 a + b of two scaled signals: a alone must go to -b / 2, b alone to -2 a.
    session = start(hand_made(controller, validation_change=2.0, loss_fast_trend=1.0))
    session.tell(make_interval(validation=0.1))
    decision = session.tell(make_interval(validation=0.11, loss_sum=25.0))
    run = session.state_dict()["past"][-1][3]
    a, b = run[GLOBAL_FEATURES.index("validation_change")], run[GLOBAL_FEATURES.index("loss_fast_trend")]
    turned = decision.explain().counterfactual
    assert turned is not None
    (change,) = turned.changes
    assert turned.direction == np.sign(2 * a + b)
    assert change.name == "validation_change" and change.measured == pytest.approx(0.01 / 0.11)
    assert change.scaled_instead == pytest.approx(-b / 2, abs=1e-3)
    knots = controller.checkpoint.normalizer.run[GLOBAL_FEATURES.index("validation_change")].astype(float)
    assert change.instead == pytest.approx(np.interp(change.scaled_instead, np.linspace(-1, 1, 17), knots), rel=1e-6)
    assert "it would have gone the other way had validation_change been" in decision.explain().sentence


def test_two_signals_turn_what_one_cannot(controller: Controller):
    # Each signal is varied within ± 1: at (1, 1, 1) none of three equal ones turns the sum, two do.
    names = ("validation_change", "loss_fast_trend", "validation_trend")
    session = start(hand_made(controller, **dict.fromkeys(names, 1.0)))
    session.tell(make_interval(validation=0.1))
    session.tell(make_interval(validation=0.2, loss_sum=45.0))
    setting, run = session._setting, np.zeros(len(GLOBAL_FEATURES))
    run[[GLOBAL_FEATURES.index(name) for name in names]] = 1.0
    group, hidden = np.zeros((2, len(GROUP_FEATURES))), np.zeros((2, setting.network.hidden_size))
    action = setting.network.act(hidden, group, run, setting.context)
    moment = Moment(hidden, group, run, SignalFeatures(group, run), action[0], action[1], 1.0)
    turned = find_counterfactual(setting, moment)
    assert turned is not None and turned.direction == 1
    assert len(turned.changes) == 2 and {change.name for change in turned.changes} <= set(names)
    # The nearest point of a + b + 1 = 0 to (1, 1) is (-½, -½), 1.5 √2 away; the grid finds it but for its width.
    assert turned.distance == pytest.approx(1.5 * math.sqrt(2), rel=0.05)


def test_what_never_moves_has_no_counterfactual(controller: Controller):
    session = start(hand_made(controller))
    explanation = session.tell(INTERVALS[0]).explain()
    assert explanation.counterfactual is None
    assert explanation.attributions[0].action == 0.0
    assert "left the learning rate of group 0 at what it was" in explanation.sentence


def test_similar_decisions_are_the_nearest_earlier_ones(controller: Controller):
    session = start(controller)
    assert session.ask().explain().similar == ()
    for statistics in INTERVALS[:8]:
        decision = session.tell(statistics)
    past = session.state_dict()["past"]
    seen = np.array([[*np.mean(one[2], axis=0), *one[3]] for one in past])
    distance = np.sqrt(np.square(seen[:-1] - seen[-1]).mean(1))
    similar = decision.explain().similar
    assert [one.index for one in similar] == [1 + int(i) for i in np.argsort(distance)[:3]]
    for one in similar:
        assert one.distance == pytest.approx(distance[one.index - 1])
        led_to = past[one.index][5]
        assert one.validation_change == (None if math.isnan(led_to) else led_to)
    for statistics in random_intervals(2, count=40):
        session.tell(statistics)
    assert len(session.state_dict()["past"]) == 32


def test_the_prior_and_the_domain_make_up_the_value(controller: Controller):
    session = start(controller)
    for decision in [session.ask(), *(session.tell(statistics) for statistics in INTERVALS[:4])]:
        values = {f"{name}[{g}]": v for g, row in enumerate(decision.groups) for name, v in row.items()} | decision.run
        for share in decision.explain().prior:
            assert share.value == pytest.approx(values[share.label])
            assert 0 <= share.gate <= 1 and -1 <= share.modifier <= 1
            if share.domain_factor is not None and share.run_factor is not None:
                assert share.base * share.domain_factor * share.run_factor == pytest.approx(share.value)
        (rate,) = [share for share in decision.explain().prior if share.label == "learning_rate[1]"]
        reach = controller.config.reach[0].start
        assert rate.domain_shift == pytest.approx(rate.gate * rate.modifier * reach * session.confidence)
        assert rate.base == pytest.approx(0.006)


def test_an_explanation_is_words_and_numbers_and_is_kept_on_demand(controller: Controller):
    session = start(controller)
    for statistics in INTERVALS[:3]:
        decision = session.tell(statistics)
    explanation = decision.explain()
    assert decision.explain() is explanation and str(explanation) == explanation.sentence
    assert explanation.sentence.startswith(f"At step {decision.step} the controller ")
    assert explanation.sentence.endswith(".") and "learning rate of group" in explanation.sentence
    assert "no outcome model" in explanation.sentence and explanation.expected is None
    assert Explanation.from_dict(json.loads(json.dumps(explanation.as_dict()))).as_dict() == explanation.as_dict()
    assert "explanation" not in decision.as_dict()
    kept = Decision.from_dict(json.loads(json.dumps(decision.as_dict(explanation=True))))
    assert kept.explain().as_dict() == explanation.as_dict()
    for lost in (Decision.from_dict(decision.as_dict()), pickle.loads(pickle.dumps(decision))):
        assert lost == decision and not lost.explain().recorded
        assert "explanation of decision 3 was not recorded" in lost.explain().sentence


def test_far_from_the_training_range_nothing_moved_it(controller: Controller):
    session = start(controller, profile=make_profile(size=1e4))
    for decision in (session.ask(), session.tell(INTERVALS[0])):
        explanation = decision.explain()
        assert all(set(one.contributions.values()) == {0.0} for one in explanation.attributions)
        assert explanation.counterfactual is None


def test_the_explanation_is_of_what_the_controller_would_have_done(controller: Controller):
    frozen = start(controller)
    control = start(controller)
    frozen.switch("frozen")
    mine, other = frozen.tell(INTERVALS[0]), control.tell(INTERVALS[0])
    assert [one.action for one in mine.explain().attributions] == [one.action for one in other.explain().attributions]


def test_attribution_leaves_out_what_may_not_be_changed(controller: Controller):
    session = start(
        controller,
        withheld=[("weight_decay",), ()],
        space=controller.config.space.subset(["learning_rate", "weight_decay"]),
    )
    labels = [one.label for one in session.tell(INTERVALS[0]).explain().attributions]
    assert labels == ["learning_rate[0]", "learning_rate[1]", "weight_decay[1]"]


def test_at_the_median_of_everything_only_rest_is_left(controller: Controller):
    session = start(controller, family=None)
    setting = replace(session._setting, descriptors=np.zeros(len(DESCRIPTORS)))
    group, run = np.zeros((2, len(GROUP_FEATURES))), np.zeros(len(GLOBAL_FEATURES))
    moment = Moment(
        np.zeros((2, setting.network.hidden_size)), group, run, SignalFeatures(group, run), group[:, :3], run[:1], 1.0
    )
    contributions, step = attribute_step(setting, moment)
    assert list(contributions) == [USUAL_MOVE]
    np.testing.assert_array_equal(contributions[USUAL_MOVE], step)


def test_nothing_is_explained_before_it_is_asked(controller: Controller, monkeypatch: pytest.MonkeyPatch):
    session, calls, act = start(controller), [], controller.network.act
    monkeypatch.setattr(controller.network, "act", lambda *arguments: calls.append(0) or act(*arguments))
    decision = session.tell(INTERVALS[0])
    assert len(calls) == 1
    decision.explain()
    assert len(calls) > 2
