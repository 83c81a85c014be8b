"""Where episodes take place: small domains, simulated and real, each with model families and a budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from envs.domains import Domain, make_domain
from envs.public import BUNDLED, PublicSource, draw_slice, load_folder
from envs.recommenders import Evaluator
from envs.simulated import SimulatedPrior, simulate
from metalearn.interactions import Interactions

USERS, ITEMS = (250, 500), (150, 350)
SETUPS = (("matrix_factorization", True), ("matrix_factorization", False))
"""Model family, and whether the run's length is known."""
DEARER_SETUPS = (("two_tower", True),)
"""On every second domain."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run gets.

    Args:
      steps: optimizer steps.
      interval: steps between decisions.
      batch_size: samples per step.
      dim: embedding dimension.
    """

    steps: int = 120
    interval: int = 6
    batch_size: int = 128
    dim: int = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A domain, a model family, and whether the length of the run is known.

    Args:
      domain: small.
      family: name in `envs.recommenders.RECOMMENDERS`.
      knows_horizon: where not, the rate is held and averaged weights are evaluated.
      budget: of its runs.
    """

    domain: Domain
    family: str
    knows_horizon: bool
    budget: Budget

    @property
    def name(self) -> str:
        """Names the cell."""
        return f"{self.domain.name}/{self.family}/{'known' if self.knows_horizon else 'unknown'} horizon"

    @property
    def horizon(self) -> int | None:
        """What the controller is told."""
        return self.budget.steps if self.knows_horizon else None

    @cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """By split."""
        return {split: Evaluator(self.domain, split) for split in ("validation", "test")}


def simulated_cells(count: int, budget: Budget) -> list[Cell]:
    """Returns the cells of so many simulated domains, drawn with the seeds 0, 1, ..."""
    prior = SimulatedPrior(users=USERS, items=ITEMS, history=(15.0, 40.0))
    domains = [_domain(simulate(prior, seed=seed), f"simulated-{seed}") for seed in range(count)]
    return _cells(domains, budget)


def real_cells(count: int, budget: Budget, folder: str | Path | None = None) -> list[Cell]:
    """Returns the cells of so many slices of the bundled domain, and of one of each domain in a folder.

    Args:
      count: slices of the bundled domain.
      budget: of the runs.
      folder: with parquet or CSV files, see `envs.public.load_folder`.
    """
    domains = _slices(BUNDLED, count)
    for source in () if folder is None else load_folder(folder).values():
        domains += _slices(source, 1)
    return _cells(domains, budget)


def _slices(source: PublicSource, count: int) -> list[Domain]:
    interactions = source.interactions()
    return [
        _domain(
            draw_slice(
                interactions,
                max_users=USERS[1],
                max_items=ITEMS[1],
                min_users=USERS[0] // 2,
                min_items=ITEMS[0] // 2,
                key=np.random.default_rng(seed),
            ),
            f"{source.name}-{seed}",
        )
        for seed in range(count)
    ]


def _domain(interactions: Interactions, name: str) -> Domain:
    """Splits by leave-last-out: nearly every user has a target, which keeps the noise of the metric small."""
    domain = make_domain(interactions, name=name, split="leave-last-out")
    return dataclasses.replace(domain, item_content=None, exposures=None)


def _cells(domains: list[Domain], budget: Budget) -> list[Cell]:
    return [
        Cell(domain=domain, family=family, knows_horizon=known, budget=budget)
        for index, domain in enumerate(domains)
        for family, known in (*SETUPS, *(() if index % 2 else DEARER_SETUPS))
    ]
