"""How arrays of any shape reach kernels that treat every element alike."""

import math

import numpy as np

from .arrays import kernel_view

ROW = 4096  # elements; sums over them are added row by row, whatever the array's shape


def over_elements(run, inputs, output, dtype):
    """Call ``run`` on 2-D blocks that together make up the arrays, in order.

    The inputs are of one shape, as is the output unless it is None. An array that is not contiguous, or
    of another dtype than ``dtype``, is copied as a whole.
    """
    flat = [np.ascontiguousarray(a, dtype).reshape(-1) for a in inputs]
    direct = output is not None and output.flags.c_contiguous and output.dtype == dtype
    if output is None:
        result = None
    else:
        result = output.reshape(-1) if direct and output.flags.aligned else np.empty(output.size, dtype)
    size = flat[0].size
    rows = size // ROW
    for part, shape in ((slice(0, rows * ROW), (rows, ROW)), (slice(rows * ROW, size), (1, size % ROW))):
        if math.prod(shape):
            blocks = [kernel_view(a[part].reshape(shape)) for a in (*flat, result) if a is not None]
            run(blocks[: len(flat)], None if result is None else blocks[-1])
    if result is not None and not np.may_share_memory(result, output):
        with np.errstate(over="ignore", under="ignore"):
            np.copyto(output, result.reshape(output.shape), casting="unsafe")
