"""What of an optimizer and a model a controller can change, and how it is changed for the time of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from time import perf_counter
from typing import Any

import torch

from metalearn.controller.config import ROLES
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.spaces import CANONICAL_SPACE, HyperparameterSpace

_DROPOUTS = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout)
_ADAM_FAMILY = (torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SparseAdam)


TIMED_EVERY = 16
"""One step in so many is timed, and stands for the others: reading the clock costs a tenth of what is measured."""


def dropout_modules(model: torch.nn.Module | None) -> list[Any]:
    """Returns the dropout layers of a model."""
    return [module for module in model.modules() if isinstance(module, _DROPOUTS)] if model is not None else []


def infer_roles(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> list[str]:
    """Returns each group's role: what its "role" key says, else `embedding` if most of it lies in embedding tables.

    Without a model a group of matrices only counts as embeddings, anything else as `dense`.
    """
    tables: set[int] | None = None
    if model is not None:
        kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
        tables = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    roles = []
    for index, group in enumerate(optimizer.param_groups):
        role = group.get("role")
        if role is not None and role not in ROLES:
            raise InvalidArgumentError(f"`role` of parameter group {index} must be among {ROLES}, got {role!r}")
        params = group["params"]
        total = sum(p.numel() for p in params)
        if tables is None:
            embedded = total if all(p.ndim == 2 for p in params) else 0
        else:
            embedded = sum(p.numel() for p in params if id(p) in tables)
        roles.append(role or ("embedding" if 2 * embedded > total else "dense"))
    return roles


class _GroupBinding:
    """What one parameter group is given for a step, and what it had before.

    Args:
      group: the optimizer's.
      values: canonical name to value.
      initial: the group's initial learning rate.
    """

    __slots__ = ("beta1", "found", "get", "initial", "keys", "momentum", "ours", "own_momentum", "rate")

    def __init__(self, group: Mapping[str, Any], values: Mapping[str, float], initial: float) -> None:
        momentum = "betas" if "betas" in group else "momentum"
        self.ours: dict[str, Any] = {}
        """key of the group to value; the rate is filled in for each step, betas when the group's own change"""
        if (rate := values.get("learning_rate")) is not None:
            self.ours["lr"] = rate
        if (decay := values.get("weight_decay")) is not None:
            self.ours["weight_decay"] = decay
        if (beta1 := values.get("beta1")) is not None:
            self.ours[momentum] = beta1
        self.rate, self.beta1, self.initial = rate, beta1, initial
        self.momentum = momentum if momentum in self.ours else None
        self.own_momentum: Any = None
        self.keys = ("lr", *(key for key in self.ours if key != "lr"))
        self.get = itemgetter(*self.keys, "lr")  # the second one makes it a tuple in any case
        self.found: tuple[Any, ...] = ()

    def put_in(self, group: dict[str, Any], factor: float) -> None:
        """Saves the group's own values, and puts these in their place."""
        self.found = found = self.get(group)
        if self.rate is not None:
            self.ours["lr"] = self.rate * factor * (found[0] / self.initial)
        if self.momentum is not None and self.own_momentum is not group[self.momentum]:
            self.own_momentum = own = group[self.momentum]
            self.ours[self.momentum] = (self.beta1, *own[1:]) if self.momentum == "betas" else self.beta1
        group.update(self.ours)

    def put_back(self, group: dict[str, Any]) -> None:
        """Puts the group's own values back."""
        group.update(zip(self.keys, self.found, strict=False))


class Bindings:
    """Binds controlled hyperparameters to one optimizer and model.

    Values are in force only while `optimizer.step` runs: a hook before it sets them, one after it puts back what was
    there. Other schedulers and whoever reads `param_groups` therefore see their own values, to the bit. The learning
    rate is the controller's times what other schedulers have made of the group's initial one.

    Args:
      optimizer: any torch optimizer.
      model: whose dropout layers are bound; None binds none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
        self._optimizer = optimizer
        self._dropouts = dropout_modules(model)
        self._own_dropouts = [module.p for module in self._dropouts]
        self._initial_rates = [self._initial_rate(i, group) for i, group in enumerate(optimizer.param_groups)]
        self.masked: dict[str, str] = self._masks()
        self.withheld: list[list[str]] = self._withheld()
        """per parameter group, what it keeps to itself"""
        self.steps = 0
        """optimizer steps done"""
        self.seconds = 0.0
        """wall-clock seconds that the hooks took, estimated from a sample of the steps"""
        self._next: list[_GroupBinding] = []
        self._groups: list[_GroupBinding] = []
        """those of the step that runs, or ran last"""
        self._factors: Iterator[float] = iter(())
        self._factor: float | None = None
        """of the step that runs, or ran last"""
        self._in_force = self._stepping = False
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._prepare: Callable[[], Sequence[float]]
        self._finish: Callable[[], None] | None = None
        self._hooks: list[Any] = []

    @property
    def uses_prior(self) -> bool:
        """Whether the controller's start configuration, learnt with AdamW, carries over to this optimizer."""
        return isinstance(self._optimizer, _ADAM_FAMILY)

    @property
    def space(self) -> HyperparameterSpace:
        """The bound part of the canonical space.

        Raises:
          InvalidArgumentError: nothing of this optimizer can be changed.
        """
        names = [n for n in ("learning_rate", "weight_decay", "beta1", "dropout") if n not in self.masked]
        if not names:
            raise InvalidArgumentError(
                f"nothing of `optimizer` can be controlled: {self.masked}; pass another optimizer"
            )
        return CANONICAL_SPACE.subset(names)

    def initial(self) -> list[dict[str, float]]:
        """Returns the groups' own values, under canonical names."""
        groups = zip(self._optimizer.param_groups, self._initial_rates, strict=True)
        return [
            {name: value for name, value in _own_values(group, rate).items() if name not in self.masked}
            for group, rate in groups
        ]

    def _masks(self) -> dict[str, str]:
        masked: dict[str, str] = {}
        groups = self._optimizer.param_groups
        if any(isinstance(group["lr"], torch.Tensor) for group in groups):
            masked["learning_rate"] = "the learning rate is a tensor; pass a float"
        if any("weight_decay" not in group for group in groups):
            masked["weight_decay"] = f"{type(self._optimizer).__name__} has no weight decay"
        elif not all(isinstance(self._optimizer, torch.optim.AdamW) or g.get("decoupled_weight_decay") for g in groups):
            masked["weight_decay"] = "its weight decay is not decoupled (use AdamW)"
        if any("betas" not in group and not group.get("momentum") for group in groups):
            masked["beta1"] = "a parameter group has no betas and no momentum"
        elif any(isinstance(group.get("betas", (0.0,))[0], torch.Tensor) for group in groups):
            masked["beta1"] = "betas are tensors; pass floats"
        if not self._dropouts:
            masked["dropout"] = "`model` was not given or has no dropout layer"
        if not self.uses_prior:  # such a run starts from its own values, which therefore must be expressible
            for group, rate in zip(groups, self._initial_rates, strict=True):
                for name, value in _own_values(group, rate).items():
                    known = CANONICAL_SPACE[name]
                    if name not in masked and not known.low <= value <= known.high:
                        masked[name] = f"{value:g} lies outside the controlled range [{known.low:g}, {known.high:g}]"
        return masked

    def _withheld(self) -> list[list[str]]:
        """Leaves a group's weight decay of 0 alone where other groups have one: biases and norms are excluded so."""
        decays = [group.get("weight_decay", 0.0) for group in self._optimizer.param_groups]
        withheld: list[list[str]] = [[] for _ in decays]
        if any(decays) and "weight_decay" not in self.masked:
            for index, decay in enumerate(decays):
                if decay == 0.0:
                    withheld[index].append("weight_decay")
                    self.masked[f"weight_decay[{index}]"] = (
                        f"parameter group {index} has weight_decay=0, which it keeps"
                    )
        return withheld

    @staticmethod
    def _initial_rate(index: int, group: Mapping[str, Any]) -> float:
        rate = float(group.get("initial_lr", group["lr"]))
        if not rate > 0:
            raise InvalidArgumentError(
                f"learning rate of parameter group {index} must be positive, got {rate}; other schedulers' factors are "
                "taken relative to it"
            )
        return rate

    def set_dropout(self, value: float) -> None:
        """Sets every dropout layer."""
        for module in self._dropouts:
            module.p = value

    def attach(self, prepare: Callable[[], Sequence[float]], finish: Callable[[], None] | None) -> None:
        """Registers the hooks.

        Args:
          prepare: returns the base schedule's factors on the learning rates for as many coming steps as it likes, at
            least one; called before a step when they are used up.
          finish: called after every step.
        """
        self._prepare, self._finish = prepare, finish
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            # A step that raised has left its values in the groups: never save those, never put back what is older.
            self._optimizer.register_state_dict_pre_hook(lambda _: self._restore()),
            self._optimizer.register_load_state_dict_post_hook(lambda _: self._forget()),
        ]

    def take(self, groups: Sequence[Mapping[str, float]]) -> None:
        """Takes the values of the steps to come.

        Args:
          groups: per parameter group, canonical name to value.
        """
        parts = zip(self._optimizer.param_groups, groups, self._initial_rates, strict=True)
        self._next = [_GroupBinding(group, values, initial) for group, values, initial in parts]

    def _before_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        # The training step empties the processor's caches, so every line here is dear: it is kept to what must be.
        timed = not self.steps % TIMED_EVERY
        began = perf_counter() if timed else 0.0
        if self._in_force and self._factor is not None:
            # The same step again: it raised, or a subclass's step calls its parent's and torch runs the hooks of both.
            self._put_back()
            factor = self._factor
        else:
            factor = next(self._factors, None)
            if factor is None:
                self._factors = iter(self._prepare())
                factor = next(self._factors)
        groups, bindings = optimizer.param_groups, self._next
        if len(groups) != len(bindings):
            raise SessionError(
                f"the optimizer has {len(groups)} parameter groups and had {len(bindings)} when the MetaScheduler was "
                "made; detach that and make a new one after add_param_group"
            )
        self._groups, self._factor, self._in_force, self._stepping = bindings, factor, True, True
        for group, binding in zip(groups, bindings):  # noqa: B905 (compared above)
            binding.put_in(group, factor)
        if timed:
            self.seconds += TIMED_EVERY * (perf_counter() - began)

    def _after_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        if not self._stepping:  # of a subclass's step, whose parent's was counted
            return
        timed = not self.steps % TIMED_EVERY
        began = perf_counter() if timed else 0.0
        self._put_back()
        self._stepping = False
        self.steps += 1
        if self._finish is not None:
            self._finish()
        if timed:
            self.seconds += TIMED_EVERY * (perf_counter() - began)

    def _put_back(self) -> None:
        """Puts back what the hook before the step found."""
        if self._in_force:
            for group, binding in zip(self._optimizer.param_groups, self._groups):  # noqa: B905 (groups may be added)
                binding.put_back(group)
            self._in_force = False

    def _restore(self) -> None:
        """Puts back what a step that raised has left."""
        if self._in_force:
            self._put_back()
            self._factors = iter(())

    def _forget(self) -> None:
        """Drops what was found: the optimizer has been loaded with other values since."""
        self._in_force = False
        self._factors = iter(())

    def last_rates(self) -> list[float]:
        """Returns the learning rates of the last step; before the first, the groups' own."""
        if self._factor is None:
            return list(self._rates)
        return [float(b.found[0] if b.rate is None else b.ours["lr"]) for b in self._groups]

    def release(self) -> bool:
        """Removes the hooks, and gives groups and dropout layers back what was theirs.

        Returns:
          Whether there was anything to remove; a second call does nothing.
        """
        if not self._hooks:
            return False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._restore()
        for module, value in zip(self._dropouts, self._own_dropouts, strict=True):
            module.p = value
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs.

        The initial rates are in it, since other schedulers' factors are relative to them, and a resumed run may make
        this object when the optimizer's state, with decayed rates, is loaded already.
        """
        return {
            "steps": self.steps,
            "initial_rates": list(self._initial_rates),
            "last_rates": self.last_rates(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverts `state_dict`; `take` must follow."""
        self._restore()
        self.steps = int(state["steps"])
        self._initial_rates, self._rates = list(state["initial_rates"]), list(state["last_rates"])
        self._factor, self._factors = None, iter(())


def _own_values(group: Mapping[str, Any], rate: float) -> dict[str, float]:
    """Returns what a parameter group has of the controlled hyperparameters, under canonical names."""
    own = {"learning_rate": rate}
    if "betas" in group or group.get("momentum"):
        own["beta1"] = float(group["betas"][0] if "betas" in group else group["momentum"])
    if "weight_decay" in group:
        own["weight_decay"] = float(group["weight_decay"])
    return own
