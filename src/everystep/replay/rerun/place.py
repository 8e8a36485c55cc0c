"""Where a run is replayed: what differs from the recording, and the environment of such a process."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from typing import Literal

from everystep.errors import ExperimentError, Fault, UsageError
from everystep.numerics import MOST_THREADS, Numerics

__all__ = ["CAPABILITIES", "MKL_BRANCHES", "Place"]

#: What ATEN_CPU_CAPABILITY takes.
CAPABILITIES = ("default", "avx2", "avx512")
#: Dtypes that all floating-point numbers can have.
PRECISIONS = ("float64", "bfloat16")
#: Branches that MKL_CBWR takes, each also with ",STRICT"; "OFF" is MKL's own choice.
MKL_BRANCHES = ("OFF", "AUTO", "COMPATIBLE", "SSE4_2", "AVX", "AVX2", "AVX512")


@dataclass(frozen=True)
class Place:
    """Where a run is replayed; None is as in the recording.

    threads: of torch; capability: instruction set of torch's own kernels; mkl: branch of MKL's
    reproducibility; precision: of all floating-point numbers; python: another interpreter, which has
    its own torch.
    """

    threads: int | None = None
    capability: str | None = None
    mkl: str | None = None
    precision: Literal["float64", "bfloat16"] | None = None
    python: str | None = None

    def check(self) -> None:
        """Check all settings.

        Raises:
            UsageError: nothing differs from the recording.
            ExperimentError: lists every invalid setting, with a fix.
        """
        if self == Place():
            raise UsageError(
                "a rerun needs something that differs from the recording: threads, capability, mkl, "
                "float64, bfloat16 or python (everystep verify replays the run as it was recorded)"
            )
        faults = []
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            faults.append(Fault("threads", f"must be from 1 to {MOST_THREADS:,}, not {self.threads:,}"))
        if self.capability is not None and self.capability not in CAPABILITIES:
            known = ", ".join(CAPABILITIES)
            faults.append(Fault("capability", f"must be one of {known}, not {self.capability!r:.40}"))
        if self.mkl is not None and self.mkl.upper().removesuffix(",STRICT") not in MKL_BRANCHES:
            known = ", ".join(MKL_BRANCHES)
            faults.append(
                Fault("mkl", f"must be one of {known}, or one with ,STRICT, not {self.mkl!r:.40}")
            )
        if self.precision is not None and self.precision not in PRECISIONS:
            known = " or ".join(PRECISIONS)
            faults.append(Fault("precision", f"must be {known}, not {self.precision!r:.40}"))
        if self.python is not None and shutil.which(self.python) is None:
            faults.append(Fault("python", f"{self.python} is not a program that can be run"))
        if faults:
            raise ExperimentError(faults, "the rerun")

    @property
    def interpreter(self) -> str:
        """The interpreter that replays there."""
        return sys.executable if self.python is None else shutil.which(self.python) or self.python

    def environment(self, recorded: Numerics) -> dict[str, str]:
        """Return the variables that make a new process compute there."""
        found = recorded.environment()
        if self.threads is not None:
            found["OMP_NUM_THREADS"] = str(self.threads)
        if self.capability is not None:
            found["ATEN_CPU_CAPABILITY"] = self.capability
        if self.mkl is not None:
            # MKL takes a variable that is empty as one that is not set.
            found["MKL_CBWR"] = "" if self.mkl.upper() == "OFF" else self.mkl.upper()
        return found
