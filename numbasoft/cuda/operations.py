"""What an operation is to those who launch it: its kernels, by regime."""

from collections.abc import Callable
from typing import NamedTuple


class Forward(NamedTuple):
    """Each kernel is a factory (see ops/*/cuda.py) that gives the function and its signature."""

    rows: Callable  # that fit into registers
    columns: Callable  # along another axis
    last: Callable  # the last step of a long row; those before are the same for all (split.py)
    others: bool  # whether the sum is that without the maxima
    reduced: bool  # whether there is one result a row


class Backward(NamedTuple):
    rows: Callable
    columns: Callable
    last: Callable
    product: bool  # whether the sum is over g * y, or over g
