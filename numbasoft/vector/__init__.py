"""A SIMD vector type for Numba kernels. All LLVM IR of the package is in this folder.

Numba has no vector type, and LLVM leaves much of a softmax loop scalar or badly
scheduled. With a vector type a kernel is still Python, ``e = exp2_scaled(x - c, ...)``,
and every value in it is a register full of elements.

A vector holds 64 bytes of float32 or float64 on every machine. LLVM splits it into what
the CPU has (one AVX-512, two AVX2, four NEON or SSE registers), so that the order of
every addition does not depend on the CPU. Without FMA instructions results may differ
in the last bit.

Arrays of 16-bit floats come as integers, because Numba's CPU target knows no such type:
uint16 is bfloat16, int16 is float16. They are widened to float32 when loaded and rounded
once, to nearest even, when stored.
"""

from .arithmetic import (
    exponent_and_mantissa,
    fma,
    low_bits_as_exponent,
    lowered,
    max_across,
    maximum,
    minimum,
    narrowed,
    operand,
    plus,
    scaled_entry,
    select,
    splat,
    sum_across,
    sum_of_pairs,
    widened,
)
from .blocks import block_side, transpose_block
from .memory import (
    add_atomically,
    aligned_after,
    any_kept_of,
    below,
    drained,
    filled,
    lanes,
    load,
    load_atomically,
    load_kept,
    load_kept_part,
    load_part,
    prefetch,
    prefetch_to_write,
    row_at,
    spin,
    stack_array,
    stack_block,
    store,
    store_part,
    store_past_caches,
)

__all__ = [
    "add_atomically",
    "aligned_after",
    "any_kept_of",
    "below",
    "block_side",
    "drained",
    "exponent_and_mantissa",
    "filled",
    "fma",
    "lanes",
    "load",
    "load_atomically",
    "load_kept",
    "load_kept_part",
    "load_part",
    "low_bits_as_exponent",
    "lowered",
    "max_across",
    "maximum",
    "minimum",
    "narrowed",
    "operand",
    "plus",
    "prefetch",
    "prefetch_to_write",
    "row_at",
    "scaled_entry",
    "select",
    "spin",
    "splat",
    "stack_array",
    "stack_block",
    "store",
    "store_part",
    "store_past_caches",
    "sum_across",
    "sum_of_pairs",
    "transpose_block",
    "widened",
]
