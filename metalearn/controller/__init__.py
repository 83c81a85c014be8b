"""The controller: base prior, domain modifier with gate, recurrent in-run policy; loaded from a checkpoint file.

`metalearn.controller.network` is the Flax definition and the only module here that loads jax.
"""

from metalearn.controller.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.controller import Controller, load_controller
from metalearn.controller.decision import Configuration, Decision
from metalearn.controller.explanation import Explanation

__all__ = [
    "CONTROLLED",
    "Checkpoint",
    "Configuration",
    "Controller",
    "ControllerConfig",
    "Decision",
    "Explanation",
    "load_checkpoint",
    "load_controller",
    "save_checkpoint",
]
