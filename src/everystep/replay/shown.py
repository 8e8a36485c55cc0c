"""An answer or an opened step, which a notebook shows as the terminal prints it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everystep.views.run_view import RunView

__all__ = ["Shown"]


@dataclass(frozen=True)
class Shown:
    """An answer of a run. view: how it is shown; None: only by `repr`."""

    view: RunView | None = field(default=None, repr=False, compare=False, kw_only=True)

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
