"""Kinds of users' Python, as rows of one table: `CASES`, and what they are made of."""

from tests.training.python_cases.carrying import CARRYING_CASES
from tests.training.python_cases.case import NEVER, WHEN, Case
from tests.training.python_cases.metrics import METRIC_CASES
from tests.training.python_cases.optimizers import OPTIMIZER_CASES
from tests.training.python_cases.own import COUNTS, MODELS, OWN_CASES, factor_of
from tests.training.python_cases.settings import (
    CHANGERS,
    SETTING_CASES,
    SETTINGS,
    set_between_steps,
)

__all__ = [
    "CASES",
    "CHANGERS",
    "COUNTS",
    "MODELS",
    "NEVER",
    "SETTINGS",
    "WHEN",
    "Case",
    "factor_of",
    "set_between_steps",
]

CASES = [*OWN_CASES, *SETTING_CASES, *OPTIMIZER_CASES, *METRIC_CASES, *CARRYING_CASES]
