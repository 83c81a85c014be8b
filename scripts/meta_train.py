"""Meta-trains a controller and writes its checkpoint and model card.

    python scripts/meta_train.py --preset smoke                        # a minute, simulated domains only
    python scripts/meta_train.py --preset laptop --data DIR --output runs/meta   # about 1.5 hours on 2 cores

DIR holds one parquet or CSV file of interactions per domain, and optionally a MANIFEST.json that gives each a role:
"meta-training" domains are learnt from, "validation" domains choose the iteration that is released. Killed, it resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

# Two forced host devices, one thread each: a second core does nothing inside one program of small tensors.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count={os.cpu_count()} "
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs.events import EventConfig
from envs.public import DomainCache, find_source, load_folder, load_public
from envs.tasks import NO_EVENTS, TaskPool, build_pool
from envs.vectorized import LARGE, MIDDLE, SMALL
from metalearn.controller.checkpoint import save_checkpoint
from metalearn.controller.config import ControllerConfig
from metalearn.controller.observation import DESCRIPTORS
from metalearn.interactions import Interactions
from metalearn.meta_training.loop import MetaTrainConfig, meta_train
from metalearn.meta_training.model_card import write_model_card
from metalearn.tracking import Tracker
from provenance import commit

PRESETS = {
    "smoke": (
        MetaTrainConfig(
            num_iterations=2,
            groups_per_pool=(4,),
            steps_range=((8, 16),),
            search_tasks=(12,),
            search_configurations=(16,),
            validate_every=2,
            validation_episodes=8,
        ),
        (SMALL,),
        2,
        (16,),
    ),
    "laptop": (MetaTrainConfig(), (SMALL, MIDDLE, LARGE), 4, (40, 30, 12)),
}
"""Name to settings, sizes, slices of each real domain, simulated domains of each size."""


EVENTS = EventConfig(missing_validation=0.1, missing_gradients=0.1, delayed_validation=0.1, drift=0.15)
"""What befalls episodes that are learnt from; those that validate see none."""


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--data", type=Path, help="folder of interaction files, one domain each")
    parser.add_argument("--hub", nargs="*", default=[], help="registered names or Hugging Face ids to learn from")
    parser.add_argument("--output", type=Path, default=Path("runs/meta_training"))
    parser.add_argument("--iterations", type=int, help="policy updates, instead of the preset's")
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


def build_pools(arguments: argparse.Namespace, real: dict[str, dict[str, Interactions]]) -> list[list[TaskPool]]:
    """Builds the pools to learn from and those to validate on, one a size."""
    _, buckets, slices, simulated = PRESETS[arguments.preset]
    cache = arguments.output / "tasks"
    # Without real validation domains, unseen simulated ones choose: better than choosing on what was learnt from.
    unseen = 0 if real["validation"] else 8
    pools: list[list[TaskPool]] = [[], []]
    for bucket, count in zip(buckets, simulated, strict=True):
        for index, (role, num_simulated, events) in enumerate(
            (("meta-training", count, EVENTS), ("validation", unseen, NO_EVENTS))
        ):
            pools[index].append(
                build_pool(
                    real[role],
                    bucket,
                    slices_per_domain=slices,
                    num_simulated=num_simulated,
                    seed=arguments.seed + index,
                    events=events,
                    cache=cache,
                )
            )
        sizes = [len(group[-1]) for group in pools]
        print(
            f"bucket {bucket.users} x {bucket.items}: {sizes[0]} tasks, {sizes[1]} for validation",
            flush=True,
        )
    return pools


def main() -> None:
    arguments = parse()
    began = time.monotonic()
    config, buckets, *_ = PRESETS[arguments.preset]
    config = replace(config, seed=arguments.seed, num_iterations=arguments.iterations or config.num_iterations)
    real = read_domains(arguments)
    pools, validation_pools = build_pools(arguments, real)
    provenance = {
        "domains": sorted(real["meta-training"]),
        "validation_domains": sorted(real["validation"]),
        "tasks": [len(pool) for pool in pools],
        "buckets": [asdict(bucket) for bucket in buckets],
        "events": asdict(EVENTS),
        "commit": commit(),
        "preset": arguments.preset,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    with Tracker("metalearn-meta-training", config=asdict(config), directory=arguments.output) as tracker:

        def log(record: dict) -> None:
            record = {"elapsed": round(time.monotonic() - began, 1), **record}
            tracker.log({key: value for key, value in record.items() if isinstance(value, int | float)})
            with (arguments.output / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}), flush=True)

        checkpoint = meta_train(
            config,
            ControllerConfig(descriptors=DESCRIPTORS),
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
    main()
