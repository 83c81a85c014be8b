"""Hostile policies: what a controller may have become, and a loop that does what it says unguarded."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from envs.sandbox.cells import Cell
from envs.sandbox.incidents import Episode, Incident
from metalearn.controller.actions import schedule_multiplier
from metalearn.controller.config import CONTROLLED, GLOBAL_CONTROLLED, GROUP_CONTROLLED
from metalearn.controller.controller import Controller
from metalearn.controller.decision import Decision
from metalearn.controller.runtime import NumpyNetwork
from metalearn.profiles import DomainProfile
from metalearn.torch.averaging import AVERAGE_EVERY, WeightAverage
from metalearn.torch.bindings import dropout_modules

FAR = 50.0
"""An output whose tanh is 1: the largest move."""
HOSTILE = ("garbage_policy", "adversarial_policy")


class HostileNetwork(NumpyNetwork):
    """The network of a controller, whose outputs are an incident's.

    Args:
      network: the sound one.
      incident: garbage or adversarial.
      seed: of random outputs.
    """

    def __init__(self, network: NumpyNetwork, incident: Incident, *, seed: int) -> None:
        self.__dict__.update(network.__dict__)
        self._incident, self._rng, self._acts = incident, np.random.default_rng(seed), 0

    def start(self, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gate, modifier = super().start(code)
        return gate, np.full_like(modifier, math.nan) if self._incident.variant == "start" else modifier

    def act(
        self, hidden: np.ndarray, group: np.ndarray, run: np.ndarray, context: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        outputs = super().act(hidden, group, run, context)
        self._acts += 1
        struck = [hostile(self._incident.variant, output, self._acts, self._rng) for output in outputs]
        return struck[0], struck[1], outputs[2] if self._incident.name == "adversarial_policy" else struck[2]


def hostile(variant: str, output: np.ndarray, act: int, rng: np.random.Generator) -> np.ndarray:
    """Returns what stands in for one output of the network.

    Args:
      variant: of the incident.
      output: the sound one.
      act: number of the decision.
      rng: of random outputs.
    """
    if variant == "random":
        return rng.normal(0.0, 10.0, output.shape)
    if variant in ("nan", "inf"):
        return np.full(output.shape, float(variant))
    if variant == "shape":
        return np.zeros((*output.shape[:-1], output.shape[-1] + 1))
    if variant in ("high", "low"):
        return np.full(output.shape, FAR if variant == "high" else -FAR)
    if variant == "alternating":  # half of the decisions of a run one way, then the other way
        return np.full(output.shape, FAR if act // 5 % 2 else -FAR)
    return output


def hostile_controller(controller: Controller, episode: Episode) -> Controller:
    """Returns the controller, with the policy that an episode gives it."""
    incident = next((i for i in episode.incidents if i.name in HOSTILE), None)
    if incident is None:
        return controller
    twin = copy.copy(controller)
    twin.network = HostileNetwork(controller.network, incident, seed=episode.seed)
    return twin


class RecklessAdvisor:
    """Asks for so many times the learning rate in a span of a run, in mode `advise`; else lets the controller.

    Args:
      incident: the proposal; its size is the factor.
      steps: of the run.
    """

    def __init__(self, incident: Incident, steps: int) -> None:
        first = round(incident.at * steps)
        self._span, self._factor = range(first, first + incident.lasts), incident.size

    def __call__(self, decision: Decision) -> Any:
        if decision.step not in self._span:
            return True
        groups = tuple({**group, "learning_rate": group["learning_rate"] * self._factor} for group in decision.groups)
        return dataclasses.replace(decision, groups=groups)


def wrong_profile(profile: DomainProfile, others: Sequence[DomainProfile], episode: Episode) -> DomainProfile:
    """Returns the profile that an episode's run is told: its own, another domain's, or an absurd one."""
    incident, rng = episode.find("wrong_profile"), np.random.default_rng(episode.seed)
    if incident is None:
        return profile
    if incident.variant == "other":
        strangers = [other for other in others if other.fingerprint != profile.fingerprint]
        return strangers[int(rng.integers(len(strangers)))] if strangers else profile
    values = rng.normal(0.0, 1.0, len(profile.values)) * 10.0 ** rng.uniform(0.0, 9.0, len(profile.values))
    return dataclasses.replace(profile, values=values, mask=np.ones(len(values), bool), num_interactions=1)


class Unguarded:
    """Does to an optimizer whatever a hostile policy or a reckless advisor says, from the controller's start on.

    It moves through the same unit ranges by the same steps as a session does, within the bounds of the space and no
    others, and the base schedule is the same. Proposals in the optimizer's own units are applied as they are.

    Args:
      optimizer, model: of the run.
      cell: where it takes place.
      start: the controller's start configuration.
      controller: whose space and schedule they are.
      episode: with a hostile policy or a reckless advisor.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        cell: Cell,
        start: Decision,
        controller: Controller,
        episode: Episode,
    ) -> None:
        self._optimizer, self._dropouts, self._cell = optimizer, dropout_modules(model), cell
        self._episode, self._space = episode, controller.config.space
        self._decay_to = controller.config.decay_to
        rows = [[self._space[name].encode(group[name]) for name in GROUP_CONTROLLED] for group in start.groups]
        self._group = np.array(rows)
        self._run = np.array([self._space[name].encode(start.run.get(name, 0.0)) for name in GLOBAL_CONTROLLED])
        self._acts, self._rng = 0, np.random.default_rng(episode.seed)
        horizon = cell.horizon
        self._average = None if horizon is not None else WeightAverage(list(model.parameters()))
        self.steps = 0
        self.should_validate = self.rolled_back = False
        self.rollbacks = ()
        if any(incident.variant == "start" for incident in episode.incidents):
            self._group[:] = math.nan
        self._apply()
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    def step(self, loss: torch.Tensor) -> None:
        """Ends the interval if it is time."""
        if self.should_validate:  # nobody reported
            self._decide()
        self.should_validate = self.steps % self._cell.budget.interval == 0
        self._apply()

    def report(self, metrics: Any) -> None:
        """Decides."""
        float(metrics)
        self._decide()

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """As a MetaScheduler's."""
        if self._average is None:
            yield
            return
        with self._average.swapped():
            yield

    def _after_step(self) -> None:
        self.steps += 1
        if self._average is not None and self.steps % AVERAGE_EVERY == 0:
            self._average.update()

    def _decide(self) -> None:
        self.should_validate = False
        self._acts += 1
        policy = next((i for i in self._episode.incidents if i.name in HOSTILE), None)
        if policy is not None:
            largest = np.array([self._space[name].max_step for name in CONTROLLED])
            split = len(GROUP_CONTROLLED)
            group = hostile(policy.variant, np.zeros_like(self._group), self._acts, self._rng)
            run = hostile(policy.variant, np.zeros_like(self._run), self._acts, self._rng)
            self._group = np.clip(self._group + largest[:split] * np.tanh(group), 0.0, 1.0)
            self._run = np.clip(self._run + largest[split:] * np.tanh(run), 0.0, 1.0)
        self._apply()

    def _apply(self) -> None:
        budget, horizon = self._cell.budget, self._cell.horizon
        proposal = self._episode.find("learning_rate_proposal")
        factor = 1.0
        if horizon is not None:
            factor = float(schedule_multiplier(np.float64(self.steps / horizon), np, self._decay_to))
        if proposal is not None and 0 <= self.steps - round(proposal.at * budget.steps) < proposal.lasts:
            factor *= proposal.size
        for group, row in zip(self._optimizer.param_groups, self._group, strict=True):
            rate, decay, beta1 = (
                self._space[name].decode(unit) for name, unit in zip(GROUP_CONTROLLED, row.tolist(), strict=True)
            )
            group.update(lr=rate * factor, weight_decay=decay, betas=(beta1, 0.999))
        for module in self._dropouts:
            module.p = self._space["dropout"].decode(float(self._run[0]))
