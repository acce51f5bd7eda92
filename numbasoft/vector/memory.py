"""Vectors from and to the memory of an array.

An offset counts elements from the array's data pointer. A ``_part`` function touches
the first ``count`` lanes only: what lies behind them is neither read nor written.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .types import (
    DOUBLE,
    FLOAT,
    HAS_AVX512,
    HAS_HALF,
    I1,
    I8,
    I16,
    I32,
    I64,
    Mask,
    Vector,
    broadcast,
    call,
    coerce,
    constant,
    llvm_vector,
    vector_of,
)

STORED = {types.float32: FLOAT, types.float64: DOUBLE, types.uint16: I16, types.int16: I16}


def is_loadable(array):
    return isinstance(array, types.Array) and array.dtype in STORED


def structure(context, builder, array_type, array=None):
    """The members of an array. Numba's module for it takes 50 ms to import, and compiling needs it anyway."""
    from numba.np.arrayobj import make_array

    return make_array(array_type)(context, builder, value=array)


def address(context, builder, array_type, array, offset):
    """The pointer to an element, and the alignment that can be relied upon."""
    data = structure(context, builder, array_type, array).data
    return builder.gep(data, [offset]), array_type.dtype.bitwidth // 8


def lanes_below(builder, count, lanes):
    """The mask of the lanes below ``count``, which may be larger than their number."""
    top = ir.Constant(count.type, lanes)
    count = builder.select(builder.icmp_signed("<", count, top), count, top)
    kind = ir.VectorType(I32, lanes)
    iota = ir.Constant(kind, list(range(lanes)))
    return builder.icmp_signed("<", iota, broadcast(builder, builder.trunc(count, I32), lanes))


@intrinsic
def filled(typingctx, array, value):
    """A vector of the type that ``array`` is computed in, with ``value`` in every lane."""
    if not is_loadable(array):
        return None
    vector = vector_of(array)

    def lower(context, builder, sig, args):
        return coerce(context, builder, args[1], sig.args[1], vector)

    return vector(array, value), lower


@intrinsic
def below(typingctx, like, count):
    """The mask of a vector's lanes below ``count``."""
    if not isinstance(like, Vector):
        return None

    def lower(context, builder, sig, args):
        return lanes_below(builder, args[1], like.lanes)

    return Mask(like.lanes)(like, types.intp), lower


@intrinsic
def lanes(typingctx, array):
    """How many elements of an array a vector holds."""
    if not is_loadable(array):
        return None
    count = vector_of(array).lanes
    return types.intp(array), lambda context, builder, sig, args: context.get_constant(types.intp, count)


@intrinsic
def row_at(typingctx, array, i):
    """The offset of row i of a 2-D array, in elements; 0 where the array is None."""

    def lower(context, builder, sig, args):
        if array == types.none:
            return context.get_constant(types.intp, 0)
        strides = structure(context, builder, array, args[0]).strides
        step = builder.sdiv(builder.extract_value(strides, 0), ir.Constant(I64, array.dtype.bitwidth // 8))
        return builder.mul(args[1], step)

    return types.intp(array, types.intp), lower


@intrinsic
def aligned_after(typingctx, array, offset):
    """How far behind an element the next one lies, 1 to ``lanes``, from which no vector touches two lines of the cache."""
    if not is_loadable(array):
        return None

    def lower(context, builder, sig, args):
        size, count = array.dtype.bitwidth // 8, vector_of(array).lanes
        pointer, _ = address(context, builder, array, args[0], args[1])
        place = builder.udiv(builder.ptrtoint(pointer, I64), ir.Constant(I64, size))
        return builder.sub(ir.Constant(I64, count), builder.and_(place, ir.Constant(I64, count - 1)))

    return types.intp(array, types.intp), lower


@intrinsic
def load(typingctx, array, offset):
    """A full vector of an array's elements, 16-bit floats widened to float32."""
    if not is_loadable(array):
        return None

    def lower(context, builder, sig, args):
        return load_vector(context, builder, array, args[0], args[1])

    return vector_of(array)(array, types.intp), lower


def load_vector(context, builder, array_type, array, offset):
    pointer, align = address(context, builder, array_type, array, offset)
    stored = ir.VectorType(STORED[array_type.dtype], vector_of(array_type).lanes)
    v = builder.load(builder.bitcast(pointer, stored.as_pointer()), align=align)
    return widen_stored(builder, v, array_type)


@intrinsic
def load_part(typingctx, array, offset, count, fill):
    """As ``load``, but with ``fill`` in the lanes from ``count`` on, which are not read."""
    if not is_loadable(array):
        return None
    vector = vector_of(array)

    def lower(context, builder, sig, args):
        rest = coerce(context, builder, args[3], sig.args[3], vector)
        return load_lanes(context, builder, array, args[0], args[1], args[2], rest)

    return vector(array, types.intp, types.intp, fill), lower


def load_lanes(context, builder, array_type, array, offset, count, rest):
    pointer, align = address(context, builder, array_type, array, offset)
    mask = lanes_below(builder, count, rest.type.count)
    if array_type.dtype.bitwidth == 16:
        v = gather_16(builder, pointer, count, rest.type.count)
        return builder.select(mask, widen_stored(builder, v, array_type), rest)
    return masked_load(builder, pointer, align, mask, rest)


@intrinsic
def load_kept(typingctx, array, offset, mask, mask_offset):
    """As ``load``, with -inf where an array of bytes, if there is one, holds a zero."""
    if not is_loadable(array):
        return None
    vector = vector_of(array)

    def lower(context, builder, sig, args):
        v = load_vector(context, builder, array, args[0], args[1])
        if mask == types.none:
            return v
        keeps = mask_vector(context, builder, mask, args[2], args[3], None, vector.lanes)
        return builder.select(keeps, v, constant(v.type, float("-inf")))

    return vector(array, types.intp, mask, types.intp), lower


@intrinsic
def load_kept_part(typingctx, array, offset, mask, mask_offset, count):
    """As ``load_kept``, with -inf in the lanes from ``count`` on, which are not read."""
    if not is_loadable(array):
        return None
    vector = vector_of(array)

    def lower(context, builder, sig, args):
        rest = constant(llvm_vector(vector), float("-inf"))
        v = load_lanes(context, builder, array, args[0], args[1], args[4], rest)
        if mask == types.none:
            return v
        keeps = mask_vector(context, builder, mask, args[2], args[3], args[4], vector.lanes)
        return builder.select(keeps, v, rest)

    return vector(array, types.intp, mask, types.intp, types.intp), lower


def mask_vector(context, builder, mask_type, mask, offset, count, lanes):
    """Which of the lanes below ``count`` (None: all) an array of bytes keeps."""
    pointer, _ = address(context, builder, mask_type, mask, offset)
    kind = ir.VectorType(I8, lanes)
    if count is None:
        v = builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)
    else:
        buffer = cgutils.alloca_once(builder, kind)
        builder.store(constant(kind, 0), buffer)
        copy_small(builder, builder.bitcast(buffer, I8.as_pointer()), pointer, count, lanes)
        v = builder.load(buffer)
    return builder.icmp_unsigned("!=", v, constant(kind, 0))


@intrinsic
def any_kept_of(typingctx, array, mask, offset, count):
    """Whether a mask keeps any of up to ``count`` elements; no mask keeps all."""
    width = vector_of(array).lanes

    def lower(context, builder, sig, args):
        if mask == types.none:
            return ir.Constant(I1, 1)
        keeps = mask_vector(context, builder, mask, args[1], args[2], args[3], width)
        bits = builder.bitcast(keeps, ir.IntType(width))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(array, mask, types.intp, types.intp), lower


def masked_load(builder, pointer, align, mask, rest):
    kind = rest.type
    name = f"llvm.masked.load.v{kind.count}f{64 if kind.element == DOUBLE else 32}.p0"
    pointer = builder.bitcast(pointer, kind.as_pointer())
    return call(builder, name, kind, [pointer, ir.Constant(I32, align), mask, rest])


def masked_store(builder, pointer, align, mask, v):
    name = f"llvm.masked.store.v{v.type.count}f{64 if v.type.element == DOUBLE else 32}.p0"
    pointer = builder.bitcast(pointer, v.type.as_pointer())
    return call(builder, name, ir.VoidType(), [v, pointer, ir.Constant(I32, align), mask])


def gather_16(builder, pointer, count, lanes):
    """Up to ``lanes`` 16-bit elements by way of the stack: CPUs mask no 16-bit loads."""
    kind = ir.VectorType(I16, lanes)
    buffer = cgutils.alloca_once(builder, kind)
    builder.store(constant(kind, 0), buffer)
    copy_small(builder, builder.bitcast(buffer, I16.as_pointer()), pointer, count, lanes)
    return builder.load(buffer)


def copy_small(builder, to, source, count, lanes):
    """Copy ``count`` (at most ``lanes``) elements in pieces of 16, 8, 4, 2 and 1."""
    element = source.type.pointee
    width = {FLOAT: 4, DOUBLE: 8}.get(element) or element.width // 8
    top = ir.Constant(count.type, lanes)
    count = builder.select(builder.icmp_signed("<", count, top), count, top)
    done = cgutils.alloca_once_value(builder, ir.Constant(count.type, 0))
    piece = lanes
    while piece:
        zero, bit = ir.Constant(count.type, 0), ir.Constant(count.type, piece)
        has = builder.icmp_unsigned("!=", builder.and_(count, bit), zero)
        with builder.if_then(has):
            at = builder.load(done)
            kind = ir.VectorType(element, piece).as_pointer()
            part = builder.load(builder.bitcast(builder.gep(source, [at]), kind), align=width)
            builder.store(part, builder.bitcast(builder.gep(to, [at]), kind), align=width)
            builder.store(builder.add(at, ir.Constant(count.type, piece)), done)
        piece //= 2


@intrinsic
def store(typingctx, array, offset, v):
    """Write a full vector, rounded once where the array holds 16-bit floats; no array: nothing."""
    if array != types.none and (not is_loadable(array) or v.element != vector_of(array).element):
        return None

    def lower(context, builder, sig, args):
        if array != types.none:
            pointer, align = address(context, builder, array, args[0], args[1])
            stored = narrow_to_stored(builder, args[2], array)
            builder.store(stored, builder.bitcast(pointer, stored.type.as_pointer()), align=align)

    return types.void(array, types.intp, v), lower


@intrinsic
def store_past_caches(typingctx, array, offset, v):
    """Write a full vector, which has to lie on a line of the cache, to memory: the line is not read, and stays in no cache."""
    if not is_loadable(array) or array.dtype.bitwidth == 16 or v != vector_of(array):
        return None

    def lower(context, builder, sig, args):
        pointer, _ = address(context, builder, array, args[0], args[1])
        pointer = builder.bitcast(pointer, args[2].type.as_pointer())
        instruction = builder.store(args[2], pointer, align=v.lanes * array.dtype.bitwidth // 8)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))

    return types.void(array, types.intp, v), lower


@intrinsic
def drained(typingctx):
    """Wait until other threads see what ``store_past_caches`` wrote: what orders other stores need not order those."""

    def lower(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), lower


@intrinsic
def add_atomically(typingctx, array, i, value):
    """Add to an int64 of an array that other threads add to, too; what it was before."""
    if not (isinstance(array, types.Array) and array.dtype == types.int64):
        return None

    def lower(context, builder, sig, args):
        pointer, _ = address(context, builder, array, args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), lower


@intrinsic
def load_atomically(typingctx, array, i):
    """An int64 that other threads change; what they wrote before they did is seen after this."""
    if not (isinstance(array, types.Array) and array.dtype == types.int64):
        return None

    def lower(context, builder, sig, args):
        pointer, align = address(context, builder, array, args[0], args[1])
        return builder.load_atomic(pointer, "seq_cst", align)

    return types.int64(array, types.intp), lower


@intrinsic
def spin(typingctx):
    """Tell the processor that this thread waits for another's store."""

    def lower(context, builder, sig, args):
        if builder.module.triple.startswith(("x86_64", "i386", "i686")):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), lower


@intrinsic
def prefetch(typingctx, array, offset):
    """Ask for the cache line of an element to be read soon; outside the array it does no harm."""
    return prefetching(array, 0)


@intrinsic
def prefetch_to_write(typingctx, array, offset):
    """As ``prefetch``, for an element to be written soon."""
    return prefetching(array, 1)


def prefetching(array, to_write):
    if array != types.none and not isinstance(array, types.Array):
        return None

    def lower(context, builder, sig, args):
        if array == types.none:
            return
        pointer, _ = address(context, builder, array, args[0], args[1])
        pointer = builder.bitcast(pointer, I8.as_pointer())
        how = [ir.Constant(I32, value) for value in (to_write, 3, 1)]
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *how])

    return types.void(array, types.intp), lower


@intrinsic
def store_part(typingctx, array, offset, count, v):
    """Write the lanes below ``count`` and nothing else; no array: nothing."""
    if array != types.none and (not is_loadable(array) or v != vector_of(array)):
        return None

    def lower(context, builder, sig, args):
        if array == types.none:
            return
        pointer, align = address(context, builder, array, args[0], args[1])
        stored = narrow_to_stored(builder, args[3], array)
        if array.dtype.bitwidth >= 32 and HAS_AVX512:
            masked_store(builder, pointer, align, lanes_below(builder, args[2], v.lanes), stored)
        else:  # AVX2's masked store takes dozens of cycles on AMD, other CPUs have none
            buffer = cgutils.alloca_once(builder, stored.type)
            builder.store(stored, buffer)
            source = builder.bitcast(buffer, STORED[array.dtype].as_pointer())
            copy_small(builder, pointer, source, args[2], v.lanes)

    return types.void(array, types.intp, types.intp, v), lower


@intrinsic
def stack_array(typingctx, like, length):
    """A small array of zeros on the stack, for what is known of each row of a tile.

    Its type is that of the vectors an array ``like`` is computed in, or ``like`` itself.
    """
    return on_stack(like, length, True)


@intrinsic
def stack_block(typingctx, like, length):
    """As ``stack_array``, for larger arrays that are written before they are read: not zeroed."""
    return on_stack(like, length, False)


def on_stack(like, length, is_zeroed):
    if not isinstance(length, types.IntegerLiteral):
        return None
    element = vector_of(like).element if isinstance(like, types.Array) else like.dtype
    array = types.Array(element, 1, "C")

    def lower(context, builder, sig, args):
        from numba.np.arrayobj import populate_array

        item = context.get_data_type(array.dtype)
        size = ir.Constant(I32, length.literal_value)
        data = cgutils.alloca_once(builder, item, size=size)
        data.align = 64
        if is_zeroed:
            zeros = constant(ir.VectorType(item, length.literal_value), 0)
            builder.store(zeros, builder.bitcast(data, zeros.type.as_pointer()), align=64)
        result = structure(context, builder, array)
        bytes_each = context.get_constant(types.intp, array.dtype.bitwidth // 8)
        populate_array(
            result,
            data=data,
            shape=[context.get_constant(types.intp, length.literal_value)],
            strides=[bytes_each],
            itemsize=bytes_each,
            meminfo=None,
        )
        return result._getvalue()

    return array(like, length), lower


# 16-bit floats.


def widen_stored(builder, v, array):
    if array.dtype == types.uint16:
        return bfloat16_to_float(builder, v)
    if array.dtype == types.int16:
        return half_to_float(builder, v)
    return v


def narrow_to_stored(builder, v, array):
    if array.dtype == types.uint16:
        return float_to_bfloat16(builder, v)
    if array.dtype == types.int16:
        return float_to_half(builder, v)
    return v


def bfloat16_to_float(builder, v):
    wide = ir.VectorType(I32, v.type.count)
    bits = builder.shl(builder.zext(v, wide), constant(wide, 16))
    return builder.bitcast(bits, ir.VectorType(FLOAT, v.type.count))


def float_to_bfloat16(builder, v):
    """Round to nearest even. NaN stays NaN where its last 16 bits are zero, as they are in all
    that the CPU makes and in those of bfloat16 arrays: the addition then carries nothing over."""
    wide = ir.VectorType(I32, v.type.count)
    bits = builder.bitcast(v, wide)
    even = builder.and_(builder.lshr(bits, constant(wide, 16)), constant(wide, 1))
    bits = builder.add(bits, builder.add(even, constant(wide, 0x7FFF)))
    return builder.trunc(builder.lshr(bits, constant(wide, 16)), ir.VectorType(I16, v.type.count))


def half_to_float(builder, v):
    lanes = v.type.count
    if HAS_HALF:
        half = builder.bitcast(v, ir.VectorType(ir.HalfType(), lanes))
        return builder.fpext(half, ir.VectorType(FLOAT, lanes))
    wide, floats = ir.VectorType(I32, lanes), ir.VectorType(FLOAT, lanes)
    bits = builder.zext(v, wide)
    magnitude = builder.shl(builder.and_(bits, constant(wide, 0x7FFF)), constant(wide, 13))
    # 2**112 moves the exponent's bias and makes subnormals normal; inf and NaN lie above.
    value = builder.fmul(builder.bitcast(magnitude, floats), constant(floats, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, constant(wide, 0x7C00 << 13))
    value = builder.select(
        special, builder.or_(magnitude, constant(wide, 0x7F800000)), builder.bitcast(value, wide)
    )
    sign = builder.shl(builder.and_(bits, constant(wide, 0x8000)), constant(wide, 16))
    return builder.bitcast(builder.or_(value, sign), floats)


def float_to_half(builder, v):
    lanes = v.type.count
    if HAS_HALF:
        return builder.bitcast(
            builder.fptrunc(v, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(I16, lanes)
        )
    wide, floats = ir.VectorType(I32, lanes), ir.VectorType(FLOAT, lanes)
    bits = builder.bitcast(v, wide)
    magnitude = builder.and_(bits, constant(wide, 0x7FFFFFFF))
    value = builder.bitcast(magnitude, floats)
    # Normal results: round the 13 bits away to nearest even, then move the bias.
    even = builder.and_(builder.lshr(magnitude, constant(wide, 13)), constant(wide, 1))
    normal = builder.add(magnitude, builder.add(even, constant(wide, 0xFFF - (112 << 23))))
    normal = builder.lshr(normal, constant(wide, 13))
    # Subnormal results: adding 0.5 leaves the rounded bits at the end of the significand.
    small = builder.bitcast(builder.fadd(value, constant(floats, 0.5)), wide)
    small = builder.sub(small, constant(wide, 0x3F000000))
    is_small = builder.icmp_unsigned("<", magnitude, constant(wide, 113 << 23))
    result = builder.select(is_small, small, normal)
    is_large = builder.icmp_unsigned(">=", magnitude, constant(wide, (127 + 16) << 23))
    result = builder.select(is_large, constant(wide, 0x7C00), result)
    result = builder.select(builder.fcmp_unordered("uno", v, v), constant(wide, 0x7E00), result)
    sign = builder.lshr(builder.and_(bits, constant(wide, 0x80000000)), constant(wide, 16))
    return builder.trunc(builder.or_(result, sign), ir.VectorType(I16, lanes))
