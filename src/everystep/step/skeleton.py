"""The skeleton of a training: its tensors and its optimizer as programs know them, without its code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everystep.errors import ProgramError
from everystep.program.memory import copy_into
from everystep.program.program import Program
from everystep.step.eager import BatchSource, Training
from everystep.step.state import State

__all__ = ["Skeleton", "load_into_skeleton", "make_skeleton"]


class Skeleton(nn.Module):
    """Holds parameters and buffers under their names; cannot be called."""


class _RecordedOptimizer(torch.optim.Optimizer):
    """Param groups and tensors of an optimizer with its step among a program's operations."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        # Not the base's own: it imports torch's compiler, which takes most of a second.
        self.param_groups = groups
        self.state = defaultdict(dict)
        self.defaults = {}


def make_skeleton(
    programs: Sequence[Program],
    state: State,
    batch: BatchSource,
    device: torch.device,
    clip_norm: float | None,
) -> Training:
    """Return a training that programs can be bound to, with the settings of a state but no values yet.

    Args:
        programs: all of the training's; they define its tensors and their layout.
        state: any state of the training, for the settings of its optimizer.
        batch: provides the batch of each step.
        device: where it will run.
        clip_norm: of the training; programs hold the operations.

    Raises:
        ProgramError: the programs and the state do not belong together, or memory is exhausted.
    """
    tensors = _state_tensors(programs, device)
    tied: dict[tuple[Any, ...], nn.Parameter] = {}
    model, loss = Skeleton(), Skeleton()
    for name, tensor in tensors.items():
        kind, _, path = name.partition("/")
        if kind == "parameter" and not path.startswith("#"):
            _register(model, path, _parameter(tensor, tied))
        elif kind == "buffer":
            _register(model, path, tensor, persistent=path in state.parameters)
        elif kind == "loss":
            _register(loss, path, tensor)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        kind, _, path = name.partition("/")
        if kind == "parameter" and path.startswith("#"):
            parameters[path] = _parameter(tensor, tied)
        elif kind == "gradient":
            parameters[path].grad = tensor
    optimizer = _optimizer(programs, state, parameters, tensors)
    return Training(
        model=model,
        loss=loss,
        optimizer=optimizer,
        batch=batch,
        device=device,
        clip_norm=clip_norm,
    )


def load_into_skeleton(training: Training, state: State, *, has_step: bool) -> None:
    """Restore a state in a training that `make_skeleton` returned, and in the random generators.

    has_step: whether a program ends in the step of an optimizer.

    Raises:
        ValueError: it is the state of another training; names the first tensor that does not fit.
    """
    if has_step:
        state.restore(training.model, training.loss, training.optimizer, None, training.device)
        return
    saved = state.named()
    with torch.no_grad():
        for name, tensor in training.named_state().items():
            given = saved.get(name)
            if given is not None and given.shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(given.shape)}, not {tuple(tensor.shape)}")
            if given is not None:
                copy_into(tensor, given)
            elif name.startswith(("optimizer/", "gradient/")):  # the first step makes it
                tensor.zero_()
            else:
                raise ValueError(f"the state has no {name}")
    for group, known in zip(
        training.optimizer.param_groups, state.settings["optimizer"]["groups"], strict=True
    ):
        group.update({k: v for k, v in known.items() if k != "params"})
    state.generators.restore(training.device)


def _state_tensors(programs: Sequence[Program], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of the state by name, on memory that the programs share."""
    sizes: dict[str, int] = {}
    for program in programs:
        for name in program.of_kind("state"):
            sizes[name] = max(sizes.get(name, 0), program.storages[name].bytes)
    hosted = {n for program in programs for n, s in program.storages.items() if s.host}
    try:
        memory = {
            name: torch.zeros(size, dtype=torch.uint8, device="cpu" if name in hosted else device)
            for name, size in sizes.items()
        }
    except RuntimeError as error:
        raise ProgramError(f"not enough memory for the state: {error}") from None
    found: dict[str, Tensor] = {}
    for program in programs:
        for name, spec in program.tensors.items():
            if spec.storage in memory and "~" not in name:
                place = memory[spec.storage].untyped_storage()
                empty = torch.empty(0, dtype=spec.torch_dtype, device=place.device)
                found.setdefault(name, empty.set_(place, spec.offset, spec.shape, spec.stride))
    return found


def _parameter(tensor: Tensor, tied: dict[tuple[Any, ...], nn.Parameter]) -> nn.Parameter:
    """Return the tensor as a parameter; the same one if two names have the same memory."""
    place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.numel() > 0)
    if tensor.numel() == 0 or place not in tied:
        learns = tensor.is_floating_point() or tensor.is_complex()
        tied[place] = nn.Parameter(tensor, requires_grad=learns)
    return tied[place]


def _register(model: nn.Module, path: str, tensor: Tensor, *, persistent: bool = True) -> None:
    *parents, name = path.split(".")
    module = model
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, Skeleton())
        module = module.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor, persistent=persistent)


def _optimizer(
    programs: Sequence[Program],
    state: State,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> torch.optim.Optimizer:
    settings = state.settings["optimizer"]
    unknown = {n for group in settings["groups"] for n in group["params"]} - parameters.keys()
    if unknown:
        raise ProgramError(
            f"the state has the parameter {min(unknown)!r}, which the programs do not have"
        )
    groups = [
        dict(group) | {"params": [parameters[name] for name in group["params"]]}
        for group in settings["groups"]
    ]
    for index, group in enumerate(groups):
        prefix = f"group/{index}/"
        given = {n: t for n, t in state.rest.items() if n.startswith(prefix)}
        own = {n.removeprefix(prefix): tensors.get(n, t.clone()) for n, t in given.items()}
        group.update(own)
    step = next((p.optimizer_step for p in programs if p.optimizer_step is not None), None)
    if step is None:
        kind = type(str(settings["class"]), (_RecordedOptimizer,), {})
        optimizer: torch.optim.Optimizer = kind(groups)
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
                optimizer.state[parameters[parameter]][key] = tensor
        return optimizer
    plain = [{k: v for k, v in g.items() if not isinstance(v, Tensor)} for g in groups]
    kind = getattr(torch.optim, step.name)
    try:
        optimizer = kind(plain)
    except (TypeError, ValueError) as error:
        raise ProgramError(f"the step of {step.name} rejects its settings: {error}") from None
    for made, group in zip(optimizer.param_groups, groups, strict=True):
        made.update({key: value for key, value in group.items() if key != "params"})
    return optimizer
