"""Precision: really lower, switched between steps only, its scaler kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from metalearn.errors import InvalidArgumentError
from metalearn.torch import Precision
from metalearn.torch import precision as module


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the CPU do what it is masked for: torch computes float16 on it, slowly, and keeps the setting of TF32."""
    monkeypatch.setattr(module, "_masks", lambda device: {})
    found = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(found)


class Loop:
    """A small training loop that knows the type which its layer computed in."""

    def __init__(self, precision: Precision) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.01)
        self.precision = precision
        self.dtypes: list[torch.dtype] = []

    def half_step(self, scale: float = 1.0) -> None:
        with self.precision.autocast():
            out = self.layer(torch.ones(2, 4))
            loss = scale * out.float().square().mean()
        self.dtypes.append(out.dtype)
        self.precision.scale(loss).backward()

    def step(self, scale: float = 1.0) -> None:
        self.half_step(scale)
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad()


def test_bf16_on_the_cpu_trains_near_fp32():
    loops = [Loop(Precision("fp32")), Loop(Precision("bf16"))]
    for loop in loops:
        for _ in range(20):
            loop.step()
    assert set(loops[0].dtypes) == {torch.float32}
    assert set(loops[1].dtypes) == {torch.bfloat16}
    weights = [loop.layer.weight.detach() for loop in loops]
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=0.05, atol=0.02)
    plain = Loop(Precision())
    for _ in range(20):
        plain.layer(torch.ones(2, 4)).square().mean().backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    assert torch.equal(plain.layer.weight, loops[0].layer.weight)


@pytest.mark.usefixtures("every")
def test_a_switch_within_a_step_waits_for_its_end():
    loop = Loop(Precision("fp16"))
    loop.half_step()
    loop.precision.write("bf16")
    assert loop.precision.read() == "bf16"
    loop.step()  # of the same step: its gradients are scaled, and so must these be
    loop.step()
    assert loop.dtypes == [torch.float16, torch.float16, torch.bfloat16]
    loop.precision.write("fp32")
    loop.step()
    assert loop.dtypes[-1] == torch.float32


@pytest.mark.usefixtures("every")
def test_the_scaler_skips_what_is_not_finite_and_is_kept():
    loop = Loop(Precision("fp16"))
    assert loop.precision.scaler is not None
    first = loop.precision.scaler.get_scale()
    before = loop.layer.weight.detach().clone()
    loop.step(scale=float("inf"))
    assert torch.equal(loop.layer.weight, before)
    lower = loop.precision.scaler.get_scale()
    assert lower < first
    loop.precision.write("fp32")
    loop.step()
    loop.precision.write("fp16")
    assert loop.precision.scaler.get_scale() == lower
    state = loop.precision.state_dict()
    other = Precision("fp32")
    other.write("fp16")
    other.load_state_dict(state)
    assert other.scaler is not None
    assert other.scaler.get_scale() == lower


@pytest.mark.usefixtures("every")
def test_a_state_loaded_in_mid_step_begins_the_step_anew():
    loop = Loop(Precision("fp16"))
    state = loop.precision.state_dict()
    loop.half_step()
    loop.precision.scaler.unscale_(loop.optimizer)  # type: ignore[union-attr]
    loop.precision.write("fp16")
    loop.precision.load_state_dict(state)
    loop.optimizer.zero_grad()
    before = [p.detach().clone() for group in loop.optimizer.param_groups for p in group["params"]]
    loop.step(scale=1e-3)  # an old scaler would refuse to unscale twice
    after = [p for group in loop.optimizer.param_groups for p in group["params"]]
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.usefixtures("every")
def test_tf32_is_a_setting_of_the_process_and_given_back():
    own = torch.get_float32_matmul_precision()
    precision = Precision("tf32")
    assert torch.get_float32_matmul_precision() == "high"
    precision.write("bf16")
    assert torch.get_float32_matmul_precision() == own
    precision.write("tf32")
    precision.release()
    assert torch.get_float32_matmul_precision() == own


@pytest.mark.parametrize("value", ["tf32", "fp16"])
def test_what_the_cpu_has_not_got_is_masked_with_a_reason(value: str):
    masks = Precision().masks()
    assert set(masks) == {"precision=tf32", "precision=fp16"}
    with pytest.raises(InvalidArgumentError, match=f"`value` cannot be '{value}': .*CPU|NVIDIA"):
        Precision(value)
    with pytest.raises(InvalidArgumentError, match=r"`precision` must be one of .*, got 'int8'"):
        Precision("int8")


@pytest.mark.parametrize(("capability", "missing"), [((7, 5), {"tf32", "bf16"}), ((8, 0), set()), ((9, 0), set())])
def test_masks_of_gpus_follow_their_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], missing: set[str]
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    masks: dict[str, Any] = module._masks(torch.device("cuda"))
    assert set(masks) == {f"precision={name}" for name in missing}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("value", ["tf32", "bf16", "fp16"])
def test_trains_on_a_gpu(value: str):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=True)
    precision = Precision(value, device="cuda")
    losses = []
    for _ in range(30):
        with precision.autocast():
            loss = layer(torch.ones(8, 64, device="cuda")).float().square().mean()
        precision.scale(loss).backward()
        precision.step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    precision.release()
    assert losses[-1] < 0.5 * losses[0]
