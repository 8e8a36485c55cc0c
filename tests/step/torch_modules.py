"""PyTorch's own list of modules with sample inputs (`module_db`), as cases that can be trained.

Importing this without `expecttest`, which the list needs, skips the importing test file, by name.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

pytest.importorskip("expecttest", reason="PyTorch's list of modules needs expecttest: not installed")

# On import, torch's test utilities forbid this process to set flags of torch.backends, and load a
# hypothesis profile of their own (fewer examples): every later test would run under both.
with mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal.common_modules import FunctionInput, ModuleInfo, ModuleInput, module_db
settings.load_profile("everystep")

__all__ = [
    "NOT_TRAINED",
    "WARNINGS",
    "ModuleCase",
    "ModuleWithItsInputs",
    "listed_modules",
    "module_cases",
]

#: The modules of torch's list that have no case: name to reason.
NOT_TRAINED: dict[str, str] = {}

#: What the cases warn of in their steps, to be ignored by `pytest.mark.filterwarnings(*WARNINGS)`.
WARNINGS = ["ignore:reduction. 'mean' divides the total loss:UserWarning"]

#: Modules for which torch's list has logarithms or fractional powers of negative numbers, so that only
#: NaN can come out: they are given the absolute values, and 1 for NaN.
MADE_POSITIVE = {"KLDivLoss", "LPPool1d", "LPPool2d", "LPPool3d"}

#: With this seed every case learns; with others, the one number of ReLU's first sample is negative.
SEED = 1

#: Stands, among the names of what a model holds, for the x that forward is given.
GIVEN = "x"

Made = tuple[nn.Module, Tensor, Tensor, Callable[[Any, Tensor], Tensor]]


@dataclass(frozen=True)
class ModuleCase:
    """A module with one of its samples; the sample's number ends the name, unless it is 0.

    make: returns a model, x, y and the loss; the same numbers at every call.
    """

    name: str
    make: Callable[[], Made]


def module_cases() -> list[ModuleCase]:
    """Return one or two cases of every module in torch's list, but for those in `NOT_TRAINED`."""
    return [
        ModuleCase(f"{name}-{number}" if number else name, partial(make_sample, name, number))
        for name, info in listed_modules().items()
        if name not in NOT_TRAINED
        for number in _chosen(_samples(info))
    ]


def listed_modules() -> dict[str, ModuleInfo]:
    """Return torch's list, by the module's name: `Conv2d`."""
    return {info.name.removeprefix("nn."): info for info in module_db}


class ModuleWithItsInputs(nn.Module):
    """A module and a sample's inputs: `given` is what forward is called with, it holds the others.

    Where the module has no parameters, every number of the given input has a learnable factor, so that
    a step goes backward through the module.
    """

    def __init__(
        self, module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], given: Tensor
    ) -> None:
        super().__init__()
        self.module = module
        # x has rows, even where the module takes a single number.
        self.squeezes = given.dim() == 0
        self.arguments = [
            self._hold(f"argument_{place}", value, given) for place, value in enumerate(arguments)
        ]
        self.named = {name: self._hold(f"named_{name}", value, given) for name, value in named.items()}
        has_parameters = any(True for _ in module.parameters())
        logits = torch.linspace(-1, 1, given.numel()).reshape(given.shape)
        self.logits = None if has_parameters else nn.Parameter(logits)

    def forward(self, x: Tensor) -> Any:
        if self.squeezes:
            x = x.squeeze(0)
        if self.logits is not None:
            # Factors between 0 and 1, whatever is learned, keep x where the module is defined: BCELoss
            # takes numbers from 0 to 1.
            x = x * self.logits.sigmoid()
        arguments = [self._recall(held, x) for held in self.arguments]
        named = {name: self._recall(held, x) for name, held in self.named.items()}
        return self.module(*arguments, **named)

    def _hold(self, name: str, value: Any, given: Tensor) -> Any:
        """Return the name under which `value` is held now; for a tuple (an LSTM's state), the names."""
        if isinstance(value, tuple):
            return tuple(self._hold(f"{name}_{place}", part, given) for place, part in enumerate(value))
        if value is given:
            return GIVEN
        if isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)
        return name

    def _recall(self, held: Any, x: Tensor) -> Any:
        if isinstance(held, tuple):
            return tuple(self._recall(part, x) for part in held)
        return x if held == GIVEN else getattr(self, held)


def norm(prediction: Any, y: Tensor) -> Tensor:
    """Return a loss for any prediction: a norm of all its floating-point numbers together.

    Not their sum of squares itself: for a module that sums over everything, its gradient explodes.
    y: stands for a target, since there must be one; without influence.
    """
    # Starting from 1, since the root has no gradient at 0.
    total = torch.ones((), device=y.device)
    for numbers in _floating_tensors(prediction):
        # The sum of squares of what a normalisation gives is the same for every input: hence weights.
        weights = torch.arange(numbers.numel(), device=numbers.device) % 7 + 1
        total = total + (weights * numbers.flatten().square()).sum()
    return total.sqrt()


def make_sample(name: str, number: int) -> Made:
    """Return a model, x, y and the loss of one of a module's samples; the same numbers at every call."""
    info = listed_modules()[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        warnings.filterwarnings("ignore", "enable_nested_tensor is True, but", UserWarning)
        # A seed of its own for each: one number is positive for ReLU to learn, negative for PReLU.
        torch.manual_seed(SEED + zlib.crc32(info.name.encode()))
        sample = _samples(info)[number]
        construction, inputs = sample.constructor_input, sample.forward_input
        # The random samples of fractional pooling are made in float64, and cast by the tests of torch.
        module = info.module_cls(*construction.args, **construction.kwargs).to(torch.float32)
        if isinstance(module, LazyModuleMixin):
            # Its parameters come to be when it first sees an input.
            with torch.no_grad():
                module(*inputs.args, **inputs.kwargs)
    arguments, named = inputs.args, inputs.kwargs
    if name in MADE_POSITIVE:
        arguments = tuple(tensor.abs().nan_to_num(1) for tensor in arguments)
    tensors = list(_tensors((arguments, named)))
    given = next(iter(_floating_tensors(tensors)), tensors[0])
    x = given.unsqueeze(0) if given.dim() == 0 else given
    model = ModuleWithItsInputs(module, arguments, named, given)
    return model, x, torch.zeros(len(x)), norm


def _samples(info: ModuleInfo) -> list[ModuleInput]:
    options = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": True}
    return info.module_inputs_func(info, **options)


def _chosen(samples: list[ModuleInput]) -> list[int]:
    """Return the number of the first sample, and of one that differs, where there is one.

    In how its module is made, or else in its inputs; of several the largest, since a small one does
    not enter a kernel's vectorised loop.
    """
    made = [_description(sample.constructor_input) for sample in samples]
    called = [_description(sample.forward_input) for sample in samples]
    numbers = range(len(samples))
    others = [n for n in numbers if made[n] != made[0]] or [n for n in numbers if called[n] != called[0]]
    second = max(others, key=lambda number: _size(samples[number].forward_input), default=None)
    return [n for n in numbers if n in (0, second)]


def _description(inputs: FunctionInput) -> str:
    """Return the inputs as text: of a tensor, its type and shape."""

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.shape
        if isinstance(value, tuple | list):
            return [described(part) for part in value]
        return value

    return repr([described(inputs.args), *((name, described(v)) for name, v in inputs.kwargs.items())])


def _size(inputs: FunctionInput) -> int:
    return sum(tensor.numel() for tensor in _tensors((inputs.args, inputs.kwargs)))


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors within tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _floating_tensors(value: Any) -> list[Tensor]:
    """Return those of the tensors that can have a gradient; a complex one as its real view."""
    tensors = [t for t in _tensors(value) if t.is_complex() or t.is_floating_point()]
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
