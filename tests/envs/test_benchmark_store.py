"""The store of trials: nothing is lost, whoever writes and whoever is killed."""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.benchmark.store import Identity, TrialStore, identity, round_trial
from metalearn.errors import InvalidArgumentError
from metalearn.trials import Measurement, Trial, TrialStatus


def make_trial(index: int = 0, value: float = 0.125, *, seed: int = 0, **configuration: object) -> Trial:
    trial = Trial(
        task="movies/two_tower/2000x256",
        configuration={"method": "sampled", "replicate": 0, "index": index, **configuration},
        seed=seed,
    )
    return trial.record(Measurement(2000, "test_ndcg@10", value)).complete(cost=1.5)


def append_many(path: Path, first: int) -> None:
    for index in range(first, first + 40):
        TrialStore(path).append([make_trial(index, padding="x" * 5000)])


@given(
    values=st.lists(st.floats(), max_size=3),
    cost=st.floats(0, 1e6),
    status=st.sampled_from(["complete", "diverged", "invalid"]),
)
def test_what_is_read_is_what_was_appended(values: list[float], cost: float, status: str):
    measurements = tuple(Measurement(step, "test_ndcg@10", value) for step, value in enumerate(values))
    configuration = {"method": "pbt", "replicate": 2, "index": 3, "learning_rate": 0.1}
    trial = Trial(
        task="a/b/1x1", configuration=configuration, seed=4, status=TrialStatus(status), measurements=measurements
    )
    trial = round_trial(Trial(**{**vars(trial), "cost": cost}))
    with tempfile.TemporaryDirectory() as folder:
        store = TrialStore(Path(folder) / "made" / "trials.jsonl")
        assert store.read() == {}
        store.append([trial])
        (read,) = store.read().values()
    assert identity(read) == Identity("a/b/1x1", "pbt", 2, 3, 4)
    assert (read.status, read.cost, read.configuration) == (trial.status, trial.cost, configuration)
    for mine, other in zip(read.measurements, trial.measurements, strict=True):
        assert mine == other or (math.isnan(mine.value) and not math.isfinite(other.value))


def test_figures_are_rounded(tmp_path: Path):
    store = TrialStore(tmp_path / "trials.jsonl")
    store.append([make_trial(value=0.123456789)])
    assert '"test_ndcg@10", 0.123457]' in store.path.read_text()


def test_a_torn_line_is_passed_over_and_cut_off(tmp_path: Path):
    store = TrialStore(tmp_path / "trials.jsonl")
    store.append([make_trial(0), make_trial(1)])
    whole = store.path.read_bytes()
    line = make_trial(2).to_json().encode()
    for kept in (1, len(line) // 2, len(line)):  # of a whole trial without the end of its line as well
        store.path.write_bytes(whole + line[:kept])
        assert [key.index for key in store.read()] == [0, 1]
        store.append([make_trial(3)])
        assert [key.index for key in store.read()] == [0, 1, 3]
        assert store.path.read_bytes().startswith(whole + b'{"task"')
    store.path.write_bytes(line[:50])  # the very first line is torn
    assert store.read() == {}
    store.append([make_trial(4)])
    assert [key.index for key in store.read()] == [4]


def test_a_damaged_line_is_named(tmp_path: Path):
    store = TrialStore(tmp_path / "trials.jsonl")
    store.append([make_trial(0), make_trial(1)])
    lines = store.path.read_text().splitlines()
    store.path.write_text("\n".join([lines[0], lines[1][:40], lines[1], ""]))
    with pytest.raises(InvalidArgumentError, match="line 2 is not a trial of the benchmark"):
        store.read()
    store.path.write_text(lines[0].replace('"replicate": 0, ', "") + "\n")
    with pytest.raises(InvalidArgumentError, match=r"line 1 .* must have method, replicate and index"):
        store.read()


def test_the_last_of_an_identity_counts(tmp_path: Path):
    store = TrialStore(tmp_path / "trials.jsonl")
    store.append([make_trial(0, 0.1), make_trial(1, 0.2), make_trial(0, 0.3), make_trial(0, 0.4, seed=1)])
    assert [(key.index, key.seed, t.measurements[0].value) for key, t in store.read().items()] == [
        (1, 0, 0.2),
        (0, 0, 0.3),
        (0, 1, 0.4),
    ]


def test_processes_append_at_once(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    path = tmp_path / "trials.jsonl"
    processes = [context.Process(target=append_many, args=(path, 40 * place)) for place in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(key.index for key in TrialStore(path).read()) == list(range(120))
