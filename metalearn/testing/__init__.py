"""Contract suites: what metalearn expects of an implementation, as checks that a third party runs on its own."""

from metalearn.testing.environment_checks import ENVIRONMENT_CHECKS, JITTED_ENVIRONMENT_CHECKS
from metalearn.testing.environment_contract import EnvironmentContract, Run

__all__ = ["ENVIRONMENT_CHECKS", "JITTED_ENVIRONMENT_CHECKS", "EnvironmentContract", "Run"]
