"""Safety: what may be applied, and what may not."""

from metalearn.safety.guard import RULES, Proposal, Rule, Verdict, judge

__all__ = ["RULES", "Proposal", "Rule", "Verdict", "judge"]
