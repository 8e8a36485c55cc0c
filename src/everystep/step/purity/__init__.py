"""Purity: whether a program may stand in for Python, and until when.

A program may run in the place of Python only where that Python is proven to do nothing else. Two kinds
are: torch's own modules, functions, losses and optimizers (`torchs_own`), and code of the user that was
read (`reader`): its source was interpreted on a real batch by rules that allow no effect besides tensor
operations, and every value that it took from outside was noted (`guards`). As long as these values are
the same, and a batch is of the same kind, the same source takes the same path to the same operations.

`examine` decides. `torchs_own` and `callables` say what of torch is known; `source` finds the text of a
function; `attributes` looks an attribute up as Python does, but runs nothing; `reader` goes through the
syntax tree, and `values` and `calls` say what may be done with a value; `guards` and `process` compare.
"""
