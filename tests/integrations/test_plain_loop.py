"""The contract on a plain loop, and what adapters share."""

from __future__ import annotations

import importlib.util
import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.integrations.deferred import DeferredScheduler
from metalearn.integrations.options import Found, SchedulerOptions, complete_options
from metalearn.torch import MetaScheduler
from tests.integrations import plain
from tests.integrations.contract import Job, over_the_contract, unknown_options_are_refused

ROOT = Path(__file__).parents[2]


@over_the_contract
def test_contract(check: Any, job: Job):
    if check is unknown_options_are_refused:
        pytest.skip("Python refuses unknown arguments of a plain call")
    check(plain.run, plain.run, job)


def test_adapters_take_what_a_scheduler_takes():
    expected = [name for name in inspect.signature(MetaScheduler).parameters if name not in ("optimizer", "model")]
    assert list(SchedulerOptions.__annotations__) == expected


@pytest.mark.parametrize(
    ("options", "found", "expected"),
    [
        ({}, Found(), {"horizon": None, "batch_size": None, "metric": None}),
        ({}, Found(steps=20.0, batch_size=8), {"horizon": 20, "batch_size": 8, "metric": None}),
        ({}, Found(steps=math.inf), {"horizon": None, "batch_size": None, "metric": None}),
        ({}, Found(steps=-1), {"horizon": None, "batch_size": None, "metric": None}),
        ({"horizon": None}, Found(steps=20), {"horizon": None, "batch_size": None, "metric": None}),
        (
            {"horizon": 7, "batch_size": 2},
            Found(steps=20, batch_size=8),
            {"horizon": 7, "batch_size": 2, "metric": None},
        ),
        (
            {},
            Found(metric="loss", mode="min"),
            {"horizon": None, "batch_size": None, "metric": "loss", "mode": "min"},
        ),
        (
            {"metric": "ndcg"},
            Found(metric="loss", mode="min"),
            {"horizon": None, "batch_size": None, "metric": "ndcg"},
        ),
        (
            {"metric": "loss", "mode": "max"},
            Found(metric="loss", mode="min"),
            {"horizon": None, "batch_size": None, "metric": "loss", "mode": "max"},
        ),
        ({}, Found(tracked=["schedule"]), {"horizon": None, "batch_size": None, "metric": None}),
    ],
)
def test_what_is_left_open_the_framework_knows(options: dict[str, Any], found: Found, expected: dict[str, Any]):
    assert complete_options(options, found) == expected


def test_a_rollback_takes_back_what_is_the_frameworks_too():
    completed = complete_options({"rollback": "any", "tracked": ["mine"]}, Found(tracked=["its"]))
    assert completed["tracked"] == ("its", "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"`domain` is missing; pass metalearn.profile_domain\(interactions\)"),
        ({"domain": None}, "`domain` is missing"),
        ({"optimizer": 1}, "`optimizer` is the framework's own; leave it out"),
        ({"model": 1}, "`model` is the framework's own; leave it out"),
        ({"lr": 1}, "`lr` is no argument of MetaScheduler; pass some of .*'horizon'"),
    ],
)
def test_wrong_options_are_named_at_once(options: dict[str, Any], message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        DeferredScheduler(options)


def test_before_training_there_is_no_scheduler(job: Job):
    deferred = DeferredScheduler({"domain": job.domain.profile})
    assert deferred.state_dict() == {}
    with pytest.raises(SessionError, match="no scheduler before training starts"):
        deferred.scheduler  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate", "recbole"])
def test_adapters_load_no_jax(framework: str):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    code = f"""
import sys
import metalearn.integrations.{framework} as adapter
if hasattr(adapter, "patch_recbole"):
    adapter.patch_recbole()
assert "{framework}" in sys.modules
print(sorted({{"jax", "jaxlib", "flax", "optax", "orbax"}} & {{name.partition(".")[0] for name in sys.modules}}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_package_loads_no_framework_and_each_adapter_only_its_own():
    code = """
import importlib, importlib.util, sys
def loaded(): return {"torch", "jax", "lightning", "transformers", "accelerate", "recbole"} & set(sys.modules)
import metalearn.integrations
assert loaded() == set(), loaded()
import metalearn.integrations.options, metalearn.integrations.recbole
assert loaded() == {"torch"}, loaded()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
