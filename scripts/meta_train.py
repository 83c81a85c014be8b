"""Meta-trains a controller and writes its checkpoint and model card.

    python scripts/meta_train.py --preset smoke                        # a minute, simulated domains only
    python scripts/meta_train.py --preset laptop --data DIR --output runs/meta --bases checkpoints/default/bases.json

DIR holds one parquet or CSV file of interactions per domain, and optionally a MANIFEST.json that gives each a role:
"meta-training" domains are learnt from, "validation" domains choose the iteration that is released. Killed, it resumes.
`laptop` takes an hour or two on 2 cores and trains the families that 2 cores can train on whole domains; a family that
has a base in the file gets that base, at rest, if it has no recipe, or if validation speaks against what was learnt for
it.
`gpu` trains all five families, for many times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Two forced host devices, one thread each: a second core does nothing inside one program of small tensors.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count={os.cpu_count()} "
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs.public import DomainCache, find_source, load_folder, load_public
from envs.tasks import EVENTS, NO_EVENTS, TaskPool, build_pool
from envs.vectorized import HUGE, LARGE, MIDDLE, SMALL, WHOLE, Bucket
from metalearn.controller.checkpoint import save_checkpoint
from metalearn.controller.config import CONTROLLED, OTHER, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS
from metalearn.errors import InvalidArgumentError, MetalearnError
from metalearn.interactions import Interactions
from metalearn.meta_training.config import ChosenBase, MetaTrainConfig
from metalearn.meta_training.es import ESConfig
from metalearn.meta_training.loop import meta_train
from metalearn.meta_training.model_card import write_model_card
from metalearn.meta_training.outcome import OutcomeFitConfig
from metalearn.meta_training.ppo import PPOConfig
from metalearn.tracking import Tracker
from provenance import commit


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one pool of tasks is made of, and its share of the work.

    Args:
      bucket: sizes, learner, optimizer.
      groups: of rollouts in an iteration.
      steps: fewest and most optimizer steps per interval, whatever the epochs.
      search: tasks of the search for the base, and configurations of each.
    """

    bucket: Bucket
    groups: int
    steps: tuple[int, int] = (4, 160)
    search: tuple[int, int] = (16, 32)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A budget.

    Args:
      recipes: of the pools, of one family from small to large.
      slices: of each real domain, at every size.
      simulated: domains, by users of the bucket.
      settings: of the meta-training run.
    """

    recipes: tuple[Recipe, ...]
    slices: int
    simulated: Mapping[int, int]
    settings: Mapping[str, Any]

    @property
    def families(self) -> tuple[str, ...]:
        """Model families, in the order of the recipes."""
        return tuple(dict.fromkeys(recipe.bucket.learner for recipe in self.recipes))

    def config(self, **more: Any) -> MetaTrainConfig:
        """Returns the settings of the run, with some replaced."""
        columns = {
            "groups_per_pool": tuple(recipe.groups for recipe in self.recipes),
            "steps_range": tuple(recipe.steps for recipe in self.recipes),
            "search_tasks": tuple(recipe.search[0] for recipe in self.recipes),
            "search_configurations": tuple(recipe.search[1] for recipe in self.recipes),
        }
        return MetaTrainConfig(**{**columns, **self.settings, **more})


def _of(bucket: Bucket, learner: str, **changes: Any) -> Bucket:
    return replace(bucket, learner=learner, **changes)


BPR, TOWERS, CLICKS, SEQUENCES, GRAPH = (
    "matrix_factorization", "two_tower", "click_model", "self_attention", "graph_convolution",
)  # fmt: skip
_SMALL, _MIDDLE = replace(SMALL, history=20), replace(MIDDLE, history=20)

_EMBEDDINGS = (
    Recipe(bucket=_of(_MIDDLE, BPR), groups=2, steps=(8, 96), search=(32, 16)),
    Recipe(bucket=_of(LARGE, BPR), groups=2, search=(32, 16)),
    Recipe(bucket=_of(HUGE, BPR), groups=2, search=(32, 8)),
    Recipe(bucket=_of(WHOLE, TOWERS), groups=2, steps=(4, 128), search=(32, 16)),
)
"""The families that a laptop can train on whole domains."""
_FAMILIES = (
    *_EMBEDDINGS,
    Recipe(bucket=_of(_MIDDLE, TOWERS), groups=2, steps=(8, 96)),
    # A click model scores every pair by itself: fewer users are evaluated.
    Recipe(bucket=_of(_MIDDLE, CLICKS, evaluated=96), groups=2, steps=(8, 96)),
    Recipe(bucket=_of(WHOLE, CLICKS, evaluated=96), groups=1),
    Recipe(bucket=_of(_SMALL, SEQUENCES), groups=1, steps=(8, 96)),
    Recipe(bucket=_of(_MIDDLE, SEQUENCES, batch=64), groups=2, steps=(8, 96)),
    Recipe(bucket=_of(_SMALL, GRAPH), groups=1, steps=(8, 96)),
    Recipe(bucket=_of(_MIDDLE, GRAPH), groups=1, steps=(8, 96)),
)
"""Five families, each at sizes up to whole domains where it can be."""
_WIDE_SEARCH = (32, 48)
"""Tasks and configurations of every pool's search on an accelerator."""

PRESETS = {
    "smoke": Preset(
        recipes=(Recipe(bucket=SMALL, groups=4, steps=(8, 16), search=(12, 16)),),
        slices=2,
        simulated={512: 16},
        settings={
            "num_iterations": 2,
            "validate_every": 2,
            "validation_episodes": 8,
            "outcome_rounds": 1,
            "outcome": OutcomeFitConfig(max_evaluations=4),
        },
    ),
    "laptop": Preset(
        recipes=_EMBEDDINGS,
        slices=4,
        simulated={1_024: 30, 4_096: 12, 6_144: 12, 24_576: 4},
        settings={
            # Few validations of many episodes: the best of many noisy ones would be luck.
            "num_iterations": 40,
            "validate_every": 10,
            "validation_episodes": 16,
            "patience": 2,
            "outcome_rounds": 3,
            # Rollouts of a group start alike, so that what differs between them is what the policy did.
            "ppo": PPOConfig(start_weight=0.0, initial_start_log_std=-2.5),
        },
    ),
    # Episodes of a chunk run side by side on an accelerator, and every local device takes chunks.
    "gpu": Preset(
        recipes=tuple(replace(recipe, groups=4 * recipe.groups, search=_WIDE_SEARCH) for recipe in _FAMILIES),
        slices=8,
        simulated={512: 160, 1_024: 120, 4_096: 48, 6_144: 48, 24_576: 16},
        settings={"num_iterations": 400, "validation_episodes": 32},
    ),
}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--data", type=Path, help="folder of interaction files, one domain each")
    parser.add_argument("--hub", nargs="*", default=[], help="registered names or Hugging Face ids to learn from")
    parser.add_argument("--output", type=Path, default=Path("runs/meta_training"))
    parser.add_argument(
        "--bases", type=Path, help="base configurations of families that the preset does not train, or that end at rest"
    )
    parser.add_argument("--iterations", type=int, help="policy updates, instead of the preset's")
    parser.add_argument("--estimator", choices=("ppo", "es"), default="ppo", help="policy gradients, or evolution")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_domains(arguments: argparse.Namespace) -> dict[str, dict[str, Interactions]]:
    """Reads the real domains, by role."""
    roles = ("meta-training", "validation")
    sources = {role: load_folder(arguments.data, role=role) if arguments.data else {} for role in roles}
    real = {role: {name: source.interactions() for name, source in found.items()} for role, found in sources.items()}
    prepared = DomainCache(arguments.output / "domains")
    for name in arguments.hub:
        print("\n".join(find_source(name).describe()), flush=True)
        real["meta-training"][name] = load_public(name, cache=prepared).train
    if arguments.hub:
        print(prepared.statistics, flush=True)
    counts = [len(real[role]) for role in roles]
    print(f"{counts[0]} real domains to learn from, {counts[1]} to validate on", flush=True)
    return real


def read_bases(path: Path | None) -> tuple[ChosenBase, ...]:
    """Reads bases, family to "known" and "unknown" to values by hyperparameter.

    Raises:
      InvalidArgumentError: the file is none of scripts/choose_base.py.
    """
    if path is None:
        return ()
    try:
        return tuple(
            (family, horizon == "known", tuple(float(values[name]) for name in CONTROLLED))
            for family, horizons in json.loads(path.read_text())["bases"].items()
            if family != OTHER
            for horizon, values in sorted(horizons.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(
            f"`--bases` must be a file that scripts/choose_base.py has written, got {path} ({error!r})"
        ) from error


def build_pools(arguments: argparse.Namespace, real: dict[str, dict[str, Interactions]]) -> list[list[TaskPool]]:
    """Builds the pools to learn from and those to validate on, one a recipe."""
    preset = PRESETS[arguments.preset]
    cache = arguments.output / "tasks"
    # Without real validation domains, unseen simulated ones choose: better than choosing on what was learnt from.
    unseen = 0 if real["validation"] else 8
    pools: list[list[TaskPool]] = [[], []]
    built: dict[tuple[str, int, int], TaskPool] = {}
    for recipe in preset.recipes:
        users = recipe.bucket.users
        for index, (role, num_simulated, events) in enumerate(
            (("meta-training", preset.simulated[users], EVENTS), ("validation", unseen, NO_EVENTS))
        ):
            key = role, users, recipe.bucket.evaluated
            if key not in built:
                built[key] = build_pool(
                    real[role],
                    recipe.bucket,
                    slices_per_domain=preset.slices,
                    num_simulated=num_simulated,
                    seed=arguments.seed + index,
                    events=events,
                    cache=cache,
                )
            pools[index].append(built[key].trained_by(recipe.bucket))
        print(f"{pools[0][-1].label}: {len(pools[0][-1])} tasks, {len(pools[1][-1])} for validation", flush=True)
    return pools


def main() -> None:
    arguments = parse()
    began = time.monotonic()
    preset = PRESETS[arguments.preset]
    bases = read_bases(arguments.bases)
    given = tuple(base for base in bases if base[0] not in preset.families)
    others = tuple(dict.fromkeys(family for family, *_ in given))
    config = preset.config(
        seed=arguments.seed,
        bases=given,
        resting_bases=tuple(base for base in bases if base not in given),
        es=ESConfig() if arguments.estimator == "es" else None,
    )
    config = replace(config, num_iterations=arguments.iterations or config.num_iterations)
    real = read_domains(arguments)
    pools, validation_pools = build_pools(arguments, real)
    provenance = {
        "domains": sorted(real["meta-training"]),
        "validation_domains": sorted(real["validation"]),
        "tasks": [len(pool) for pool in pools],
        "buckets": [asdict(recipe.bucket) for recipe in preset.recipes],
        "events": asdict(EVENTS),
        "commit": commit(),
        "preset": arguments.preset,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    with Tracker("metalearn-meta-training", config=asdict(config), directory=arguments.output) as tracker:

        def log(record: dict) -> None:
            record = {"elapsed": round(time.monotonic() - began, 1), **record}
            histograms = {key: value for key, value in record.items() if isinstance(value, list)}
            tracker.histograms(histograms, low=-1.0, high=1.0)
            tracker.log({key: value for key, value in record.items() if isinstance(value, int | float)})
            with (arguments.output / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            shown = {key: value for key, value in record.items() if key not in histograms}
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in shown.items()}), flush=True)

        checkpoint = meta_train(
            config,
            # A family that has a base and no recipe keeps to its base: the policy never sees it.
            ControllerConfig(descriptors=DESCRIPTORS, families=(*preset.families, *others), at_rest=others),
            pools,
            validation_pools,
            directory=arguments.output / "state",
            log=log,
            provenance=provenance,
        )
        path = save_checkpoint(checkpoint, arguments.output / "controller.safetensors")
        write_model_card(checkpoint, path.with_name("README.md"))
        tracker.artifact(path, "controller")
    print(
        json.dumps(
            {
                "checkpoint": str(path),
                "seconds": round(time.monotonic() - began, 1),
                **checkpoint.provenance["validation"],
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
