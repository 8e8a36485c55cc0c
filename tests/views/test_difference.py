"""Where two runs part, in one sentence; as lines and as data it is tested with diff."""

import pytest

from everystep.answers.causes import COMPUTED_OTHERWISE
from everystep.answers.diff import Difference
from everystep.answers.operations import OperationDifference, TensorDifference
from everystep.program.observed import Observed
from everystep.program.operation import Operation
from everystep.replay.parallel import LossDifference
from everystep.step.state import StateDifference
from everystep.views.comparisons import diff_sentence


def difference(operation=None, **found):
    known = {"loss": LOSS, "common_state": 128, "experiments": {}, "numerics": {}, "states": ()} | found
    return Difference(
        names=("one", "other"), steps=(500, 500), operation=operation, problems=(), **known
    )


def observed(operator, phase, module=None):
    return Observed(Operation(phase=phase, operator=operator, module=module), {}, {})


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
            f"{FIRST} of step 137, aten.mul (update), because of SGD: lr 0.1 | 0.2; scheduler "
            "StepLR: gamma 1 | 0.5.",
        ),
        (
            parting(inputs=["parameter/0.weight~1"]),
            f"{FIRST}, aten.addmm (forward, 0), because 0.weight already differs.",
        ),
        (
            parting(inputs=["x", "gradient/0.weight"]),
            f"{FIRST}, aten.addmm (forward, 0), because x of the batch and the gradient of 0.weight "
            "already differ.",
        ),
        (
            parting(causes=["another random draw: seed 1 | 2"]),
            f"{FIRST}, aten.addmm (forward, 0), because of another random draw: seed 1 | 2.",
        ),
        (
            parting(other=RELU, causes=["another operation"]),
            f"{FIRST}: aten.addmm (forward, 0) in one, aten.relu (forward, 0) in other.",
        ),
        (
            parting(other=RELU, causes=["module 0: Linear(4, 8) | ReLU()"]),
            f"{FIRST}: aten.addmm (forward, 0) in one, aten.relu (forward, 0) in other, because of "
            "module 0: Linear(4, 8) | ReLU().",
        ),
        (
            parting(causes=[f"{COMPUTED_OTHERWISE}; all recorded numerics are the same"]),
            f"{FIRST}, aten.addmm (forward, 0), although its inputs are identical: all recorded "
            "numerics are, too.",
        ),
        (
            parting(other=None, causes=["another operation"]),
            f"{FIRST}, aten.addmm (forward, 0), which only one has.",
        ),
        (
            parting(one=None, causes=["another operation"]),
            f"{FIRST}, aten.addmm (forward, 0), which only other has.",
        ),
    ],
)
def test_a_difference_in_a_sentence(operation, sentence):
    assert diff_sentence(difference(operation)) == sentence


def test_what_no_loss_shows_and_other_threads_in_a_sentence():
    same = "The losses of all 500 common steps are identical;"
    assert diff_sentence(difference(parting(inputs=["parameter/0.bias"]), loss=None)) == (
        f"{same} the first operation that differs is #9 of step 138, aten.addmm (forward, 0), because "
        "0.bias already differs."
    )
    states = (StateDifference(500, "0.weight", 3, 1),)
    assert (
        diff_sentence(difference(loss=None, states=states)) == f"{same} 0.weight of state 500 differs."
    )
    found = difference(parting(causes=[COMPUTED_OTHERWISE]), numerics={"threads": (2, 1)})
    assert diff_sentence(found) == (
        f"{FIRST}, aten.addmm (forward, 0), although its inputs are identical: threads 2 and 1."
    )
