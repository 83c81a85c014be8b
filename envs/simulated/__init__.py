"""Simulated domains: interactions drawn from a wide, documented prior."""

from envs.simulated.generator import generate, simulate
from envs.simulated.prior import SimulatedParams, SimulatedPrior, draw_params

__all__ = ["SimulatedParams", "SimulatedPrior", "draw_params", "generate", "simulate"]
