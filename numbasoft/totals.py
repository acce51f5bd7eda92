"""One number per row to one number for all of them: a sum whose order is fixed by how many there are."""

from .jit import kernel
from .launch import code_for_few
from .summation import added_up


@kernel
def add(values):
    return added_up(values)


def total(values):
    """The sum of contiguous float64 numbers (see ``added_up``), without warnings."""
    return code_for_few(add, None, (values,), ())(values)
