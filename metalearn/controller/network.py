"""The controller's networks in Flax: code of domain and family, start modifier with gate, recurrent in-run policy.

Shape legend: G parameter group, F feature, D descriptor, S start value, A group action, B global action, H hidden unit.
`metalearn.controller.runtime` is the same function in NumPy; a test holds the two together.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from metalearn.controller.config import CONTROLLED, GLOBAL_CONTROLLED, GROUP_CONTROLLED, ROLES, ControllerConfig
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES


class Observation(NamedTuple):
    """What the in-run policy sees at one decision, percentile-scaled."""

    group: Any
    """[G, F]"""
    run: Any
    """[F]"""
    descriptors: Any
    """[D]"""
    family: Any
    """int, see `ControllerConfig.family_index`"""
    role: Any
    """int [G], index into ROLES"""
    group_mask: Any
    """[G], 1 for groups that exist, 0 for padding"""


class StartAction(NamedTuple):
    """The start configuration's two learned parts, each [S]."""

    gate: Any
    """in [0, 1]: the share of the modifier that transfers"""
    modifier: Any
    """before tanh"""


class Action(NamedTuple):
    """Means of the in-run action, before tanh."""

    group: Any
    """[G, A]"""
    run: Any
    """[B]"""


class GatedRecurrentUnit(nn.Module):
    """Gated recurrent unit (Cho et al., 2014, the variant of cuDNN): h' = (1 - z) n + z h."""

    size: int

    @nn.compact
    def __call__(self, hidden: Any, inputs: Any) -> Any:
        from_input = nn.Dense(3 * self.size, name="input")(inputs)
        from_hidden = nn.Dense(3 * self.size, name="hidden", kernel_init=nn.initializers.orthogonal())(hidden)
        input_reset, input_update, input_new = jnp.split(from_input, 3, axis=-1)
        hidden_reset, hidden_update, hidden_new = jnp.split(from_hidden, 3, axis=-1)
        reset = nn.sigmoid(input_reset + hidden_reset)
        update = nn.sigmoid(input_update + hidden_update)
        new = jnp.tanh(input_new + reset * hidden_new)
        return (1.0 - update) * new + update * hidden


START_PARTS = ("encoder", "family", "start_hidden", "modifier", "gate")
"""Parameters that the start configuration depends on; of them the in-run policy reads the code."""


class ControllerNetwork(nn.Module):
    """Maps descriptors to a start and observations to actions; its output layers start at zero.

    An untrained controller therefore is exactly the base: modifier 0, residual 0.
    """

    config: ControllerConfig

    def setup(self) -> None:
        """Makes the layers; output layers, gate and embeddings start at zero."""
        zeros = nn.initializers.zeros
        self.encoder = nn.Dense(self.config.code_size)
        self.family = self.param("family", zeros, (1 + len(self.config.families), self.config.code_size))
        self.start_hidden = nn.Dense(self.config.hidden_size)
        self.modifier = nn.Dense(len(CONTROLLED), kernel_init=zeros)
        self.gate = self.param("gate", zeros, (len(CONTROLLED),))
        self.role = self.param("role", zeros, (len(ROLES), self.config.hidden_size))
        self.mix = nn.Dense(self.config.hidden_size)
        self.recurrent = GatedRecurrentUnit(self.config.hidden_size)
        self.group_head = nn.Dense(len(GROUP_CONTROLLED), kernel_init=zeros)
        self.run_head = nn.Dense(len(GLOBAL_CONTROLLED), kernel_init=zeros)

    def code(self, descriptors: Any, family: Any) -> Any:
        """Maps descriptors [D] and the model family to a code."""
        return jnp.tanh(self.encoder(descriptors) + self.family[family])

    def start(self, descriptors: Any, family: Any) -> StartAction:
        """Maps descriptors [D] and the model family to gate and modifier."""
        code = self.code(descriptors, family)
        return StartAction(nn.sigmoid(self.gate), self.modifier(jnp.tanh(self.start_hidden(code))))

    def __call__(self, hidden: Any, observation: Observation) -> tuple[Action, Any]:
        """Advances the policy by one decision; `hidden` is [G, H]."""
        num_groups = observation.group.shape[0]
        weights = observation.group_mask[:, None] / jnp.maximum(observation.group_mask.sum(), 1.0)
        code = self.code(observation.descriptors, observation.family)
        shared = jnp.concatenate([observation.run, code, (weights * hidden).sum(0)])
        inputs = jnp.concatenate([observation.group, jnp.broadcast_to(shared, (num_groups, shared.shape[0]))], axis=-1)
        mixed = jnp.tanh(self.mix(inputs) + self.role[observation.role])
        hidden = self.recurrent(hidden, mixed)
        return Action(self.group_head(hidden), self.run_head((weights * hidden).sum(0))), hidden

    def both(self, hidden: Any, observation: Observation) -> tuple[StartAction, Action, Any]:
        """Runs both parts, so that one `init` makes every parameter."""
        return self.start(observation.descriptors, observation.family), *self(hidden, observation)


def init(config: ControllerConfig, *, key: jax.Array) -> dict[str, Any]:
    """Makes the parameters of an untrained controller.

    Args:
      config: the architecture.
      key: a typed PRNG key.

    Returns:
      A nested dict of float32 arrays.
    """
    observation = Observation(
        group=jnp.zeros((1, len(GROUP_FEATURES))),
        run=jnp.zeros(len(GLOBAL_FEATURES)),
        descriptors=jnp.zeros(len(config.descriptors)),
        family=jnp.zeros((), jnp.int32),
        role=jnp.zeros(1, jnp.int32),
        group_mask=jnp.ones(1),
    )
    hidden = jnp.zeros((1, config.hidden_size))
    variables = ControllerNetwork(config).init(key, hidden, observation, method="both")
    return cast("dict[str, Any]", variables["params"])


def start(config: ControllerConfig, params: dict[str, Any], descriptors: Any, family: Any) -> StartAction:
    """Applies the start part; pure."""
    return cast(StartAction, ControllerNetwork(config).apply({"params": params}, descriptors, family, method="start"))


def act(config: ControllerConfig, params: dict[str, Any], hidden: Any, observation: Observation) -> tuple[Action, Any]:
    """Applies the in-run part: (hidden, observation) to (action means, next hidden); pure."""
    return ControllerNetwork(config).apply({"params": params}, hidden, observation)
