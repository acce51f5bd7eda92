"""What kernels compute with vectors: operators, fma, comparisons, sums across lanes."""

import math
import operator
import struct

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin

from .types import (
    DOUBLE,
    HAS_AVX2,
    HAS_AVX512,
    HAS_FMA,
    I32,
    Mask,
    Vector,
    broadcast,
    call,
    coerce,
    constant,
    llvm_integers,
    llvm_vector,
)

# Operators: vector with vector, or vector with scalar on either side.

ARITHMETIC = {
    operator.add: "fadd",
    operator.sub: "fsub",
    operator.mul: "fmul",
    operator.truediv: "fdiv",
}
COMPARISON = {
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
}
LOGIC = {operator.and_: "and_", operator.or_: "or_"}


def vector_among(args):
    """The one vector type among an operator's arguments, or None if they do not fit."""
    vectors = {a for a in args if isinstance(a, Vector)}
    others = [a for a in args if not isinstance(a, (Vector, types.Number))]
    return vectors.pop() if len(vectors) == 1 and not others else None


def add_operator(op, result_type, emit):
    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            vector = vector_among(args)
            return signature(result_type(vector), *args) if vector else None

    def lower(context, builder, sig, args):
        vector = vector_among(sig.args)
        pair = zip(args, sig.args, strict=True)
        return emit(builder, *[coerce(context, builder, a, t, vector) for a, t in pair])

    for args in (Vector, Vector), (Vector, types.Number), (types.Number, Vector):
        lower_builtin(op, *args)(lower)


for op, name in ARITHMETIC.items():
    add_operator(op, lambda v: v, lambda builder, a, b, name=name: getattr(builder, name)(a, b))
for op, name in COMPARISON.items():
    add_operator(
        op, lambda v: Mask(v.lanes), lambda builder, a, b, name=name: builder.fcmp_ordered(name, a, b)
    )


def add_logic(op, name):
    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            if all(isinstance(a, Mask) for a in args):
                return signature(args[0], *args)
            return None

    @lower_builtin(op, Mask, Mask)
    def lower(context, builder, sig, args):
        return getattr(builder, name)(*args)


for op, name in LOGIC.items():
    add_logic(op, name)


# Functions.


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c with a single rounding; also of float64 numbers."""
    vector = vector_among((a, b, c))
    if a == b == c == types.float64:
        return a(a, b, c), lambda context, builder, sig, args: fma_of_numbers(builder, *args)
    if vector is None:
        return None

    def lower(context, builder, sig, args):
        pair = zip(args, sig.args, strict=True)
        a, b, c = (coerce(context, builder, v, t, vector) for v, t in pair)
        if HAS_FMA:
            return call(builder, f"llvm.fma.v{vector.lanes}f{vector.element.bitwidth}", a.type, [a, b, c])
        return (emulated_fma64 if vector.element == types.float64 else emulated_fma32)(builder, a, b, c)

    return vector(a, b, c), lower


def fma_of_numbers(builder, a, b, c):
    return call(builder, "llvm.fma.f64", a.type, [a, b, c]) if HAS_FMA else emulated_fma64(builder, a, b, c)


def emulated_fma32(builder, a, b, c):
    """float32 fma for CPUs without one: the product is exact in float64."""
    wide = ir.VectorType(DOUBLE, a.type.count)
    a, b, d = (builder.fpext(v, wide) for v in (a, b, c))
    return builder.fptrunc(builder.fadd(builder.fmul(a, b), d), c.type)


def emulated_fma64(builder, a, b, c):
    """float64 fma for CPUs without one, by Dekker's product and Knuth's sum."""
    add, sub, mul = builder.fadd, builder.fsub, builder.fmul

    def split(v):
        t = mul(v, constant(v.type, 134217729.0))
        high = sub(t, sub(t, v))
        return high, sub(v, high)

    product = mul(a, b)
    (ah, al), (bh, bl) = split(a), split(b)
    error = add(sub(mul(ah, bh), product), mul(ah, bl))
    error = add(add(error, mul(al, bh)), mul(al, bl))
    total = add(product, c)
    z = sub(total, product)
    rounding = add(sub(product, sub(total, z)), sub(c, z))
    error = add(error, rounding)
    # numbers above 2**996 are too large to be split: there the error is NaN, and stays unknown
    return builder.select(builder.fcmp_ordered("==", error, error), add(total, error), total)


@intrinsic
def maximum(typingctx, a, b):
    """The larger of a and b in every lane; b where one of them is NaN (one instruction)."""
    return chosen(">", a, b)


@intrinsic
def minimum(typingctx, a, b):
    """The smaller of a and b in every lane; b where one of them is NaN."""
    return chosen("<", a, b)


def chosen(comparison, a, b):
    vector = vector_among((a, b))
    if vector is None:
        return None

    def lower(context, builder, sig, args):
        pair = zip(args, sig.args, strict=True)
        a, b = (coerce(context, builder, v, t, vector) for v, t in pair)
        return builder.select(builder.fcmp_ordered(comparison, a, b), a, b)

    return vector(a, b), lower


@intrinsic
def select(typingctx, mask, a, b):
    """a where the mask holds, else b; also of float64 numbers."""
    vector = vector_among((a, b))
    if isinstance(mask, types.Boolean) and a == b == types.float64:
        return a(mask, a, b), lambda context, builder, sig, args: builder.select(*args)
    if vector is None or not isinstance(mask, Mask):
        return None

    def lower(context, builder, sig, args):
        pair = zip(args[1:], sig.args[1:], strict=True)
        a, b = (coerce(context, builder, v, t, vector) for v, t in pair)
        return builder.select(args[0], a, b)

    return vector(mask, a, b), lower


@intrinsic
def splat(typingctx, like, value):
    """A vector of the type of ``like`` with ``value`` in every lane."""
    if not isinstance(like, Vector):
        return None

    def lower(context, builder, sig, args):
        return coerce(context, builder, args[1], sig.args[1], like)

    return like(like, value), lower


@intrinsic
def operand(typingctx, like, value):
    """As ``splat``, for a constant of a loop that needs more of them than there are registers.

    LLVM would load a constant that it knows by an instruction of its own in every round; one that
    it does not know it keeps in memory, from where most instructions can take an operand.
    """
    if not isinstance(like, Vector):
        return None

    def lower(context, builder, sig, args):
        v = coerce(context, builder, args[1], sig.args[1], like)
        if not HAS_AVX2 or HAS_AVX512:
            return v
        lanes = like.lanes * like.element.bitwidth // 256
        register = ir.VectorType(v.type.element, v.type.count // lanes)
        index = ir.Constant(ir.VectorType(I32, register.count), list(range(register.count)))
        part = builder.shuffle_vector(v, v, index)
        part = builder.asm(ir.FunctionType(register, [register]), "", "=x,0", [part], True)
        index = list(range(register.count)) * lanes
        return builder.shuffle_vector(part, part, ir.Constant(ir.VectorType(I32, len(index)), index))

    return like(like, value), lower


@intrinsic
def plus(typingctx, a, b, one):
    """a + b, where there is an fma as a * one + b with a ``one`` that is an ``operand``.

    A conversion needs the parts of the CPU that add; those that multiply are idle beside it.
    """
    if not isinstance(a, Vector) or not a == b == one:
        return None

    def lower(context, builder, sig, args):
        a, b, one = args
        if HAS_FMA:
            return call(
                builder, f"llvm.fma.v{a.type.count}f{sig.return_type.element.bitwidth}", a.type, [a, one, b]
            )
        return builder.fadd(a, b)

    return a(a, b, one), lower


@intrinsic
def low_bits_as_exponent(typingctx, v):
    """Shift the bits of every element to where the exponent is: for exp's 2**n."""
    if not isinstance(v, Vector):
        return None

    def lower(context, builder, sig, args):
        integers = llvm_integers(v)
        bits = builder.bitcast(args[0], integers)
        shift = constant(integers, 52 if v.element == types.float64 else 23)
        return builder.bitcast(builder.shl(bits, shift), llvm_vector(v))

    return v(v), lower


@intrinsic
def lowered(typingctx, v, powers):
    """v / 2**powers, rounded to nearest even where that is subnormal, for float32 vectors from 0 on, without NaN.

    It is made by integers: arithmetic with a subnormal result takes the CPU many times as long.
    """
    if not isinstance(v, Vector) or v.element != types.float32 or not isinstance(powers, types.Integer):
        return None

    def lower(context, builder, sig, args):
        v, integers = args[0], llvm_integers(sig.args[0])
        exponent = builder.shl(builder.trunc(args[1], I32), ir.Constant(I32, 23))
        exponent = broadcast(builder, exponent, integers.count)
        # 2**powers times the smallest normal number: what is added to it is rounded as a subnormal number is
        normal = builder.add(exponent, constant(integers, 1 << 23))
        smallest = builder.bitcast(normal, v.type)
        is_below = builder.fcmp_ordered("<", v, smallest)
        v = builder.fadd(v, builder.select(is_below, smallest, constant(v.type, 0.0)))
        bits = builder.sub(builder.bitcast(v, integers), builder.select(is_below, normal, exponent))
        return builder.bitcast(bits, v.type)

    return v(v, powers), lower


@intrinsic
def exponent_and_mantissa(typingctx, v):
    """k and f with v = 2**k * f and f between sqrt(1/2) and sqrt(2), for positive float64 vectors."""
    if not isinstance(v, Vector) or v.element != types.float64:
        return None

    def lower(context, builder, sig, args):
        integers = llvm_integers(v)
        bits = builder.bitcast(args[0], integers)
        low = constant(integers, bits_of(math.sqrt(0.5)))
        k = builder.ashr(builder.sub(bits, low), constant(integers, 52))
        f = builder.sub(bits, builder.shl(k, constant(integers, 52)))
        shifted = builder.bitcast(builder.add(k, constant(integers, bits_of(1.5 * 2.0**52))), args[0].type)
        exponent = builder.fsub(shifted, constant(args[0].type, 1.5 * 2.0**52))
        return context.make_tuple(builder, sig.return_type, [exponent, builder.bitcast(f, args[0].type)])

    return types.UniTuple(v, 2)(v), lower


def bits_of(number):
    return struct.unpack("q", struct.pack("d", number))[0]


def halves(builder, vector):
    lanes = vector.type.count // 2
    index = ir.VectorType(I32, lanes)
    low = ir.Constant(index, list(range(lanes)))
    high = ir.Constant(index, list(range(lanes, 2 * lanes)))
    return builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high)


def across_lanes(builder, vector, combine):
    """Combine all lanes, half with half until one is left: a fixed order."""
    while vector.type.count > 1:
        vector = combine(*halves(builder, vector))
    return builder.extract_element(vector, ir.Constant(I32, 0))


@intrinsic
def max_across(typingctx, v):
    """The largest element of a vector."""
    if not isinstance(v, Vector):
        return None

    def lower(context, builder, sig, args):
        return across_lanes(
            builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)
        )

    return v.element(v), lower


@intrinsic
def sum_across(typingctx, v):
    """The sum of a vector's elements, half with half until one is left."""
    if not isinstance(v, Vector):
        return None

    def lower(context, builder, sig, args):
        return across_lanes(builder, args[0], builder.fadd)

    return v.element(v), lower


@intrinsic
def sum_of_pairs(typingctx, high, low):
    """The sum of two float64 vectors, the second a correction of the first, in two parts.

    Half of the lanes is added to the other half until one is left; what the additions of
    the first lose goes to the second.
    """
    if not isinstance(high, Vector) or high != low or high.element != types.float64:
        return None

    def lower(context, builder, sig, args):
        add, sub = builder.fadd, builder.fsub
        total, lost = args
        while total.type.count > 1:
            a, b = halves(builder, total)
            total = add(a, b)
            z = sub(total, a)
            rounding = add(sub(a, sub(total, z)), sub(b, z))
            lost = add(add(*halves(builder, lost)), rounding)
        zero = ir.Constant(I32, 0)
        result = [builder.extract_element(v, zero) for v in (total, lost)]
        return context.make_tuple(builder, sig.return_type, result)

    return types.UniTuple(types.float64, 2)(high, low), lower


@intrinsic
def widened(typingctx, v):
    """A float32 vector as float64."""
    if not isinstance(v, Vector):
        return None
    wide = Vector(types.float64, v.lanes)

    def lower(context, builder, sig, args):
        return builder.fpext(args[0], llvm_vector(wide))

    return wide(v), lower


@intrinsic
def narrowed(typingctx, v):
    """A float64 vector rounded to float32."""
    if not isinstance(v, Vector):
        return None
    narrow = Vector(types.float32, v.lanes)

    def lower(context, builder, sig, args):
        return builder.fptrunc(args[0], llvm_vector(narrow))

    return narrow(v), lower


@intrinsic
def scaled_entry(typingctx, t, table):
    """For exp: the entry of an 8-entry table that the low 3 bits of t select, times 2**n.

    ``table`` holds the bits of float32 numbers less j << 20 for entry j, so that one
    addition of bits << 20 puts n, which stands above those 3 bits in t, into the exponent.
    """
    if not isinstance(t, Vector) or t.element != types.float32 or not isinstance(table, types.UniTuple):
        return None

    def lower(context, builder, sig, args):
        integers = llvm_integers(t)
        bits = builder.bitcast(args[0], integers)
        entries = [builder.trunc(builder.extract_value(args[1], j), I32) for j in range(8)]
        entry = lookup(builder, bits, entries)
        return builder.bitcast(builder.add(entry, builder.shl(bits, constant(integers, 20))), llvm_vector(t))

    return t(t, table), lower


def lookup(builder, index, entries):
    """entries[index & 7] in every lane: one permutation per register where x86 has one."""
    lanes = index.type.count
    if HAS_AVX512 and lanes % 16 == 0:
        return permuted(builder, index, entries * 2, "llvm.x86.avx512.permvar.si.512")
    if HAS_AVX2 and lanes % 8 == 0:
        return permuted(builder, index, entries, "llvm.x86.avx2.permd")
    values = [broadcast(builder, entry, lanes) for entry in entries]
    for bit in (1, 2, 4):
        is_set = builder.and_(index, constant(index.type, bit))
        is_set = builder.icmp_unsigned("!=", is_set, constant(index.type, 0))
        pairs = zip(values[0::2], values[1::2], strict=True)
        values = [builder.select(is_set, odd, even) for even, odd in pairs]
    return values[0]


def permuted(builder, index, entries, name):
    """Look up register by register with an x86 permutation of all lanes."""
    register = ir.VectorType(I32, len(entries))
    table = ir.Constant(register, ir.Undefined)
    for j, entry in enumerate(entries):
        table = builder.insert_element(table, entry, ir.Constant(I32, j))
    parts = []
    for start in range(0, index.type.count, len(entries)):
        lanes = ir.Constant(register, list(range(start, start + len(entries))))
        part = builder.shuffle_vector(index, index, lanes)
        parts.append(call(builder, name, register, [table, part]))
    while len(parts) > 1:
        pairs = zip(parts[0::2], parts[1::2], strict=True)
        parts = [joined(builder, low, high) for low, high in pairs]
    return parts[0]


def joined(builder, low, high):
    lanes = ir.VectorType(I32, 2 * low.type.count)
    return builder.shuffle_vector(low, high, ir.Constant(lanes, list(range(lanes.count))))
