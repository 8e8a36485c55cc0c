"""A run as shown to people. Computes nothing about training.

A module has the name of what it shows, and of the form where another folder has that name: `why_text`.
"""

import random

_state = random.getstate()
import rich.style  # noqa: E402, F401  # draws from Python's generator, which is the user's

random.setstate(_state)
