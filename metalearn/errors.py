"""Every exception that metalearn raises on purpose.

One root, `MetalearnError`, so that a training job can catch all of them in one clause. Those that stem from a bad
argument are also `ValueError`.
"""


class MetalearnError(Exception):
    """Root of all errors raised by metalearn."""


class InvalidArgumentError(MetalearnError, ValueError):
    """An argument has a value that is not allowed; the message names it, what was received and what to pass."""


class InteractionsError(InvalidArgumentError):
    """An interactions table cannot be used as given: missing column, missing id, empty, wrong type."""


class LeakageError(InvalidArgumentError):
    """A split lets training see what it is evaluated on: a future timestamp or an evaluated pair in training."""


class CheckpointError(MetalearnError):
    """A controller checkpoint cannot be read: missing, truncated, altered, or not a checkpoint at all."""


class SchemaMismatchError(CheckpointError):
    """A checkpoint was written for another format version, feature schema or hyperparameter space."""


class SessionError(MetalearnError):
    """A session or scheduler was called out of order, or resumed with a state that is not its own."""


class AuditError(MetalearnError):
    """An audit log is altered, cut, or not an audit log; the message names file and line, `line` is its number."""

    line: int | None = None


class PrivacyError(MetalearnError):
    """A private release is refused: beyond the budget, no ledger that can be used, or the extra is not installed."""
