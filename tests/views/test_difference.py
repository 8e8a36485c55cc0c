"""Where two runs part, in one sentence; as lines and as data it is tested with diff."""

import pytest

from everystep.answers.diff import Difference
from everystep.answers.operations import OperationDifference, TensorDifference
from everystep.program.observed import Observed
from everystep.program.operation import Operation
from everystep.replay.run_replay import LossDifference
from everystep.step.state import StateDifference
from everystep.views.comparisons import diff_sentence


def difference(operation=None, **found):
    known = {"loss": LOSS, "common_state": 128, "experiments": {}, "numerics": {}, "states": ()} | found
    return Difference(
        names=("one", "other"), steps=(500, 500), operation=operation, problems=(), **known
    )


def observed(operator, phase, module=None):
    return Observed(Operation(phase=phase, operator=operator, module=module), {}, {})


NAME = "aten.addmm.default of module 0, forward"
ADDMM = observed("aten.addmm.default", "forward", "0")
MUL = observed("aten.mul.Tensor", "update")
RELU = observed("aten.relu.default", "forward", "0")
LOSS = LossDifference(138, 1.0, 2.0)


def parting(one=ADDMM, other=ADDMM, step=138, index=9, inputs=(), causes=()):
    given = [TensorDifference(name, 1, 4, [], []) for name in inputs]
    return OperationDifference(step, index, one, other, [], given, [], list(causes))


FIRST = "The losses first differ at step 138; the first operation that differs is #9"


@pytest.mark.parametrize(
    ("operation", "sentence"),
    [
        (None, "The losses first differ at step 138."),
        (
            parting(MUL, MUL, 137, causes=["SGD: lr 0.1 | 0.2", "scheduler StepLR: gamma 1 | 0.5"]),
            f"{FIRST} of step 137, aten.mul.Tensor, update; cause: SGD: lr 0.1 | 0.2; cause: scheduler "
            "StepLR: gamma 1 | 0.5.",
        ),
        (
            parting(inputs=["x", "gradient/0.weight~1"]),
            f"{FIRST}, {NAME}; its input x of the batch differs; its "
            "input gradient of 0.weight differs.",
        ),
        (
            parting(other=RELU, causes=["module 0: Linear(4, 8) | ReLU()"]),
            f"{FIRST}, {NAME} | aten.relu.default of module 0, forward; "
            "cause: module 0: Linear(4, 8) | ReLU().",
        ),
        (
            parting(one=None, causes=["another operation"]),
            f"{FIRST}, no operation | {NAME}; cause: another operation.",
        ),
    ],
)
def test_a_difference_in_a_sentence(operation, sentence):
    assert diff_sentence(difference(operation)) == sentence


def test_what_no_loss_shows_in_a_sentence():
    same = "The losses are identical up to step 500;"
    assert diff_sentence(difference(parting(inputs=["parameter/0.bias"]), loss=None)) == (
        f"{same} the first operation that differs is #9 of step 138, {NAME}; its input 0.bias differs."
    )
    states = (StateDifference(500, "0.weight", 3, 1),)
    assert (
        diff_sentence(difference(loss=None, states=states)) == f"{same} 0.weight of state 500 differs."
    )
