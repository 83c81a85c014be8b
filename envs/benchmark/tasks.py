"""Tasks: a domain with a model family and the budget that every method gets alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from envs.domains import Domain
from envs.public import BUNDLED, DomainCache, PublicSource, find_source, load_folder
from envs.recommenders import RECOMMENDERS
from envs.recommenders.training import TrainingSettings
from metalearn.errors import InvalidArgumentError

BUDGETS: Mapping[str, TrainingSettings] = {
    "matrix_factorization": TrainingSettings(steps=2000, batch_size=512),
    "two_tower": TrainingSettings(steps=2000, batch_size=256),
    "click_model": TrainingSettings(steps=2000, batch_size=512, max_validation_users=250),
    "graph_convolution": TrainingSettings(steps=1500, batch_size=512),
    "self_attention": TrainingSettings(steps=1000, batch_size=128),
}
"""By family. A click model runs its hidden layer for every pair of user and item, hence the smaller validations."""

FINAL_USERS: Mapping[str, int] = {"click_model": 2000}
"""Most users of the selection score and of the test, by family; all of them where none is given."""

FLOOR_TASK = "{}/floor/0x0"
"""Name of the task of a domain's floors, which train nothing."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A domain, a family and a budget.

    Args:
      domain: its name.
      family: a name in `RECOMMENDERS`.
      settings: the budget.
      final_users: most users of the selection score and of the test; None for all.
    """

    domain: str
    family: str
    settings: TrainingSettings
    final_users: int | None = None

    @property
    def name(self) -> str:
        """As in "movies/two_tower/2000x256"."""
        return f"{self.domain}/{self.family}/{self.settings.steps}x{self.settings.batch_size}"

    def prolonged(self, factor: int) -> Task:
        """Returns the task with more steps."""
        return replace(self, settings=replace(self.settings, steps=factor * self.settings.steps))


def make_tasks(domains: Iterable[str], families: Iterable[str]) -> list[Task]:
    """Returns every pair of domain and family as a task.

    Raises:
      InvalidArgumentError: there is no such family.
    """
    families = list(families)
    unknown = sorted(set(families) - set(RECOMMENDERS))
    if unknown:
        raise InvalidArgumentError(f"`families` must be of {list(RECOMMENDERS)}, got {unknown}")
    return [
        Task(domain=domain, family=family, settings=BUDGETS[family], final_users=FINAL_USERS.get(family))
        for domain in domains
        for family in families
    ]


def find_sources(folder: Path | None = None, files: Iterable[Path] = ()) -> dict[str, PublicSource]:
    """Returns the domains by name: the bundled one, a folder's of role "validation", and files of their own.

    Raises:
      InvalidArgumentError: something is missing, or two domains have one name.
    """
    found = [BUNDLED, *(load_folder(folder, role="validation").values() if folder else ())]
    found += [find_source(file) for file in files]
    sources = {source.name: source for source in found}
    if len(sources) < len(found):
        names = [source.name for source in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidArgumentError(f"several domains are called {twice}; rename the files passed as `--domain`")
    return sources


class Domains:
    """Opens domains, each once in a process; prepared ones are kept on disk, for other processes and later runs.

    Args:
      sources: by name.
      cache: folder of the prepared domains.
    """

    def __init__(self, sources: Mapping[str, PublicSource], cache: Path) -> None:
        self._sources, self._cache = sources, DomainCache(cache)
        self._open: dict[str, Domain] = {}

    def __getitem__(self, name: str) -> Domain:
        if name not in self._open:
            self._open[name] = self._sources[name].domain(cache=self._cache)
        return self._open[name]
