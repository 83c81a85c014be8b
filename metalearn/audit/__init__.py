"""The audit trail: what was decided, when, and why."""

from metalearn.audit.log import DecisionLog, read_decisions
from metalearn.audit.trajectories import draw_trajectories

__all__ = ["DecisionLog", "draw_trajectories", "read_decisions"]
