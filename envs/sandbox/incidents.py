"""What may befall a training run: incidents by the names that the literature has for them, and seeded draws of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metalearn.errors import InvalidArgumentError

PHASES = ("training", "report", "snapshot", "state")
"""Of a run that is killed: in an optimizer step, in the middle of a decision, while a snapshot or the run's state is
being written to the disk."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of incident, and what may be drawn of it.

    Args:
      what: for the report.
      episodes: of the built-in mix.
      variants: one is drawn.
      size: range of its size, log-uniform; the unit is the kind's.
      lasts: range of its duration in steps, log-uniform.
      recurs: whether it may lie in the data, so that it comes again when the run goes back to where it was.
    """

    what: str
    episodes: int
    variants: tuple[str, ...] = ("",)
    size: tuple[float, float] = (1.0, 1.0)
    lasts: tuple[int, int] = (1, 1)
    recurs: bool = False


CATALOGUE: Mapping[str, Kind] = {
    "nonfinite_loss": Kind(
        what="the loss of batches is NaN or infinite", episodes=90, variants=("nan", "inf"), lasts=(1, 4), recurs=True
    ),
    "nonfinite_gradient": Kind(
        what="gradients of batches hold NaN or infinity, their losses do not",
        episodes=90,
        variants=("nan", "inf"),
        lasts=(1, 4),
        recurs=True,
    ),
    "loss_spike": Kind(
        what="the loss of batches, and its gradient, is many times what it was",
        episodes=80,
        size=(10.0, 1e6),
        lasts=(1, 4),
        recurs=True,
    ),
    "learning_rate_proposal": Kind(
        what="an advisor asks for 1000 times the learning rate", episodes=80, size=(1e3, 1e3), lasts=(8, 160)
    ),
    "garbage_policy": Kind(
        what="the policy's outputs are random, not finite, or of a wrong shape; or its start is not finite",
        episodes=90,
        variants=("random", "nan", "inf", "shape", "start"),
    ),
    "adversarial_policy": Kind(
        what="the policy heads for the worst bound, or from one to the other",
        episodes=90,
        variants=("high", "low", "alternating"),
    ),
    "lost_validation": Kind(what="validation metrics do not arrive", episodes=70, lasts=(8, 160)),
    "absurd_metric": Kind(
        what="validation metrics that mean nothing are reported",
        episodes=90,
        variants=("nan", "inf", "-inf", "-1e30", "1e30", "text"),
        lasts=(8, 80),
    ),
    "out_of_memory": Kind(
        what="a step does not fit into memory, once or twice, or because the batch was made four times as large",
        episodes=70,
        variants=("forward", "step", "batch_size"),
        lasts=(1, 2),
    ),
    "kill": Kind(what="kill -9, and a restart from the last saved state", episodes=60, variants=PHASES),
    "drift": Kind(
        what="batches come from earlier, then from later rows only; or items mean others for a while",
        episodes=70,
        variants=("abrupt", "concept"),
    ),
    "loader_stall": Kind(what="batches arrive late (size in seconds)", episodes=40, size=(0.03, 0.2), lasts=(1, 4)),
    "slower_hardware": Kind(
        what="steps take longer from then on (size in seconds)", episodes=40, size=(0.002, 0.03), lasts=(16, 48)
    ),
    "wrong_profile": Kind(
        what="the profile is of another domain, or absurd", episodes=40, variants=("other", "extreme")
    ),
}
"""By name."""

COMPANIONS = ("nonfinite_loss", "nonfinite_gradient", "loss_spike", "lost_validation", "loader_stall")
"""What may come on top of another incident."""
ONSET = (0.15, 0.75)
"""Range of the share of a run after which an incident begins: not before there is something to lose, and not so late
that nothing is left to recover in."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One incident of one episode.

    Args:
      name: in `CATALOGUE`.
      variant: one of the kind's.
      at: share of the run after which it begins, in [0, 1).
      lasts: steps.
      size: in the kind's unit.
      recurs: whether it lies in the data.
    """

    name: str
    variant: str = ""
    at: float = 0.5
    lasts: int = 1
    size: float = 1.0
    recurs: bool = False

    def __post_init__(self) -> None:
        kind = known(self.name)
        if self.variant not in kind.variants:
            raise InvalidArgumentError(f"`variant` of {self.name} must be one of {kind.variants}, got {self.variant!r}")
        if not 0.0 <= self.at < 1.0 or self.lasts < 1:
            raise InvalidArgumentError(
                f"{self.name}: `at` must lie in [0, 1) and `lasts` be at least 1, got {self.at} and {self.lasts}"
            )


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One run and what befalls it.

    Args:
      index: in the mix.
      incidents: the first is the one it is reported under.
      seed: of initial weights, batches and policy.
      draw: in [0, 1); chooses the cell.
      every_interval: whether snapshots are taken each interval; else as often as their cost allows (the default).
      rewinds: whether the position in the data is tracked, and goes back too.
      constrained: whether the run has a least throughput.
    """

    index: int
    incidents: tuple[Incident, ...]
    seed: int
    draw: float
    every_interval: bool = True
    rewinds: bool = True
    constrained: bool = False

    @property
    def name(self) -> str:
        """Of the main incident."""
        return self.incidents[0].name

    def find(self, name: str) -> Incident | None:
        """Returns the incident of a name, if there is one."""
        return next((incident for incident in self.incidents if incident.name == name), None)

    @property
    def key(self) -> str:
        """Names the episode by all that it is."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A configuration of incidents.

    Args:
      kinds: what is drawn, each as many times as its `episodes` say.
      compound: probability that an episode has a second incident, in [0, 1].
      seed: of all draws.
    """

    kinds: Mapping[str, Kind] = field(default_factory=lambda: dict(CATALOGUE))
    compound: float = 0.25
    seed: int = 0

    def scaled(self, episodes: int) -> Mix:
        """Returns the mix with about so many episodes, at least one of each kind."""
        total = sum(kind.episodes for kind in self.kinds.values())
        return replace(
            self,
            kinds={
                name: replace(kind, episodes=max(1, round(kind.episodes * episodes / total)))
                for name, kind in self.kinds.items()
            },
        )


def known(name: str) -> Kind:
    """Returns the kind of a name.

    Raises:
      InvalidArgumentError: there is none.
    """
    if name not in CATALOGUE:
        raise InvalidArgumentError(f"no incident is called {name!r}; there are {sorted(CATALOGUE)}")
    return CATALOGUE[name]


def draw_episodes(mix: Mix) -> list[Episode]:
    """Draws the episodes of a mix; each depends on the seed, its kind and its number among its kind only.

    >>> episodes = draw_episodes(Mix().scaled(14))
    >>> len(episodes), episodes[0].name
    (14, 'nonfinite_loss')
    """
    episodes: list[Episode] = []
    for position, name in enumerate(CATALOGUE):
        for number in range(mix.kinds[name].episodes if name in mix.kinds else 0):
            rng = np.random.default_rng([mix.seed, position, number])
            incidents = [_draw(name, mix.kinds[name], number, rng)]
            others = [other for other in COMPANIONS if other != name and other in mix.kinds]
            if others and rng.random() < mix.compound:
                other = others[int(rng.integers(len(others)))]
                incidents.append(_draw(other, mix.kinds[other], int(rng.integers(1000)), rng))
            needs_rewind = any(incident.variant == "batch_size" for incident in incidents)
            episodes.append(
                Episode(
                    index=len(episodes),
                    incidents=tuple(incidents),
                    seed=int(rng.integers(1 << 30)),
                    draw=float(rng.random()),
                    every_interval=name == "kill" or bool(rng.random() < 0.75),
                    rewinds=needs_rewind or bool(rng.random() < 0.5),
                    constrained=name in ("loader_stall", "slower_hardware") and bool(rng.random() < 0.5),
                )
            )
    return episodes


def _draw(name: str, kind: Kind, number: int, rng: np.random.Generator) -> Incident:
    def log_uniform(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    return Incident(
        name=name,
        variant=kind.variants[number % len(kind.variants)],
        at=round(float(rng.uniform(*ONSET)), 4),
        lasts=round(log_uniform(*kind.lasts)),
        size=float(f"{log_uniform(*kind.size):.6g}"),
        recurs=kind.recurs and bool(rng.random() < 0.5),
    )


def read_mix(path: str | Path) -> Mix:
    """Reads a mix from a JSON file.

    The file holds `{"incidents": {NAME: {"episodes": 90, "variants": [...], "size": [low, high], "lasts": [low, high],
    "recurs": true}}, "compound": 0.25, "seed": 0}`. Everything but the names may be left out: then it is as built in.

    Raises:
      InvalidArgumentError: the file is no such mix; the message names what is wrong.
    """
    try:
        content: Any = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{path} is not a JSON file of incidents: {error}") from error
    allowed = {"incidents", "compound", "seed"}
    if not isinstance(content, dict) or not isinstance(content.get("incidents"), dict) or set(content) - allowed:
        raise InvalidArgumentError(f"{path} must hold an object with `incidents` and, if need be, {sorted(allowed)}")
    compound, seed = content.get("compound", Mix.compound), content.get("seed", Mix.seed)
    if not isinstance(compound, int | float) or not 0.0 <= compound <= 1.0 or not isinstance(seed, int):
        raise InvalidArgumentError(f"`compound` must lie in [0, 1] and `seed` be an int, got {compound!r} and {seed!r}")
    return Mix(
        kinds={name: _kind(name, given) for name, given in content["incidents"].items()}, compound=compound, seed=seed
    )


def _kind(name: str, given: Any) -> Kind:
    kind = known(name)
    fields = {"episodes", "variants", "size", "lasts", "recurs"}
    if not isinstance(given, dict) or set(given) - fields:
        raise InvalidArgumentError(f"incident {name!r} must be an object of {sorted(fields)}, got {given!r}")
    changed = replace(kind, **{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
    ranges = (changed.size, changed.lasts)
    if not all(len(pair) == 2 and 0 < pair[0] <= pair[1] for pair in ranges) or changed.episodes < 0:
        raise InvalidArgumentError(f"incident {name!r}: ranges must be [low, high] with 0 < low <= high, got {given!r}")
    if not changed.variants or not set(changed.variants) <= set(kind.variants):
        raise InvalidArgumentError(f"incident {name!r}: variants must be among {kind.variants}, got {changed.variants}")
    return changed
