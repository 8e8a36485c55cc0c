"""How much of a step's loss, and of its gradients, each row of the batch makes."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.answers.row_terms import RowsFollower
from everystep.device import on_cpu
from everystep.errors import RunError, UsageError, did_you_mean
from everystep.ops.labels import MIXED, SHARED, Reason, Tracked
from everystep.replay.opened_step import Step
from everystep.replay.shown import Shown

__all__ = ["Rows", "Share", "rows_of"]

_LOSS = "the loss"
#: In float32, numbers below this fraction of the largest gradient are rounding of cancelled terms.
_EPS = float(torch.finfo(torch.float32).eps)


class Share(NamedTuple):
    """The contributions of rows to the loss, or to the gradient of a parameter.

    norms: the 2-norm of each row's term (N), for the loss the term itself; whole: of the sum; rest: of
    the term from no row, such as a penalty; is_mean: of the loss, whether it is a mean.
    """

    norms: Tensor
    whole: float
    rest: float
    is_mean: bool = False

    @property
    def relative(self) -> Tensor:
        """The norms divided by that of the whole (N)."""
        return self.norms / self.whole


@dataclass(frozen=True, eq=False)
class Rows(Shown):
    """The rows of the batch of a step.

    numbers: of each row in `source`, the name of the data, or in the batch if that is empty; loss_share:
    the contribution of each row to the loss; gradients: to each parameter's gradient; a `Reason` if
    unknown.
    """

    step: int
    numbers: tuple[int, ...]
    source: str
    loss_share: Share | Reason
    gradients: dict[str, Share | Reason]

    @property
    def loss(self) -> Tensor:
        """The loss of each row (N), in float64: the step's loss is their mean or their sum, and `rest`.

        Raises:
            RunError: it is unknown; gives the reason.
        """
        share = self.loss_share
        if isinstance(share, Reason):
            raise RunError(f"the loss of each row of step {self.step} is unknown: {share}")
        return share.norms * len(self.numbers) if share.is_mean else share.norms

    @property
    def gradient(self) -> Tensor:
        """The 2-norm of each row's contribution to all gradients together (N), in float64.

        Raises:
            RunError: it is unknown for a parameter; gives the reason.
        """
        return self.gradient_of(*self.gradients)

    @property
    def known(self) -> list[str]:
        """The parameters with gradients of known rows."""
        return [name for name, share in self.gradients.items() if isinstance(share, Share)]

    def gradient_of(self, *parameters: str) -> Tensor:
        """Return the same of some parameters.

        Raises:
            UsageError: there is no gradient of a parameter.
            RunError: it is unknown; gives the reason.
        """
        squares = torch.zeros(len(self.numbers), dtype=torch.float64)
        if not parameters:
            raise RunError(f"step {self.step} has no gradients")
        for name in parameters:
            if name not in self.gradients:
                cure = did_you_mean(name, list(self.gradients))
                raise UsageError(f"step {self.step} has no gradient of {name!r:.80}; {cure}")
            share = self.gradients[name]
            if isinstance(share, Reason):
                raise RunError(f"the rows of the gradient of {name} are unknown: {share}")
            # The square of a norm of all gradients is the sum of the squares of each.
            squares += share.norms**2
        return squares.sqrt()

    def ranked(self, values: Tensor) -> list[int]:
        """Return the places of rows in the batch, by their values (N): NaN first, then the largest."""
        return [*map(int, values.argsort(descending=True, stable=True))]  # for torch, NaN is the largest

    def __repr__(self) -> str:
        loss = "unknown" if isinstance(self.loss_share, Reason) else "known"
        return (
            f"<rows of step {self.step}: {len(self.numbers):,} rows, loss {loss}, "
            f"gradients of {len(self.known)} of {len(self.gradients)} parameters known>"
        )


@on_cpu()
def rows_of(step: Step) -> Rows:
    """Return how much of the loss and of the gradients of a step each row of its batch makes.

    Computed from the operations of the step alone. A row's term is its summand in the step, from the
    recorded values; the terms must add up to the whole, or they are unknown.
    """
    sizes = {len(tensor) for tensor in step.batch.tensors.values() if tensor.dim()}
    if len(sizes) != 1:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in step.batch.tensors.items())
        why = f"the tensors of the batch have no first axis in common ({shapes})"
        return _without_rows(step, Reason(why if sizes else "the batch has no tensor with rows"))
    (count,) = sizes
    follower = RowsFollower(step, count)
    if (apart := follower.apart()) is not None:
        return _without_rows(step, apart)
    given = step.batch.rows
    is_known = given is not None and len(given) == count
    numbers = given.tolist() if given is not None and is_known else range(count)
    followed, rounding = follower.followed(), _rounding(step)
    norms = [float(gradient.norm()) for gradient in step.gradients.values()]
    floor = _EPS * max((norm for norm in norms if isfinite(norm)), default=0.0)

    def share_of(name: str, tracked: Tracked) -> Share | Reason:
        if not is_of_rows and tracked.is_shared:
            return no_rows
        before = step.state.get(f"gradient/{name}")
        # A penalty belongs to no row, so the rest of such a gradient may be anything.
        rests = None if name in followed.penalized else () if before is None else (before,)
        return _share(tracked, count, "the gradient", rounding, floor, rests)

    # Sums over the data count as constants: a loss of nothing else is not of rows, nor its gradients.
    no_rows = Reason("no single row goes into the loss, only sums over the batch, or nothing of it")
    is_of_rows = followed.loss is None or not followed.loss.is_shared
    loss: Share | Reason = Reason("the step has no loss that an operation returned")
    if followed.loss is not None:
        loss = _share(followed.loss, count, _LOSS, rounding) if is_of_rows else no_rows
    return Rows(
        step.number,
        tuple(numbers),
        step.batch.source if is_known else "",
        loss,
        {n: share_of(n, followed.gradients[n]) for n in step.gradients if n in followed.gradients},
    )


def _without_rows(step: Step, reason: Reason) -> Rows:
    return Rows(step.number, (), "", reason, dict.fromkeys(step.gradients, reason))


def _rounding(step: Step) -> float:
    """Return the relative rounding to expect of sums in a step, by its least precise numbers."""
    results = (tensor for seen in step.operations for tensor in seen.results.values())
    dtypes = {tensor.dtype for tensor in results if tensor.is_floating_point()}
    return max([1e-4, *(8 * torch.finfo(dtype).eps for dtype in dtypes)])


def _share(
    tracked: Tracked,
    count: int,
    what: str,
    rounding: float,
    floor: float = 0.0,
    rests: tuple[Tensor, ...] | None = None,
) -> Share | Reason:
    """Return what each of `count` rows makes, or why that is unknown.

    what: the name of the tensor; rounding: relative to the terms; floor: smaller numbers count as
    rounding; rests: allowed terms from no row, in addition to 0; None: any.
    """
    if tracked.has(MIXED):
        return tracked.reason or Reason("rows are mixed")
    if tracked.value.is_complex():
        return Reason(f"{what} is complex")
    try:
        rest = tracked.term(SHARED).double()
        total, norms = rest.clone(), []
        for row in range(count):
            term = tracked.term(row).double()
            total += term
            norms.append(_size(term, what))
        found = torch.stack(norms).cpu().reshape(count)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        line = (str(error).splitlines() or [""])[0]
        return Reason(f"an operator does not run on the numbers of a row alone: {line:.200}")
    whole = tracked.value.double()
    # Terms are sums themselves, so that rounding is relative to what cancels in them, too.
    scale = float(found[found.isfinite()].abs().sum()) + float(rest[rest.isfinite()].norm())
    allowed = max(rounding * scale, floor)
    are_finite = total.isfinite()
    off = float((total - whole)[are_finite].norm())
    if not torch.equal(are_finite, whole.isfinite()) or not off <= allowed:
        return Reason(
            f"the terms of the rows add up to {what} only within {off:.3g}, more than rounding"
        )
    if rests is not None:
        # What belongs to no row may be nothing, or a gradient that was there before the step.
        strange = [rest, *(rest - known.double() for known in rests if known.shape == rest.shape)]
        if not min(float(each[each.isfinite()].norm()) for each in strange) <= allowed:
            return Reason("it adds up numbers that are the same for all rows")
    sizes = float(_size(whole, what)), float(_size(rest, what))
    return Share(found, *sizes, tracked.is_mean)


def _size(term: Tensor, what: str) -> Tensor:
    """Return the norm of a term; of the loss, the term itself, which may be below 0."""
    return term.reshape(()) if what == _LOSS else term.norm()
