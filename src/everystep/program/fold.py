"""Fold: an equivalent program with fewer operations that rounds differently.

A plain update multiplies a gradient by a number and subtracts it from its parameter. If a matrix product
made that gradient, both become one product that adds to the parameter (`addmm_`); if a sum over rows
made it, one product with a vector of ones (`addmv_`); otherwise, one `add_` with a factor. The operation
that made the gradient stays in the program, marked as derived: it runs only when someone opens the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from everystep.program.program import Operation, Program, Storage, TensorSpec, hyperparameter

__all__ = ["fold_updates"]


def fold_updates(program: Program, rates: Mapping[int, float]) -> Program:
    """Return the program with plain gradient updates folded into what computes the gradients.

    Args:
        program: of a step with the update `parameter - gradient * lr`, or SGD without momentum; any
            other program is returned unchanged.
        rates: the lr of each param group, which must be the same at every step.
    """
    return _Folding(program, rates).folded()


@dataclass(frozen=True)
class _Update:
    """`parameter -= gradient * lr`, by the operations at these places."""

    parameter: str
    gradient: str
    factor: float
    places: tuple[int, ...]


@dataclass
class _Folding:
    program: Program
    rates: Mapping[int, float]
    storages: dict[str, Storage] = field(init=False)
    tensors: dict[str, TensorSpec] = field(init=False)
    once: list[Operation] = field(init=False)

    def __post_init__(self) -> None:
        self.storages = dict(self.program.storages)
        self.tensors = dict(self.program.tensors)
        self.once = list(self.program.once)

    def folded(self) -> Program:
        """Return the new program."""
        operations: list[Operation | None] = list(self.program.operations)
        updates = list(self._updates())
        if not updates:
            return self.program
        for update in updates:
            maker = self._maker(update)
            new = None if maker is None else self._accumulating(update, operations[maker])
            if new is not None and maker is not None:
                derived = self.program.operations[maker]
                operations[maker] = derived.model_copy(update={"derived": True})
            *others, last = update.places
            operations[last] = new or _added(update)
            for place in others:
                operations[place] = None
        kept = tuple(each for each in operations if each is not None)
        used = {n for o in (*self.once, *kept) for n in (*o.reads(), *o.results) if n}
        used |= {*filter(None, (self.program.loss, *self.program.gradients.values()))}
        used |= {n for names in self.program.activations.values() for n in names}
        tensors = {
            name: spec
            for name, spec in self.tensors.items()
            if name in used or self.storages[spec.storage].kind in ("state", "input")
        }
        on = {spec.storage for spec in tensors.values()}
        changes = {
            "storages": {name: storage for name, storage in self.storages.items() if name in on},
            "tensors": tensors,
            "once": tuple(self.once),
            "operations": kept,
        }
        return Program.model_validate(self.program.model_dump() | changes)

    def _updates(self) -> Iterable[_Update]:
        """Yield the plain updates of the program."""
        operations = self.program.operations
        for place, operation in enumerate(operations):
            if operation.phase != "update":
                continue
            if operation.operator == "aten.sub_.Tensor" and place and not operation.keywords:
                parameter, product = operation.arguments
                before = operations[place - 1]
                if before.operator == "aten.mul.Tensor" and before.results == (product,):
                    gradient, lr = before.arguments
                    group = self._group(lr)
                    if group is not None and self._is_gradient(gradient):
                        yield _Update(parameter, gradient, -self.rates[group], (place - 1, place))
            elif operation.operator == "aten.add_.Tensor" and "alpha" in operation.keywords:
                parameter, gradient = operation.arguments
                if self._is_gradient(gradient):
                    yield _Update(parameter, gradient, operation.keywords["alpha"], (place,))

    def _group(self, lr: object) -> int | None:
        for group in self.rates:
            if lr in [hyperparameter("lr", group, dtype) for dtype in ("float32", "float64")]:
                return group
        return None

    def _is_gradient(self, name: object) -> bool:
        return name in self.program.gradients.values()

    def _maker(self, update: _Update) -> int | None:
        """Return the place of the operation that makes the gradient, if nothing else uses the gradient.

        Its inputs must be the same at the update as they were then.
        """
        storage = self.program.tensors[update.gradient].storage
        makers = []
        for place, operation in enumerate(self.program.operations):
            results = {self._storage(name) for name in operation.results if name}
            if storage in results and place not in update.places:
                makers.append(place)
            elif place not in update.places and storage in map(self._storage, operation.reads()):
                return None
        if len(makers) != 1:
            return None
        reads = set(map(self._storage, self.program.operations[makers[0]].reads()))
        between = self.program.operations[makers[0] + 1 : update.places[-1]]
        written = {self._storage(name) for o in between for name in (*o.results, *o.written()) if name}
        return None if reads & written else makers[0]

    def _storage(self, tensor: str) -> str:
        return self.program.tensors[tensor].storage

    def _accumulating(self, update: _Update, maker: Operation | None) -> Operation | None:
        """Return the product that adds to the parameter, if the gradient is a product or a sum."""
        if maker is None or maker.keywords:
            return None
        target = self._view_of_parameter(update, maker)
        if target is None:
            return None
        if maker.operator == "aten.mm.default":
            return _operation("aten.addmm_.default", target, list(maker.arguments), update)
        if maker.operator == "aten.sum.dim_IntList":
            rows, dimensions = maker.arguments[:2]
            spec = self.tensors[rows]
            if len(spec.shape) == 2 and dimensions == [0] and spec.torch_dtype.is_floating_point:
                vector = self._flat(target)
                arguments = [self._transposed(rows), self._ones(spec)]
                return _operation("aten.addmv_.default", vector, arguments, update)
        return None

    def _view_of_parameter(self, update: _Update, maker: Operation) -> str | None:
        """Return the parameter in the shape in which the operation returns the gradient."""
        parameter, gradient = self.tensors[update.parameter], self.tensors[update.gradient]
        (result,) = maker.results
        made = self.tensors[result or ""]
        if (parameter.stride, parameter.shape) != (gradient.stride, gradient.shape) or (
            made.offset != gradient.offset
        ):
            return None
        return self._add(parameter.model_copy(update={"shape": made.shape, "stride": made.stride}))

    def _flat(self, name: str) -> str:
        spec = self.tensors[name]
        return self._add(spec.model_copy(update={"shape": (max(spec.shape),), "stride": (1,)}))

    def _transposed(self, name: str) -> str:
        spec = self.tensors[name]
        return self._add(
            spec.model_copy(update={"shape": spec.shape[::-1], "stride": spec.stride[::-1]})
        )

    def _ones(self, like: TensorSpec) -> str:
        """Return a vector of ones, one for each row."""
        rows = like.shape[0]
        name = f"ones/{rows}/{like.dtype}"
        if name not in self.tensors:
            self.storages[name] = Storage(kind="temporary", bytes=rows * like.torch_dtype.itemsize)
            self.tensors[name] = TensorSpec(storage=name, dtype=like.dtype, shape=(rows,), stride=(1,))
            self.once.append(
                Operation(
                    phase="update",
                    operator="aten.ones.default",
                    arguments=([rows],),
                    keywords={"dtype": {"dtype": like.dtype}},
                    results=(name,),
                )
            )
        return name

    def _add(self, spec: TensorSpec) -> str:
        """Return the name of the tensor of this geometry; add it if there is none."""
        for name, known in self.tensors.items():
            if known == spec:
                return name
        name = f"{spec.storage}~folded{len(self.tensors)}"
        self.tensors[name] = spec
        return name


def _operation(operator: str, target: str, arguments: list[str], update: _Update) -> Operation:
    return Operation(
        phase="update",
        operator=operator,
        arguments=(target, *arguments),
        keywords={"beta": 1, "alpha": update.factor},
        results=(target,),
    )


def _added(update: _Update) -> Operation:
    return Operation(
        phase="update",
        operator="aten.add_.Tensor",
        arguments=(update.parameter, update.gradient),
        keywords={"alpha": update.factor},
        results=(update.parameter,),
    )
