"""Which numbers the step of an optimizer, taken as a whole, updates a number from, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everystep.program.elements import Formula, NoRuleError, Piece
from everystep.program.elements.optimizers import adam
from everystep.program.execute import Observed
from everystep.replay.step import Step

__all__ = ["optimizer_rule"]

#: Optimizers of torch that update each number from its own gradient and its own state.
_ELEMENTWISE = {
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"),
    "SGD",
}
#: Tensors that Adam writes, as its kernels call their lists.
_LISTS = {"param": "self", "exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}


def optimizer_rule(step: Step, seen: Observed, name: str, index: tuple[int, ...]) -> Formula:
    """Return the numbers that `torch.optim.NAME` updated a parameter from, or a tensor of its state.

    Raises:
        NoRuleError: it may use numbers at other places, too.
    """
    optimizer = seen.operation.operator.rpartition(".")[2]
    if optimizer not in _ELEMENTWISE:
        raise NoRuleError(f"{optimizer} does not update each number by itself")
    kind, _, rest = name.partition("/")
    path = rest if kind == "parameter" else rest.rpartition("/")[0]
    parameter, gradient = f"parameter/{path}", step.places.gradients.get(path)
    if parameter not in seen.inputs or gradient is None:
        raise NoRuleError(f"{parameter} is not among its inputs")
    shape = tuple(seen.inputs[parameter].shape)
    own = f"optimizer/{path}/"
    given = {"param": parameter, "grad": gradient.names[0]}
    given |= {each.removeprefix(own): each for each in step.state if each.startswith(own)}
    if tuple(step.end[name].shape) != shape:  # such as a counter of steps
        given = {key: each for key, each in given.items() if each == name}
        shape = tuple(step.end[name].shape)
    pieces = {}
    for key, each in given.items():
        tensor = seen.inputs[each] if each in seen.inputs else step.state[each]
        if tensor.is_complex():  # its real and its imaginary part are updated one by one
            raise NoRuleError(f"{each} is complex")
        if tuple(tensor.shape) != shape and tensor.numel() != 1:
            raise NoRuleError(f"{each} has another shape than {name}")
        pieces[key] = Piece(each, index if tuple(tensor.shape) == shape else (0,) * tensor.dim())
    key = "param" if kind == "parameter" else name.removeprefix(own)
    text, of = _formula(step, optimizer, path, key)
    is_new = any(each.startswith(own) and each not in step.state for each in step.end)
    return Formula(f"{text}; its state begins at 0" if is_new else text, pieces, of)


def _formula(step: Step, optimizer: str, path: str, key: str) -> tuple[str, Callable[..., Any] | None]:
    """Return the formula of Adam and AdamW, where all its settings are known; of others, no function."""
    text = f"updated by torch.optim.{optimizer} from these numbers and its settings"
    known = step.places.optimizer
    groups = () if known is None else known.groups
    place = next((i for i, group in enumerate(groups) if path in group["params"]), None)
    if key == "step":
        return "step + 1", lambda step=(0,): step[0] + 1
    if place is None or optimizer not in ("Adam", "AdamW") or key not in _LISTS:
        return text, None
    settings = dict(groups[place])
    lr = step.hyperparameters.get("lr" if not place else f"lr[{place}]")
    others = {name for name in step.hyperparameters if not name.startswith("lr")}
    betas = settings.get("betas")
    if lr is None or others or not isinstance(betas, list | tuple):
        return text, None
    settings |= {"lr": lr, "beta1": betas[0], "beta2": betas[1]}
    is_decoupled = optimizer == "AdamW" or bool(settings.get("decoupled_weight_decay"))
    formula, function = adam(is_decoupled, _LISTS[key], settings)
    if function is None:
        return text, None

    def of(param: Any, grad: Any, exp_avg: Any = (0,), exp_avg_sq: Any = (0,), step: Any = (0,)) -> Any:
        return function(param, grad, exp_avg, exp_avg_sq, [step[0] + 1])

    return formula, of
