"""The addresses of the server, and their answers."""

from starlette.convertors import StringConvertor, register_url_convertor

__all__ = ["RunNameConvertor"]


class RunNameConvertor(StringConvertor):
    """The name of a run in a path; in a sweep, it has two parts: `sweep-1/lr=0.1,seed=3`."""

    regex = "[^/]+(?:/[^/]*=[^/]*)?"


register_url_convertor("run", RunNameConvertor())
