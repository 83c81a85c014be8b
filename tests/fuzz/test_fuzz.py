"""The fuzzer's targets: each takes its valid inputs, refuses what once broke it, and survives some mutations."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from metalearn import Interactions
from metalearn.errors import InteractionsError

HERE = Path(__file__).parent
NAMES = (
    *("space", "config", "profile", "checkpoint", "sealed_checkpoint", "audit", "anchor", "report"),
    *("interactions_csv", "interactions_parquet", "bases", "incidents", "ledger", "snapshot"),
)
ONCE_BROKE = {"interactions_parquet": ["panic.parquet"], "snapshot": sorted(p.name for p in HERE.glob("*.pt"))}


@pytest.fixture(scope="module")
def fuzz(scripts: Any) -> ModuleType:
    return scripts("fuzz")


def test_every_target_is_here(fuzz: ModuleType):
    assert set(fuzz.TARGETS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_parses_its_seeds_and_raises_nothing_else_on_mutants(fuzz: ModuleType, name: str):
    target, rng = fuzz.TARGETS[name](), random.Random(0)
    seeds = target.seeds()
    target.parse(seeds[0])  # a seed that is refused would be fuzzed from in vain
    for _ in range(12):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(max(len(content), 1))
            content[place : place + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        fuzz.run_one(target, bytes(content))
    for file in ONCE_BROKE.get(name, []):
        fuzz.run_one(target, (HERE / file).read_bytes())


def test_what_is_no_way_to_refuse_an_input_gets_out(fuzz: ModuleType):
    def parse(content: bytes) -> None:
        raise KeyError(content)

    with pytest.raises(KeyError):
        fuzz.run_one(fuzz.Target(parse=parse, seeds=list), b"x")


def test_a_file_at_which_the_reader_panics_is_refused_by_name():
    with pytest.raises(InteractionsError, match=r"panic\.parquet"):
        Interactions.read(HERE / "panic.parquet")
