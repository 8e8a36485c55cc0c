"""A run as shown to people. Computes nothing about training."""

import random

_state = random.getstate()
import rich.style  # noqa: E402, F401  # draws from Python's generator, which is the user's

random.setstate(_state)
