"""What `doctor` finds, as text and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everystep.views.answers import labelled

if TYPE_CHECKING:
    from everystep.replay.doctor import Diagnosis
    from everystep.replay.repair import Repaired

__all__ = ["diagnosis_data", "diagnosis_text"]


def diagnosis_text(found: Diagnosis) -> str:
    """Return what is wrong with a run, what can be read, and what a repair brought back, in lines."""
    lines: list[str] = []
    for finding in found.findings:
        cure = finding.cure.replace("RUN", found.name)
        lines += [labelled("place", finding.place), labelled("problem", finding.problem)]
        lines += [labelled("cure", cure), ""]
    lines += [labelled("readable", "\n".join(found.readable) or "nothing")]
    if found.checked:
        lines.append(labelled("checked", f"{', '.join(found.checked)}, by their digests"))
    if found.unchecked:
        what = ", ".join(found.unchecked)
        lines.append(
            labelled("unchecked", f"{what}: everystep verify {found.name} takes each step again")
        )
    if found.repaired is not None:
        lines.append(labelled("repaired", _repaired_text(found.repaired)))
    return "\n".join([*lines, "", f"{found.name} {_verdict(found)}"])


def _verdict(found: Diagnosis) -> str:
    if found.findings:
        return "is damaged"
    return "is sound in what was checked" if found.unchecked else "is healthy"


def diagnosis_data(found: Diagnosis) -> dict[str, Any]:
    """Return the same as plain data."""
    repaired = found.repaired
    return {
        "run": found.name,
        "healthy": found.is_healthy,
        "findings": [finding._asdict() for finding in found.findings],
        "readable": list(found.readable),
        "checked": list(found.checked),
        "unchecked": list(found.unchecked),
        "repaired": repaired
        and {
            "directory": str(repaired.directory),
            "steps": repaired.steps,
            "planned_steps": repaired.planned,
            "taken_again": [list(span) for span in repaired.again],
            "problems": list(repaired.problems),
            "notes": list(repaired.notes),
            "complete": repaired.is_complete,
        },
    }


def _repaired_text(repaired: Repaired) -> str:
    spans = ", ".join(f"{first:,} to {last:,}" for first, last in repaired.again)
    again = [f"steps {spans} taken again by replay"] if spans else []
    kept = f"{repaired.directory}: {repaired.steps:,} of {repaired.planned:,} steps"
    return "\n".join([kept, *again, *repaired.notes, *repaired.problems])
