"""The project's benchmark: one runner, every peer, one table. `python -m benchmarks`."""
