"""Rows of a run's database, checked as they are read: another program may have written them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.errors import RunError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BYTES", "LOSSES", "MAYBE_BYTES", "MAYBE_STEP", "STEP", "TEXT", "VALUES", "Kinds", "Rows"]


class Kinds(NamedTuple):
    """The types that the values of a column have (NULL is None), and in words what others would be."""

    types: frozenset[type[Any]]
    others: str


STEP = Kinds(frozenset({int}), "steps or places that are not whole numbers")
MAYBE_STEP = Kinds(STEP.types | {NoneType}, STEP.others)
TEXT = Kinds(frozenset({str}), "names that are not texts")
BYTES = Kinds(frozenset({bytes}), "contents that are not bytes")
MAYBE_BYTES = Kinds(BYTES.types | {NoneType}, BYTES.others)
LOSSES = Kinds(frozenset({float, NoneType}), "losses that are not numbers")
VALUES = Kinds(LOSSES.types, "measurements that are not numbers")


class Rows:
    """Reads rows of an open database."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path

    def rows(self, query: str, *arguments: Any) -> list[Any]:
        """Return the rows of a query.

        Raises:
            RunError: the database cannot be read.
        """
        try:
            return self.connection.execute(query, arguments).fetchall()
        except (sqlite3.Error, UnicodeError) as error:
            raise self._unreadable(error) from None

    def checked(self, kinds: Sequence[Kinds], query: str, *arguments: Any) -> list[Any]:
        """Return the rows of a query, in which each column has only values of some types.

        Raises:
            RunError: a value has another type, or the database cannot be read.
        """
        rows = self.rows(query, *arguments)
        for column, allowed in zip(zip(*rows, strict=True), kinds, strict=True) if rows else ():
            self._check(column, allowed)
        return rows

    def numbers(self, query: str, *arguments: Any, kinds: Kinds | None = None) -> list[Any]:
        """Return the only column of a query; fast for millions of rows.

        Raises:
            RunError: a value has none of the types in `kinds`, or the database cannot be read.
        """
        try:
            found = list(chain.from_iterable(self.connection.execute(query, arguments)))
        except (sqlite3.Error, UnicodeError) as error:
            raise self._unreadable(error) from None
        if kinds is not None:
            self._check(found, kinds)
        return found

    def integers(self, query: str, *arguments: Any, kinds: Kinds) -> NDArray[np.int64]:
        """Return the only column of a query, of whole numbers, as an array.

        Raises:
            RunError: a value has none of the types in `kinds`, or the database cannot be read.
        """
        import numpy as np

        return np.array(self.numbers(query, *arguments, kinds=kinds), np.int64)

    def floats(self, query: str, *arguments: Any, kinds: Kinds) -> NDArray[np.float64]:
        """Return the only column of a query as an array; NULL is NaN. Fast for millions of rows.

        Raises:
            RunError: a value has none of the types in `kinds`, or the database cannot be read.
        """
        import numpy as np

        try:
            found = chain.from_iterable(self.connection.execute(query, arguments))
            return np.fromiter(found, np.float64)
        except (sqlite3.Error, UnicodeError) as error:
            raise self._unreadable(error) from None
        except (TypeError, ValueError):  # NULL, or what should not be there
            return np.array(self.numbers(query, *arguments, kinds=kinds), np.float64)

    def _unreadable(self, error: Exception) -> RunError:
        is_damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT
        cure = (
            f"; everystep doctor {self.path.parent.name} reports what can be read" if is_damaged else ""
        )
        return RunError(f"{self.path} cannot be read: {error}{cure}")

    def _check(self, values: Iterable[Any], allowed: Kinds) -> None:
        if not set(map(type, values)) <= allowed.types:
            raise RunError(f"{self.path} has {allowed.others}: the database was changed")
