"""A run of several processes decides once for all, by what all have measured, and stays the same in each to the bit."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.audit import read_decisions
from metalearn.controller.checkpoint import load_checkpoint, save_checkpoint
from metalearn.errors import InvalidArgumentError
from metalearn.safety.drift import DriftConfig
from metalearn.torch import RollbackConfig
from tests.torch import ranked
from tests.torch.crew import Crew, RankError
from tests.torch.loops import assert_equal
from tests.torch.ranked import INTERVAL, Job
from tests.torch.runs import start

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    made = Crew(2, tmp_path_factory.mktemp("crew"))
    yield made
    made.close()


@pytest.fixture
def arguments(domain: Domain, controller_path: Path) -> dict[str, Any]:
    return {"profile": domain.profile, "controller": controller_path}


def same(outcomes: list[Any]) -> dict[str, Any]:
    """Return what all ranks came to."""
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
    for outcome in outcomes[1:]:
        for name in outcome.keys() - {"logs", "statistics", "asked"}:
            assert_equal(outcome[name], outcomes[0][name], name)
        for mine, theirs in zip(outcome["statistics"], outcomes[0]["statistics"], strict=True):
            for name in mine:
                np.testing.assert_array_equal(mine[name], theirs[name], name)
    return outcomes[0]


def assert_close(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    """Compare statistics, decided values and weights."""
    for mine, theirs in zip(one["statistics"], other["statistics"], strict=True):
        for name in mine:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=tolerance, atol=1e-7, err_msg=name)
    for mine, theirs in zip(one["decisions"], other["decisions"], strict=True):
        assert (mine["index"], mine["step"], mine["status"]) == (theirs["index"], theirs["step"], theirs["status"])
        for row, expected in zip((*mine["groups"], mine["run"]), (*theirs["groups"], theirs["run"]), strict=True):
            assert row == pytest.approx(expected, rel=tolerance)
    for mine, theirs in zip(one["weights"], other["weights"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-5)


def test_a_rank_that_dies_is_named_and_replaced(crew: Crew):
    with pytest.raises(ChildProcessError, match=r"rank \d died with exit code 3"):
        crew.run(os._exit, 3)
    assert crew.run(os.getenv, "CREW_RANK", group=False) == ["0", "1"]


def test_a_group_that_does_not_come_up_is_tried_again(crew: Crew):
    (crew.folder / f"group-{crew.jobs + 1}").mkdir()  # where the ranks are to find one another
    assert crew.run(os.getenv, "CREW_RANK") == ["0", "1"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("horizon", [8 * INTERVAL, None])
def test_ranks_are_the_same_to_the_bit(crew: Crew, arguments: dict[str, Any], kind: Any, horizon: int | None):
    outcome = same(crew.run(ranked.train, Job(**arguments, kind=kind, horizon=horizon, dropout=0.3)))
    decisions = outcome["decisions"]
    assert [decision["step"] for decision in decisions] == [INTERVAL * index for index in range(6)]
    assert len({decision["groups"][0]["learning_rate"] for decision in decisions}) >= 4
    for name in ("validation", "validation_loss", "training_sample_loss"):
        assert all(math.isfinite(statistics[name]) for statistics in outcome["statistics"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("max_probed", [2**14, 12])
def test_two_halves_of_a_batch_are_judged_as_the_batch(
    crew: Crew, arguments: dict[str, Any], kind: Any, max_probed: int
):
    alone = ranked.train(Job(**arguments, kind="alone", max_probed=max_probed))
    outcome = same(crew.run(ranked.train, Job(**arguments, kind=kind, max_probed=max_probed)))
    assert_close(outcome, alone, 2e-3)
    assert outcome["statistics"][1]["samples"] == INTERVAL * ranked.GLOBAL_BATCH


def test_an_average_of_shards_is_the_average(crew: Crew, arguments: dict[str, Any]):
    """Whole parameters that FSDP2 keeps after an evaluation are dropped when the weights are put back."""
    job = Job(**arguments, kind="fsdp", horizon=None)
    alone = ranked.train(replace(job, kind="alone"))
    outcome = same(crew.run(ranked.train, job))
    assert_close(outcome, alone, 2e-3)
    for mine, theirs in zip(outcome["averaged"], alone["averaged"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-5)


def test_sparse_gradients_are_judged_as_one_process_judges_them(crew: Crew, arguments: dict[str, Any]):
    job = Job(**arguments, kind="ddp", sparse=True, optimizer="SparseAdam")
    outcome = same(crew.run(ranked.train, job))
    assert len(outcome["decisions"]) == 6
    assert_close(outcome, ranked.train(replace(job, kind="alone")), 2e-3)


@pytest.mark.parametrize(("kind", "spoil"), [("ddp", "loss"), ("fsdp", "loss"), ("fsdp", "weights")])
def test_what_goes_wrong_in_one_rank_takes_all_back(crew: Crew, arguments: dict[str, Any], kind: Any, spoil: Any):
    options = {"rollback": RollbackConfig(every=1), "drift": DriftConfig()}
    outcome = same(crew.run(ranked.train, Job(**arguments, kind=kind, spoil=spoil, options=options)))
    (record,) = outcome["rollbacks"]
    assert (record.step, record.to_step, record.fallback) == (3 * INTERVAL, 2 * INTERVAL, False)
    assert "not finite" in record.reason
    assert all(torch.isfinite(weights).all() for weights in outcome["weights"])
    assert [decision["status"] for decision in outcome["decisions"]].count("rolled back") == 1
    assert outcome["steps"] == 5 * INTERVAL


def test_a_rolled_back_run_trains_as_one_that_decided_so_at_once(crew: Crew, arguments: dict[str, Any]):
    """The barred decision aside, nothing of the lost interval is left, in shards neither."""
    options = {"rollback": RollbackConfig(every=1)}
    jobs = [Job(**arguments, kind=kind, spoil="loss", options=options) for kind in ("ddp", "fsdp")]
    one, other = (same(crew.run(ranked.train, job)) for job in jobs)
    assert_close(one, other, 2e-3)


def test_rank_0_alone_logs_and_asks(crew: Crew, arguments: dict[str, Any], tmp_path: Path):
    log = tmp_path / "decisions.jsonl"
    options = {"decision_log": log, "steering": "advise", "advisor": ranked.advise}
    outcomes = crew.run(ranked.train, Job(**arguments, kind="ddp", options=options))
    same(outcomes)
    assert [outcome["logs"] for outcome in outcomes] == [True, False]
    assert outcomes[0]["asked"] > 0 and outcomes[1]["asked"] == 0
    assert [record["index"] for record in read_decisions(log)] == list(range(6))
    assert {decision["advice"] for decision in outcomes[0]["decisions"]} >= {"accepted", "rejected"}


@pytest.mark.parametrize(("kind", "how"), [("ddp", "all"), ("ddp", "own"), ("fsdp", "all"), ("fsdp", "own")])
def test_a_resumed_run_is_the_same_run(crew: Crew, arguments: dict[str, Any], kind: Any, how: Any):
    at = (INTERVAL + 3, 2 * INTERVAL, 3 * INTERVAL - 1)  # within an interval, at its end, between the steps of a probe
    results = crew.run(ranked.interrupt, Job(**arguments, kind=kind, dropout=0.3), at, how)
    whole, *resumed = [same(list(outcomes)) for outcomes in zip(*results, strict=True)]
    assert len(resumed) == len(at)
    for outcome in resumed:
        assert outcome["decisions"] == whole["decisions"]
        assert_equal(outcome["weights"], whole["weights"])
        assert outcome["warned"] == 0


def test_an_average_of_shards_is_resumed_by_each_rank(crew: Crew, arguments: dict[str, Any]):
    job = Job(**arguments, kind="fsdp", horizon=None)
    results = crew.run(ranked.interrupt, job, (INTERVAL + 3,), "own")
    whole, resumed = [same(list(outcomes)) for outcomes in zip(*results, strict=True)]
    assert_equal(resumed["averaged"], whole["averaged"])
    assert not torch.equal(whole["averaged"][0], whole["weights"][0])
    for error in crew.run(ranked.interrupt, job, (INTERVAL + 3,), "all"):
        assert isinstance(error, RankError) and "save the state_dict() of each process" in str(error)
    for error in crew.run(ranked.interrupt, job, (INTERVAL + 3,), "first")[1:]:
        assert isinstance(error, RankError) and "averaged weights are sharded" in str(error)


def test_the_first_rank_s_state_will_do_at_the_end_of_an_interval(crew: Crew, arguments: dict[str, Any]):
    at = (2 * INTERVAL, 2 * INTERVAL + 3)
    results = crew.run(ranked.interrupt, Job(**arguments, kind="ddp"), at, "first")
    warned = [[outcome.pop("warned") for outcome in outcomes] for outcomes in results]
    assert warned == [[0, 0, 0], [0, 0, 1]]
    whole, exact, about = [same(list(outcomes)) for outcomes in zip(*results, strict=True)]
    assert exact["decisions"] == whole["decisions"] != about["decisions"]
    assert_equal(exact["weights"], whole["weights"])


@pytest.mark.parametrize("late", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_forgotten_report_is_an_error(crew: Crew, arguments: dict[str, Any], kind: Any, late: float):
    errors = crew.run(ranked.forget_to_report, Job(**arguments, kind=kind), late)
    assert all(isinstance(error, RankError) for error in errors)
    assert any("rank 0 waits in report() while rank 1 trains on; at the end of" in str(error) for error in errors)


def test_all_may_train_on_without_a_report(crew: Crew, arguments: dict[str, Any]):
    outcome = same(crew.run(ranked.report_to_none, Job(**arguments, kind="ddp")))
    assert len(outcome["decisions"]) == 5
    assert all(math.isnan(statistics["validation"]) for statistics in outcome["statistics"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([{}, {"horizon": 99}], "differ in horizon: rank 0: 48; rank 1: 99; make the MetaScheduler with the same"),
        ([{"interval": 5}, {}], "differ in interval: rank 0: 5; rank 1: 6"),
        ([{}, {"batch_size": None}], "differ in whether `batch_size` is given: rank 0: True; rank 1: False"),
        ([{}, {"model": None}], "differ in what can be controlled: rank 0"),
    ],
)
def test_ranks_that_differ_are_refused(crew: Crew, arguments: dict[str, Any], options: Any, message: str):
    for error in crew.run(ranked.differ, Job(**arguments, kind="ddp", dropout=0.1), options):
        assert isinstance(error, RankError) and message in str(error)


def test_another_controller_in_one_rank_is_refused(
    crew: Crew, arguments: dict[str, Any], tmp_path: Path, controller_path: Path
):
    checkpoint = load_checkpoint(controller_path)
    other = save_checkpoint(replace(checkpoint, base=checkpoint.base + 0.01), tmp_path / "other.safetensors")
    options = [{}, {"controller": other}]
    for error in crew.run(ranked.differ, Job(**arguments, kind="ddp"), options):
        assert isinstance(error, RankError) and "differ in controller: rank 0" in str(error)


def test_what_is_called_in_every_rank_stays_the_same(crew: Crew, arguments: dict[str, Any], domain: Domain):
    job = Job(**arguments, kind="ddp", dropout=0.2, options={"drift": DriftConfig()})
    outcome = same(crew.run(ranked.steer, job, domain.profile))
    assert {decision["mode"] for decision in outcome["decisions"]} == {"control", "shadow"}


def test_what_is_called_in_one_rank_is_an_error(crew: Crew, arguments: dict[str, Any]):
    for error in crew.run(ranked.switch_in_one_rank, Job(**arguments, kind="ddp")):
        assert isinstance(error, RankError) and "are at different points of it" in str(error)


def test_one_rank_cannot_survive_alone(crew: Crew, arguments: dict[str, Any]):
    job = Job(**arguments, kind="ddp", options={"rollback": RollbackConfig(every=1)})
    _, error = crew.run(ranked.run_out_of_memory, job)
    assert isinstance(error, RankError) and "rank 1 of 2 ran out of memory, and the others wait" in str(error)


def test_a_group_of_one_is_a_process_of_its_own(domain: Domain, controller: Controller, tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        run = start(domain, controller=controller, horizon=24, interval=INTERVAL)
        assert run.scheduler is not None and run.scheduler._run.ranks is None
        run.advance(2 * INTERVAL)
    finally:
        torch.distributed.destroy_process_group()
    plain = start(domain, controller=controller, horizon=24, interval=INTERVAL)
    plain.advance(2 * INTERVAL)
    assert plain.scheduler is not None and plain.scheduler.decisions == run.scheduler.decisions
    with pytest.raises(InvalidArgumentError, match="must hold numbers, got None"):
        plain.scheduler.report(None)
    with pytest.raises(InvalidArgumentError, match=r"`process_group` must be a group of torch\.distributed that"):
        start(domain, controller=controller, process_group="world")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_four_ranks(arguments: dict[str, Any], kind: Any, tmp_path: Path):
    crew = Crew(4, tmp_path)
    try:
        alone = ranked.train(Job(**arguments, kind="alone", max_probed=12))
        outcome = same(crew.run(ranked.train, Job(**arguments, kind=kind, max_probed=12)))
        assert_close(outcome, alone, 2e-3)
        options = {"rollback": RollbackConfig(every=1)}
        job = Job(**arguments, kind=kind, dropout=0.3, spoil="loss", options=options)
        assert len(same(crew.run(ranked.train, job))["rollbacks"]) == 1
        results = crew.run(ranked.interrupt, replace(job, spoil=None), (INTERVAL + 3,), "all")
        whole, resumed = [same(list(outcomes)) for outcomes in zip(*results, strict=True)]
        assert resumed["decisions"] == whole["decisions"]
        assert_equal(resumed["weights"], whole["weights"])
    finally:
        crew.close()


def by_torchrun(job: Job, folder: Path, *, ranks: int, kill_after: int) -> list[dict[str, Any]]:
    """Run `elastic_run` with one restart; return what the last attempt of each rank came to."""
    folder.mkdir()
    (folder / "job.pkl").write_bytes(pickle.dumps(job))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1"]
    what = ["--no-python", sys.executable, "-m", "tests.torch.elastic_run"]
    command = [sys.executable, *launcher, *what, str(folder / "job.pkl"), str(folder), str(kill_after)]
    # A store of its own for each attempt: in a shared one a rank may find the addresses of those that have died.
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **own}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [pickle.loads((folder / f"outcome-{rank}.pkl").read_bytes()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)])
def test_a_rank_that_is_killed_is_restarted_into_the_same_run(
    arguments: dict[str, Any], tmp_path: Path, kind: Any, ranks: int
):
    job = Job(**arguments, kind=kind, dropout=0.3)
    whole = by_torchrun(job, tmp_path / "whole", ranks=ranks, kill_after=-1)
    killed = by_torchrun(job, tmp_path / "killed", ranks=ranks, kill_after=2 * INTERVAL + 3)
    assert [outcome.pop("attempt") for outcome in whole + killed] == [0] * ranks + [1] * ranks
    expected, outcome = same(whole), same(killed)
    assert outcome["decisions"] == expected["decisions"]
    assert_equal(outcome["weights"], expected["weights"])
    resumed_at = 2 * INTERVAL  # the last checkpoint before the kill
    assert len(outcome["statistics"]) == len(expected["statistics"]) - resumed_at // INTERVAL


def _train_on_gpu(rank: int, folder: str, job: Job) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(ranked.train(job)))
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus(arguments: dict[str, Any], tmp_path: Path, kind: Any):
    job = Job(**arguments, kind=kind, dropout=0.3, device="cuda", options={"rollback": RollbackConfig(every=1)})
    torch.multiprocessing.spawn(_train_on_gpu, (str(tmp_path), job), nprocs=2)
    outcome = same([pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)])
    assert len(outcome["decisions"]) == 6
