"""Chooses the base of a controller again, with its trained policy, on whole validation domains.

    python scripts/choose_base.py --data DIR --output runs/base   # some minutes on 2 cores
    python scripts/choose_base.py --quick                         # simulated domains, under a minute

It is the last stage of `scripts/meta_train.py`, on its own: for a checkpoint that has none, or when validation domains
have come in. DIR is as there; of its MANIFEST.json only domains with the role "validation" are used. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

# As in meta_train.py: a second core works as a second host device.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count={os.cpu_count()} "
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from envs.public import load_folder
from envs.tasks import build_pool
from envs.vectorized import LARGE, SMALL
from metalearn.controller.checkpoint import load_checkpoint, save_checkpoint, unflatten
from metalearn.controller.controller import load_controller
from metalearn.errors import MetalearnError
from metalearn.meta_training import ppo
from metalearn.meta_training.model_card import write_model_card
from metalearn.meta_training.release import released_prior
from metalearn.meta_training.rollout import Prior
from metalearn.meta_training.runner import RolloutRunner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--controller", type=Path, help="a checkpoint instead of the one that ships")
    parser.add_argument("--data", type=Path, help="folder of interaction files, one domain each")
    parser.add_argument("--output", type=Path, help="folder for the checkpoint with the chosen base, and its card")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of an interval")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few steps on simulated domains")
    arguments = parser.parse_args()

    checkpoint = load_controller().checkpoint if arguments.controller is None else load_checkpoint(arguments.controller)
    sources = load_folder(arguments.data, role="validation") if arguments.data else {}
    pool = build_pool(
        {name: source.interactions() for name, source in sources.items()},
        SMALL if arguments.quick else LARGE,
        slices_per_domain=4,
        num_simulated=0 if sources else 4,
        seed=arguments.seed + 1,
        cache=None if arguments.output is None else arguments.output / "tasks",
    )
    print(f"{len(pool)} tasks of {sorted(set(pool.names))}", flush=True)
    untrained = ppo.init(checkpoint.config, ppo.PPOConfig(), key=jax.random.key(0))
    prior, records = released_prior(
        RolloutRunner([pool], checkpoint.config),
        untrained._replace(network=unflatten(checkpoint.network)),
        Prior(checkpoint.base, checkpoint.normalizer),
        num_steps=8 if arguments.quick else arguments.steps,
        seed=arguments.seed,
        log=lambda record: print(json.dumps(record), flush=True),
    )
    if arguments.output is not None:
        provenance = {**checkpoint.provenance, "release_base": records}
        path = save_checkpoint(
            replace(checkpoint, base=prior.base, provenance=provenance), arguments.output / "controller.safetensors"
        )
        write_model_card(load_checkpoint(path), path.with_name("README.md"))
        print(f"written to {path}")
    print(json.dumps({name: round(value, 4) for name, value in records.items()}))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
