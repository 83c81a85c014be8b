"""Popularity: its law, and how it comes and goes: births, rises, decays, seasons and sudden changes.

Shape legend: I items, B users of a chunk, Q = 5 courses of popularity.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from envs.simulated.prior import SimulatedParams

_RISE_SPAN = 0.1
"""Share of the time span in which an item makes up what it lacks at birth."""
_YEAR = 365.25


class Popularity(NamedTuple):
    """The popularity part of log-preferences at time t: courses(t) @ loadings, and less for the newly born."""

    loadings: np.ndarray
    """float32 [Q, I]: law, law after an abrupt drift, decay from birth, and two of the seasonal wave."""
    birth: np.ndarray
    """float32 [I], share of the time span, 0 for what is there from the start."""
    num_first: int
    """Items that are there from the start; they come first, so that the others are one slice."""

    def courses(self, when: np.ndarray, after: np.ndarray, params: SimulatedParams) -> np.ndarray:
        """Weights of the loadings at given times, float32 [B, Q].

        Args:
            when: [B] share of the time span.
            after: [B] bool, whether the abrupt drift lies behind.
            params: of the domain.
        """
        wave = 2.0 * np.pi * when * params.span_days / _YEAR
        angle = params.shift * after
        columns = (np.cos(angle), np.sin(angle), np.ones(len(when)), np.cos(wave), np.sin(wave))
        return np.stack(columns, axis=1).astype(np.float32)

    def limit(self, logits: np.ndarray, when: np.ndarray, params: SimulatedParams) -> None:
        """Lower the newly born in `logits` [B, I], and those not yet born to -inf, in place."""
        late = logits[:, self.num_first :]
        age = when[:, None].astype(np.float32) - self.birth[self.num_first :]
        if params.rise > 0.0:
            late -= np.float32(params.rise) * np.maximum(1.0 - age / np.float32(_RISE_SPAN), 0.0)
        late[age < 0.0] = -np.inf


def draw_popularity(item_cluster: np.ndarray, params: SimulatedParams, rng: np.random.Generator) -> Popularity:
    """Draw the popularity of every item and its course.

    An item's log-preference falls by decay · (t - birth); what all items share does not matter, so that is a
    constant decay · birth.
    """
    law, other = _law(params, rng), _law(params, rng)
    kind = rng.random(params.items)
    time = rng.random(params.items)
    birth = np.where(kind < params.born, time, 0.0)
    birth = np.where(kind >= 1.0 - params.cold_items, 0.9 + 0.1 * time, birth).astype(np.float32)
    birth = birth[np.argsort(birth > 0.0, kind="stable")]
    phase = rng.uniform(0.0, 2.0 * np.pi, params.clusters)[item_cluster]
    wave = params.season * np.stack([np.cos(phase), np.sin(phase)])
    loadings = np.stack([law, other, params.decay * birth, *wave]).astype(np.float32)
    return Popularity(loadings=loadings, birth=birth, num_first=int((birth == 0.0).sum()))


def visibility(popularity: Popularity, params: SimulatedParams) -> np.ndarray:
    """Chance of each item to be seen by a user, float32 [I], `exposure` on average before clipping."""
    weight = np.exp(params.exposure_bias * popularity.loadings[0])
    return np.clip(params.exposure * weight / weight.mean(), 0.02, 1.0).astype(np.float32)


def _law(params: SimulatedParams, rng: np.random.Generator) -> np.ndarray:
    """Popularity part of the log-preferences, float32 [I]: a blend of log-normal and power law, by rank."""
    normal = np.sort(rng.standard_normal(params.items))[::-1]
    power = -np.log(np.arange(1, params.items + 1))
    power = (power - power.mean()) / power.std()
    blend = (1.0 - params.zipf_share) * normal + params.zipf_share * power
    return rng.permutation(params.popularity_std * (blend - blend.mean()) / blend.std()).astype(np.float32)
