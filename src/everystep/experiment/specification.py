"""An experiment as data: from TOML to validated, frozen models, and back.

Imports no torch; `load` does, to check the names of layers, losses and optimizers.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from everystep.bounded import MOST_STEPS, StrictModel, read_regular
from everystep.errors import ExperimentError, Fault, did_you_mean, rephrased, short_text

__all__ = [
    "ArrayData",
    "BundledData",
    "DataSpecification",
    "Experiment",
    "ImagesData",
    "Iteration",
    "Loss",
    "Model",
    "RandomData",
    "TableData",
    "built_in",
    "check_iteration",
    "load",
    "parse",
    "parse_setting",
]

#: Bytes of an experiment's file, and dots in one line of it: reading a dotted key takes time that grows
#: with the square of its parts.
LARGEST, _MOST_DOTS = 1_000_000, 1_000

#: The height or the width of an image.
Pixels = Annotated[int, Field(ge=1, le=10_000)]

BundledName = Literal["digits", "diabetes", "wine", "iris", "breast_cancer"]


# An experiment passes through these forms:
#   TOML or a dict       {"optimizer": {"name": "SGD", "lr": 0.1}, "steps": 500, ...}
#   with settings        {"optimizer.lr": 1e-3} puts a value into the dict, by path
#   Experiment           validated: Optimizer(name="SGD", lr=0.1); all faults are reported at once
#   TOML in the run      written with all defaults, and with absolute paths
class NamedSection(StrictModel):
    """A torch class by name; the other keys are its keyword arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the class."""
        return dict(self.model_extra or {})


class DataSpecification(StrictModel):
    """The keys of every data source."""

    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    scale: Literal["standard"] | None = None

    @property
    def file_keys(self) -> tuple[str, ...]:
        """The keys that name the files that the data is in: the path, or that of each array."""
        if getattr(self, "path", None) is not None:
            return ("path",)
        return tuple(key for key in ("x", "y") if hasattr(self, key))

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the data is in."""
        return tuple(getattr(self, key) for key in self.file_keys)


class RandomData(DataSpecification):
    """The chapter's data: x (N, D_in), then y (N, D_out), from the standard normal distribution."""

    source: Literal["random"]
    N: PositiveInt
    D_in: PositiveInt
    D_out: PositiveInt


class BundledData(DataSpecification):
    """A real data set that comes with everystep."""

    source: Literal["bundled"]
    name: BundledName


class TableData(DataSpecification):
    """A CSV, TSV, Parquet or Arrow file. A relative path is relative to the experiment's file."""

    source: Literal["table"]
    path: str
    target: str | Annotated[list[str], Field(min_length=1)]
    features: Annotated[list[str], Field(min_length=1)] | None = None
    missing: Literal["error", "drop", "mean"] = "error"
    unseen: Literal["error", "zeros"] = "error"
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None


class ImagesData(DataSpecification):
    """A directory of images, with a subdirectory for each class."""

    source: Literal["images"]
    path: str
    size: Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None
    grayscale: bool = False


class ArrayData(DataSpecification):
    """Arrays: two .npy files, or two names within one .npz or .safetensors file (`path`)."""

    source: Literal["arrays"]
    path: str | None = None
    x: str = "x"
    y: str = "y"


class Model(StrictModel):
    """The model: the layers of an `nn.Sequential`, each written as in Python."""

    layers: Annotated[list[str], Field(min_length=1)]


class Loss(NamedSection):
    """A loss of `torch.nn`."""


class Optimizer(NamedSection):
    """`GradientDescent`, or an optimizer of `torch.optim`."""


class Scheduler(NamedSection):
    """A scheduler of `torch.optim.lr_scheduler`, advanced every step or every epoch."""

    every: Literal["step", "epoch"] = "step"


Steps = Annotated[int, Field(ge=0, le=MOST_STEPS)]


class Iteration(StrictModel):
    """How to iterate: what experiment files and the arguments of `train` share."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    device: str | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    steps: Steps | None = None
    epochs: Steps | None = None
    batch_size: PositiveInt | None = None
    drop_last: bool = False
    evaluate_every: PositiveInt | None = None
    max_grad_norm: PositiveFloat | None = None
    stop_on_nan: bool = False
    engine: Literal["auto", "program", "eager"] = "auto"

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise PydanticCustomError("steps", "set either steps or epochs, not both or neither")
        return self


class Experiment(Iteration):
    """Everything that determines a run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "cpu"
    metrics: Annotated[list[str], Field(min_length=1)] | None = None
    data: Annotated[
        RandomData | BundledData | TableData | ImagesData | ArrayData, Field(discriminator="source")
    ]
    model: Model
    loss: Loss
    optimizer: Optimizer
    scheduler: Scheduler | None = None

    def with_fused(self, device: str) -> Experiment:
        """Return the experiment with `fused = true` if the optimizer supports it and nothing is set.

        device: its kind.
        """
        from everystep.experiment.catalogue import keyword_parameters

        optimizer = self.optimizer
        # torch's fused, foreach and for-loop implementations differ in their last bits, and the default
        # differs by device: so the experiment records which one it uses. torch has fused kernels of all
        # but one optimizer on every kind of device.
        is_chosen = {"fused", "foreach", "differentiable"} & optimizer.keywords.keys()
        has_it = "fused" in keyword_parameters("optimizer", optimizer.name)
        if is_chosen or not has_it or (optimizer.name == "Adagrad" and device != "cpu"):
            return self
        return self.model_copy(update={"optimizer": optimizer.model_copy(update={"fused": True})})

    def to_toml(self) -> str:
        """Write the experiment as TOML that `load` reads back to an equal one."""
        # With the defaults: those of a later version may differ.
        return tomli_w.dumps(self.model_dump(exclude_none=True, exclude_defaults=False))


def check_iteration(**arguments: Any) -> Iteration:
    """Return the checked arguments of `train`; raise ExperimentError, which lists every fault."""
    arguments = _copied(arguments)
    try:
        return Iteration.model_validate(arguments)
    except ValidationError as error:
        raise ExperimentError([_fault(detail, arguments) for detail in error.errors()]) from None


#: The built-in experiments, and their data.
_BUILT_IN = Path(__file__).parent / "builtin"


def built_in() -> dict[str, Path]:
    """Return the built-in experiments: name to file."""
    return {path.stem: path for path in sorted(_BUILT_IN.glob("*.toml"))}


def load(
    source: str | Path | Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> Experiment:
    """Read an experiment, apply `settings`, and check all of it, including names and arguments.

    Args:
        source: the name of a built-in experiment, the path of a TOML file, or its content as a dict.
        settings: values to override, by path: `{"optimizer.lr": 1e-3, "model.layers[1]": "Tanh()"}`.
            None removes a value. Setting one of steps and epochs removes the other.

    Raises:
        ExperimentError: lists every error with its location and a fix.
    """
    raw, where, folder = _read(source)
    for path, value in (settings or {}).items():
        _override(raw, path, _copied(value))
    faults: dict[str, Fault] = {}
    try:
        experiment = Experiment.model_validate(raw)
    except ValidationError as error:
        # By path: a value that fits no branch of a union has a fault of each.
        faults = {fault.path: fault for fault in (_fault(each, raw) for each in error.errors())}

    from everystep.experiment.catalogue import names_faults

    # Names are looked up in what was written, so that their faults are reported together with the
    # others.
    of_names = [fault for fault in names_faults(raw) if fault.path not in faults]
    if faults or of_names:
        raise ExperimentError([*faults.values(), *of_names], where)
    # Absolute paths of the data, so that the experiment works from anywhere.
    data = experiment.data
    changes = {key: _absolute(getattr(data, key), folder) for key in data.file_keys}
    return experiment.model_copy(update={"data": data.model_copy(update=changes)})


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `optimizer.lr=1e-3`; the value is TOML, or a bare string.

    Raises:
        ExperimentError: there is no `=`, or no path before it.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ExperimentError([Fault(text, "write a setting as path=value: optimizer.lr=1e-3")])
    try:
        return path.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return path.strip(), value.strip()


def parse(content: bytes, where: str) -> dict[str, Any]:
    """Return the unchecked content of an experiment's file.

    where: the file, for messages.

    Raises:
        ExperimentError: it is not TOML, or too large.
    """
    if len(content) > LARGEST:
        raise ExperimentError(f"{where} has more than {LARGEST:,} bytes, too many for an experiment")
    if max(line.count(b".") for line in content.split(b"\n")) > _MOST_DOTS:
        raise ExperimentError(
            f"{where} has a line with more than {_MOST_DOTS:,} dots; write long lists on several lines"
        )
    try:
        return tomllib.loads(content.decode("utf-8-sig"))  # editors may begin it with a byte order mark
    except UnicodeDecodeError:
        raise ExperimentError(f"{where} is not UTF-8 text") from None
    except RecursionError:
        raise ExperimentError(f"{where} is nested too deep") from None
    except ValueError as error:  # of an integer with thousands of digits, too
        raise ExperimentError(f"{where} is not valid TOML: {error!s:.300}") from None


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str, Path]:
    """Return the content of an experiment, its name for messages, and the folder of its file."""
    # A copy, since settings are put into it.
    if isinstance(source, Mapping):
        return _copied(source), "the experiment", Path.cwd()
    path, where = Path(source), str(source)
    if isinstance(source, str) and source in built_in():
        path, where = built_in()[source], f"experiment {source}"
    try:
        content = read_regular(path, LARGEST)
    except (FileNotFoundError, ValueError):  # a NUL in it
        cure = did_you_mean(where, list(built_in())) or "run `everystep experiments` to list those"
        raise ExperimentError(
            f"{where!r:.200} is neither a file nor a built-in experiment; {cure}"
        ) from None
    except OSError as error:
        raise ExperimentError(f"{where:.200} cannot be read: {error.strerror}") from None
    return parse(content, where), where, path.parent


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value  # numbers and arrays of NumPy or torch


def _override(raw: dict[str, Any], path: str, value: Any) -> None:
    keys: list[str | int] = [
        # `model.layers[1]` becomes "model", "layers", 1.
        int(index) if index else name
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)
    ]
    place: Any = raw
    # A path of dots alone has no key; it is refused as an index at the top is.
    for key, following in pairwise([*(keys or [0]), None]):
        is_item = isinstance(place, list) and isinstance(key, int) and key < len(place)
        if not is_item and not (isinstance(place, dict) and isinstance(key, str)):
            raise ExperimentError([Fault(path, "the experiment has no such key or index")])
        if following is not None and is_item:
            place = place[key]
        elif following is not None:
            # A section that is not there yet is made, so that a setting can add one.
            place = place.setdefault(key, [] if isinstance(following, int) else {})
        elif value is None and not is_item:
            place.pop(key, None)
        else:
            place[key] = value
    if path in ("steps", "epochs") and value is not None:
        raw.pop("epochs" if path == "steps" else "steps", None)


def _absolute(path: str, folder: Path) -> str:
    # A built-in experiment that was copied still finds its data, which lies next to the original.
    found = (folder / Path(path).expanduser()).resolve()
    bundled = _BUILT_IN / path
    return str(bundled if not found.exists() and bundled.is_file() else found)


def _fault(detail: ErrorDetails, raw: Mapping[str, Any]) -> Fault:
    """Convert an error of pydantic to one of everystep."""
    location = [*detail["loc"]]
    # Without what pydantic inserts: the source of the data, and the branch of a target.
    if location[:1] == ["data"] and location[1:2] and location[1] in _DATA:
        del location[1]
    if location[:2] == ["data", "target"]:
        del location[2:]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    key = str(location[-1]) if location else ""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            problem = f"is missing; {_CURES.get(path, f'add {key} = ...')}"
        case "union_tag_not_found":
            path, problem = f"{path}.source", f"is missing; known here: {', '.join(_SOURCES)}"
        case "union_tag_invalid":
            tag = str(context["tag"])
            path = f"{path}.source"
            problem = f"{tag!r} is not a data source; {did_you_mean(tag, _SOURCES)}"
        case "extra_forbidden":
            cure = f"{key} belongs at the top of the file, before the first [section]"
            # A key of the top that follows a section belongs to that section in TOML, which is easily
            # missed.
            if len(location) == 1 or key not in Experiment.model_fields:
                cure = did_you_mean(key, _known_keys(location[0] if location[1:] else None, raw))
            problem = f"unknown key; {cure}".removesuffix("; ")
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", str(context["expected"]))
            problem = f"{detail['input']!r} is not supported; use one of {', '.join(allowed)}"
        case "too_short":
            problem = f"must have at least {context['min_length']} item"
            problem += "s" * (context["min_length"] > 1)
        case "model_type" | "model_attributes_type" | "dict_type":
            problem = f"must be a section [{path}], not {detail['input']!r}"
        case _:
            # Of the whole experiment, all values would follow.
            given = f", not {short_text(detail['input'])}" if location else ""
            problem = f"{rephrased(detail['msg'])}{given}"
    return Fault(path, problem)


_DATA: dict[str, type[StrictModel]] = {
    "random": RandomData,
    "bundled": BundledData,
    "table": TableData,
    "images": ImagesData,
    "arrays": ArrayData,
}
_SOURCES = list(_DATA)
_CURES = {
    "data": 'add [data] with source = "random", "bundled", "table", "images" or "arrays"',
    "model": 'add [model] with layers = ["Linear(1000, 100)", ...]',
    "loss": 'add [loss] with name = "MSELoss"',
    "optimizer": 'add [optimizer] with name = "GradientDescent" and lr = 1e-4',
}


def _known_keys(section: str | int | None, raw: Mapping[str, Any]) -> dict[str, str]:
    """Return how to write each key of a section; at the top (None), of sections too."""
    source = data.get("source") if isinstance(data := raw.get("data"), Mapping) else None
    of_data = _DATA[source].model_fields if isinstance(source, str) and source in _DATA else ()
    if section is not None:
        known = {"data": of_data, "model": Model.model_fields, "scheduler": Scheduler.model_fields}
        return {key: key for key in known[str(section)]}
    inner = {"data": of_data, "model": ["layers"], "scheduler": ["every"], "optimizer": ["lr"]}
    found = {key: f"{name}.{key}" for name, keys in inner.items() for key in keys}
    return found | {"learning_rate": "optimizer.lr"} | {key: key for key in Experiment.model_fields}
