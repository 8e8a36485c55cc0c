"""Kinds of users' Python, as rows of one table: `CASES`, and what they are made of."""

from tests.training.python_cases.carrying import CARRYING_CASES
from tests.training.python_cases.case import NEVER, WHEN, Case
from tests.training.python_cases.losses import LOSS_CASES
from tests.training.python_cases.methods import METHOD_CASES, METHODS, using
from tests.training.python_cases.metrics import METRIC_CASES
from tests.training.python_cases.optimizers import OPTIMIZER_CASES
from tests.training.python_cases.ordinary import ORDINARY_CASES
from tests.training.python_cases.places import PLACE_CASES, PLACES, factor_of
from tests.training.python_cases.reading import READING_CASES, READINGS
from tests.training.python_cases.settings import (
    CHANGERS,
    SETTING_CASES,
    SETTINGS,
    set_between_steps,
)

__all__ = [
    "CASES",
    "CHANGERS",
    "METHODS",
    "NEVER",
    "PLACES",
    "READINGS",
    "SETTINGS",
    "WHEN",
    "Case",
    "factor_of",
    "set_between_steps",
    "using",
]

CASES = [
    *PLACE_CASES,
    *METHOD_CASES,
    *READING_CASES,
    *SETTING_CASES,
    *OPTIMIZER_CASES,
    *METRIC_CASES,
    *LOSS_CASES,
    *CARRYING_CASES,
    *ORDINARY_CASES,
]
