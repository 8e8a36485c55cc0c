"""Why an operation has a different result in another run: which inputs differ, and their origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.answers.operations import (
    Argument,
    OperationDifference,
    OperationPair,
    StepPair,
    TensorDifference,
    memory_of,
    name_in_words,
    tensor_difference,
)
from everystep.errors import NAMED, named
from everystep.ops.operators import draws_random_numbers
from everystep.program.observed import Observed
from everystep.recording.recorded_run import EXPERIMENT_FILE, stretch_at
from everystep.recording.settings_diff import Setting, settings_that_differ
from everystep.recording.texts import number_text, shortest, value_text
from everystep.replay.processes import Opener
from everystep.replay.run_replay import Replay
from everystep.step.state import State, same_bits

__all__ = ["Evidence", "causes_of"]

#: The numbers by which torch's kernels know a reduction.
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_NAMES_OF_REDUCTIONS = {number: name for name, number in _REDUCTIONS.items()}


# The way from a result to a cause, e.g. of `aten.native_dropout` in the forward pass of module 3:
#   another operator there     a setting of the module (eval mode does nothing), or a call of one run
#   another argument           p 0.2 | 0.21: the setting that torch makes this number of
#   another input              the batch (its rows, their order, the data), the state, or NumPy
#   another draw               the seed, or the state of the generator
#   another layout             the same numbers with other strides
#   none of these              the numerics: threads, processor, versions
class Evidence(StepPair):
    """A step of two runs, and everything known about both except its operations.

    names: of the runs; settings: those of both trainings that differ; modules and optimizers: the
    classes of the first run's, by path and by name; numerics: those that differ, as text;
    is_data_drawn: whether the seed decides on the data; is_seeded: whether it decides on everything
    drawn before the first step; unseen: inputs of operations that no program can hold, as text.
    """

    def __init__(self, openers: tuple[Opener, Opener], number: int, numerics: Sequence[str]) -> None:
        super().__init__(openers[0].step(number), openers[1].step(number))
        self._openers = openers
        stretches = [opener.run.stretches for opener in openers]
        self._facts = [each[stretch_at(each, number)].facts for each in stretches]
        self.names = [opener.run.name for opener in openers]
        self.number = number
        self.numerics = numerics
        self.settings = settings_that_differ(*self._facts)
        known = self._facts[0]
        self.modules = {path: each.class_name for path, each in known.modules.items()}
        self.optimizers = {name: each.class_name for name, each in known.optimizers.items()}
        self.has_rows = not any(each.loop for each in self._facts)
        self.unseen = list(dict.fromkeys(text for each in self._facts for text in each.unseen))
        self.is_data_drawn = all(each.data.source == "random" for each in self._facts)
        # An experiment sets its seed before it creates the model; other objects exist already.
        self.is_seeded = all((each.run.directory / EXPERIMENT_FILE).exists() for each in openers)

    @property
    def changed(self) -> list[frozenset[str]]:
        """The tensors that code outside of a step changed just before the step, in both."""
        files = [(o.run, o.run.change_files().get(self.number - 1)) for o in self._openers]
        return [frozenset(run.change(file).tensors if file else ()) for run, file in files]

    @property
    def generators(self) -> list[dict[str, Tensor]]:
        """The states of the random generators that the step draws from, by name, in both."""
        return [opener.call(_generators, self.number) for opener in self._openers]

    @cached_property
    def first_states(self) -> list[State]:
        """State 0 of both."""
        return [opener.state(0) for opener in self._openers]

    @cached_property
    def current(self) -> list[Setting]:
        """The learning rates and other numbers of optimizers that differ at this step."""
        one, other = (step.hyperparameters for step in self.steps)
        return [
            self.of_optimizer(name, (value, other[name]))
            for name, value in one.items()
            if name in other and value != other[name]
        ]

    def of_kind(self, *kinds: str) -> list[Setting]:
        """Return the settings of some kinds."""
        return [each for each in self.settings if each.kind in kinds]

    def of_optimizer(self, name: str, values: tuple[float, float]) -> Setting:
        """Return a setting of an optimizer. name: `lr[1]`; `generator.lr[1]` if it is one of several."""
        prefix, _, rest = name.partition(".")
        is_one_of_several = rest and prefix in self.optimizers
        path, key = (prefix, rest) if is_one_of_several else (next(iter(self.optimizers), ""), name)
        owner = self.optimizers.get(path, "optimizer")
        # A rate may be a float32 tensor: 0.1, not 0.10000000149011612.
        pair = float(shortest(values[0])), float(shortest(values[1]))
        return Setting("optimizer", "" if path == "optimizer" else path, owner, key, pair)

    def of_update(self, module: str | None) -> list[Setting]:
        """Return the settings on which an operation of the update depends, the current numbers first.

        module: of the operation, the name of the optimizer if there are several.
        """
        names = {(each.path, each.name) for each in self.current}
        others = self.of_kind("optimizer", "max_grad_norm")
        found = self.current + [each for each in others if (each.path, each.name) not in names]
        its = (module or "").partition(".")[0]
        if its not in self.optimizers:
            return found
        path = "" if its == "optimizer" else its
        return [each for each in found if each.kind != "optimizer" or each.path == path]

    def schedulers(self) -> list[Setting]:
        """Return what differs in schedulers, unless the numbers that they start from differ."""
        names = {(each.path, each.name) for each in self.of_kind("optimizer")}
        # A scheduler starts from these: where they differ, its rates differ in any case.
        is_start = any((each.path, each.name) in names for each in self.current)
        return [] if is_start else self.of_kind("scheduler")


def _generators(replay: Replay, number: int) -> dict[str, Tensor]:
    """Return the states of the random generators that a step draws from, by name."""
    with replay.in_force(number):
        # In the stretch of the step: the state before it may be the last of another one.
        stepper = replay.go_to(number - 1, replay.stretch_of(number))
        stepper.settle()
        return stepper.generators(number)


def causes_of(found: OperationDifference, evidence: Evidence) -> list[str]:
    """Return why an operation has a different result, as texts."""
    if found.others or not found.is_one_operation:
        return _of_another_operation(found, evidence)
    a = found.sides[0]
    causes = list(_of_arguments(a, found, evidence))
    causes += _of_inputs(found, evidence, is_shape_known=bool(causes))
    if draws_random_numbers(a.operation.resolved):
        causes += _of_draw(evidence)
    if not causes and not found.inputs:
        causes += _of_layout(found, evidence)
    if causes or found.inputs:
        return list(dict.fromkeys(causes))
    why = "; all recorded numerics are the same"
    if evidence.numerics:
        why = f", under different numerics: {', '.join(evidence.numerics)}"
    return [f"the same inputs give different results{why}"]


def _others_text(others: tuple[list[str], ...], evidence: Evidence) -> str:
    """Return the inputs that come from another source. others: as text, of both runs."""
    if others[0] == others[1]:
        return f"another part of {', '.join(dict.fromkeys(others[0]))}"
    texts = [named(list(dict.fromkeys(each))) for each in others]
    if all(texts):
        return f"different inputs: {' | '.join(texts)}"
    ((run, text),) = [each for each in zip(evidence.names, texts, strict=True) if each[1]]
    return f"different inputs: {text} only in {run}"


def _texts(settings: Sequence[Setting | str]) -> list[str]:
    texts = list(dict.fromkeys(map(str, settings)))
    left = len(texts) - NAMED
    return texts[:NAMED] + ([f"{left} more"] if left > 0 else [])


def _one_of(settings: Sequence[Setting]) -> str:
    texts = _texts(settings)
    return "one or more of: " * (len(texts) > 1) + "; ".join(texts)


def _perhaps(settings: Sequence[Setting | str]) -> str:
    return f"; perhaps because of {'; '.join(_texts(settings))}" if settings else ""


def _of_another_operation(found: OperationDifference, evidence: Evidence) -> list[str]:
    """Return the settings that may explain why the operations differ; else what differs."""
    near = [each for side in found.sides for each in _near(side, evidence)]
    modes = _modes(found, evidence)
    # A mode that the loop has changed since the settings were recorded.
    is_changed = "training" in modes.values() and all(each.name != "training" for each in near)
    # What torch's own code does follows from its settings and its mode alone.
    if near and not is_changed and all(each.is_torchs for each in near):
        return [_one_of(near)]
    if not near:
        is_update = all(side.operation.phase == "update" for side in found.sides)
        kinds = ("optimizer",) if is_update else ("model", "parameters", "loss", "part")
        near = evidence.of_kind(*kinds)
    if kept := _kept_gradients(found, evidence):
        return [kept]
    # Without a setting of torch's own code, the calls that only one step has may show the reason.
    what = _others_text(found.others, evidence) if found.others else "another operation"
    known = [what, *_trained(evidence), *modes, *_calls(found, evidence)]
    # Settings of torch decide which operations the same Python runs.
    of_torch = [each for each in evidence.numerics if each.startswith("torch.")]
    return ["; ".join(known) + _perhaps([*near, *of_torch])]


def _modes(found: OperationDifference, evidence: Evidence) -> dict[str, str]:
    """Return differences in the forward pass of the module, such as its mode: arguments by text."""
    texts: dict[str, str] = {}
    for path in sorted({side.operation.module for side in found.sides if side.operation.module}):
        sides = [
            {
                each.operation.operator: each
                for each in step.operations
                if (each.operation.phase, each.operation.module) == ("forward", path)
            }
            for step in evidence.steps
        ]
        owner, runs = evidence.modules.get(path, ""), [bool(side) for side in sides]
        if "Dropout" in owner and runs[0] is not runs[1]:
            only = evidence.names[runs.index(True)]
            text = f"module {path} {owner}, which does nothing in eval mode, computes only in {only}"
            texts[text] = "training"
        # In the order of the step: that of a set would differ from process to process.
        for operator in [each for each in sides[0] if each in sides[1]]:
            one, other = (side[operator] for side in sides)
            arguments = OperationPair(one, other, evidence.sources).arguments
            texts |= {_argument_text(one, each, evidence): each.name for each in arguments}
    return dict(islice(texts.items(), NAMED))


def _kept_gradients(found: OperationDifference, evidence: Evidence) -> str | None:
    """Return which run drops the gradients of the step before, if the other adds to these there."""
    one, other = evidence.steps
    # Those that only one of the two runs drops.
    pending = {f"gradient/{name}" for name in one.dropped.keys() ^ other.dropped.keys()}
    pending &= one.state.keys() & other.state.keys()
    if not pending & {memory_of(name) for side in found.sides for name in side.inputs}:
        return None
    by = 0 if any(name.removeprefix("gradient/") in one.dropped for name in pending) else 1
    return (
        f"zero_grad: {evidence.names[by]} drops the gradients of step {evidence.number - 1:,}, "
        f"and {evidence.names[1 - by]} adds to them"
    )


def _trained(evidence: Evidence) -> Iterator[str]:
    """Yield the parameters of both models that only one step computes gradients of, as text."""
    gradients = [step.gradients for step in evidence.steps]
    if not all(gradients):  # one has no backward pass
        return
    for run, own, others in zip(evidence.names, gradients, gradients[::-1], strict=True):
        only = [name for name in own if name not in others]
        both = [name for name in only if all(f"parameter/{name}" in s.state for s in evidence.steps)]
        if both:
            yield f"only {run} computes the gradient of {named(both)}"


def _calls(found: OperationDifference, evidence: Evidence) -> Iterator[str]:
    """Yield the later operations that only one step has, or has more often, as text.

    The operations of an optimizer that steps in only one of them count as one.
    """
    stepped = [
        {each.operation.module for each in step.operations if each.operation.phase == "update"}
        for step in evidence.steps
    ]
    counts = [
        Counter(
            (_name(each), each.operation.phase)
            # The operations before this one are the same in both.
            for each in step.operations[found.index :]
            if each.operation.phase != "update" or each.operation.module in others
        )
        for step, others in zip(evidence.steps, stepped[::-1], strict=True)
    ]
    for place, run in enumerate(evidence.names):
        more = [
            f"a step of {' '.join(filter(None, (name, evidence.optimizers.get(name or 'optimizer'))))}"
            for name in sorted(stepped[place] - stepped[1 - place], key=str)
        ]
        more += [
            f"{name} ({phase}){f' {count} times' if count > 1 else ''}"
            for (name, phase), count in (counts[place] - counts[1 - place]).items()
        ]
        if more:
            yield f"only {run} has {named(more)}"


def _name(seen: Observed) -> str:
    """Return the name of an operator without its overload."""
    if seen.operation.operator == "aten._to_copy.default":
        given = (seen.operation.keywords.get(name) for name in ("dtype", "memory_format"))
        to = [kind for each in given if isinstance(each, dict) for kind in each.values()]
        return " ".join(["_to_copy to", *(kind for kind in to if kind != "preserve_format")])
    return seen.operation.name


def _of_arguments(a: Observed, found: OperationDifference, evidence: Evidence) -> Iterator[str]:
    """Yield the settings that arguments come from; the arguments too, if the settings do not show it."""
    arguments = evidence.operation(found.index).arguments
    # A number of a setting may also come as a tensor: a constant of the step, or its learning rate.
    numbers = [each for each in found.inputs if _is_number_of_step(each, evidence)]
    pairs = [pair for argument in arguments for pair in _pairs_within(argument.values)]
    pairs += [pair for each in numbers for pair in each.values]
    near = _near(a, evidence)
    known = _explaining(near, pairs)
    own = [each for each in known if each.name in {argument.name for argument in arguments}]
    if pairs:
        # What torch's own code does follows from its settings alone.
        is_sure = bool(near) and all(each.is_torchs for each in near)
        chosen = own or known or near * is_sure
        yield from map(str, chosen) if known or len(chosen) < 2 else [_one_of(chosen)]
        if any(each in evidence.current for each in chosen or near):
            yield from map(str, evidence.schedulers())
        # One that no setting explains may differ for another reason, such as the mode of the module.
        unexplained = [each for each in arguments if not _explaining(near, _pairs_within(each.values))]
        texts = [_argument_text(a, each, evidence) for each in unexplained]
        if not known:
            texts += [
                f"{_called(each.name, evidence)}: {_pair_text(each.values[0])}" for each in numbers
            ]
        if texts and a.operation.phase == "backward":
            texts += _trained(evidence)
        yield from (text + ("" if is_sure else _perhaps(near)) for text in texts)
    elif any(not each.positions for each in found.inputs):  # of another shape or dtype
        yield from (str(each) for each in near if each.kind == "model")


def _is_number_of_step(each: TensorDifference, evidence: Evidence) -> bool:
    """Return whether an input is one number that neither the batch nor the state has."""
    is_known = memory_of(each.name) in evidence.sources[0].known
    return each.of == 1 and bool(each.values) and not is_known


def _near(seen: Observed, evidence: Evidence) -> list[Setting]:
    """Return the settings that differ of what runs an operation: a module, the loss, an optimizer."""
    phase, module = seen.operation.phase, seen.operation.module
    if phase == "update":
        return evidence.of_update(module)
    # Backward of what runs outside of modules is mostly that of the loss.
    is_of_loss = phase == "loss" or (phase == "backward" and module is None)
    found = evidence.of_kind("loss") * is_of_loss
    is_of_model = phase == "forward" or (phase == "backward" and module is not None) or not found
    return found + _of_module(module or "", evidence) * is_of_model


def _of_module(path: str, evidence: Evidence) -> list[Setting]:
    """Return the settings that differ of a module, or of the nearest one of torch's that it is in."""
    own = [each for each in evidence.of_kind("model") if each.path == path]
    if own or not path:
        return own
    around = _of_module(path.rpartition(".")[0], evidence)
    return around if all(each.is_torchs for each in around) else []


def _explaining(settings: list[Setting], pairs: list[tuple[Any, Any]]) -> list[Setting]:
    """Return the settings that explain pairs of arguments; equal ones have precedence."""
    found: list[Setting] = []
    for pair in pairs:
        ranked = [(each, _way_to(each, pair)) for each in settings]
        # The setting itself, before its negative, before 1 minus it: the fewer steps of torch's, the
        # surer.
        best = min((way for _, way in ranked if way is not None), default=None)
        found += [each for each, way in ranked if way is not None and way == best]
    return [each for each in settings if each in found]


def _way_to(setting: Setting, pair: tuple[Any, Any]) -> int | None:
    """Return how torch derives a pair of arguments from a setting, None if unknown."""
    for one, other in _pairs_within(setting.values):
        for way, (x, y) in enumerate(zip(_as_arguments(one), _as_arguments(other), strict=True)):
            if _same_number(pair[0], x) and _same_number(pair[1], y):
                return way
    return None


def _as_arguments(value: Any) -> tuple[Any, Any, Any]:
    """Return arguments that torch may derive: the setting, its negative (a rate), 1 minus it (a p)."""
    if value is None or isinstance(value, str):
        # -1 is what torch passes for no `padding_idx`.
        known = -1 if value is None else _REDUCTIONS.get(value, value)
        return known, value, value
    # e.g. lr 0.1 is alpha=-0.1 of `add_`, and p 0.2 of a dropout is p=0.8 of `bernoulli_`.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value, value, value
    return value, -value, 1 - value


def _pairs_within(values: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    """Return the pairs of values that differ; of two lists of the same length, item by item."""
    lengths = {len(each) for each in values if isinstance(each, list | tuple)}
    if len(lengths) != 1:
        return [values]
    (length,) = lengths
    one, other = (each if isinstance(each, list | tuple) else [each] * length for each in values)
    return [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]


def _same_number(one: Any, other: Any) -> bool:
    """Return whether two values are the same, if need be once they are rounded to float32."""
    # In Python, True equals 1, but a setting that became a number is different.
    if isinstance(one, bool) is not isinstance(other, bool):
        return False
    if isinstance(one, float) and isinstance(other, float):
        # A number beyond float32 becomes infinite, and NumPy would warn.
        with np.errstate(over="ignore"):
            return bool(one == other or np.float32(one) == np.float32(other))
    return bool(one == other)


def _argument_text(seen: Observed, argument: Argument, evidence: Evidence) -> str:
    path = seen.operation.module
    owner = evidence.modules.get(path or "")
    module = f"module {' '.join(filter(None, (path, owner)))}: " if path else ""
    operator = seen.operation.operator.rpartition(".")[0]
    values = argument.values
    if argument.name == "reduction":
        values = tuple(_NAMES_OF_REDUCTIONS.get(value, value) for value in values)
    return f"{module}{argument.name} of {operator} {_pair_text(values)}"


def _pair_text(values: tuple[Any, Any]) -> str:
    return " | ".join(map(value_text, values))


def _called(name: str, evidence: Evidence) -> str:
    """Describe where a tensor comes from, by its name among the arguments in the first run."""
    sources = evidence.sources[0]
    return sources.text(sources.of(name))


def _of_inputs(found: OperationDifference, evidence: Evidence, *, is_shape_known: bool) -> Iterator[str]:
    """Yield where the inputs began to differ: in the batch, in a state, outside of the run."""
    for each in found.inputs:
        name = memory_of(each.name)
        if name in evidence.steps[0].batch.tensors:
            yield from _of_batch(name, found, evidence)
        # The cause of another shape is known already.
        elif is_shape_known and not each.positions:
            continue
        elif name.startswith("group/"):  # a learning rate that is a tensor
            _, place, key = name.split("/", 2)
            key = key if place == "0" else f"{key}[{place}]"
            yield str(evidence.of_optimizer(key, each.values[0]))
        elif name in evidence.steps[0].state:
            yield from _of_state(name, evidence)
        elif (
            not _is_number_of_step(each, evidence) and evidence.sources[0].of(each.name).made_by is None
        ):
            made = "it was made before, or by code that no program records, such as NumPy"
            noted = f" ({', '.join(evidence.unseen)})" if evidence.unseen else ""
            where = _called(each.name, evidence)
            yield f"{where}: {_tensor_text(each._replace(name=''))}; {made}{noted}"


def _of_batch(name: str, found: OperationDifference, evidence: Evidence) -> Iterator[str]:
    """Yield why a tensor of the batch differs: different rows, or different numbers in them."""
    one, other = (step.batch.tensors.get(name) for step in evidence.steps)
    assert one is not None
    if other is not None and same_bits(one, other):  # something wrote into it that no program shows
        return
    difference = tensor_difference(name, one, other)
    of_data = [each for each in evidence.of_kind("data") if each.name not in ("digest", "path")]
    are_same_rows = found.rows and all(a == b for _, a, b in found.rows)
    if difference.positions and are_same_rows and evidence.has_rows:
        set_by = of_data + evidence.of_kind("seed") * evidence.is_data_drawn
        yield from map(str, set_by)
        if not set_by:
            yield f"data: {_cells_text(difference, found)}"
        return
    if found.rows and not evidence.has_rows and all(a != b for _, a, b in found.rows):
        yield f"batch: the same rows of {name} in another order"
        return
    # The seed decides on the order of the rows, not on how many there are.
    by_seed = evidence.of_kind("seed") if difference.positions else []
    set_by = (by_seed or evidence.of_kind("batches")) + of_data
    yield from map(str, set_by)
    if not set_by and difference.positions:
        yield f"batch: {_tensor_text(difference)}"
    elif not set_by:
        yield f"batch: {name} {_tensor_text(difference, one, other)}"


def _cells_text(difference: TensorDifference, found: OperationDifference) -> str:
    """Return which numbers of the data differ: the only one with its values, or their rows."""
    rows = {place: row for place, row, _ in found.rows}
    where = "" if found.rows_of in ("the batch", "the data") else f", rows of {found.rows_of}"
    if difference.elements == 1:
        (place, *rest), values = difference.positions[0], difference.values[0]
        cell = [rows[place], *rest]
        return f"{difference.name}{cell} {' | '.join(map(number_text, values))}{where}"
    count = f"{difference.elements:,} numbers of {difference.name}"
    return f"{count} in row{'s' * (len(rows) > 1)} {named([*rows.values()])}{where}"


def _of_state(name: str, evidence: Evidence) -> Iterator[str]:
    """Yield how a tensor of the state differs, and from which state on."""
    one, other = (step.state.get(name) for step in evidence.steps)
    first = [state.named().get(name) for state in evidence.first_states]
    since = evidence.number - 1
    if first[0] is not None and first[1] is not None and not same_bits(first[0], first[1]):
        # Already state 0 differs, so nothing of later steps is the cause.
        (one, other), since = first, 0
        if evidence.is_seeded and (seeds := evidence.of_kind("seed")):
            yield from map(str, seeds)
            return
    if one is None or (other is not None and same_bits(one, other)):
        return
    changed = [run for run, names in zip(evidence.names, evidence.changed, strict=True) if name in names]
    where = f"; changed outside of a step, after step {since:,}, in {' and '.join(changed)}"
    by = where if changed and since else ""
    difference = tensor_difference(name_in_words(name), one, other)
    if difference.elements == 1 and difference.positions:
        position, values = difference.positions[0], difference.values[0]
        place = str(list(position)) if position else ""
        yield f"{difference.name}{place} of state {since:,}: {' | '.join(map(number_text, values))}{by}"
    else:
        text = _tensor_text(difference._replace(name=""), one, other)
        yield f"{difference.name} of state {since:,}: {text}{by}"


def _of_draw(evidence: Evidence) -> Iterator[str]:
    """Yield why different random numbers are drawn, if the generators differ."""
    one, other = evidence.generators
    # No operation of torch draws from these two.
    names = dict.fromkeys(n for n in (*one, *other) if n not in ("python", "numpy"))
    differing = [n for n in names if n not in one or n not in other or not same_bits(one[n], other[n])]
    if not differing:
        return
    seeds = evidence.of_kind("seed")
    if seeds:
        yield "another random draw: seed {} | {}".format(*seeds[0].values)
    elif any(name.startswith("generator/") for name in differing):  # before one of the step's draws
        where = f"was set to a different state by step {evidence.number:,}"
        yield f"another random draw: torch's generator {where}"
    else:
        first = [state.rest.get("generator/torch") for state in evidence.first_states]
        is_first = first[0] is not None and first[1] is not None and not same_bits(first[0], first[1])
        since = 0 if is_first else evidence.number - 1
        yield f"another random draw: torch's generator differs in state {since:,}"


def _tensor_text(
    difference: TensorDifference, one: Tensor | None = None, other: Tensor | None = None
) -> str:
    if not difference.positions:
        if one is not None and other is not None:
            kinds = (f"{tuple(each.shape)} {each.dtype}" for each in (one, other))
            return " | ".join(kinds).replace("torch.", "")
        return f"{difference.name} of another shape or dtype"
    of = f" of {difference.name}" if difference.name else ""
    size = str(difference.size)
    return f"{difference.elements:,} of {difference.of:,} numbers{of}{f', {size}' if size else ''}"


def _of_layout(found: OperationDifference, evidence: Evidence) -> Iterator[str]:
    """Yield the tensors of the same numbers with another layout in memory, on which bits may depend."""
    own = [*_other_layouts(found.index, evidence)]
    yield from (text for text, _ in own)
    # If the step made all of these, the layout began at the first such input of an earlier operation.
    if own and all(is_made for _, is_made in own):
        earlier = (each for index in range(found.index) for each in _other_layouts(index, evidence))
        yield from islice((text for text, is_made in earlier if not is_made), 1)


def _other_layouts(index: int, evidence: Evidence) -> Iterator[tuple[str, bool]]:
    """Yield the inputs with a different memory layout, as text, and whether the step made them."""
    for name, x, y in evidence.operation(index).inputs:
        if x.stride() != y.stride():
            layouts = f"{_layout_text(x)} | {_layout_text(y)}"
            is_made = evidence.sources[0].of(name).made_by is not None
            yield f"{_called(name, evidence)} in memory: {layouts}", is_made


def _layout_text(tensor: Tensor) -> str:
    """Return the memory layout of a tensor: the name of torch's memory format, or its strides."""
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    for format, dimensions in zip(formats, (tensor.ndim, 4, 5), strict=True):
        if tensor.ndim == dimensions and tensor.is_contiguous(memory_format=format):
            return str(format).removeprefix("torch.").removesuffix("_format")
    return f"strides {tensor.stride()}"
