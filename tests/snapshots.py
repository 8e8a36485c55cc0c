"""Snapshots at chosen steps, whatever the speed of the machine and its disk."""

from everystep.recording.recorder import Recorder
from everystep.recording.snapshots import SnapshotPlan


def take_snapshots_every(patch, steps):
    """Let trainings take a snapshot after every so many steps, even while one is being written."""
    patch.setattr(SnapshotPlan, "choose_interval", lambda plan, *_: setattr(plan, "interval", steps))
    patch.setattr(Recorder, "is_behind", False)
