"""The types of kernels' parameters: addresses and numbers, never arrays."""

from numba.cuda import types

address = types.int64  # of memory on the device
whole = types.int64  # distances in bytes, and numbers of rows
size = types.int32  # of a row or a team


def number_type(compute):
    """The computing type of the kinds of arithmetic "f4" and "f8"."""
    return types.float64 if compute == "f8" else types.float32


def signature(*kinds):
    return types.void(*kinds)
