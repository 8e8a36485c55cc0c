"""The device: the named one, or the best available."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from everystep.errors import DeviceError, did_you_mean

__all__ = [
    "available", "drawing_state", "generator_of", "kinds", "on_cpu", "select", "set_drawing_state",
    "set_generator_of",
]  # fmt: skip


def kinds() -> list[str]:
    """Return the kinds of devices that a name may begin with, available or not."""
    # Whatever torch itself was built with, or a backend that extends it.
    accelerator = torch.accelerator.current_accelerator()
    here = [] if accelerator is None else [accelerator.type]
    return list(dict.fromkeys(["cpu", "cuda", "mps", "xpu", *here]))


def available() -> list[str]:
    """Return the available devices, the best first; `cpu` is always available."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    if accelerator.type == "mps":  # which has one, and no numbers
        return ["mps", "cpu"]
    return [*(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())), "cpu"]


def select(name: str) -> torch.device:
    """Return the device of that name: `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`, or `auto` for the best.

    A backend that extends torch adds its own name.

    Raises:
        DeviceError: the name is unknown, or the device is not available; lists the available ones.
    """
    there = available()
    if name == "auto":
        return torch.device(there[0])
    kind, _, index = name.partition(":")
    has_number = kind not in ("cpu", "mps")
    if kind not in kinds() or (":" in name and not (has_number and index.isdecimal())):
        # Names that people type, which are like none of torch's.
        is_gpu = kind.lower() in ("gpu", "nvidia", "rocm")
        cure = did_you_mean("cuda" if is_gpu else name, ["auto", *kinds(), "cuda:0"])
        raise DeviceError(f"unknown device {name!r}; {cure}".rstrip("; "))
    wanted = f"{kind}:{index or 0}" if has_number else name
    if wanted not in there:
        raise DeviceError(
            f"device {name!r} is not available; this machine has: {', '.join(there)} (device = "
            '"auto" uses the first)'
        )
    return torch.device(wanted)


def generator_of(device: torch.device) -> Tensor | None:
    """Return the state of a device's own generator of random numbers (bytes,) uint8, None on the CPU."""
    if device.type == "cpu":
        return None
    state: Tensor = torch.get_device_module(device).get_rng_state(*_named(device))
    return state


def set_generator_of(device: torch.device, state: Tensor) -> None:
    """Set a device's own generator of random numbers to a state that `generator_of` returned."""
    torch.get_device_module(device).set_rng_state(state, *_named(device))


def _named(device: torch.device) -> list[torch.device]:
    """Return which device a function of its module is for; of mps there is only one."""
    return [] if device.type == "mps" else [device]


def drawing_state(device: torch.device) -> Tensor:
    """Return the states of the generators that torch draws from: the CPU's, then the device's own.

    One after the other (bytes,) uint8.
    """
    state, own = torch.get_rng_state(), generator_of(device)
    return state if own is None else torch.cat([state, own])


def set_drawing_state(device: torch.device, state: Tensor) -> None:
    """Set the generators that torch draws from to what `drawing_state` returned."""
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size])
    if device.type != "cpu" and len(state) > size:
        set_generator_of(device, state[size:].clone())


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make new tensors on the CPU inside, whatever default device the caller has set."""
    # A mode makes every call of torch slower, so it is entered only if it changes something.
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield
