"""The device: the named one, or the best available."""

from __future__ import annotations

import torch

from everystep.errors import DeviceError, did_you_mean

__all__ = ["available", "select"]


def available() -> list[str]:
    """Return the devices that are there, the best first; `cpu` always is."""
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def select(name: str) -> torch.device:
    """Return the device of that name: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the best.

    Raises:
        DeviceError: the name is unknown, or the device is not available; lists those that are.
    """
    there = available()
    if name == "auto":
        return torch.device(there[0])
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and (kind != "cuda" or not index.isdecimal())):
        is_gpu = kind.lower() in ("gpu", "nvidia", "rocm")
        cure = did_you_mean("cuda" if is_gpu else name, ["auto", "cpu", "cuda", "cuda:0", "mps"])
        raise DeviceError(f"unknown device {name!r}; {cure}".rstrip("; "))
    wanted = f"cuda:{index or 0}" if kind == "cuda" else name
    if wanted not in there:
        raise DeviceError(
            f"device {name!r} is not available; this machine has: {', '.join(there)} (device = "
            '"auto" uses the first)'
        )
    return torch.device(wanted)
