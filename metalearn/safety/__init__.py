"""Safety: what may be applied, and what may not."""

from metalearn.safety.guard import (
    OVERRIDE_RULES,
    RULES,
    Acceptance,
    GuardConfig,
    GuardState,
    after_decision,
    after_rollback,
    judge,
)
from metalearn.safety.proposal import Bar, Proposal, Region, Rule, Verdict

__all__ = [
    "OVERRIDE_RULES",
    "RULES",
    "Acceptance",
    "Bar",
    "GuardConfig",
    "GuardState",
    "Proposal",
    "Region",
    "Rule",
    "Verdict",
    "after_decision",
    "after_rollback",
    "judge",
]
