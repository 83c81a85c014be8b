"""The sandbox: incidents replayed against guarded and unguarded training runs, and what each of them lost."""

from envs.sandbox.arms import Guarding, Outcome, run_episode, run_fallback
from envs.sandbox.cells import Budget, Cell, real_cells, simulated_cells
from envs.sandbox.incidents import CATALOGUE, Episode, Incident, Mix, draw_episodes, read_mix
from envs.sandbox.judgement import Bound, bound, false_positive_rate, systematically_worse
from envs.sandbox.kills import run_killed
from envs.sandbox.report import below_bound, summarize, table, worse_than_fallback

__all__ = [
    "CATALOGUE",
    "Bound",
    "Budget",
    "Cell",
    "Episode",
    "Guarding",
    "Incident",
    "Mix",
    "Outcome",
    "below_bound",
    "bound",
    "draw_episodes",
    "false_positive_rate",
    "read_mix",
    "real_cells",
    "run_episode",
    "run_fallback",
    "run_killed",
    "simulated_cells",
    "summarize",
    "systematically_worse",
    "table",
    "worse_than_fallback",
]
