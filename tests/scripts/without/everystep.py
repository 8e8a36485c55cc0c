"""Stands in for everystep where a script runs without it: nothing is recorded, and all else is plain."""

from contextlib import contextmanager, nullcontext


class _Loop:
    def epochs(self, count):
        return range(count)

    def steps(self, batches):
        return batches

    def step(self, batch=None):
        return nullcontext()

    def log(self, **values):
        pass

    def stop(self, reason):
        pass


@contextmanager
def record(**parts):
    yield _Loop()
