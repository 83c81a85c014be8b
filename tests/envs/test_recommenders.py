"""What PyTorch makes of every recommender: compiled, and in low precision."""

from __future__ import annotations

import pytest
import torch

from envs.domains import Domain
from envs.recommenders import RECOMMENDERS, Recommender
from tests.envs.twins import BATCH, DIM, small_domain

pytestmark = [
    pytest.mark.parametrize("name", RECOMMENDERS),
    # Those of torch compiling a Function, and of inductor.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def domain() -> Domain:
    return small_domain()


def _made(name: str, domain: Domain) -> tuple[Recommender, tuple[torch.Tensor, ...]]:
    model = RECOMMENDERS[name].for_domain(domain, dim=DIM, dropout=0.1, generator=torch.Generator().manual_seed(0))
    return model.eval(), model.sampler(domain, BATCH, seed=0).next()


def _gradients(model: Recommender, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return gradients


def test_it_compiles_to_one_graph(name, domain):
    model, batch = _made(name, domain)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, loss = model(*batch), compiled(*batch)
    torch.testing.assert_close(loss, expected)
    for gradient, own in zip(_gradients(model, loss), _gradients(model, expected), strict=True):
        torch.testing.assert_close(gradient, own)


def test_it_stands_bfloat16(name, domain):
    model, batch = _made(name, domain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(*batch)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(model(*batch).item(), rel=0.05)
    assert all(torch.isfinite(gradient).all() for gradient in _gradients(model, low))


@pytest.mark.slow
def test_inductor_compiles_it(name, domain):
    model, batch = _made(name, domain)
    loss = torch.compile(model, fullgraph=True)(*batch)
    torch.testing.assert_close(loss, model(*batch))
    _gradients(model, loss)
