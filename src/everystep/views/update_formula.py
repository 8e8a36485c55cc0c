"""The update of a parameter as a formula, built from the operations that ran.

It has two notations, as in the chapter: operators, `param - param.grad * 0.0001`, and function calls,
`torch.sub(param, torch.mul(param.grad, 0.0001))`. If one kernel does it all (`fused`, or an optimizer
step as a whole), the formula is the one in torch's documentation, if it certainly applies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from everystep.ops.optimizers import FUSED, UPDATES, update
from everystep.program.observed import Observed
from everystep.program.operation import Operation
from everystep.recording.facts import OptimizerFacts
from everystep.recording.texts import optimizers_text
from everystep.views.mathematics import all_arguments, kind_of

__all__ = ["UpdateFormula", "update_formulas"]

#: A longer formula does not help.
LONGEST = 250

_SUM, _PRODUCT, _ATOM = 1, 2, 3
_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


class UpdateFormula(NamedTuple):
    """How a parameter is updated: in operators, and as calls of operations, one line or several.

    numbers: those of the operations in `Step.operations` that do it.
    """

    operators: tuple[str, ...]
    calls: tuple[str, ...]
    numbers: tuple[int, ...]


def update_formulas(
    operations: Sequence[Observed], optimizer: OptimizerFacts
) -> dict[str, UpdateFormula]:
    """Return the formula of each parameter that the operations of phase `update` change.

    optimizer: of the updates with a formula that is too long, or that are one operation.
    """
    composer = _Composer(optimizer)
    for number, seen in enumerate(operations):
        if seen.operation.phase == "update":
            composer.apply(number, seen)
    return composer.formulas()


class _Term(NamedTuple):
    operators: str
    calls: str
    strength: int = _ATOM
    numbers: frozenset[int] = frozenset()
    parameters: frozenset[str] = frozenset()

    def within(self, strength: int) -> str:
        """Return the term as operators; in parentheses, if its surroundings bind more strongly."""
        return self.operators if self.strength >= strength else f"({self.operators})"


# SGD with momentum, operation by operation; a term is kept for each tensor that was written:
#   mul_(momentum_buffer, 0.9)           momentum_buffer * 0.9
#   add_(momentum_buffer, grad)          momentum_buffer * 0.9 + param.grad
#   add_(param, momentum_buffer, -0.1)   param - 0.1 * (momentum_buffer * 0.9 + param.grad)
class _Composer:
    """Expresses each tensor, at the current operation, by the tensors before the update."""

    def __init__(self, optimizer: OptimizerFacts) -> None:
        self._settings = (f"{optimizers_text({'': optimizer})}, as the run began",)
        known = _documented(optimizer) if optimizer.is_torchs else None
        self._documented = known or self._settings
        self._terms: dict[str, _Term] = {}
        self._known: dict[str, UpdateFormula] = {}

    def apply(self, number: int, seen: Observed) -> None:
        kind = kind_of(seen.operation)
        if kind.startswith("fused_"):
            self._as_a_whole(number, seen)
            return
        arguments = {
            key: self._term(value, seen)
            for key, (value, is_given) in all_arguments(seen.operation).items()
            if is_given and key != "out"
        }
        results = [name for name in seen.operation.results if name] or list(seen.results)
        for place, name in enumerate(results):
            base, is_view, _ = name.partition("~")
            # Clipped: from here it is the parameter's gradient. With momentum, it is part of the update.
            if base.startswith("gradient/") and all(
                not tensor.dim() or each.startswith("gradient/") for each, tensor in seen.inputs.items()
            ):
                self._terms.pop(base, None)
                continue
            own = {
                key: value[place] if isinstance(value, list) and place < len(value) else value
                for key, value in arguments.items()
            }
            term = _composed(kind.removeprefix("foreach_"), own)
            # No formula has a view, such as complex numbers as pairs, or a part.
            of = term.parameters | {name} if is_view else term.parameters
            self._terms[base] = term._replace(numbers=term.numbers | {number}, parameters=of)

    def formulas(self) -> dict[str, UpdateFormula]:
        found = dict(self._known)
        for name, term in self._terms.items():
            if name.startswith("parameter/"):
                found[name.partition("/")[2]] = self._formula(name, term)
        return found

    def _formula(self, name: str, term: _Term) -> UpdateFormula:
        numbers = tuple(sorted(term.numbers))
        is_of_itself = term.parameters <= {name.partition("/")[2]}
        if len(term.calls) <= LONGEST and is_of_itself:
            return UpdateFormula((term.operators,), (term.calls,), numbers)
        calls = f"by {len(numbers)} operations"
        return UpdateFormula(
            self._settings if self._decays_now(name) else self._documented, (calls,), numbers
        )

    def _decays_now(self, name: str) -> bool:
        """Return whether the operations decay a parameter, and the documented formula does not."""
        if any(text in line for text in ("weight_decay", "lambd") for line in self._documented):
            return False
        own = f"optimizer/{name.partition('/')[2]}/"
        state = (term.operators for each, term in self._terms.items() if each.startswith(own))
        is_in_state = any(re.search(r"\bparam\b(?!\.)", text) for text in state)
        return is_in_state or "param *" in self._terms[name].operators

    def _as_a_whole(self, number: int, seen: Observed) -> None:
        formula = _of_kernel(seen.operation) or self._documented
        for result in seen.results:
            kind, _, parameter = result.partition("~")[0].partition("/")
            if kind == "parameter":
                self._known[parameter] = UpdateFormula(formula, (seen.operation.operator,), (number,))

    def _term(self, value: Any, seen: Observed) -> Any:
        if isinstance(value, list | tuple):
            return [self._term(item, seen) for item in value]
        if isinstance(value, float):
            return _Term(repr(value), repr(value), _ATOM if value >= 0 else _SUM)
        if not isinstance(value, str):
            text = next(iter(value.values())) if isinstance(value, dict) else value
            return _Term(str(text), str(text))
        base, is_view, _ = value.partition("~")
        kind, _, parameter = base.partition("/")
        if base in self._terms:
            found = self._terms[base]
        elif kind in ("parameter", "gradient", "optimizer"):
            own, _, text = parameter.rpartition("/") if kind == "optimizer" else (parameter, "", "")
            text = text or ("param" if kind == "parameter" else "param.grad")
            found = _Term(text, text, parameters=frozenset([own]))
        else:
            found = _Term(value, value)
        return found._replace(parameters=found.parameters | {value}) if is_view else found


def _composed(kind: str, arguments: dict[str, Any]) -> _Term:
    terms: list[_Term] = [
        term for value in arguments.values() for term in (value if isinstance(value, list) else [value])
    ]
    numbers: frozenset[int] = frozenset().union(*(term.numbers for term in terms))
    of: frozenset[str] = frozenset().union(*(term.parameters for term in terms))
    # A copy is what was copied: the last argument.
    if kind in ("clone", "copy") and terms:
        return terms[-1]._replace(numbers=numbers, parameters=of)
    texts = {key: _text(value, "calls") for key, value in arguments.items()}
    keywords = [f"{key}={texts.pop(key)}" for key in ("alpha", "value") if key in texts]
    calls = f"torch.{kind}({', '.join([*texts.values(), *keywords])})"
    if kind == "neg" and len(terms) == 1:
        return _Term(f"-{terms[0].within(_PRODUCT)}", calls, _SUM, numbers, of)
    sign = _OPERATORS.get(kind)
    left, right, *_ = *arguments.values(), None, None
    if sign is None or not isinstance(left, _Term) or not isinstance(right, _Term):
        inner = ", ".join(_text(value, "operators") for value in arguments.values())
        return _Term(f"{kind}({inner})", calls, _ATOM, numbers, of)
    strength = _PRODUCT if sign in "*/" else _SUM
    # a - (b + c) needs its parentheses, a + (b + c) does not.
    second = right.within(strength + 1 if sign in "-/" else strength)
    alpha = arguments.get("alpha")
    if alpha is not None and alpha.operators not in ("1", "1.0"):
        factor = alpha.operators
        # Adding -0.1 times something is written as subtracting 0.1 times it.
        if factor.startswith("-"):
            sign, factor = ("-" if sign == "+" else "+"), factor[1:]
        second = right.within(_PRODUCT)
        if factor not in ("1", "1.0"):
            second = f"{factor} * {second}"
    return _Term(f"{left.within(strength)} {sign} {second}", calls, strength, numbers, of)


def _text(value: Any, notation: str) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_text(each, notation) for each in value)}]"
    return str(getattr(value, notation))


#: Settings that choose a different algorithm, not a number in it.
_FLAGS = ("amsgrad", "centered", "decoupled_weight_decay", "maximize", "nesterov")


def _documented(optimizer: OptimizerFacts) -> tuple[str, ...] | None:
    """Return the formula of a torch optimizer as in its documentation, None if uncertain."""
    if optimizer.class_name not in UPDATES or not optimizer.groups:
        return None
    flags = [{key: bool(group.get(key)) for key in _FLAGS} for group in optimizer.groups]
    # Param groups of different algorithms have no formula in common.
    if any(each != flags[0] for each in flags):
        return None
    # A number that is 0 in one param group only is in the formula of all.
    used = {key: value for group in optimizer.groups for key, value in group.items() if value}
    if used.get("dampening"):  # its first step has a different formula
        return None
    return _lines(optimizer.class_name, used)


def _of_kernel(operation: Operation) -> tuple[str, ...] | None:
    """Return the formula of a fused optimizer, with the settings that its kernel was called with."""
    known = FUSED.get(operation.name.strip("_"))
    if known is None:
        return None
    given = {key: value for key, (value, _) in all_arguments(operation).items() if value is not None}
    return _lines(known[0], given, is_first=bool(given.get("is_first_step")))


def _lines(optimizer: str, settings: Mapping[str, Any], *, is_first: bool = False) -> tuple[str, ...]:
    """Return what an optimizer assigns, one line after the other."""
    found = update(optimizer, settings, t="t", is_first=is_first)
    written = {text: key for key, text in found.results.items() if text in found.definitions}
    assigned = found.definitions | {
        key: text for key, text in found.results.items() if text not in found.definitions
    }
    # The count of steps gets no line of its own.
    del assigned["t"]

    def renamed(word: re.Match[str]) -> str:
        name = written.get(word[0], word[0])
        return "param.grad" if name == "grad" else name

    lines = {
        written.get(name, name): re.sub(r"\b[a-z]\w*\b", renamed, text).replace(" ^ 2", "²")
        for name, text in assigned.items()
    }
    if [*lines] == ["param"]:
        return (lines["param"],)
    width = max(map(len, lines))
    return tuple(f"{name:{width}} = {text}" for name, text in lines.items())
