"""A trained controller, ready to start sessions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metalearn.controller.checkpoint import Checkpoint, fingerprint, load_checkpoint
from metalearn.controller.outcome import OutcomeModel
from metalearn.controller.runtime import NumpyNetwork
from metalearn.errors import CheckpointError
from metalearn.spaces import CANONICAL_SPACE, HyperparameterSpace

if TYPE_CHECKING:
    from metalearn.controller.decision import Mode
    from metalearn.controller.modes import Advisor
    from metalearn.profiles import DomainProfile
    from metalearn.safety import GuardConfig
    from metalearn.session import Session

_PACKAGE = Path(__file__).resolve().parent.parent
_DEFAULT_PLACES = (
    _PACKAGE / "_checkpoints" / "default" / "controller.safetensors",  # inside a wheel
    _PACKAGE.parent / "checkpoints" / "default" / "controller.safetensors",  # in a checkout
)


class Controller:
    """Serves a checkpoint in NumPy.

    Args:
      checkpoint: from `load_checkpoint`, or made in memory.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.network = NumpyNetwork(checkpoint.network)
        self.outcome = OutcomeModel(checkpoint.outcome) if checkpoint.outcome else None
        self.fingerprint = fingerprint(checkpoint)

    def start(
        self,
        profile: DomainProfile,
        space: HyperparameterSpace = CANONICAL_SPACE,
        *,
        roles: Sequence[str] = ("embedding",),
        family: str | None = None,
        horizon: int | None = None,
        decays: bool = True,
        batch_size: int | None = None,
        interval: int | None = None,
        initial: Sequence[dict[str, float]] | None = None,
        withheld: Sequence[Collection[str]] | None = None,
        mode: Mode = "control",
        advisor: Advisor | None = None,
        guard: GuardConfig | None = None,
    ) -> Session:
        """Starts a session on a domain; `ask` it for the start configuration.

        Args:
          profile: of the training interactions, from `profile_domain`.
          space: the hyperparameters that the loop can change; others are left alone.
          roles: of each parameter group: `embedding`, `dense`, `pretrained`, `adapter` or `head`.
          family: of the model, one of `config.families`; None for any other.
          horizon: optimizer steps of the whole run; None if nobody knows.
          decays: whether the learning rate decays over the horizon. It need not where averaged weights are evaluated:
            then the horizon sets the interval and nothing else.
          batch_size: training samples per step; None if nobody knows.
          interval: steps between decisions; by default the horizon over the controller's number of decisions.
          initial: per group, values to start from instead of the controller's own start: for optimizers it was not
            trained on.
          withheld: per group, hyperparameters of `space` that this group keeps to itself.
          mode: `control`; `shadow` to decide and change nothing; `advise` to ask before each change; `frozen` to leave
            the start configuration in force. `Session.switch` changes it.
          advisor: for `advise`: gets what the controller would do, as a decision; returns True to let it, False to
            leave the values where they are, or other values, with `groups` and `run` like a decision's.
          guard: limits of its own; by default those that the controller was trained with.

        Raises:
          InvalidArgumentError: an argument is out of range; the message names it.
        """
        from metalearn.safety import GuardConfig
        from metalearn.session import Session

        return Session(
            self,
            profile,
            space,
            roles=roles,
            family=family,
            horizon=horizon,
            decays=decays,
            batch_size=batch_size,
            interval=interval,
            initial=initial,
            withheld=withheld,
            mode=mode,
            advisor=advisor,
            guard=guard or GuardConfig(),
        )


def load_controller(path: str | Path | None = None) -> Controller:
    """Loads a pretrained controller; nothing in the file is executed.

    Args:
      path: a checkpoint, or a folder that holds `controller.safetensors`; by default the one that ships with metalearn.

    Raises:
      CheckpointError: the file is missing, altered, or not a checkpoint; `SchemaMismatchError` if it is for another
        version.
    """
    if path is None:
        for place in _DEFAULT_PLACES:
            if place.exists():
                return Controller(load_checkpoint(place))
        raise CheckpointError(
            "this installation has no default checkpoint; pass `path`, or make one with scripts/meta_train.py"
        )
    path = Path(path)
    return Controller(load_checkpoint(path / "controller.safetensors" if path.is_dir() else path))
