"""Snapshots: whatever happens in between, what comes back is what was there, and nobody else's memory."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.torch import Snapshots, copies
from metalearn.torch.copies import Pairs
from tests.torch.loops import OPTIMIZERS, Loop, Net, assert_equal
from tests.torch.snapshot_mutants import MUTANTS

ROOT = Path(__file__).parents[2]


class Machine(RuleBasedStateMachine):
    """Trains, saves, restores and replaces state; a deep copy says what should be there."""

    snapshots: type[Snapshots] = Snapshots
    reached: ClassVar[Counter[str]] = Counter()

    @initialize(kind=st.sampled_from(sorted(OPTIMIZERS)), steps=st.sampled_from([0, 2]))
    def start(self, kind: str, steps: int) -> None:
        self.loop = Loop(kind, self.snapshots)
        self.train_and_save(steps)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.loop.train()

    @rule(steps=st.integers(0, 2), ahead=st.sampled_from([None, 0, 1]))
    def train_and_save(self, steps: int, ahead: int | None = None) -> None:
        """Saves, perhaps with a look before it that copies, or with one before the last step."""
        self.train(steps)
        if ahead is not None:
            assert self.loop.snapshots.all_finite(copying=True)
            self.train(ahead)
        self.loop.snapshots.save(7, self.loop.extra)
        self.saved, self.restored_since_save = self.loop.contents(), 0
        self.reached["saved with moments" if self.loop.optimizer.state else "saved without moments"] += 1

    @rule()
    def copy_and_not_save(self) -> None:
        """An interval that is judged bad after weights and moments were copied."""
        self.train(1)
        assert self.loop.snapshots.all_finite(copying=True)

    @rule()
    def fail_to_save(self) -> None:
        """A tracked object that raises leaves the snapshot before."""
        loop = self.loop
        loop.schedule.state_dict = lambda: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            loop.snapshots.save(8, {"table": torch.ones(9)})
        del loop.schedule.state_dict

    @rule(what=st.sampled_from(["optimizer", "buffers", "rate"]))
    def replace(self, what: str) -> None:
        loop = self.loop
        if what == "optimizer":  # what loading a checkpoint does: other groups, other tensors
            loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
        elif what == "buffers":
            loop.net.norm.running_mean = torch.full((3,), 0.25)
            loop.net.seen = torch.ones(5, dtype=torch.int64)
        else:
            loop.optimizer.param_groups[0]["lr"] = 0.7

    @rule(steps=st.integers(0, 3))
    def train_and_restore(self, steps: int) -> None:
        self.train(steps)
        loop = self.loop
        groups, parameters = list(loop.optimizer.param_groups), list(loop.net.parameters())
        moments = {id(p): dict(state) for p, state in loop.optimizer.state.items()}
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        loop.snapshots.restore()
        loop.extra = loop.snapshots.extra()
        assert_equal(loop.contents(), self.saved)
        assert all(mine is theirs for mine, theirs in zip(groups, loop.optimizer.param_groups, strict=True))
        for parameter, state in loop.optimizer.state.items():
            for name, value in state.items():
                former = moments.get(id(parameter), {}).get(name)
                assert former is None or former is value or not isinstance(value, torch.Tensor)
        assert all(p.grad is None for group in groups for p in group["params"])
        self.restored_since_save += 1
        self.reached["restored twice" if self.restored_since_save > 1 else "restored"] += 1

    @invariant()
    def shares_nothing(self) -> None:
        live = {t.untyped_storage().data_ptr() for t in tensors_of(self.loop.snapshots._live(0, self.loop.extra))}
        held = {t.untyped_storage().data_ptr() for t in tensors_of(self.loop.snapshots._slots)}
        assert not live & held


def tensors_of(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.numel() else []
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def machine(snapshots: type[Snapshots], *, checks_sharing: bool) -> type[Machine]:
    members: dict[str, Any] = {"snapshots": snapshots, "reached": Counter()}
    if not checks_sharing:  # an alias is to be found by what it does, too
        members["shares_nothing"] = invariant()(lambda self: None)
    return type("Of" + snapshots.__name__, (Machine,), members)


def run(kind: type[Machine], examples: int) -> None:
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            phases=[Phase.generate],
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_whatever_happens_what_comes_back_is_what_was_saved():
    sound = machine(Snapshots, checks_sharing=True)
    run(sound, 25)
    assert min(sound.reached[what] for what in ("saved with moments", "saved without moments")) >= 5
    assert min(sound.reached[what] for what in ("restored", "restored twice")) >= 5


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_every_seeded_fault_is_found(mutant: type[Snapshots]):
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run(machine(mutant, checks_sharing=False), 40)


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_follows_a_restore_is_what_followed_the_save(kind: str, place: Any, tmp_path: Path):
    loop = Loop(kind, place=place, folder=tmp_path)
    for _ in range(3):
        loop.train()
    loop.snapshots.save(3, loop.extra)
    outcomes = []
    for _ in range(3):
        for _ in range(4):
            loop.train()
        outcomes.append(loop.contents())
        loop.snapshots.restore()
        loop.extra = loop.snapshots.extra()
    assert_equal(outcomes[1], outcomes[0])
    assert_equal(outcomes[2], outcomes[0])
    assert loop.snapshots.place == place


def test_without_rewinding_the_data_goes_on_where_it_is():
    loop = Loop("AdamW, foreach")
    loop.snapshots.save(0)
    saved = loop.contents()
    loop.train()
    found = loop.contents()
    loop.snapshots.restore(rewind=False)
    now = loop.contents()
    for name in ("order", "draws", "python", "numpy", "torch"):
        assert_equal(now[name], found[name])
    for name in ("net", "optimizer", "schedule"):
        assert_equal(now[name], saved[name])


def test_a_rate_that_no_tracked_scheduler_sets_is_its_owners():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    snapshots = Snapshots(modules=[net], optimizers=[optimizer])
    snapshots.save(0)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    optimizer.step()
    schedule.step()
    snapshots.restore()
    assert optimizer.param_groups[0]["lr"] == 0.05  # a scheduler that chains from it goes on
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_sparse_gradients_and_buffers():
    net = torch.nn.Embedding(6, 2, sparse=True)
    net.register_buffer("graph", torch.eye(3).to_sparse())
    optimizer = torch.optim.SparseAdam(net.parameters())
    snapshots = Snapshots(modules=[net], optimizers=[optimizer])
    snapshots.save(0)
    before = net.weight.detach().clone()
    net(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    net.graph = (2 * torch.eye(3)).to_sparse()
    snapshots.restore()
    assert torch.equal(net.weight, before) and not optimizer.state
    assert torch.equal(net.graph.to_dense(), torch.eye(3))
    assert net.weight.grad is None
    net(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert torch.equal(net.weight[2:], before[2:])


def test_a_grad_scaler_goes_back_also_from_within_a_step():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

    def step() -> None:
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step()
    snapshots = Snapshots(optimizers=[optimizer], tracked=[scaler])
    snapshots.save(1)
    step()
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)  # and then something raised
    snapshots.restore()
    assert scaler.get_scale() == 16.0
    step()
    assert scaler.get_scale() == 32.0


def test_whole_state_is_watched_for_what_is_not_finite():
    loop = Loop("AdamW, foreach")
    loop.train()
    assert loop.snapshots.all_finite()
    loop.net.table.weight.data[4, 2] = 3e38
    loop.net.table.weight.data[3, 2] = 3e38  # their sum overflows, they are finite
    assert loop.snapshots.all_finite()
    state = loop.optimizer.state[loop.net.norm.bias]
    loop.snapshots.save(0)
    good = loop.contents()
    for value in (float("inf"), float("nan")):
        state["exp_avg_sq"][0] = value
        assert not loop.snapshots.all_finite()
        assert not loop.snapshots.all_finite(copying=True)
    loop.snapshots.restore()
    assert_equal(loop.contents(), good)
    assert loop.snapshots.all_finite() and loop.snapshots.all_finite(copying=True)


def test_what_a_look_has_copied_is_copied_again_only_if_it_changed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metalearn.torch.copies.PIECE_BYTES", 16)  # so that small tensors go in pieces, too
    loop = Loop("AdamW, foreach")
    loop.train()
    for _ in range(2):
        loop.snapshots.save(0, loop.extra)
    copied: list[torch.Tensor] = []

    def copy_pairs(pairs: Pairs) -> None:
        copied.extend(value for _, value in pairs)
        copies.copy_pairs(pairs)

    monkeypatch.setattr("metalearn.torch.snapshots.copy_pairs", copy_pairs)
    loop.train()
    assert loop.snapshots.all_finite(copying=True)
    with torch.no_grad():
        loop.net.norm.bias.add_(1.0)
    loop.snapshots.save(1, loop.extra)
    live = {p.data_ptr(): p for p in loop.net.parameters()}
    assert [live[v.data_ptr()] for v in copied if v.data_ptr() in live] == [loop.net.norm.bias]
    moments = {v.data_ptr() for s in loop.optimizer.state.values() for v in s.values()}
    assert not moments & {v.data_ptr() for v in copied}
    saved = loop.contents()
    loop.train()
    loop.snapshots.restore()
    loop.extra = loop.snapshots.extra()
    assert_equal(loop.contents(), saved)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_copies_are_made_and_looked_at_whole_by_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, inference: bool
):
    monkeypatch.setattr("metalearn.torch.copies.PIECE_BYTES", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(inference):
            tables = [torch.randn(64, 16), torch.arange(700), torch.randn(33, 2, dtype=torch.complex64).t()]
            pairs = [(torch.empty_like(table), table) for table in tables]
            assert copies.copy_looking(pairs)
            for place in (0, 500, 1023):  # in the first share, the second, and at the end
                tables[0].view(-1)[place] = float("nan")
                assert not copies.copy_looking(pairs)
                assert all(torch.equal(i.view_as(v).nan_to_num(), v.nan_to_num()) for i, v in pairs)
                tables[0].view(-1)[place] = 0.0
    finally:
        torch.set_num_threads(before)


def test_memory_is_held_once_and_does_not_grow():
    loop = Loop("AdamW, foreach")
    for _ in range(3):
        loop.train()
        loop.snapshots.save(0, loop.extra)
    held = [tensor.data_ptr() for tensor in tensors_of(loop.snapshots._slots)]
    size = loop.snapshots.nbytes
    tracemalloc.start()
    for _ in range(5):
        loop.snapshots.save(0, loop.extra)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for turn in range(200):
        loop.snapshots.save(0, loop.extra)
        assert not loop.snapshots.grew
        if turn % 20 == 0:
            loop.snapshots.restore()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 20_000
    assert loop.snapshots.nbytes == size
    parameters = {t.data_ptr() for slot in loop.snapshots._slots for t in tensors_of(slot["parameters"])}
    assert parameters <= set(held)


def test_without_a_snapshot_there_is_nothing_to_restore():
    loop = Loop("AdamW, foreach")
    assert not loop.snapshots.exists
    with pytest.raises(SessionError, match="there is no snapshot to go back to; call save first"):
        loop.snapshots.restore()


def test_a_limit_is_kept_and_named():
    loop = Loop("AdamW, foreach", limit_bytes=1000)
    with pytest.raises(InvalidArgumentError, match=r"snapshots need [0-9]+ bytes, but `limit_bytes` is 1000"):
        loop.snapshots.save(0)
    assert loop.snapshots.nbytes == 0


def test_the_disk_is_chosen_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metalearn.torch.snapshots._available_memory", lambda: 1000)
    with pytest.raises(InvalidArgumentError, match="a `folder` to keep them on disk"):
        Loop("AdamW, foreach").snapshots.save(0)
    loop = Loop("AdamW, foreach", folder=tmp_path)
    loop.snapshots.save(0)
    assert (loop.snapshots.place, loop.snapshots.nbytes) == ("disk", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.pt"]


def test_what_cannot_be_tracked_is_refused_by_name():
    with pytest.raises(InvalidArgumentError, match=r"`tracked\[1\]` must have state_dict and load_state_dict.*got int"):
        Snapshots(tracked=[torch.Generator(), 3])


def test_a_broken_file_is_refused_by_name(tmp_path: Path):
    (tmp_path / "snapshot.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(SessionError, match=r"snapshot\.pt is not a snapshot that can be restored"):
        Loop("AdamW, foreach", place="disk", folder=tmp_path).snapshots.restore()


KILLED = """
import os, signal, sys
import torch
from tests.torch.loops import Loop

def stop(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(tree, file):
    file.write(b"half of it")
    file.flush()
    stop()

for folder, module, name, fault in ((sys.argv[1], torch, "save", write_half), (sys.argv[2], os, "fsync", stop)):
    child = os.fork()
    if not child:
        loop = Loop("AdamW, foreach", place="disk", folder=folder)
        loop.train()
        loop.snapshots.save(1, loop.extra)
        loop.train()
        setattr(module, name, fault)
        loop.snapshots.save(2, loop.extra)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_killed_while_a_snapshot_is_written_the_one_before_loads(tmp_path: Path):
    folders = [tmp_path / "half written", tmp_path / "written, not renamed"]
    subprocess.run([sys.executable, "-c", KILLED, *folders], cwd=ROOT, check=True)
    expected = Loop("AdamW, foreach")
    expected.train()
    wanted = expected.contents()
    for folder in folders:
        assert len(list(folder.iterdir())) == 2
        loop = Loop("AdamW, foreach", place="disk", folder=folder)
        assert loop.snapshots.exists
        loop.snapshots.restore()
        loop.extra = loop.snapshots.extra()
        assert_equal(loop.contents(), wanted)
        loop.snapshots.save(3, loop.extra)
        assert len(list(folder.iterdir())) == 1  # what was half written is gone
