"""A device for torch that is not the CPU, though it computes there (`simulated.cpp`).

torch loads this module by itself in every process that has `path_of` in its PYTHONPATH. The device is
called `simulated`. Its random generator is a CPU's, but not the CPU's.
"""

from __future__ import annotations

import os
import types
from contextlib import nullcontext
from pathlib import Path

__all__ = ["NAME", "load", "path_of"]

NAME = "simulated"
_SOURCE = Path(__file__).with_name("simulated.cpp")
_METADATA = "Metadata-Version: 2.1\nName: simulated\nVersion: 0\n"


def path_of(folder: Path) -> str:
    """Make the device known to torch in processes with this path; return the path."""
    about = folder / "simulated-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(_METADATA)
    (about / "entry_points.txt").write_text(f"[torch.backends]\nsimulated = {__name__}:load\n")
    return os.pathsep.join([str(folder), str(Path(__file__).parents[2])])


def load() -> None:
    """Make the device known to torch here; compiles it first, once for each version of torch."""
    import torch
    from torch.utils import backend_registration, cpp_extension

    extension = cpp_extension.load("simulated", [str(_SOURCE)], extra_cflags=["-O1", "-w"])
    backend_registration.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        device=lambda index: nullcontext(),
        _is_in_bad_fork=lambda: False,
        manual_seed_all=extension.manual_seed,
        get_rng_state=lambda device=None: extension.get_rng_state(),
        set_rng_state=lambda state, device=None: extension.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    torch._register_device_module(NAME, module)  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend()
    extension.register()
