"""The project's benchmark: one runner, every peer, one table. `python -m benchmarks`."""

import os

# Where a shell forbids to keep compiled modules, each process that is timed would compile everystep.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
