"""Loops that try to make one step pass for another: `LOOPS`, by name."""

from tests.step.loops_to_mistake.carrying import CARRYING_LOOPS
from tests.step.loops_to_mistake.control import CONTROL_LOOPS
from tests.step.loops_to_mistake.gradients import GRADIENT_LOOPS
from tests.step.loops_to_mistake.hidden import HIDDEN_LOOPS
from tests.step.loops_to_mistake.modes import MODE_LOOPS
from tests.step.loops_to_mistake.numbers import NUMBER_LOOPS
from tests.step.loops_to_mistake.optimizers import OPTIMIZER_LOOPS

__all__ = ["LOOPS"]

LOOPS = {
    **NUMBER_LOOPS,
    **HIDDEN_LOOPS,
    **GRADIENT_LOOPS,
    **OPTIMIZER_LOOPS,
    **MODE_LOOPS,
    **CARRYING_LOOPS,
    **CONTROL_LOOPS,
}
