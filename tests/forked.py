"""Another process without the seconds that importing torch takes: a fork of that of the tests."""

import multiprocessing

__all__ = ["ended"]

FORK = multiprocessing.get_context("fork")


def ended(function, *arguments, **keywords):
    """Call a function in a fork of this process; return its exit code, once it has ended."""
    process = FORK.Process(target=function, args=arguments, kwargs=keywords)
    process.start()
    process.join()
    return process.exitcode
