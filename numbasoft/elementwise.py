"""How arrays of any shape reach kernels that treat every element alike."""

import numpy as np

from .arrays import kernel_view

ROW = 4096  # elements; sums over them are added row by row, whatever the array's shape


def over_elements(run, inputs, output, dtype):
    """Call ``run`` on 2-D blocks that together make up the arrays, in order.

    The inputs are of one shape, as is the output unless it is None. An array that is not contiguous, or
    of another dtype than ``dtype``, is copied as a whole.
    """
    flat = [np.ascontiguousarray(a, dtype).reshape(-1) for a in inputs]
    output = (
        None if output is None else np.asarray(output)
    )  # no matrix, which has two axes whatever its shape
    is_direct = output is not None and output.dtype == dtype and output.flags.carray
    result = None
    if output is not None:
        result = output.reshape(-1) if is_direct else np.empty(output.size, dtype)
    rows, rest = divmod(flat[0].size, ROW)
    for first, shape in ((0, (rows, ROW)), (rows * ROW, (1, rest))):
        if shape[0] and shape[1]:
            part = slice(first, first + shape[0] * shape[1])
            blocks = [kernel_view(a[part].reshape(shape)) for a in (*flat, result) if a is not None]
            run(blocks[: len(flat)], None if result is None else blocks[-1])
    if result is not None and not is_direct:
        with np.errstate(over="ignore", under="ignore"):
            np.copyto(output, result.reshape(output.shape), casting="unsafe")
