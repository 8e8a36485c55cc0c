"""What bits depend on in addition to the seed: set before torch computes, recorded and compared.

The same program and seed give different bits under another CPU capability, thread count or setting of
the matrix-product library. All of these belong to the process, so everystep sets them early (`prepare`),
holds them during a training (`in_force`), writes them into the run (`Numerics`), and compares them on
replay.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from operator import attrgetter, call
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from everystep.errors import UsageError

if TYPE_CHECKING:
    import ctypes

    import torch

__all__ = ["ENVIRONMENT", "Numerics", "in_effect", "in_force", "prepare", "readers", "warning"]

#: No machine computes one step with more.
MOST_THREADS = 4096

#: Read by the libraries below torch when they first compute.
#:
#: `MKL_CBWR` (Intel's conditional numerical reproducibility) with STRICT makes the bits of a matrix
#: product independent of memory alignment, and on Intel processors of the thread count. AMD processors
#: ignore the requested branch ("auto,STRICT" is read back), and a few products depend on it.
ENVIRONMENT = {
    "MKL_CBWR": "AVX2,STRICT",
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}

#: What `mkl_serv_cbwr_get` returns in its low bits, after MKL's `mkl_types.h`.
_CBWR_BRANCHES = {
    1: "off",
    2: "auto",
    3: "COMPATIBLE",
    4: "SSE2",
    6: "SSSE3",
    7: "SSE4_1",
    8: "SSE4_2",
    9: "AVX",
    10: "AVX2",
    11: "AVX512_MIC",
    12: "AVX512",
    13: "AVX512_MIC_E1",
    14: "AVX512_E1",
}
_CBWR_STRICT = 0x10000

#: Choices of a switch, torch's own first.
_OFF, _ON = (False, True), (True, False)
_PRECISIONS = ("ieee", "tf32", "bf16")
_CUDA = "backends.cuda."

#: Settings of torch that kernels, or the choice among them, depend on, with the values that they take,
#: torch's own first. By attribute; where functions read and set one, by the function that sets it.
_SETTINGS: dict[str, tuple[bool | str, ...]] = {
    "set_float32_matmul_precision": ("highest", "high", "medium"),  # sets others, so it comes first
    "backends.mkldnn.enabled": _ON,
    "backends.mkldnn.deterministic": _OFF,
    "backends.mkldnn.matmul.fp32_precision": _PRECISIONS,
    "backends.mkldnn.conv.fp32_precision": _PRECISIONS,
    "backends.mkldnn.rnn.fp32_precision": _PRECISIONS,
    "backends.nnpack.set_flags": _ON,
    "backends.opt_einsum.enabled": _ON,
    "backends.opt_einsum.strategy": (
        *("auto", "greedy", "optimal", "auto-hq", "eager", "opportunistic", "dp", "dynamic-programming"),
        *("branch-1", "branch-2", "branch-all", "random-greedy", "random-greedy-128"),
    ),
    "backends.mha.set_fastpath_enabled": _ON,
    _CUDA + "enable_flash_sdp": _ON,
    _CUDA + "enable_mem_efficient_sdp": _ON,
    _CUDA + "enable_math_sdp": _ON,
    _CUDA + "allow_fp16_bf16_reduction_math_sdp": _OFF,
}
#: These have an effect only where torch computes on CUDA, and are recorded there.
_SETTINGS_OF_CUDA: dict[str, tuple[bool | str, ...]] = {
    "backends.cudnn.enabled": _ON,
    "backends.cudnn.benchmark": _OFF,
    "backends.cudnn.deterministic": _OFF,
    "backends.cudnn.conv.fp32_precision": ("tf32", "ieee", "bf16"),
    "backends.cudnn.rnn.fp32_precision": ("tf32", "ieee", "bf16"),
    _CUDA + "matmul.fp32_precision": _PRECISIONS,
    _CUDA + "matmul.allow_fp16_accumulation": _OFF,
    _CUDA + "matmul.allow_fp16_reduced_precision_reduction": _ON,
    _CUDA + "matmul.allow_bf16_reduced_precision_reduction": _ON,
    _CUDA + "enable_cudnn_sdp": _ON,
    _CUDA + "preferred_blas_library": ("cublas", "default", "cublaslt", "ck"),
    _CUDA + "preferred_linalg_library": ("default", "cusolver", "magma"),
}
_ALL_SETTINGS = _SETTINGS | _SETTINGS_OF_CUDA
#: What reads a setting that a function sets.
_READERS = {
    "set_float32_matmul_precision": "get_float32_matmul_precision",
    "backends.nnpack.set_flags": "_C._get_nnpack_enabled",  # there is no public one
    "backends.mha.set_fastpath_enabled": "backends.mha.get_fastpath_enabled",
    _CUDA + "enable_flash_sdp": _CUDA + "flash_sdp_enabled",
    _CUDA + "enable_mem_efficient_sdp": _CUDA + "mem_efficient_sdp_enabled",
    _CUDA + "enable_math_sdp": _CUDA + "math_sdp_enabled",
    _CUDA + "enable_cudnn_sdp": _CUDA + "cudnn_sdp_enabled",
    _CUDA + "allow_fp16_bf16_reduction_math_sdp": _CUDA + "fp16_bf16_reduction_math_sdp_allowed",
    _CUDA + "preferred_blas_library": _CUDA + "preferred_blas_library",
    _CUDA + "preferred_linalg_library": _CUDA + "preferred_linalg_library",
}

#: Functions of torch that report how kernels are chosen, e.g. `_get_cudnn_benchmark`,
#: `_get_mkldnn_enabled`.
_SWITCH = re.compile(r"_get_\w*(enabled|deterministic|allow|tf32|benchmark|precision|uninitialized)\w*")
#: What `ATEN_CPU_CAPABILITY` takes, by what torch calls the capability.
_CAPABILITIES = {"AVX512": "avx512", "AVX2": "avx2", "DEFAULT": "default", "NO AVX": "default"}


# When each of these takes effect, and what a replay does where it differs:
#   environment (MKL_CBWR, ...)   read once, when a library first computes: a replay starts a worker
#   capability of the processor   read once by torch, from ATEN_CPU_CAPABILITY: a worker, too
#   threads, settings of torch    at any time: set for the replay, and restored after it
#   processor, torch, device      given: reported, and each loss is compared
class Numerics(BaseModel):
    """Everything that the bits of a run depend on except its experiment, with the values in effect."""

    model_config = ConfigDict(frozen=True, strict=True)

    torch_version: str
    architecture: str
    processor: str
    device: str
    cpu_capability: str
    mkl_cbwr: str
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)]
    deterministic_algorithms: bool
    flush_denormal: bool
    default_dtype: str
    cublas_workspace_config: str
    #: By the attribute or the function that sets each, such as `torch.backends.mkldnn.enabled`.
    settings: dict[str, bool | str] = {}

    @field_validator("settings")
    @classmethod
    def _check(cls, settings: dict[str, bool | str]) -> dict[str, bool | str]:
        # A run may be a stranger's, and these values are set in this process for a replay.
        for unknown in _unknown(settings):
            raise ValueError(unknown)
        return settings

    @classmethod
    def read(cls, device: torch.device) -> Numerics:
        """Read the values in effect in this process for computing on `device`.

        Raises:
            UsageError: a setting has a value that everystep does not know.
        """
        import torch

        known = _values_of(_ALL_SETTINGS if device.type == "cuda" else _SETTINGS)
        # What this torch does not have is not recorded: a later one may.
        settings = {name: value for name, value in known.items() if value is not None}
        if unknown := next(_unknown(settings), None):
            raise UsageError(f"{unknown}, as far as everystep knows; set it to another value")
        return cls(
            torch_version=torch.__version__,
            architecture=platform.machine(),
            processor=_processor(),
            device=_model_of(device),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            mkl_cbwr=_mkl_cbwr(),
            threads=torch.get_num_threads(),
            deterministic_algorithms=torch.are_deterministic_algorithms_enabled(),
            flush_denormal=_flushes_denormals(),
            default_dtype=str(torch.get_default_dtype()).removeprefix("torch."),
            cublas_workspace_config=os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
            settings=settings,
        )

    def environment(self) -> dict[str, str]:
        """Return the environment that makes a new process compute like this, where that can be set."""
        asked = ENVIRONMENT["MKL_CBWR"]
        # On AMD processors, the default is read back as "auto,STRICT". MKL takes "OFF" for "AUTO"; an
        # empty variable counts as not set, and `prepare` leaves it so.
        mkl_cbwr = {"auto,STRICT": asked, "absent": asked, "unknown": asked, "off": ""}.get(
            self.mkl_cbwr, self.mkl_cbwr
        )
        found = ENVIRONMENT | {"MKL_CBWR": mkl_cbwr.upper(), "OMP_NUM_THREADS": str(self.threads)}
        found["CUBLAS_WORKSPACE_CONFIG"] = self.cublas_workspace_config
        if self.cpu_capability in _CAPABILITIES:
            found["ATEN_CPU_CAPABILITY"] = _CAPABILITIES[self.cpu_capability]
        return found

    def needs_other_process(self, other: Numerics) -> bool:
        """Return whether a difference can only be fixed in a new process."""
        # All else can be set in a running process, or cannot be set at all.
        settled = ("cpu_capability", "mkl_cbwr") + ("cublas_workspace_config",) * (self.device != "cpu")
        return any(getattr(self, name) != getattr(other, name) for name in settled)

    def named(self) -> dict[str, Any]:
        """Return all values by name, each setting by its own name."""
        return {name: value for name, value in self if name != "settings"} | self.settings

    def differences(self, other: Numerics) -> dict[str, tuple[Any, Any]]:
        """Return each value that both know and that differs, with the other's.

        Settings of CUDA are left out where both compute on the CPU.
        """
        left_out = {"cublas_workspace_config"} if self.device == other.device == "cpu" else set()
        theirs = other.named()
        pairs = {n: (value, theirs[n]) for n, value in self.named().items() if n in theirs}
        return {n: pair for n, pair in pairs.items() if pair[0] != pair[1] and n not in left_out}


def _unknown(settings: Mapping[str, bool | str]) -> Iterator[str]:
    """Yield in words which settings have a value that is not among their choices."""
    for name, choices in _ALL_SETTINGS.items():
        value = settings.get(f"torch.{name}", choices[0])
        if value not in choices:
            yield f"torch.{name} cannot be {value!r:.40}"


def prepare() -> None:
    """Set the environment that the libraries below torch read when they first compute.

    It keeps what the user has set. It has no effect on a library that already computed: `Numerics` reads
    back and records the values in effect.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def warning() -> str | None:
    """Return a warning for the user, once, if `prepare` came too late for the matrix products."""
    asked = os.environ.get("MKL_CBWR") == ENVIRONMENT["MKL_CBWR"]
    # It was asked for, but MKL had computed before the environment was set.
    if asked and _mkl_cbwr() == "off":
        return next(_too_late, None)
    return None


#: Once in a process: in a notebook, it holds for each of many runs.
_too_late = iter(
    [
        "torch already computed something in this process, so the bits of its runs may depend on the "
        "thread count and on memory alignment; to avoid that, call everystep.numerics.prepare() first, "
        "or start Python with MKL_CBWR=AVX2,STRICT"
    ]
)


def in_effect() -> tuple[Any, ...]:
    """Return settings of this process that bits depend on, read in microseconds, as `readers` has them.

    Two different results mean that a setting changed in between; `Numerics` shows which.
    """
    return tuple(map(call, readers().values()))


@cache
def readers() -> dict[str, Callable[[], Any]]:
    """Return what reads such settings, by name: torch's functions that report how kernels are chosen."""
    import torch

    found = {"number of threads": torch.get_num_threads, "default dtype": torch.get_default_dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 warns, once, of a function that it calls old
        for name in filter(_SWITCH.fullmatch, dir(torch._C)):
            read = getattr(torch._C, name)
            with suppress(TypeError, RuntimeError):  # it wants arguments, or another build
                # It is called once, to see whether it can be.
                read()
                # A precision that was set in the new way has none in the old one.
                may_raise = "precision" in name or "tf32" in name
                found[name] = partial(_value_or_reason, read) if may_raise else read
    return found


def _value_or_reason(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError as error:
        return str(error)


@contextmanager
def in_force(
    threads: int | None = None, recorded: Numerics | None = None, *, suspends_device: bool = False
) -> Iterator[None]:
    """Set deterministic algorithms, unflushed denormals and `threads`; restore them after.

    All of these belong to the process: of trainings in several threads, the last to end restores them.

    recorded: of a recording to be repeated, which may have other values; a setting that this torch does
    not have is left out, and so are its threads.
    suspends_device: make new tensors on the CPU, whatever default device the caller has set; set this
    only if none of the caller's code, which may rely on it, runs inside.

    Raises:
        UsageError: the caller has an active mode that changes what torch functions do, or no machine
            has so many threads.
    """
    import torch

    from everystep.device import on_cpu

    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"threads must be from 1 to {MOST_THREADS:,}, not {threads:,}")
    device = torch.get_default_device()
    if not suspends_device and device.type != "cpu":
        raise UsageError(
            f"the default device is {device} here, but would not be during a replay; call "
            'torch.set_default_device("cpu") before you call everystep, and move the model and the '
            "batches yourself"
        )
    mode = _active_mode()
    if mode is not None:
        raise UsageError(
            f"{mode} is active here, but would not be during a replay; exit it before you call "
            "everystep, or move it into the model's forward or the loss"
        )
    threads_before, dtype_before = torch.get_num_threads(), torch.get_default_dtype()
    with _reproducible(), on_cpu():
        before = _values_of(_ALL_SETTINGS)
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            if recorded is not None:
                if recorded.default_dtype in ("float16", "bfloat16", "float32", "float64"):
                    torch.set_default_dtype(getattr(torch, recorded.default_dtype))
                if not recorded.deterministic_algorithms:
                    torch.set_deterministic_debug_mode("default")
                if recorded.flush_denormal:
                    torch.set_flush_denormal(True)
                _apply(recorded.settings)
            yield
        finally:
            _apply(before)
            torch.set_num_threads(threads_before)
            torch.set_default_dtype(dtype_before)


def _apply(settings: Mapping[str, bool | str | None]) -> None:
    """Set what differs, of the settings that this torch has."""
    import torch

    for name in _ALL_SETTINGS:
        value, now = settings.get(f"torch.{name}"), _setting(name)
        # What is already so is not set: the setter of one sets others, too.
        if value is None or now is None or value == now:
            continue
        # This torch may be built without a library; reading the settings then shows the difference.
        with suppress(RuntimeError, ValueError):
            # A setting of torch is an attribute, or has a function that sets it and another that reads
            # it.
            if name in _READERS:
                attrgetter(name)(torch)(value)
            else:
                place, _, attribute = name.rpartition(".")
                setattr(attrgetter(place)(torch), attribute, value)


def _values_of(names: Iterable[str]) -> dict[str, bool | str | None]:
    """Return the values of settings, as a run has them."""
    return {f"torch.{name}": _setting(name) for name in names}


def _setting(name: str) -> bool | str | None:
    """Return the value of a setting; None if this torch does not have it, or refuses to read it."""
    import torch

    try:
        with warnings.catch_warnings():
            # torch 2.9 with CUDA warns about reading a precision, and later versions do not.
            warnings.simplefilter("ignore")
            value: Any = attrgetter(_READERS.get(name, name))(torch)
            value = value() if name in _READERS else value
    except (AttributeError, RuntimeError):  # precisions were set both in the old and in the new way
        return None
    if isinstance(value, tuple):  # whether it reduces in lower precision, and whether it splits sums
        value = value[0]
    if value is None or isinstance(value, bool):
        return value
    text = str(value).rpartition(".")[2].lower()  # of an enumeration, such as `_BlasBackend.Cublas`
    return "ieee" if text == "none" else text  # the default of a library


def _active_mode() -> str | None:
    """Return the caller's active mode that changes what torch functions do, or None."""
    import torch
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    from everystep.device import kinds

    if any(map(torch.is_autocast_enabled, kinds())):
        return "torch.autocast"
    if torch.is_inference_mode_enabled():
        return "torch.inference_mode"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode"
    for mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        # A default device is such a mode, too; `in_force` knows what to do with it.
        if type(mode) is not DeviceContext:
            return f"a TorchFunctionMode ({type(mode).__name__})"
    return None


_lock = threading.Lock()
#: For each training under way in this process, the settings of torch as it began: the first are the
#: caller's.
_before: list[tuple[int, bool, bool]] = []


@contextmanager
def _reproducible() -> Iterator[None]:
    """Set what belongs to the process; the last of several trainings restores it."""
    import torch
    import torch.utils.deterministic as settings

    with _lock:
        fill = settings.fill_uninitialized_memory  # type: ignore[attr-defined]
        _before.append((torch.get_deterministic_debug_mode(), fill, _flushes_denormals()))
        # Only the first sets, and only the last restores: a training that ends must not change
        # another's.
        if len(_before) == 1:
            # The same as use_deterministic_algorithms(True, warn_only=True), which imports the compiler.
            torch.set_deterministic_debug_mode("warn")
            # With deterministic algorithms, torch would fill all new memory with NaN, which takes time.
            settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            torch.set_flush_denormal(False)
    try:
        yield
    finally:
        with _lock:
            mode, fill, flush = _before.pop()
            if not _before:
                torch.set_deterministic_debug_mode(mode)
                settings.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
                torch.set_flush_denormal(flush)


def _flushes_denormals() -> bool:
    """Find out by computing: torch has a setter for it but no getter."""
    import torch

    # 1e-39 is a denormal number of float32.
    return (torch.tensor([1e-39], device="cpu") * 1).item() == 0


def _mkl_cbwr() -> str:
    """Return MKL's reproducibility mode in effect: 'AVX2,STRICT', 'off', ..., or 'absent'."""
    import torch

    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return "absent"
    library = _torch_cpu_library()
    get = getattr(library, "mkl_serv_cbwr_get", None) if library else None
    if get is None:
        return "unknown"
    # -1 is MKL_CBWR_ALL: it asks for the branch and its flags.
    value = int(get(-1))
    branch = value & ~_CBWR_STRICT
    name = _CBWR_BRANCHES.get(branch, str(branch))
    return f"{name},STRICT" if value & _CBWR_STRICT else name


@cache
def _torch_cpu_library() -> ctypes.CDLL | None:
    import ctypes

    import torch

    # MKL is linked into this library, so its functions are found there.
    suffix = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / suffix))
    except OSError:
        return None


def _model_of(device: torch.device) -> str:
    """Return the model of a device, or its kind if the model is not known."""
    import torch

    if device.type == "cpu":
        return "cpu"
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name is None else str(name(device))


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
