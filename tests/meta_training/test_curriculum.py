"""The curriculum: every second group of a domain repeats the one before it; what differs is the domain's progress."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from metalearn.controller import ControllerConfig
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.curriculum import Curriculum, Pick
from metalearn.meta_training.loop import iteration_chunks
from metalearn.meta_training.runner import CHUNK, Chunk, Ended, RolloutRunner
from tests.meta_training.test_loop import TOYS, of_one_pool, same_chunks

NAMES = ("books", "books", "movies", "simulated")


@pytest.fixture(scope="module")
def toy(config: ControllerConfig) -> RolloutRunner:
    return RolloutRunner(TOYS[:1], config, devices=jax.local_devices()[:1])


def ended(chunk: Chunk, value: float) -> Ended:
    """Return a group whose episodes have returned a value on average."""
    return Ended(chunk, value + np.linspace(-1.0, 1.0, CHUNK))


def picks(curriculum: Curriculum, tasks: list[int], share: float = 0.5, seed: int = 0) -> list[Pick]:
    return curriculum.picks(0, NAMES, tasks, share=share, rng=np.random.default_rng(seed))


def test_without_any_progress_domains_take_turns():
    tasks = [0, 2, 3, 1, 2]
    assert [pick.task for pick in picks(Curriculum(), tasks)] == tasks
    assert len({pick.seed for pick in picks(Curriculum(), tasks)}) == len(tasks)


def test_groups_are_drawn_in_proportion_to_progress():
    curriculum = Curriculum(progress={"0/books": 0.3, "0/movies": 0.1, "1/simulated": 9.0})
    drawn = Counter(NAMES[pick.task] for pick in picks(curriculum, [3] * 4000, share=0.5))
    assert drawn["simulated"] / 4000 == pytest.approx(0.5, abs=0.03)  # of another pool nothing is known here
    assert drawn["books"] / drawn["movies"] == pytest.approx(3.0, rel=0.2)
    assert {pick.task for pick in picks(curriculum, [3] * 100)} == {0, 1, 2, 3}
    assert {pick.task for pick in picks(curriculum, [3] * 100, share=0.0)} == {3}


def test_a_domain_that_stands_still_is_not_preferred():
    assert [pick.task for pick in picks(Curriculum(progress={"0/books": 0.0}), [3, 3], share=1.0)] == [3, 3]


def test_a_group_is_repeated_once_whatever_its_task():
    curriculum = Curriculum(waiting={"0/books": (1, 77, 0.2)})
    first, second = picks(curriculum, [0, 0])
    assert first == (1, 77)
    assert second.task == 0
    assert second.seed != 77
    assert picks(curriculum, [2])[0].task == 2
    assert picks(curriculum, [0], share=0.0)[0].task == 0  # no curriculum, no repetitions


def test_progress_is_the_distance_between_a_group_and_its_repetition(toy: RolloutRunner):
    config, curriculum = of_one_pool(progress_share=0.5), Curriculum()
    first = iteration_chunks(config, toy, 0, curriculum)[0]
    curriculum.observe(toy, [ended(first, 0.5)])
    (key,) = curriculum.waiting
    assert curriculum.progress == {}
    later = iteration_chunks(config, toy, 7, curriculum)
    again = [chunk for chunk in later if chunk.spec.task[0] == first.spec.task[0]]
    assert len(later) == 2 * len(again) == 2  # domains take turns
    assert same_chunks(again, [first])  # task, weights, noise, horizon and interval
    curriculum.observe(toy, [ended(again[0], 0.2)])
    assert curriculum.progress == {key: pytest.approx(0.3)}
    assert curriculum.waiting == {}
    curriculum.observe(toy, [ended(first, 0.0), ended(first, 0.1)])
    assert curriculum.progress[key] == pytest.approx(0.5 * 0.3 + 0.5 * 0.1)


def test_another_group_waits_in_place_of_the_one_before(toy: RolloutRunner):
    config, curriculum = of_one_pool(), Curriculum()
    one, other = (
        next(chunk for chunk in iteration_chunks(config, toy, iteration) if chunk.spec.task[0] == 0)
        for iteration in (0, 1)
    )
    curriculum.observe(toy, [ended(one, 0.5), ended(other, 0.1)])
    ((_, seed, value),) = curriculum.waiting.values()
    assert seed == other.spec.initialization[0]
    assert value == pytest.approx(0.1)
    assert curriculum.progress == {}


def test_a_group_that_returned_nothing_finite_tells_nothing(toy: RolloutRunner):
    curriculum = Curriculum()
    curriculum.observe(toy, [ended(iteration_chunks(of_one_pool(), toy, 0)[0], np.nan)])
    assert curriculum == Curriculum()


def test_its_state_is_json():
    curriculum = Curriculum(progress={"0/books": 0.1 + 0.2}, waiting={"1/movies": (3, 2**31 - 1, 1 / 3)})
    assert Curriculum.from_dict(json.loads(json.dumps(curriculum.as_dict()))) == curriculum


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_the_share_is_checked(share: float):
    with pytest.raises(InvalidArgumentError, match="`progress_share` must be between 0 and 1"):
        replace(of_one_pool(), progress_share=share)
