"""The ledger of private releases: what each tenant's data have given away, added up, and refused beyond a budget.

One JSON object a line. The first line holds the budget, each other one a charge. A line is on the disk before what it
stands for leaves the house; one that a kill cut off stands for nothing that left, and is dropped by the next charge.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: one writer at a time is then up to the user
    fcntl = None

from metalearn.audit.storage import sync_folder
from metalearn.errors import InvalidArgumentError, PrivacyError

FORMAT_VERSION = 1
_INSTALL = "differential privacy needs an extra: pip install 'metalearn[privacy]'"


@dataclass(frozen=True, kw_only=True)
class Charge:
    """Holds what one release cost.

    Args:
      tenant: whose users the data are of.
      epsilon: of the release, which is pure (delta 0).
      release: fingerprint of what was released.
      time: ISO 8601, UTC.
    """

    tenant: str
    epsilon: float
    release: str
    time: str

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
        for name in ("tenant", "release", "time"):
            if not isinstance(getattr(self, name), str):
                raise InvalidArgumentError(f"`{name}` must be a string, got {getattr(self, name)!r}")


class PrivacyLedger:
    """Adds up what a tenant's releases cost, and refuses what would exceed the budget.

    Every tenant has the same budget, of its own: tenants' users are taken to be different people. Charges are pure
    (epsilon, 0); together they are (epsilon, delta) for less than the sum of their epsilons if `delta` is above 0, by
    the privacy loss distribution of the worst mechanisms with these epsilons (Kairouz, Oh and Viswanath, "The
    composition theorem for differential privacy", ICML 2015), composed by dp-accounting.

    Processes and threads may share a file: charges wait for each other.

    Args:
      path: of the file, made if it is not there.
      epsilon: budget of a tenant, above 0.
      delta: at which it holds, in [0, 1); take one far below one over the number of users. 0 adds epsilons.

    Raises:
      InvalidArgumentError: a budget out of range.
      PrivacyError: the file is not a ledger, or one of another budget.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ledger = PrivacyLedger(Path(folder) / "ledger.jsonl", epsilon=3.0, delta=0.0)
      ...     ledger.charge("shop", 1.0, release="00ff")
      ...     ledger.spent("shop"), ledger.spent("another shop")
      1.0
      (1.0, 0.0)
    """

    def __init__(self, path: str | Path, *, epsilon: float, delta: float) -> None:
        _check_epsilon(epsilon)
        if not _is_number(delta) or not 0 <= delta < 1:
            raise InvalidArgumentError(f"`delta` must be a number from 0 to below 1, got {delta!r}; take 1e-6 or less")
        self.path, self.epsilon, self.delta = Path(path), float(epsilon), float(delta)
        with self._locked() as file:
            if not self._read(file):
                self._append(file, {"ledger": FORMAT_VERSION, "epsilon": self.epsilon, "delta": self.delta})
                sync_folder(self.path.parent)

    def charges(self, tenant: str | None = None) -> list[Charge]:
        """Returns the charges, in order; of all tenants, or of one."""
        with self._locked() as file:
            charges = self._charges(file)
        return [charge for charge in charges if tenant in (None, charge.tenant)]

    def spent(self, tenant: str) -> float:
        """Returns the epsilon, at the ledger's delta, of everything that a tenant has released."""
        return composed_epsilon([charge.epsilon for charge in self.charges(tenant)], self.delta)

    def charge(self, tenant: str, epsilon: float, *, release: str) -> float:
        """Writes a release down, before it leaves the house.

        Args:
          tenant: whose users the data are of.
          epsilon: of the release alone.
          release: fingerprint of what is released.

        Returns:
          What the tenant has spent with it, as `spent` does.

        Raises:
          PrivacyError: the budget does not allow it; nothing is written.
        """
        new = Charge(tenant=tenant, epsilon=epsilon, release=release, time=datetime.now(UTC).isoformat())
        with self._locked() as file:
            before = [charge.epsilon for charge in self._charges(file) if charge.tenant == tenant]
            after = composed_epsilon([*before, new.epsilon], self.delta)
            if after > self.epsilon:
                raise PrivacyError(
                    f"a release of epsilon {epsilon:g} would bring tenant {tenant!r} to {after:.4g} at delta "
                    f"{self.delta:g}, and the budget of {self.path} is {self.epsilon:g}; it has spent "
                    f"{composed_epsilon(before, self.delta):.4g} in {len(before)} releases; use a profile that was "
                    "released before, or a smaller `epsilon`"
                )
            self._append(file, asdict(new))
        return after

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileIO(self.path, "a+") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise PrivacyError(
                f"cannot use the ledger {self.path}: {error}; make room, or pass another path"
            ) from error

    def _read(self, file: FileIO) -> list[dict[str, Any]]:
        """Returns the whole lines; checks that the first is this ledger's."""
        file.seek(0)
        whole = file.readall().rpartition(b"\n")[0]
        rows = [self._parse(line, number) for number, line in enumerate(whole.splitlines(), 1)]
        if not rows:
            return []
        if rows[0].get("ledger") != FORMAT_VERSION:
            raise PrivacyError(f"{self.path} is not a ledger of version {FORMAT_VERSION}; pass another path")
        budget = {"epsilon": self.epsilon, "delta": self.delta}
        kept = {name: rows[0].get(name) for name in budget}
        if kept != budget:
            raise PrivacyError(f"{self.path} is a ledger with the budget {kept}, not {budget}; pass the former")
        return rows

    def _charges(self, file: FileIO) -> list[Charge]:
        charges = []
        for number, row in enumerate(self._read(file)[1:], 2):
            try:
                charges.append(Charge(**row))
            except (TypeError, InvalidArgumentError) as error:
                raise PrivacyError(f"{self.path}:{number} is not a charge: {error}") from error
        return charges

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PrivacyError(f"{self.path}:{number} is not JSON: {error}; restore the ledger from a copy") from error
        if not isinstance(row, dict):
            raise PrivacyError(f"{self.path}:{number} is not an object; restore the ledger from a copy")
        return row

    def _append(self, file: FileIO, row: dict[str, Any]) -> None:
        file.seek(0)
        content = file.readall()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
        line = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())


def composed_epsilon(epsilons: Sequence[float], delta: float) -> float:
    """Returns the epsilon that pure releases have together at a delta.

    Raises:
      PrivacyError: dp-accounting is not installed; a delta of 0, or a single release, does without.
    """
    total = math.fsum(epsilons)
    if delta == 0 or len(epsilons) < 2:
        return total
    try:
        from dp_accounting.pld import (  # pyright: ignore[reportMissingImports]
            privacy_loss_distribution as losses,
        )
    except ImportError as error:
        raise PrivacyError(_INSTALL) from error
    composed = losses.identity()
    for epsilon, count in Counter(epsilons).items():
        # Randomised response about one bit, whether the user is there, is the worst of all mechanisms with an epsilon.
        worst = losses.from_randomized_response(noise_parameter=2.0 / (1.0 + math.exp(epsilon)), num_buckets=2)
        composed = composed.compose(worst.self_compose(count))
    # Privacy losses are rounded up to a grid, so the sum may be the smaller of two valid bounds.
    return min(total, float(composed.get_epsilon_for_delta(delta)))


def _check_epsilon(epsilon: Any) -> None:
    if not _is_number(epsilon) or not 0 < epsilon <= 100:
        raise InvalidArgumentError(f"`epsilon` must be a number above 0 and at most 100, got {epsilon!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
