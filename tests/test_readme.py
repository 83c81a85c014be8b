"""The README's own lines run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.recommenders import MatrixFactorization
from metalearn import Interactions

README = Path(__file__).resolve().parent.parent / "README.md"


def code_under(heading: str) -> str:
    """Return the first Python block under a heading."""
    found = re.search(rf"^## {heading}\n.*?^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


class Learner(torch.nn.Module):
    """A model whose `forward` takes a batch and returns its loss, as the README's does."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = MatrixFactorization(20, 30, 4)

    def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.factors(*batch)


def test_the_lines_for_your_own_loop_steer_it():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = Learner()
    validated: list[torch.Tensor] = []

    def evaluate(model: Learner) -> float:
        validated.append(model.factors.user.weight.detach().clone())
        return 0.1

    scope: dict[str, Any] = {
        "interactions": Interactions.from_arrays(rng.integers(0, 20, 200), rng.integers(0, 30, 200)),
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": [tuple(torch.randint(0, 20, (3, 8)))] * 1001,
        "evaluate": evaluate,
    }
    exec(compile(code_under("In your own loop"), str(README), "exec"), scope)
    assert len(validated) == 2
    assert [decision.step for decision in scope["scheduler"].decisions] == [0, 500, 1000]
    assert not torch.equal(validated[-1], model.factors.user.weight)  # averaged, and the weights are back
