"""The `metalearn` command.

Exit status: 0 done; 1 an audit log is altered, cut, or cannot be written; 2 the command cannot be carried out as given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from metalearn import __version__
from metalearn.audit import Record, RecordKind, erase, read_key, read_records, verify, write_report
from metalearn.errors import AuditError, MetalearnError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: without the program's name; None for those of the process.

    Returns:
      The exit status.
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except AuditError as error:
        print(_printable(str(error)), file=sys.stderr)
        return 1
    except MetalearnError as error:
        print(_printable(str(error)), file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has seen enough; Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="metalearn", description="Steers PyTorch training runs.")
    parser.add_argument("--version", action="version", version=f"metalearn {__version__}")
    subjects = parser.add_subparsers(required=True, metavar="command")
    audit = subjects.add_parser("audit", help="the log of what was decided, and why")
    _add_audit_commands(audit.add_subparsers(required=True, metavar="command"))
    return parser


def _add_audit_commands(commands: Any) -> None:
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("log", type=Path, help="the audit log")
    sealed = argparse.ArgumentParser(add_help=False)
    sealed.add_argument("--key-file", type=Path, help="file that holds the log's key, if it has one")
    sealed.add_argument("--anchor", type=Path, help="file that holds the head of the chain; default: <log>.head")

    checks = commands.add_parser("verify", parents=[written, sealed], help="say whether a log is as it was written")
    checks.set_defaults(command=_verify)

    shows = commands.add_parser("show", parents=[written], help="print records, without verifying them")
    shows.add_argument("--kind", action="append", choices=[kind.value for kind in RecordKind], help="may be repeated")
    shows.add_argument("--run", help="only records of the run of this name")
    shows.add_argument("--tenant", help="only records of this tenant")
    shows.add_argument("--last", type=_count, metavar="N", help="only the last N of them")
    shows.set_defaults(command=_show)

    reports = commands.add_parser("report", parents=[written, sealed], help="draw a run as an HTML page of its own")
    reports.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page to write")
    reports.add_argument("--name", metavar="RUN", help="of the run; needed if the log holds several")
    reports.set_defaults(command=_report)

    erases = commands.add_parser("erase", parents=[written, sealed], help="drop the content of records for good")
    erases.add_argument("--tenant", help="whose records; default: everybody's")
    erases.add_argument("--before", type=_time, metavar="TIME", help="only older ones; ISO 8601, UTC if it has no zone")
    erases.set_defaults(command=_erase)


def _verify(options: argparse.Namespace) -> None:
    found = verify(options.log, key=_key(options), anchor=options.anchor)
    keyed = "keyed" if found.keyed else "no key"
    print(f"{options.log}: whole, {found.records} records, {keyed}, head {found.head.sequence} {found.head.hash}")
    if found.erased:
        print(f"the content of {found.erased} records was erased, as the log says")
    if found.ahead:
        print(
            f"{found.ahead} records are newer than the anchor: they are whole, but it would not show if later ones "
            "were cut off (the writer was killed or is writing, or the anchor is an older copy)"
        )
    if found.unfinished_bytes:
        print(
            f"the last line is unfinished, {found.unfinished_bytes} bytes: the writer was killed or is writing; "
            "the next one to open the log drops the line and notes it"
        )


def _show(options: argparse.Namespace) -> None:
    chosen: Iterable[Record] = (
        record
        for record in read_records(options.log)
        if (options.kind is None or record.kind in options.kind)
        and (options.run is None or record.name == options.run)
        and (options.tenant is None or record.tenant == options.tenant)
    )
    for record in chosen if options.last is None else deque(chosen, maxlen=options.last):
        print(_printable(_line(record)))


def _report(options: argparse.Namespace) -> None:
    key = _key(options)
    print(write_report(options.log, options.output, name=options.name, key=key, anchor=options.anchor))
    verify(options.log, key=key, anchor=options.anchor)  # the page of an altered log is written, but that is no success


def _erase(options: argparse.Namespace) -> None:
    count = erase(options.log, tenant=options.tenant, before=options.before, key=_key(options), anchor=options.anchor)
    print(f"{options.log}: erased the content of {count} records")


def _line(record: Record) -> str:
    """Returns a record in one line."""
    who = f"{record.name or '-'}{f' [{record.tenant}]' if record.tenant else ''}"
    what = "(erased)" if record.content is None else _summary(record.kind, record.content)
    return f"{record.sequence:>6}  {record.time:%Y-%m-%d %H:%M:%S}  {record.kind:<8}  {who}  {what}"


def _summary(kind: str, content: Mapping[str, Any]) -> str:
    if kind == RecordKind.DECISION and {"index", "step", "status"} <= content.keys():
        reasons = content.get("reasons")
        sentences = "; ".join(map(str, reasons)) if isinstance(reasons, list) else ""
        return f"decision {content['index']} at step {content['step']}, {content['status']}: {sentences}"
    return "  ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in content.items())


def _printable(text: str) -> str:
    """Escapes what a terminal would obey, and what it cannot print: a log may hold anything."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _key(options: argparse.Namespace) -> bytes | None:
    return None if options.key_file is None else read_key(options.key_file)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be like 2026-01-31 or 2026-01-31T09:30, got {text!r}") from error
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


if __name__ == "__main__":
    sys.exit(main())
