"""Runs the adapters' tests and writes the matrix in docs/integrations.md: framework, feature, verified version.

    python scripts/integration_matrix.py           # tests of every framework that is installed, minutes on a free core
    python scripts/integration_matrix.py --quick   # the plain loop only; writes nothing
    python scripts/integration_matrix.py --frameworks RecBole

A cell says what happened: passed, failed, or why it was skipped. The column of a framework that did not run stays as
it was recorded: a matrix may be put together in several environments.

The last line is JSON: how many cells passed, failed and were skipped, and versions.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

from provenance import commit

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "integrations"
DOCUMENT = ROOT / "docs" / "integrations.md"
RECORD = ROOT / "docs" / "results" / "integrations.json"
MARKED = ("<!-- generated: {name} -->", "<!-- end of {name} -->")


@dataclass(frozen=True)
class Framework:
    """A column of the matrix."""

    title: str
    file: str
    package: str


FRAMEWORKS = (
    Framework("plain loop", "test_plain_loop.py", "torch"),
    Framework("Lightning", "test_lightning.py", "lightning"),
    Framework("Transformers", "test_transformers.py", "transformers"),
    Framework("Accelerate", "test_accelerate.py", "accelerate"),
    Framework("RecBole", "test_recbole.py", "recbole"),
)


class Outcomes:
    """Is a pytest plugin: what became of each check of the contract, by file and check, and of the other tests."""

    def __init__(self) -> None:
        self.contract: dict[tuple[str, str], str] = {}
        self.others: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Takes in one phase of a test; only a failure makes setup and teardown count."""
        if report.when != "call" and report.passed:
            return
        outcome = report.outcome
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            outcome = reason.removeprefix("Skipped: ")
        file, _, test = report.nodeid.partition("::")
        name = Path(file).name
        if test.startswith("test_contract["):
            self.contract[name, test.removeprefix("test_contract[").removesuffix("]")] = outcome
        else:
            self.others.setdefault(name, []).append(outcome)


def installed(package: str) -> str | None:
    """Returns the version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_tests(frameworks: list[Framework]) -> Outcomes:
    """Runs the test files of some frameworks in this process."""
    outcomes = Outcomes()
    files = [str(TESTS / framework.file) for framework in frameworks]
    pytest.main(["-q", "--tb=short", "--rootdir", str(ROOT), "-p", "no:cacheprovider", *files], plugins=[outcomes])
    return outcomes


def column(framework: Framework, outcomes: Outcomes, checks: list[str]) -> dict[str, Any]:
    """Returns what is recorded of one framework."""
    others = outcomes.others.get(framework.file, [])
    return {
        "version": installed(framework.package),
        "checks": {check: outcomes.contract.get((framework.file, check), "not run") for check in checks},
        "others": {"passed": others.count("passed"), "of": len(others)},
    }


def table(columns: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    """Returns the matrix as Markdown; reasons for skipped cells follow it as notes."""
    shown = [framework.title for framework in FRAMEWORKS if framework.title in columns]
    notes: list[str] = []

    def cell(outcome: str) -> str:
        if outcome in ("passed", "failed", "not run"):
            return {"passed": "yes", "failed": "**fails**"}.get(outcome, outcome)
        if outcome not in notes:
            notes.append(outcome)
        return f"no ({notes.index(outcome) + 1})"

    rows = [
        ["", *shown],
        ["---"] * (len(shown) + 1),
        ["verified version", *(str(columns[name]["version"]) for name in shown)],
        *([title, *(cell(columns[name]["checks"][check]) for name in shown)] for check, title in titles.items()),
        ["further tests passed", *("{passed} of {of}".format(**columns[name]["others"]) for name in shown)],
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"({index}) {note}." for index, note in enumerate(notes, start=1))]).strip()


def write_block(name: str, text: str) -> None:
    """Puts generated text between its marks in docs/integrations.md."""
    begin, end = (mark.format(name=name) for mark in MARKED)
    document = DOCUMENT.read_text(encoding="utf8")
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"error: {DOCUMENT} has no block {begin} ... {end}; put the two lines where it belongs")
    DOCUMENT.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the plain loop only; write nothing")
    names = [framework.title for framework in FRAMEWORKS]
    parser.add_argument("--frameworks", nargs="+", choices=names, default=names, help="all that are installed")
    arguments = parser.parse_args()

    from tests.integrations.contract import CHECKS

    titles = {check.__name__: (check.__doc__ or "").strip() for check in CHECKS}
    present = [found for found in FRAMEWORKS if found.title in arguments.frameworks and installed(found.package)]
    if arguments.quick:
        present = [FRAMEWORKS[0]]
    outcomes = run_tests(present)
    columns = {framework.title: column(framework, outcomes, list(titles)) for framework in present}
    cells = [outcome for found in columns.values() for outcome in found["checks"].values()]
    figures = {
        "passed": cells.count("passed"),
        "failed": cells.count("failed"),
        "skipped": len(cells) - cells.count("passed") - cells.count("failed"),
        "versions": {name: found["version"] for name, found in columns.items()},
    }
    if not arguments.quick:
        known = json.loads(RECORD.read_text(encoding="utf8"))["frameworks"] if RECORD.exists() else {}
        known |= columns
        RECORD.write_text(json.dumps({"frameworks": known, "commit": commit()}, indent=1) + "\n", encoding="utf8")
        versions = f"Python {sys.version.split()[0]}, torch {installed('torch')}, numpy {installed('numpy')}"
        write_block("matrix", f"{table(known, titles)}\n\nOn {versions}, CPU, one process.")
    print(json.dumps(figures))
    if figures["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
