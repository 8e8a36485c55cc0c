"""What `doctor` finds, as text and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from everystep.recording.database import FILE_NAME
from everystep.recording.health import readable_numbers
from everystep.views.answers import labelled
from everystep.views.output_file import write_file

if TYPE_CHECKING:
    from everystep.replay.doctor import Diagnosis

__all__ = ["diagnosis_data", "diagnosis_text", "export_numbers"]


def diagnosis_text(found: Diagnosis) -> str:
    """Return what is wrong with a run, and what can be read, in lines."""
    lines: list[str] = []
    for finding in found.findings:
        cure = finding.cure.replace("RUN", found.name)
        lines += [labelled("place", finding.place), labelled("problem", finding.problem)]
        lines += [labelled("cure", cure), ""]
    lines += [labelled("readable", "\n".join(found.readable) or "nothing")]
    if found.checked:
        lines.append(labelled("checked", f"{', '.join(found.checked)}, by their digests"))
    return "\n".join([*lines, "", f"{found.name} {'is healthy' if found.is_healthy else 'is damaged'}"])


def export_numbers(directory: Path, file: str | Path) -> None:
    """Write the numbers of a run that can be read as CSV; see `readable_numbers`.

    Raises:
        RunError: the database cannot be opened.
        UsageError: the file cannot be written.
    """
    write_file(file, readable_numbers(directory / FILE_NAME))


def diagnosis_data(found: Diagnosis) -> dict[str, Any]:
    """Return the same as plain data."""
    return {
        "run": found.name,
        "healthy": found.is_healthy,
        "findings": [finding._asdict() for finding in found.findings],
        "readable": list(found.readable),
        "checked": list(found.checked),
    }
