"""The language of questions about a step: `norm(gradients['0.weight']) > 2 * previous.loss`.

    loss  step  batch.x  batch.y  nan  inf  pi  True  False
    parameters['0.weight']  buffers[...]  gradients[...]  activations['1']  measurements['lr'] or lr
    updates['0.weight']  updates['0.weight'].before  .after     (after - before, and the two)
    previous.loss  previous.gradients['0.weight']               (of the step before: any of the above)
    + - * / // % ** @   < <= > >= == !=   and or not   a if c else b   parameters['0.weight'][0, :3]

Functions of each element: abs sqrt exp log log10 sign isnan isinf isfinite; clip(x, low, high), between
two numbers; where(c, a, b), which is a where c is not 0, and b where it is 0. Functions of all elements,
which return one number: sum mean min max numel any all; std, var (unbiased, as torch's); median (the
lower of two); quantile(x, q); norm (the root of the sum of squares), rms (of their mean); zeros (the
fraction equal to 0); nonfinite (the number of NaN or infinite elements); dot(a, b), cosine(a, b). min
and max also take several numbers.

`ast` parses it; each supported node becomes a closure, and nothing is executed as Python. It does not
import torch: it treats a plain number like a tensor of one element, so that 1 / 0 is inf and log(-1)
nan. Functions of all elements compute in the tensor's own dtype (float16 and bfloat16 in float32; where
needed, integers in float64), and return a plain number. For no elements, the mean and similar functions
return nan, and min and max are an error. and, or, not work as in Python; chained comparisons, too, but
elementwise.
"""

from everystep.expression.question import Expression, Reference
from everystep.expression.reading import parse

__all__ = ["Expression", "Reference", "parse"]
