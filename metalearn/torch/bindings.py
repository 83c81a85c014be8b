"""What of an optimizer and a model a controller can change, and how it is changed for the time of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, ClassVar
from weakref import WeakSet

import torch

from metalearn.controller.config import ROLES
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.spaces import CANONICAL_SPACE, HyperparameterSpace
from metalearn.torch.calls import refuse_capture
from metalearn.torch.closures import on_gradients
from metalearn.torch.dropout import BufferedDropout
from metalearn.torch.group_values import alike, as_tensor, own_values

_DROPOUTS = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    BufferedDropout,
)
_ADAM_FAMILY = (torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SparseAdam)


TIMED_EVERY = 16
"""One step in so many is timed, and stands for the others: reading the clock costs a tenth of what is measured."""

_STEERED: WeakSet[torch.nn.Module] = WeakSet()
"""Dropout layers whose probability some Bindings set: with an optimizer each, only one of them can."""


def dropout_modules(model: torch.nn.Module | None) -> list[Any]:
    """Returns the dropout layers of a model."""
    return [module for module in model.modules() if isinstance(module, _DROPOUTS)] if model is not None else []


def infer_roles(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> list[str]:
    """Returns each group's role: what its "role" key says, else `embedding` if most of it lies in embedding tables.

    Without a model a group of matrices only counts as embeddings, anything else as `dense`. `head`, `pretrained` and
    `adapter` are never inferred: nothing about a group shows the last two, and no controller so far was trained on
    `head` (its row of the role embedding is still zero), so that calling a last layer one would take the experience
    with `dense` groups from it. Say them by the "role" key, for a controller of one's own.
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


class Bindings:
    """Binds controlled hyperparameters to one optimizer and model.

    Values are in force only while `optimizer.step` runs: a hook before it sets them, one after it puts back what was
    there. Other schedulers and whoever reads `param_groups` therefore see their own values, to the bit. The learning
    rate is the controller's times what other schedulers have made of the group's initial one.

    What is a tensor in a group is one during the step: another, so that the group's own is left alone, and nothing is
    read back from an accelerator.

    A compiled step is compiled once for all values: torch makes inputs of numbers that change, and of beta1, which it
    would build in, a tensor is made for the time of the step. The hooks themselves run outside of the graph.

    Args:
      optimizer: any torch optimizer.
      model: whose dropout layers are bound; None binds none.
    """

    _before_compiled_step: ClassVar[Any] = None
    _after_compiled_step: ClassVar[Any] = None
    # One for all objects, or torch would compile the hooks for each; made late, since that loads torch's compiler.

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
        self._optimizer = optimizer
        self._dropouts = dropout_modules(model)
        self._dropouts_taken = any(module in _STEERED for module in self._dropouts)
        if self._dropouts_taken:
            self._dropouts = []
        self._own_dropouts = [module.p for module in self._dropouts]
        self._initial_rates = [self._initial_rate(i, group) for i, group in enumerate(optimizer.param_groups)]
        self.masked: dict[str, str] = self._masks()
        self.withheld: list[list[str]] = self._withheld()
        """per parameter group, what it keeps to itself"""
        self.steps = 0
        """optimizer steps done"""
        self.seconds = 0.0
        """wall-clock seconds that the hooks took, estimated from a sample of the steps"""
        self._values: list[list[Any]] = []
        """per group [rate, initial rate, decay, key of the momentum, momentum, own momentum it was made of, beta1];
        None is left alone. What is a tensor in the group is one here"""
        self._compiled_values: list[list[Any]] | None = None
        """the same for compiled steps, once there was one since they were taken"""
        self._factors: Iterator[float] = iter(())
        self._factor: float | None = None
        """of the step that runs, or ran last; likewise below"""
        self._found: list[tuple[Any, Any, Any]] = []
        """the groups' own rate, decay and momentum"""
        self._applied: list[list[Any]] = []
        self._in_force = self._stepping = False
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._has_tensor_rates = any(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
        self._stepped_with: list[Any] = []
        """learning rates of the step, if some are tensors: the groups' own may have been written to since"""
        self._prepare: Callable[[], Sequence[float]]
        self._finish: Callable[[], None] | None = None
        self._probe: Callable[[], None] | None = None
        self._probe_is_due = False
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
            {name: value for name, value in own_values(group, rate).items() if name not in self.masked}
            for group, rate in groups
        ]

    def _masks(self) -> dict[str, str]:
        masked: dict[str, str] = {}
        groups = self._optimizer.param_groups
        if any("weight_decay" not in group for group in groups):
            masked["weight_decay"] = f"{type(self._optimizer).__name__} has no weight decay"
        elif not all(isinstance(self._optimizer, torch.optim.AdamW) or g.get("decoupled_weight_decay") for g in groups):
            masked["weight_decay"] = "its weight decay is not decoupled (use AdamW)"
        if any("betas" not in group and not group.get("momentum") for group in groups):
            masked["beta1"] = "a parameter group has no betas and no momentum"
        if self._dropouts_taken:
            masked["dropout"] = "another MetaScheduler steers the dropout layers of `model`"
        elif not self._dropouts:
            masked["dropout"] = "`model` was not given or has no dropout layer"
        if not self.uses_prior:  # such a run starts from its own values, which therefore must be expressible
            for group, rate in zip(groups, self._initial_rates, strict=True):
                for name, value in own_values(group, rate).items():
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

    def release_dropout(self) -> None:
        """Gives dropout layers back what was theirs."""
        for module, value in zip(self._dropouts, self._own_dropouts, strict=True):
            module.p = value

    def attach(
        self,
        prepare: Callable[[], Sequence[float]],
        finish: Callable[[], None] | None,
        probe: Callable[[], None] | None = None,
    ) -> None:
        """Registers the hooks.

        Args:
          prepare: returns the base schedule's factors on the learning rates for as many coming steps as it likes, at
            least one; called before a step when they are used up.
          finish: called after every step.
          probe: called after `prepare`, when the step's gradients have been computed: at once, or in its closure.
        """
        self._prepare, self._finish, self._probe = prepare, finish, probe
        _STEERED.update(self._dropouts)
        if Bindings._before_compiled_step is None:
            Bindings._before_compiled_step = torch.compiler.disable(Bindings._set_in_compiled_step)
            Bindings._after_compiled_step = torch.compiler.disable(Bindings._after_step)
        if any(group.get("capturable") for group in self._optimizer.param_groups):
            self._hooks.append(self._optimizer.register_step_pre_hook(refuse_capture))
        self._hooks += [
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
        self._values = [
            [
                values.get("learning_rate"),
                initial,
                values.get("weight_decay"),
                "betas" if "betas" in group else "momentum",
                None,
                None,
                alike(values.get("beta1"), group["betas"][0] if "betas" in group else None),
            ]
            for group, values, initial in parts
        ]
        self._compiled_values = None

    def _set_in_compiled_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> Any:
        """Is `_before_step` of a compiled step, outside of its graph."""
        if self._compiled_values is None:
            self._compiled_values = [
                [*row[:4], None, None, as_tensor(row[6], group) if row[3] == "betas" else row[6]]
                for row, group in zip(self._values, optimizer.param_groups)  # noqa: B905 (`_before_step` compares)
            ]
        values, self._values = self._values, self._compiled_values
        try:
            return self._before_step(optimizer, arguments, keywords)
        finally:
            self._values = values

    def _before_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> Any:
        if torch.compiler.is_compiling():  # by its full name: functions that do not name torch are not compiled
            return self._before_compiled_step(optimizer, arguments, keywords)
        # The training step empties the processor's caches, so that every line and call here is dear: measured, plain
        # dict operations in one function take half the time of anything better arranged.
        timed = not self.steps % TIMED_EVERY
        began = perf_counter() if timed else 0.0
        changed = None
        if self._in_force and self._factor is not None:
            # The same step again: it raised, or a subclass's step calls its parent's and torch runs the hooks of both.
            self._put_back()
            factor = self._factor
            if self._probe_is_due:
                changed = on_gradients(self._call_probe, arguments, keywords)
        else:
            factor = next(self._factors, None)
            if factor is None:
                self._factors = iter(self._prepare())
                factor = next(self._factors)
                self._probe_is_due = self._probe is not None
                if self._probe_is_due:
                    changed = on_gradients(self._call_probe, arguments, keywords)
                began = perf_counter() if timed else 0.0  # what it prepares the scheduler times itself
        groups, values = optimizer.param_groups, self._values
        if len(groups) != len(values):
            raise SessionError(
                f"the optimizer has {len(groups)} parameter groups and had {len(values)} when the MetaScheduler was "
                "made; detach that and make a new one after add_param_group"
            )
        found = []
        for group, row in zip(groups, values):  # noqa: B905 (compared above)
            rate, initial, decay, key, momentum, made_of, beta1 = row
            own_rate, own_decay = group["lr"], group.get("weight_decay")
            own_momentum: Any = group.get(key)
            found.append((own_rate, own_decay, own_momentum))
            if rate is not None:
                group["lr"] = rate * factor * (own_rate / initial)
            if decay is not None:
                group["weight_decay"] = decay
            if beta1 is not None:
                if own_momentum is not made_of:
                    row[4] = momentum = (beta1, *own_momentum[1:]) if key == "betas" else beta1
                    row[5] = own_momentum
                group[key] = momentum
        self._found, self._applied, self._factor = found, values, factor
        self._in_force = self._stepping = True
        if self._has_tensor_rates:
            self._stepped_with = [group["lr"] for group in groups]
        if timed:
            self.seconds += TIMED_EVERY * (perf_counter() - began)
        return changed

    def _call_probe(self) -> None:
        if self._probe_is_due and self._probe is not None:
            self._probe_is_due = False
            self._probe()

    def _after_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        if torch.compiler.is_compiling():
            return self._after_compiled_step(optimizer, arguments, keywords)
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
        if not self._in_force:
            return
        groups = self._optimizer.param_groups  # of which some may be new
        for group, own, row in zip(groups, self._found, self._applied):  # noqa: B905
            if row[0] is not None:
                group["lr"] = own[0]
            if row[2] is not None:
                group["weight_decay"] = own[1]
            if row[6] is not None:
                group[row[3]] = own[2]
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
        factor = self._factor
        if factor is None:
            return list(self._rates)
        if self._has_tensor_rates:
            return [float(rate) for rate in self._stepped_with]
        return [
            float(own if rate is None else rate * factor * (own / initial))
            for (own, *_), (rate, initial, *_) in zip(self._found, self._applied, strict=True)
        ]

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
        self.release_dropout()
        _STEERED.difference_update(self._dropouts)
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
