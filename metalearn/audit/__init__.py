"""The audit trail: what was decided, when, and why; in a log that shows whether it was altered."""

from metalearn.audit.chain import Verification
from metalearn.audit.log import AuditLog, erase, read_decisions, read_key, read_records, verify
from metalearn.audit.record import Record, RecordKind
from metalearn.audit.report import write_report
from metalearn.audit.trajectories import draw_trajectories

__all__ = [
    "AuditLog",
    "Record",
    "RecordKind",
    "Verification",
    "draw_trajectories",
    "erase",
    "read_decisions",
    "read_key",
    "read_records",
    "verify",
    "write_report",
]
