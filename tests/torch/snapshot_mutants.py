"""Snapshots with one fault each, seeded into the sound one: the state machine must find every fault."""

from __future__ import annotations

import copy

import torch

from metalearn.torch.copies import Held, by_reference, fresh
from metalearn.torch.snapshots import Snapshots
from metalearn.torch.tracked import restore_tracked


class AliasesWhatItSaves(Snapshots):
    """Keeps the optimizer's own tensors, as its state_dict does."""

    def save(self, step, extra=None):
        super().save(step, extra)
        last = self._last()
        last["optimizers"] = by_reference(self._live(step, extra)["optimizers"])


class AdoptsWhatItRestores(Snapshots):
    """The optimizer goes on with the snapshot's tensors, as its load_state_dict does."""

    def _restore_optimizer(self, optimizer, held, pairs):
        super()._restore_optimizer(optimizer, held, pairs)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, state in zip(parameters, held["state"], strict=True):
            for name, value in (state or {}).items():
                optimizer.state[parameter][name] = value.tensor if isinstance(value, Held) else value


class ReplacesGroups(Snapshots):
    """Whoever holds a parameter group holds a stale one."""

    def _restore_optimizer(self, optimizer, held, pairs):
        super()._restore_optimizer(optimizer, held, pairs)
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


class ReplacesMoments(Snapshots):
    def _restore_optimizer(self, optimizer, held, pairs):
        optimizer.state.clear()
        super()._restore_optimizer(optimizer, held, pairs)


class KeepsLaterMoments(Snapshots):
    """State that did not exist at the snapshot stays."""

    def _restore_optimizer(self, optimizer, held, pairs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        later = {p: copy.deepcopy(optimizer.state[p]) for p in parameters if p in optimizer.state}
        super()._restore_optimizer(optimizer, held, pairs)
        for parameter, state in later.items():
            if parameter not in optimizer.state:
                optimizer.state[parameter] = state


class ForgetsTheScheduler(Snapshots):
    def restore(self, *, rewind=True):
        kept = [copy.deepcopy(t.state_dict()) for t in self._tracked if hasattr(t, "optimizer")]
        super().restore(rewind=rewind)
        for thing, state in zip([t for t in self._tracked if hasattr(t, "optimizer")], kept, strict=True):
            restore_tracked(thing, state)


class ForgetsTheGroups(Snapshots):
    """The rate stays as another scheduler has made it since."""

    def _restore_optimizer(self, optimizer, held, pairs):
        rates = [group["lr"] for group in optimizer.param_groups]
        super()._restore_optimizer(optimizer, held, pairs)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class SkipsTheGenerators(Snapshots):
    def restore(self, *, rewind=True):
        state = torch.get_rng_state()
        super().restore(rewind=rewind)
        torch.set_rng_state(state)


class ForgetsBuffers(Snapshots):
    def _restore_buffers(self, held, pairs):
        pass


class KeepsGradients(Snapshots):
    def restore(self, *, rewind=True):
        gradients = [p.grad for p in self._parameters()]
        super().restore(rewind=rewind)
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient


class HandsOutItsExtra(Snapshots):
    """Who changes what it gave changes the snapshot."""

    def extra(self):
        held = self._last()["extra"]
        plain = fresh(held)
        return {**plain, "table": held["table"].tensor}


class TrustsOldCopies(Snapshots):
    """What a look has copied is not copied again, whatever was written since."""

    def _has_copy(self, into, value):
        return id(into) in self._ahead


class CopiesOverTheGoodOne(Snapshots):
    """A look copies into the slot that a rollback would need."""

    def _copy_ahead(self, live):
        good, self._good = self._good, (self._good + 1) % len(self._slots)
        try:
            return super()._copy_ahead(live)
        finally:
            self._good = good


MUTANTS = (
    AliasesWhatItSaves,
    AdoptsWhatItRestores,
    ReplacesGroups,
    ReplacesMoments,
    KeepsLaterMoments,
    ForgetsTheScheduler,
    ForgetsTheGroups,
    SkipsTheGenerators,
    ForgetsBuffers,
    KeepsGradients,
    HandsOutItsExtra,
    TrustsOldCopies,
    CopiesOverTheGoodOne,
)
