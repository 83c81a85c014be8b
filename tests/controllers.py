"""Controllers for tests: made from a seed, untrained, but acting on every signal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from metalearn.controller.checkpoint import Checkpoint, flatten, save_checkpoint
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS, Normalizer
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, fit_knots

BASES = {
    None: ((0.02, 0.25, 0.85, 0.15), (0.03, 0.34, 0.9, 0.1)),
    "matrix_factorization": ((0.01, 0.5, 0.8, 0.05), (0.02, 0.6, 0.75, 0.02)),
    "two_tower": ((0.004, 0.02, 0.9, 0.25), (0.006, 0.03, 0.92, 0.3)),
}
"""By family, None for any other: learning rate, weight decay, beta1 and dropout that runs start around; without, and
with a known horizon."""
FAMILIES = tuple(family for family in BASES if family is not None)


def acting_controller(path: Path, *, seed: int = 0, num_decisions: int = 20) -> Path:
    """Write the checkpoint of an untrained controller whose output layers are not at zero, so that it acts.

    Args:
        path: the file.
        seed: of the parameters and of the data that the knots are fitted to.
        num_decisions: decisions in a run whose horizon is known.

    Returns:
        The path.
    """
    import jax

    from metalearn.controller import network

    rng = np.random.default_rng(seed)
    config = ControllerConfig(descriptors=DESCRIPTORS, num_decisions=num_decisions, families=FAMILIES)
    untrained = flatten(network.init(config, key=jax.random.key(seed)))
    sizes = {"descriptors": len(DESCRIPTORS), "group": len(GROUP_FEATURES), "run": len(GLOBAL_FEATURES)}
    checkpoint = Checkpoint(
        config=config,
        network={
            name: value + rng.normal(0.0, 0.4, value.shape).astype(np.float32) for name, value in untrained.items()
        },
        base=np.array(
            [
                [[config.space[n].encode(v) for n, v in zip(CONTROLLED, base, strict=True)] for base in bases]
                for bases in BASES.values()
            ]
        ),
        normalizer=Normalizer(
            **{name: fit_knots(rng.uniform(-15.0, 15.0, (500, size))) for name, size in sizes.items()}
        ),
        provenance={"purpose": "tests"},
    )
    return save_checkpoint(checkpoint, path)
