"""Simulated domains: interactions drawn from a wide, documented prior, calibrated to lie around real ones."""

from envs.simulated.generator import Simulation, generate, simulate, simulate_domain
from envs.simulated.prior import Feedback, SimulatedParams, SimulatedPrior, draw_params

__all__ = [
    "Feedback",
    "SimulatedParams",
    "SimulatedPrior",
    "Simulation",
    "draw_params",
    "generate",
    "simulate",
    "simulate_domain",
]
