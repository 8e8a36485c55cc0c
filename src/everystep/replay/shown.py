"""An answer or an opened step, which a notebook shows as the terminal prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everystep.views.run_view import RunView

__all__ = ["Shown", "same_content"]


def same_content(one: Any, other: Any) -> bool:
    """Return whether two answers, or values in them, are the same: of tensors and arrays, each bit."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        names = [each.name for each in fields(one) if each.compare]
        return all(same_content(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same_content(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same_content, one, other))
    if hasattr(one, "untyped_storage"):
        from everystep.step.state import same_bits

        return same_bits(one, other)
    if hasattr(one, "tobytes"):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return bool(one == other or (one != one and other != other))  # NaN is itself


# Without a comparison of its own: that of two tensors has no truth value.
@dataclass(frozen=True, eq=False)
class Shown:
    """An answer of a run. view: how it is shown; None: only by `repr`."""

    view: RunView | None = field(default=None, repr=False, compare=False, kw_only=True)

    __eq__ = same_content

    def __repr__(self) -> str:
        conclusion = "" if self.view is None else f": {self.view.line(self)}"
        return f"<{type(self).__name__.lower()}{conclusion}>"

    def to_text(self, **options: Any) -> str:
        """Return it as the terminal prints it."""
        return repr(self) if self.view is None else str(self.view.shown(self, **options))

    def data(self, **options: Any) -> dict[str, Any]:
        """Return everything in it as plain data: what `--json` prints and the page gets."""
        return {} if self.view is None else self.view.data(self, **options)

    def _repr_html_(self) -> str | None:
        return None if self.view is None else self.view.html(self)
