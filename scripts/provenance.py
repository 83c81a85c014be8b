"""Where and when a script ran: what a reader needs to judge its figures."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def commit() -> str:
    """Returns the commit that runs, with a plus sign if files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        except FileNotFoundError:
            return ""
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../metalearn", "../envs", "../scripts")
    return f"{git('rev-parse', '--short', 'HEAD')}{'+' if changed else ''}" or "unknown"


def provenance(**more: Any) -> dict[str, Any]:
    """Returns date, commit, machine with its load, versions, and whatever else is passed, such as seeds."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "versions": {name: version(name) for name in ("metalearn", "torch", "jax", "numpy")},
        **more,
    }
