"""What a run holds, as digests, so that two runs are compared bit for bit."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture.trainings import Training
from everystep.errors import RunError
from everystep.recording.database import FILE_NAME
from everystep.recording.texts import shortest
from everystep.run import Run

__all__ = ["content_of", "different", "lost_lines", "state_of"]


def content_of(training: Training, place: Path, verified: bool = True) -> dict[str, Any]:
    """Return the digests of losses, measurements and the last state; and whether the run verifies."""
    run = Run(place)
    facts = run.facts
    losses = run.losses
    measured = run.measurements
    return {
        "status": run.status,
        "steps": len(losses),
        "losses": _digest(losses["loss"].to_numpy().tobytes()),
        "measurements": _digest(measured.write_csv(float_precision=None).encode()),
        "state": state_of(run, len(losses)),
        "nonfinite": facts.nonfinite_step,
        "verified": verified and bool(training.verified(place).is_exact),
        "left over": left_over(place),
    }


def state_of(run: Run, step: int) -> str | None:
    """Return the digest of a state on disk, None if there is none."""
    state = run.state_near(step)
    if state is None or state.step != step:
        return None
    digest = hashlib.sha256()
    tensors = {**state.parameters, **{f"rest/{name}": t for name, t in state.rest.items()}}
    for name in sorted(tensors):
        content = tensors[name].detach().contiguous().reshape(-1)
        digest.update(name.encode())
        digest.update(content.view(torch.uint8).numpy().tobytes() if content.numel() else b"")
    digest.update(json.dumps(state.settings, sort_keys=True).encode())
    return digest.hexdigest()


def left_over(place: Path) -> list[str]:
    """Return temporary files, and snapshots that the database does not have."""
    known = {f"{row.step:06d}" for row in Run(place).snapshot_rows()}
    found = [path.name for path in (place / "snapshots").iterdir() if path.name not in known]
    found += [path.name for path in place.rglob("*") if path.name.endswith((".tmp", "-new"))]
    return sorted(found)


def lost_lines(place: Path, lines: Path, with_report: bool = False) -> dict[str, Any]:
    """Open what a killed process left; return which lines that it printed are not in the run."""
    text = lines.read_text() if lines.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    printed = [line.split("\t") for line in whole.splitlines()]
    if not (place / FILE_NAME).exists():
        return {"opened": True, "begun": False, "lost": len(printed), "steps": 0}
    run = Run(place)
    losses = dict(run.losses.rows())
    summary, status = run.summary(), run.status
    if with_report:
        with suppress(RunError):  # it says why there is none
            str(run.report())
    lost = 0
    for step, loss in printed:
        value = losses.get(int(step))
        lost += value is None or shortest(value) != loss
    return {
        "opened": True,
        "begun": True,
        "lost": lost,
        "steps": summary.steps,
        "status": status,
        "snapshots": run.snapshots,
    }


def different(content: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return what differs from the run that was not interrupted."""
    return [name for name in expected if content.get(name) != expected[name]]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
