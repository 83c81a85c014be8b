"""Layouts: how a table holds interactions, and the pure functions that read them.

"rows": one interaction a row. "lines": text, one user a line, `user item item ...`. "lists": JSON documents
`[[item, ...], ...]` in which the position of a list is the user.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

Layout = Literal["rows", "lines", "lists"]


def read_layout(dataset: Any, layout: Layout, columns: Mapping[str, str | None] | None) -> Interactions:
    """Read an opened table in one of the layouts; `columns` as in `Interactions.from_dataset`, for "rows" only.

    Raises:
        InteractionsError: if columns are missing or values invalid.
        InvalidArgumentError: if the texts are not in the layout.
    """
    if layout == "rows":
        return Interactions.from_dataset(dataset, columns=columns)
    texts = list(dataset.with_format(None)["text"])
    return read_lines(texts) if layout == "lines" else read_lists(texts)


def read_lines(lines: Iterable[str]) -> Interactions:
    """Read adjacency text, one user a line; a user may have several lines, and a line no items.

    Example:
        >>> table = read_lines(["0 5 7", "1 5", "0 9", "2"])
        >>> table.user.tolist(), table.item_ids(table.item).tolist()
        ([0, 0, 1, 0], [5, 7, 5, 9])
    """
    return _from_lists((tokens[0], tokens[1:]) for tokens in map(str.split, lines) if tokens)


def read_lists(documents: Iterable[str]) -> Interactions:
    """Read JSON lists of item lists; the same position in every document is the same user.

    Raises:
        InvalidArgumentError: if a document is not a list of lists.

    Example:
        >>> table = read_lists(["[[5, 7], [5]]", "[[9], []]"])
        >>> table.user.tolist(), table.item_ids(table.item).tolist()
        ([0, 0, 1, 0], [5, 7, 5, 9])
    """
    users: list[tuple[int, Sequence[Any]]] = []
    for number, document in enumerate(documents):
        try:
            lists = json.loads(document)
        except ValueError as error:
            raise InvalidArgumentError(
                f"document {number} of layout 'lists' is not JSON: {error}; pass layout='lines' for plain text"
            ) from error
        if not isinstance(lists, list) or not all(isinstance(items, list) for items in lists):
            raise InvalidArgumentError(
                f"document {number} of layout 'lists' must be a list of lists of items, one per user, got "
                f"{document[:40]!r}"
            )
        users.extend(enumerate(lists))
    return _from_lists(users)


def _from_lists(lists: Iterable[tuple[Any, Sequence[Any]]]) -> Interactions:
    users, items, lengths = [], [], []
    for user, found in lists:
        users.append(user)
        items.extend(found)
        lengths.append(len(found))
    return Interactions.from_arrays(np.repeat(_ids(users), lengths), _ids(items))


def _ids(values: list[Any]) -> np.ndarray:
    """Integers where every id is a plain whole number, so that codes follow the numbers; else the ids as they are."""
    array = np.array(values)
    if array.dtype.kind == "U" and np.char.isdecimal(array).all() and np.char.str_len(array).max() < 19:
        numbers = array.astype(np.int64)
        if (numbers.astype(array.dtype) == array).all():
            return numbers
    return array
