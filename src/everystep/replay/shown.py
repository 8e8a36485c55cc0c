"""An answer that a notebook shows as the terminal prints it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

__all__ = ["Shown"]

#: A long answer scrolls, and the colours are those of the notebook.
_STYLE = "overflow: auto; max-height: 40em; line-height: 1.35; background: none"


@dataclass(frozen=True)
class Shown:
    """What a run answers.

    to_text: writes it as the terminal prints it; None: `repr` is all there is.
    """

    to_text: Callable[[], str] | None = field(default=None, repr=False, compare=False, kw_only=True)

    def _repr_html_(self) -> str | None:
        return None if self.to_text is None else f'<pre style="{_STYLE}">{escape(self.to_text())}</pre>'
