"""Purity: whether a program may stand in for Python, and until when.

A program may run in place of Python only if that Python is proven to do nothing else. Two kinds are:
torch's own modules, functions, losses and optimizers (`torchs_own`), and user code that was read
(`reader`): its source was interpreted on a real batch by rules that allow no effect except tensor
operations, and every value that it used from outside was noted (`guards`). As long as these values stay
the same, and the batch is of the same kind, the same source leads to the same operations.

`examine` decides. `torchs_own` and `callables` list what is known about torch; `source` finds the source
of a function; `attributes` looks up attributes as Python does, but runs nothing; `reader` interprets the
syntax tree, and `values` and `calls` define what a value may be used for; `guards` and `process`
compare.
"""
