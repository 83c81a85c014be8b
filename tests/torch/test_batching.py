"""Batches whose size changes: no sample lost or repeated, resumed to the bit, with and without workers, over ranks."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.torch import ResizableBatchSampler

# Other tests load JAX, which warns of every fork; workers that hand out numbers do not touch it.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


class Numbers(Dataset[int]):
    """Sample i is the number i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def copied(state: Any) -> Any:
    """Goes through JSON, so that nothing is kept by reference and all of it is plain."""
    return json.loads(json.dumps(state))


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 60), changes=sizes, shuffle=st.booleans(), seed=st.integers(0, 5))
def test_every_sample_once_an_epoch_whatever_the_sizes(count: int, changes: list[int], shuffle: bool, seed: int):
    sampler = ResizableBatchSampler(count, changes[0], seed=seed, shuffle=shuffle)
    for epoch in range(2):
        seen: list[int] = []
        for number, batch in enumerate(sampler, start=1):
            seen += batch
            sampler.batch_size = changes[number % len(changes)]
            left = count - len(seen)
            assert len(sampler) == number + -(-left // sampler.batch_size)
        assert sorted(seen) == list(range(count))
        assert (seen == sorted(seen)) >= (not shuffle)
        assert sampler.epoch == epoch + 1


def test_a_size_holds_from_the_next_batch_on():
    sampler = ResizableBatchSampler(20, 4, shuffle=False)
    lengths = []
    for batch in sampler:
        lengths.append(len(batch))
        if len(lengths) == 2:
            sampler.batch_size = 7
    assert lengths == [4, 4, 7, 5]


def test_permutations_are_of_seed_and_epoch_alone():
    def epochs(seed: int, size: int) -> list[list[int]]:
        sampler = ResizableBatchSampler(30, size, seed=seed)
        return [[index for batch in sampler for index in batch] for _ in range(3)]

    orders = epochs(0, 4)
    assert orders == epochs(0, 7)
    assert len({tuple(order) for order in (*orders, *epochs(1, 4))}) == 6
    jumped = ResizableBatchSampler(30, 4)
    jumped.set_epoch(2)
    assert [index for batch in jumped for index in batch] == orders[2]


def test_set_epoch_leaves_the_epoch_that_runs_alone():
    sampler = ResizableBatchSampler(6, 2, shuffle=False)
    batches = iter(sampler)
    next(batches)
    sampler.set_epoch(0)
    assert next(batches) == [2, 3]
    sampler.set_epoch(3)
    assert next(batches) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 50),
    world=st.integers(1, 5),
    changes=sizes,
    drop_last=st.booleans(),
)
def test_ranks_share_an_epoch(count: int, world: int, changes: list[int], drop_last: bool):
    seen: Counter[int] = Counter()
    shapes = []
    for rank in range(world):
        sampler = ResizableBatchSampler(count, changes[0], drop_last=drop_last, rank=rank, world_size=world)
        shape = []
        for number, batch in enumerate(sampler, start=1):
            seen.update(batch)
            shape.append(len(batch))
            sampler.batch_size = changes[number % len(changes)]
        shapes.append(shape)
    assert all(shape == shapes[0] for shape in shapes)  # or ranks would wait for one another
    again = sum(seen.values()) - len(seen)
    if drop_last:
        last = changes[len(shapes[0]) % len(changes)]
        assert all(size == changes[i % len(changes)] for i, size in enumerate(shapes[0]))
        assert -(-count // world) - sum(shapes[0]) < last
    else:
        assert set(seen) == set(range(count))
        assert again == -count % world
    assert max(seen.values(), default=1) <= 1 + (again > 0) + again // max(count, 1)


@settings(max_examples=40, deadline=None)
@given(stop=st.integers(0, 40), later=st.integers(1, 9))
def test_resumed_anywhere_to_the_bit(stop: int, later: int):
    def course(sampler: ResizableBatchSampler, batches: list[list[int]], until: int) -> None:
        while len(batches) < until:
            for batch in sampler:
                batches.append(batch)
                if len(batches) % 5 == 0:
                    sampler.batch_size = 1 + (len(batches) * later) % 9
                if len(batches) >= until:
                    break

    whole: list[list[int]] = []
    course(ResizableBatchSampler(37, 4, seed=3), whole, 45)
    first: list[list[int]] = []
    begun = ResizableBatchSampler(37, 4, seed=3)
    course(begun, first, stop)
    resumed = ResizableBatchSampler(37, 99, seed=3)
    resumed.load_state_dict(copied(begun.state_dict()))
    assert len(resumed) == len(begun)
    course(resumed, first, 45)
    assert first == whole


def loaded(sampler: ResizableBatchSampler, workers: int) -> DataLoader[Any]:
    return DataLoader(Numbers(60), batch_sampler=sampler, num_workers=workers, prefetch_factor=2 if workers else None)


@pytest.mark.parametrize("workers", [0, 2])
def test_with_workers_what_counts_is_what_the_loop_was_given(workers: int):
    def run(sampler: ResizableBatchSampler, given: list[list[int]], until: int) -> dict[str, Any]:
        """Trains up to a batch, and returns the state after it."""
        state: dict[str, Any] = {}
        while len(given) < until:
            for batch in sampler.track(loaded(sampler, workers)):
                given.append(batch.tolist())
                if len(given) in (2, 6, 9):
                    sampler.batch_size = {2: 7, 6: 3, 9: 10}[len(given)]
                if len(given) == until:
                    state = copied(sampler.state_dict())
                    break
        return state

    whole: list[list[int]] = []
    run(ResizableBatchSampler(60, 4), whole, 16)
    lag = 2 * workers
    assert [len(batch) for batch in whole[: 3 + lag]] == [4] * (2 + lag) + [7]
    assert Counter(i for batch in whole[: first_epoch(whole)] for i in batch) == Counter(range(60))
    for stop in (1, 2, 4, 8):  # right at a change, and while batches of the size before it are in flight
        given: list[list[int]] = []
        state = run(ResizableBatchSampler(60, 4), given, stop)
        assert state["consumed"] == sum(map(len, given))
        resumed = ResizableBatchSampler(60, 50)
        resumed.load_state_dict(state)
        run(resumed, given, 16)
        assert given == whole


def first_epoch(batches: list[list[int]]) -> int:
    """Returns the number of batches that the first epoch of 60 samples took."""
    return int(np.searchsorted(np.cumsum([len(batch) for batch in batches]), 60)) + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_loaded_in_mid_epoch_passes_over_what_is_in_flight(workers: int):
    sampler = ResizableBatchSampler(60, 4)
    expected = [index for batch in ResizableBatchSampler(60, 4) for index in batch]
    given: list[int] = []
    saved: dict[str, Any] = {}
    rolled_back = []
    lengths = []
    for number, batch in enumerate(sampler.track(loaded(sampler, workers))):
        given += batch.tolist()
        lengths.append(len(batch))
        if number == 2:
            saved = copied(sampler.state_dict())
        if number == 5 or (len(given) == 60 and len(rolled_back) == 1):  # then nothing is left for the loader to draw
            rolled_back.append(len(given))
            given = given[:12]
            sampler.load_state_dict(saved)
            sampler.batch_size = 5  # as after an out-of-memory error: no batch of the old size may come again
            lengths.clear()
    assert given == expected
    assert lengths == [5] * 9 + [3]
    assert rolled_back == [24, 60]
    assert sampler.epoch == 1


def test_an_epoch_broken_off_goes_on_with_the_batches_that_were_in_flight():
    sampler = ResizableBatchSampler(60, 4)
    expected = [index for batch in ResizableBatchSampler(60, 4) for index in batch]
    given: list[int] = []
    for batch in sampler.track(loaded(sampler, 2)):
        given += batch.tolist()
        break
    assert sampler.state_dict()["in_flight"] == [4] * 4
    sampler.batch_size = 9
    lengths = []
    for batch in sampler.track(loaded(sampler, 2)):
        lengths.append(len(batch))
        given += batch.tolist()
    assert given == expected
    assert lengths == [4] * 4 + [9] * 4 + [4]


def test_a_state_of_the_end_of_an_epoch_yields_nothing_and_goes_to_the_next():
    sampler = ResizableBatchSampler(4, 2)
    batches = iter(sampler)
    next(batches)
    next(batches)
    resumed = ResizableBatchSampler(4, 2)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed.track(loaded(resumed, 0))) == []
    assert resumed.epoch == 1
    assert len(list(resumed)) == 2


def test_wrong_use_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"`batch_size` must be an int of at least 1, got 0"):
        ResizableBatchSampler(5, 0)
    with pytest.raises(InvalidArgumentError, match=r"`rank` must be in \[0, 1\], got 2"):
        ResizableBatchSampler(5, 1, rank=2, world_size=2)
    sampler = ResizableBatchSampler(5, 1)
    with pytest.raises(InvalidArgumentError, match=r"`batch_size` must be an int of at least 1, got 2\.5"):
        sampler.batch_size = 2.5  # type: ignore[assignment]
    with pytest.raises(SessionError, match=r"num_samples=6, this sampler 5"):
        sampler.load_state_dict(ResizableBatchSampler(6, 1).state_dict())
    with pytest.raises(SessionError, match="did not draw"):
        list(sampler.track(DataLoader(Numbers(5))))
    with pytest.raises(SessionError, match="yielded no batch"):
        list(sampler.track([]))


def test_numpy_sizes_are_kept_as_plain_ones():
    sampler = ResizableBatchSampler(5, 1)
    sampler.batch_size = np.int64(3)  # type: ignore[assignment]
    assert type(sampler.state_dict()["batch_size"]) is int
