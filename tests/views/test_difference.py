"""Where two runs part, in one sentence; as lines and as data it is tested with diff."""

import pytest

from everystep.answers.causes import COMPUTED_OTHERWISE
from everystep.answers.diff import Difference
from everystep.answers.operations import OperationDifference, TensorDifference
from everystep.program.observed import Observed
from everystep.program.operation import Operation
from everystep.replay.parallel import LossDifference
from everystep.step.check import StateDifference
from everystep.views.comparisons import diff_sentence


def difference(**found):
    whole = {
        "names": ("one", "other"),
        "experiments": {},
        "numerics": {},
        "steps": (500, 500),
        "loss": None,
        "common_state": 128,
        "states": (),
        "operation": None,
        "problems": (),
    }
    return Difference(**whole | found)


def observed(operator, phase, module=None):
    return Observed(Operation(phase=phase, operator=operator, module=module), {}, {})


ADDMM = observed("aten.addmm.default", "forward", "0")
LOSS = LossDifference(138, 1.0, 2.0)


def parting(one=ADDMM, other=ADDMM, step=138, index=9, inputs=(), causes=()):
    given = [TensorDifference(name, 1, 4, [], [], None) for name in inputs]
    return OperationDifference(step, index, one, other, [], given, [], list(causes))


FIRST = "The losses first differ at step 138; the first operation that differs is #9"


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"loss": LOSS}, "The losses first differ at step 138."),
        (
            {
                "loss": LOSS,
                "operation": parting(
                    observed("aten.mul.Tensor", "update"),
                    observed("aten.mul.Tensor", "update"),
                    step=137,
                    causes=["SGD: lr 0.0001 | 0.0002", "schedule StepLR: gamma 0.1 | 0.5"],
                ),
            },
            f"{FIRST} of step 137, aten.mul (update), because of SGD: lr 0.0001 | 0.0002; schedule "
            "StepLR: gamma 0.1 | 0.5.",
        ),
        (
            {"loss": LOSS, "operation": parting(inputs=["parameter/0.weight~1"])},
            f"{FIRST}, aten.addmm (forward, 0), because 0.weight already differs.",
        ),
        (
            {"loss": LOSS, "operation": parting(inputs=["x", "gradient/0.weight"])},
            f"{FIRST}, aten.addmm (forward, 0), because x of the batch and the gradient of 0.weight "
            "already differ.",
        ),
        (
            {
                "loss": LOSS,
                "numerics": {"threads": (2, 1)},
                "operation": parting(causes=[COMPUTED_OTHERWISE]),
            },
            f"{FIRST}, aten.addmm (forward, 0), although its inputs are identical: threads 2 and 1.",
        ),
        (
            {"loss": LOSS, "operation": parting(causes=["another random draw: seed 1 | 2"])},
            f"{FIRST}, aten.addmm (forward, 0), because of another random draw: seed 1 | 2.",
        ),
        (
            {
                "loss": LOSS,
                "operation": parting(
                    other=observed("aten.convolution.default", "forward", "0"),
                    causes=["another operation"],
                ),
            },
            f"{FIRST}: aten.addmm (forward, 0) in one, aten.convolution (forward, 0) in other.",
        ),
        (
            {
                "loss": LOSS,
                "operation": parting(
                    other=observed("aten.relu.default", "forward", "0"),
                    causes=["module 0: Linear(4, 8) | ReLU()"],
                ),
            },
            f"{FIRST}: aten.addmm (forward, 0) in one, aten.relu (forward, 0) in other, because of "
            "module 0: Linear(4, 8) | ReLU().",
        ),
        (
            {
                "loss": LOSS,
                "operation": parting(
                    causes=[f"{COMPUTED_OTHERWISE}; all recorded numerics are the same"]
                ),
            },
            f"{FIRST}, aten.addmm (forward, 0), although its inputs are identical: all recorded "
            "numerics are, too.",
        ),
        (
            {"loss": LOSS, "operation": parting(other=None, causes=["another operation"])},
            f"{FIRST}, aten.addmm (forward, 0), which only one has.",
        ),
        (
            {"loss": LOSS, "operation": parting(one=None, causes=["another operation"])},
            f"{FIRST}, aten.addmm (forward, 0), which only other has.",
        ),
        (
            {"operation": parting(inputs=["parameter/0.bias"])},
            "The losses of all 500 common steps are identical; the first operation that differs is #9 "
            "of step 138, aten.addmm (forward, 0), because 0.bias already differs.",
        ),
        (
            {"states": (StateDifference(500, "0.weight", 3, 1),)},
            "The losses of all 500 common steps are identical; 0.weight of state 500 differs.",
        ),
    ],
)
def test_a_difference_in_a_sentence(found, sentence):
    assert diff_sentence(difference(**found)) == sentence
