"""Everything that needs a GPU, on one: its tests, what can be asked of runs, and what recording costs.

`python -m benchmarks.gpu [--device cuda] [--rounds 3] [--write gpu.md]` prints one page, and writes it.
The exit code is 1 if a test or an answer fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

#: Ends the process where a device is not there.
_NOT_THERE = 2


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, xpu or mps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a file for the page")
    asked = parser.parse_args()
    here = torch.accelerator.current_accelerator()
    if here is None or here.type != torch.device(asked.device).type:
        print(
            f"there is no device {asked.device!r} here: torch finds {here or 'only the CPU'}",
            file=sys.stderr,
        )
        sys.exit(_NOT_THERE)
    parts = {
        "Tests": ["pytest", "-q", "-n0", "-m", "gpu"],
        "What can be asked": ["benchmarks.device", "--device", asked.device],
        "What recording costs": [
            "benchmarks.record",
            "--device",
            asked.device,
            "--rounds",
            str(asked.rounds),
        ],
    }
    text, failed = [_about(asked.device)], False
    print(text[0], flush=True)
    for title, command in parts.items():
        found = subprocess.run(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        failed |= found.returncode != 0
        said = f"`python -m {' '.join(command)}`: exit code {found.returncode}"
        text.append(f"## {title}\n\n{said}\n\n{found.stdout}")
        print(text[-1], flush=True)
    if asked.write is not None:
        asked.write.write_text("\n".join(text))
    sys.exit(failed)


def _about(device: str) -> str:
    module = torch.get_device_module(device)
    name = module.get_device_name() if hasattr(module, "get_device_name") else device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, everystep {version('everystep')}"
    return f"# On {name}\n\n{versions}; {cores} cores\n"


if __name__ == "__main__":
    main()
