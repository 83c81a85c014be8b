"""Feedback: ratings, what was shown and not taken, and labels that are wrong.

Shape legend: N interactions, B users of a chunk, I items.
"""

from __future__ import annotations

import math

import numpy as np

from envs.simulated.prior import SimulatedParams


def draw_ratings(
    user: np.ndarray, item: np.ndarray, taste: np.ndarray, params: SimulatedParams, rng: np.random.Generator
) -> np.ndarray:
    """Draw ratings 1..5, float32 [N].

    rating = round(1 + 4 position + spread (sqrt(a) generosity_u + sqrt(b) quality_i + sqrt(c) taste + sqrt(d) noise)),
    clipped; a and b are the shares of user and item, c and d divide the rest, all parts of unit variance. A share
    `flips` is recorded upside down, r as 6 - r, and a share `unrated` is NaN.

    Args:
        user: [N] codes.
        item: [N] codes.
        taste: [N] how well the item meets the user's taste, in any unit.
        params: of the domain.
        rng: generator.
    """
    rest = max(1.0 - params.rating_user_share - params.rating_item_share, 0.0)
    taste = (taste - taste.mean()) / max(float(taste.std()), 1e-6)
    latent = math.sqrt(params.rating_user_share) * rng.standard_normal(params.users)[user]
    latent += math.sqrt(params.rating_item_share) * rng.standard_normal(params.items)[item]
    latent += math.sqrt(rest * (1.0 - params.rating_noise)) * taste
    latent += math.sqrt(rest * params.rating_noise) * rng.standard_normal(len(user))
    ratings = np.clip(np.round(1.0 + 4.0 * params.rating_position + params.rating_spread * latent), 1.0, 5.0)
    flipped = rng.random(len(user)) < params.flips
    ratings = np.where(flipped, 6.0 - ratings, ratings)
    return np.where(rng.random(len(user)) < params.unrated, np.nan, ratings).astype(np.float32)


def draw_shown(
    row: np.ndarray, item: np.ndarray, exposed: np.ndarray, params: SimulatedParams, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw what was shown beside each item taken, and not taken itself.

    What a user sees follows popularity (`exposed`), so what is shown does too.

    Args:
        row: [N] rows of `exposed`.
        item: [N] items taken.
        exposed: bool [B, I], what each user sees, without what was taken.
        params: of the domain.
        rng: generator.

    Returns:
        Position in `row` and item of each showing, no pair twice.
    """
    # Of uniform proposals those that are not exposed fall away, so more are made.
    share = max(float(exposed.mean()), 0.02)
    wanted = rng.poisson(params.shown_per_click / share, len(item))
    position = np.repeat(np.arange(len(item)), wanted)
    other = rng.integers(0, exposed.shape[1], len(position))
    seen = exposed[row[position], other]
    position, other = position[seen], other[seen]
    _, first = np.unique(row[position] * exposed.shape[1] + other, return_index=True)
    return position[first], other[first]


def draw_flips(count: int, params: SimulatedParams, rng: np.random.Generator) -> np.ndarray:
    """Draw which clicks are recorded as not taken, bool [count]; none where feedback is not clicks."""
    if params.feedback != "click":
        return np.zeros(count, dtype=bool)
    return rng.random(count) < params.flips
