"""Small blocks of elements of any size, moved between layouts: rows become columns."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import address
from .types import I32

LANE = 16  # bytes within which SSE, AVX and NEON interleave in one instruction


def side(array):
    return LANE * 8 // array.dtype.bitwidth


@intrinsic
def block_side(typingctx, array):
    """How many elements of an array are 16 bytes: ``transpose_block`` takes twice as many rows."""
    if not isinstance(array, types.Array) or not isinstance(array.dtype, (types.Integer, types.Float)):
        return None
    return types.intp(array), lambda context, builder, sig, args: context.get_constant(
        types.intp, side(array)
    )


@intrinsic
def transpose_block(typingctx, source, at, step, to, to_at, to_step):
    """Copy 2 s runs of s elements, ``step`` apart, to s runs of 2 s elements, ``to_step`` apart."""
    if not isinstance(source, types.Array) or source.dtype != to.dtype:
        return None
    s = side(source)

    def lower(context, builder, sig, args):
        _, at, step, _, to_at, to_step = args
        run = ir.VectorType(context.get_data_type(source.dtype), s)

        def load(k):
            offset = builder.add(at, builder.mul(step, ir.Constant(step.type, k)))
            pointer, align = address(context, builder, source, args[0], offset)
            return builder.load(builder.bitcast(pointer, run.as_pointer()), align=align)

        both = ir.Constant(ir.VectorType(I32, 2 * s), list(range(2 * s)))
        v = [builder.shuffle_vector(load(k), load(k + s), both) for k in range(s)]
        for _ in range(s.bit_length() - 1):
            pairs = list(zip(v[: s // 2], v[s // 2 :], strict=True))
            v = [interleaved(builder, a, b, half) for a, b in pairs for half in (0, 1)]
        for k in range(s):
            offset = builder.add(to_at, builder.mul(to_step, ir.Constant(to_step.type, k)))
            pointer, align = address(context, builder, to, args[3], offset)
            builder.store(v[k], builder.bitcast(pointer, v[k].type.as_pointer()), align=align)

    return types.void(source, types.intp, types.intp, to, types.intp, types.intp), lower


def interleaved(builder, a, b, half):
    """The lower or upper halves of a's and b's lanes of 16 bytes, element by element in turn."""
    count = a.type.count
    s = count // 2
    order = []
    for lane in (0, s):
        for k in range(half * s // 2, (half + 1) * s // 2):
            order += [lane + k, count + lane + k]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, count), order))
