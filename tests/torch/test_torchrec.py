"""TorchRec's optimizers do not run torch's hooks: refused, save for the torch optimizer inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn.errors import InvalidArgumentError
from metalearn.torch import MetaScheduler

INTERVAL = 4


class Unhooked(torch.optim.Optimizer):
    """Is made as TorchRec's KeyedOptimizer is: with room for hooks, and a step that does not call them."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}
        self.inside, self.state, self.param_groups = inside, inside.state, inside.param_groups  # type: ignore[misc]

    def step(self, closure: Any = None) -> None:
        self.inside.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inside.zero_grad(set_to_none)


def test_an_optimizer_whose_step_runs_no_hooks_is_refused(domain: Domain, controller_path: Path):
    layer = torch.nn.Linear(3, 2)
    inside = torch.optim.AdamW(layer.parameters())
    outside = Unhooked(inside)
    with pytest.raises(InvalidArgumentError, match="is a Unhooked, which does not run the hooks of a torch"):
        MetaScheduler(outside, domain=domain.profile, controller=controller_path)
    steer(MetaScheduler(inside, domain=domain.profile, controller=controller_path, interval=INTERVAL), layer, outside)


def steer(scheduler: MetaScheduler, layer: torch.nn.Linear, stepped: Any) -> None:
    """Step an optimizer around the one that is steered, and see that its decisions are made."""
    for _ in range(3 * INTERVAL):
        loss = layer(torch.ones(5, 3)).square().mean()
        loss.backward()
        stepped.step()
        stepped.zero_grad()
        scheduler.step(loss)
        if scheduler.should_validate:
            with scheduler.averaged_parameters():
                metric = -loss.item()
            scheduler.report(metric)
    assert len(scheduler.decisions) == 4
    assert scheduler.get_last_lr()[0] == pytest.approx(scheduler.decisions[2].groups[0]["learning_rate"], rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_torchrec(domain: Domain, controller_path: Path):
    keyed = pytest.importorskip("torchrec.optim.keyed", reason="TorchRec is not installed")
    import torchrec
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

    layer = torch.nn.Linear(3, 2)
    table = torchrec.EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=5, feature_names=["f"])
    fused = FusedEmbeddingBagCollection(
        tables=[table], optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}, device=torch.device("cpu")
    )
    wrapper = keyed.KeyedOptimizerWrapper(dict(layer.named_parameters()), torch.optim.AdamW)
    combined = keyed.CombinedOptimizer([("dense", wrapper), ("sparse", fused.fused_optimizer())])
    options: dict[str, Any] = {"domain": domain.profile, "controller": controller_path, "interval": INTERVAL}
    ((_, alone),) = fused.fused_optimizer().optimizers
    for refused in (wrapper, combined, alone):
        with pytest.raises(
            InvalidArgumentError, match="which does not run the hooks of a torch optimizer, as TorchRec"
        ):
            MetaScheduler(refused, **options)
    steer(MetaScheduler(wrapper._optimizer, **options), layer, combined)
