"""Functions of torch that compute with different bits where a dispatch mode is active, as without one.

Some of torch's composite functions ask whether a dispatch mode is active (`isTensorSubclassLike` in
ATen), and then choose operations that work for any mode. With those below, the results have different
bits. While a training is followed, kernels above autograd take their place, and choose what torch
chooses without a mode. What they call is seen as any operation is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from everystep.ops.operators import OperatorMode

__all__ = ["ModeFormulas", "is_decomposed", "of_mode"]

_aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
#: Where torch looks for a kernel of a composite function before it takes the composite itself.
_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMPS", "AutogradXPU", "AutogradPrivateUse1")


def _is_changed_by_us(tensor: Tensor) -> bool:
    """Return whether torch would choose for a tensor as it does only because everystep watches."""
    depth = torch._C._len_torch_dispatch_stack()
    modes = [torch._C._get_dispatch_stack_at(place) for place in range(depth)]
    is_subclass = torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)
    return bool(modes) and all(isinstance(each, OperatorMode) for each in modes) and not is_subclass


def _has_derivative(tensor: Tensor) -> bool:
    """Return whether a derivative may be asked of what is computed from a tensor."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    forward: Any = torch.autograd.forward_ad
    return forward._current_level >= 0 and forward.unpack_dual(tensor).tangent is not None


def _matmul(one: Tensor, other: Tensor) -> Any:
    """With a mode, a batch of one matrix that needs no gradient is folded into a product of matrices."""
    if one.dim() == 3 and other.dim() == 3 and one.shape[0] != other.shape[0]:
        single = one if one.shape[0] == 1 else other
        if single.shape[0] == 1 and not single.requires_grad and _is_changed_by_us(single):
            count = one.shape[0] * other.shape[0]
            # The one matrix is repeated for a product of batches, as without a mode.
            left, right = (
                each.expand(count, *each.shape[1:]).reshape(count, *each.shape[1:])
                for each in (one, other)
            )
            shape = [count, one.shape[1], other.shape[2]]
            return _aten._unsafe_view.default(torch.bmm(left, right), shape)
    return _aten.matmul.default._op_dk(_COMPOSITE, one, other)


# Of these, torch computes the vectors, too, where a derivative may need them, or where a mode is active.
def _svdvals(matrix: Tensor, *, driver: str | None = None) -> Any:
    if _is_changed_by_us(matrix) and not _has_derivative(matrix):
        return _aten._linalg_svd.default(matrix, False, False, driver=driver)[1]
    return _aten.linalg_svdvals.default._op_dk(_COMPOSITE, matrix, driver=driver)


def _eigvalsh(matrix: Tensor, triangle: str = "L") -> Any:
    if _is_changed_by_us(matrix) and not _has_derivative(matrix):
        return _aten._linalg_eigh.default(matrix, triangle, False)[0]
    return _aten.linalg_eigvalsh.default._op_dk(_COMPOSITE, matrix, triangle)


def _eigvals(matrix: Tensor) -> Any:
    if _is_changed_by_us(matrix) and not _has_derivative(matrix):
        return _aten._linalg_eigvals.default(matrix)
    return _aten.linalg_eigvals.default._op_dk(_COMPOSITE, matrix)


def _equal(one: Tensor, other: Tensor) -> bool:
    with torch._C._DisableTorchDispatch():
        found = torch.equal(one, other)  # of one memory, NaN counts as equal; raises of other dtypes
    # For the watch alone, which notes that Python reads this number.
    if one.shape == other.shape:
        bool(torch.eq(one, other).all())
    return found


def _allclose(
    one: Tensor, other: Tensor, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> bool:
    return bool(torch.isclose(one, other, rtol, atol, equal_nan).all())


def _is_left_aligned(values: Tensor, mask: Tensor) -> bool:
    with torch._C._DisableTorchDispatch():
        found: bool = torch._nested_tensor_from_mask_left_aligned(values, mask)
    bool((mask[:, 1:] <= mask[:, :-1]).all())
    return found


#: Functions that return to Python what they find in tensors. Operations that a program can hold find the
#: same, so that a replay compares what Python may branch on.
_READING: dict[Any, Callable[..., Any]] = {
    _aten.equal.default: _equal,
    _aten.allclose.default: _allclose,
    _aten._nested_tensor_from_mask_left_aligned.default: _is_left_aligned,
}
_FORMULAS: dict[Any, Callable[..., Any]] = {
    _aten.matmul.default: _matmul,
    _aten.linalg_svdvals.default: _svdvals,
    _aten.linalg_eigvalsh.default: _eigvalsh,
    _aten.linalg_eigvals.default: _eigvals,
}


def is_decomposed(function: Any) -> bool:
    """Return whether `of_mode` has a formula for a function that is no composite."""
    return function in _READING


def of_mode(function: Any) -> Callable[..., Any]:
    """Return what a mode calls to see the operations of a function of torch."""
    formula: Callable[..., Any] = (_READING | _FORMULAS).get(function, function.decompose)
    return formula


class ModeFormulas:
    """Puts the functions in the place of torch's, until it is removed. It holds for all threads."""

    def __init__(self) -> None:
        self._libraries: list[Any] = []
        for key in _KEYS:
            library: Any = torch.library.Library("aten", "IMPL", key)  # type: ignore[no-untyped-call]
            for function, formula in _FORMULAS.items():
                library.impl(function._schema.name.partition("::")[2], formula)
            self._libraries.append(library)

    def remove(self) -> None:
        """Restore torch's functions."""
        self._libraries.clear()
