"""What was asked for differently in two runs, setting by setting, and where their data differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.views.terminal import shortest

if TYPE_CHECKING:
    from everystep.replay.data import DataDifference
    from everystep.replay.diff import Difference

__all__ = ["Listed", "listed"]

#: Numbers of the data that are shown with both values.
MOST_CELLS = 6
#: Rows and columns of the data that are named.
MOST_PLACES = 8
#: Characters of a value.
LONGEST = 60


class Listed(NamedTuple):
    """A line of the list: a setting and its value in both runs, or one text about it."""

    name: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}  {' | '.join(self.values)}"


def listed(found: Difference) -> list[Listed]:
    """Return what was asked for differently, one line for each setting or number of the data."""
    settings = [
        Listed(name, _pair_texts(pair))
        for name, pair in found.experiments.items()
        if name != "data.digest" or not found.data
    ]
    return settings + [line for each in found.data for line in _data_lines(each)]


def _data_lines(found: DataDifference) -> Iterator[Listed]:
    tensor = found.tensor
    shown = list(zip(tensor.positions, tensor.values, strict=True))[:MOST_CELLS]
    for position, (one, other) in shown:
        row, *rest = position
        named = [found.names[rest[0]]] if found.names and rest else [str(place) for place in rest]
        place = ", ".join([str(row), *named])
        yield Listed(f"data.{tensor.name}[{place}]", (_number(one), _number(other)))
    left = tensor.elements - len(shown)
    if left:
        columns = [found.names[column] if found.names else column for column in found.columns]
        where = f"in {_places('row', found.rows)}"
        where += f" and {_places('column', columns)}" if columns else ""
        more = f"and {left:,} more of {tensor.of:,} numbers, {where}; {tensor.size}".rstrip("; ")
        yield Listed(f"data.{tensor.name}", (more,))


def _places(what: str, places: Sequence[Any]) -> str:
    named = ", ".join(map(str, places[:MOST_PLACES]))
    more = f" and {len(places) - MOST_PLACES:,} more" if len(places) > MOST_PLACES else ""
    return f"{what}{'s' * (len(places) > 1)} {named}{more}"


def _number(value: Any) -> str:
    return shortest(value) if isinstance(value, float) else str(value)


def _pair_texts(pair: tuple[Any, Any]) -> tuple[str, str]:
    """Return two values in a line each; cut, unless they differ only later."""
    one, other = (_text(value) for value in pair)
    short = [text if len(text) <= LONGEST else text[:24] + "..." for text in (one, other)]
    return (short[0], short[1]) if short[0] != short[1] else (one, other)


def _text(value: Any) -> str:
    return str(tuple(value) if isinstance(value, list) else value).replace("\n", " ")
