"""Tables: what `datasets.load_dataset` opens, by one path for a hub id, a local folder and a local file."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalearn.errors import InvalidArgumentError

if TYPE_CHECKING:
    import datasets

ROW_FORMATS = (".parquet", ".csv", ".tsv")
"""Suffixes of files with one interaction a row."""

_BUILDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
    # The JSON builder refuses lists of lists: such a file is read as one text.
    ".json": ("text", {"sample_by": "document"}),
}
"""Suffix to the builder that reads it and the builder's options."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Point at one table: on the hub, in a local folder, or a local file.

    Args:
        location: hub id "owner/name", or path of a folder (with a README that has a `configs:` block, unless `files`
            are given) or of a file.
        config: configuration to load; None for the default one.
        files: paths inside `location`, read one after the other as one table, instead of a configuration.
        dataset_split: split to read; several as in "train+validation".
        revision: commit hash; required for a hub id, so that a result can be repeated, and None for a path.
        features: column to type ("string", "float64", ...) for CSV columns whose values do not tell it.

    Raises:
        InvalidArgumentError: if a hub id has no revision.
    """

    location: str
    config: str | None = None
    files: tuple[str, ...] = ()
    dataset_split: str = "train"
    revision: str | None = None
    features: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.is_local and self.revision is None:
            raise InvalidArgumentError(
                f"`revision` of hub data set {self.location!r} is missing; pass the commit hash to pin, which "
                f"`huggingface_hub.HfApi().dataset_info({self.location!r}).sha` gives (a local folder or file must "
                "exist under that path)"
            )

    @property
    def is_local(self) -> bool:
        """Whether the location is a path on this machine; with a revision it is a hub id, whatever lies here."""
        return self.revision is None and Path(self.location).exists()

    @contextlib.contextmanager
    def open(self) -> Iterator[datasets.Dataset]:
        """Open the table; nothing but a hub id touches the network, and what a local one caches is removed again.

        Raises:
            InvalidArgumentError: if a file has a suffix that no builder reads.
        """
        import datasets

        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet(datasets))
            options: dict[str, Any] = {}
            if self.is_local:
                options["cache_dir"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="metalearn-"))
            if Path(self.location).is_file():
                yield self._load_files(datasets, [self.location], options)
            elif self.files:
                base = self.location if self.is_local else f"hf://datasets/{self.location}@{self.revision}"
                yield self._load_files(datasets, [f"{base}/{file}" for file in self.files], options)
            else:
                if not self.is_local:
                    options["revision"] = self.revision
                yield datasets.load_dataset(self.location, self.config, split=self.dataset_split, **options)

    def _load_files(self, datasets: Any, files: list[str], options: dict[str, Any]) -> datasets.Dataset:
        suffix = Path(files[0]).suffix
        if suffix not in _BUILDERS:
            raise InvalidArgumentError(
                f"`location` {files[0]!r} has suffix {suffix!r}; pass a folder or a {' or '.join(_BUILDERS)} file"
            )
        builder, builder_options = _BUILDERS[suffix]
        if self.features is not None:
            types = {column: datasets.Value(dtype) for column, dtype in self.features.items()}
            options = options | {"features": datasets.Features(types)}
        return datasets.load_dataset(builder, data_files=files, split="train", **builder_options, **options)

    def content_hash(self) -> str:
        """Identify the content: SHA-256 over the bytes of a local file or folder, or the hub id and its revision."""
        path = Path(self.location)
        if not self.is_local:
            return f"{self.location}@{self.revision}"
        if path.is_file():
            return _file_hash(path)
        inside = [path / file for file in self.files] or sorted(file for file in path.rglob("*") if file.is_file())
        digest = hashlib.sha256()
        for file in inside:
            digest.update(f"{file.relative_to(path).as_posix()} {_file_hash(file)}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ItemTable(Table):
    """Point at a table with what items are.

    Args:
        item: column with the raw item ids, as the interactions have them.
        title: column with the titles.
        text: columns that describe an item, used where the table has them; values are text or lists of texts.
    """

    item: str = "item_id"
    title: str = "title"
    text: tuple[str, ...] = ("title", "categories", "genres")

    def read(self) -> dict[str, tuple[str, str]]:
        """Read title and description by raw id as text; "" where there is none.

        Raises:
            InvalidArgumentError: if the id or the title column is missing.
        """
        with self.open() as dataset:
            missing = sorted({self.item, self.title}.difference(dataset.column_names))
            if missing:
                raise InvalidArgumentError(
                    f"item table {self.location!r} has no columns {missing}, only {dataset.column_names}; pass "
                    "ItemTable(item=..., title=...)"
                )
            names = [name for name in self.text if name in dataset.column_names]
            table = dataset.select_columns(list(dict.fromkeys((self.item, self.title, *names)))).with_format(None)
            ids, titles, texts = list(table[self.item]), list(table[self.title]), [list(table[name]) for name in names]
        described = [" ".join(map(_as_text, row)) for row in zip(*texts, strict=True)] if names else [""] * len(ids)
        return {
            str(key): (_as_text(title).strip(), text.strip())
            for key, title, text in zip(ids, titles, described, strict=True)
        }


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(_as_text, value)) if isinstance(value, list) else str(value)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Switch progress bars off and back to what they were."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
