"""Where the numbers come from: the machine, the numerics in force, and every peer's version."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch

from benchmarks.peers import Peer
from everystep import numerics

__all__ = ["describe"]


def describe(peers: Sequence[Peer], peak: float) -> dict[str, str]:
    """Return what the numbers depend on, by name; `peak` is in operations a second."""
    in_force = numerics.Numerics.read(torch.device("cpu"))
    distributions = dict.fromkeys(name for peer in peers for _, name in peer.packages)
    versions = ", ".join(f"{name} {version(name)}" for name in ["everystep", *distributions])
    return {
        "processor": f"{in_force.processor} ({in_force.architecture}), {_cores()}",
        "threads": f"{in_force.threads} of torch; JAX takes its own",
        "CPU capability": in_force.cpu_capability,
        "torch": in_force.torch_version,
        "MKL": f"reproducibility {in_force.mkl_cbwr}",
        "peak": f"{peak / 1e9:.0f} GFLOP/s, the best of a few square float32 torch.mm",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load before": _load(),
        "versions": versions,
    }


def _cores() -> str:
    """Say how many cores there are, and how many of them this process may use (`taskset`)."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()} cores, {own} for this process"


def _load() -> str:
    """Say how busy the machine was already: other work makes every number worse."""
    if not hasattr(os, "getloadavg"):
        return "unknown"
    return f"{os.getloadavg()[0]:.2f} (average of the last minute)"
