"""All intrinsics and all PTX of the package; ``simulated`` has the same names for Numba's simulator.

A value in a kernel is a vector of the elements that one thread holds, with operators, so
that a kernel reads like the formula and its constants take the type of what they meet.
All of a vector stays in registers. One number for a whole row is a vector of one lane.

Memory is named by its address, an int64: arrays would cost a launch nine arguments each.
Words for storage types: f2 and b2 are float16 and bfloat16, f4 and f8 float32 and float64.

LLVM code is written as NVVM takes it for every device: no fneg, no maxnum, scalars only.
"""

import operator
from functools import partial

from llvmlite import ir
from numba.cuda import types
from numba.cuda.cudadecl import registry as typing_registry
from numba.cuda.cudaimpl import registry as lowering_registry
from numba.cuda.datamodel import models
from numba.cuda.extending import intrinsic, register_model
from numba.cuda.typing.templates import AbstractTemplate, signature

from .geometry import ITEMSIZE, STRIDED_LANES, VECTOR_BYTES

FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
WORD = {"f2": I16, "b2": I16, "f4": I32, "f8": I64}
INTEGER = {
    "b1": I8, "i1": I8, "u1": I8, "i2": I16, "u2": I16, "i4": I32, "u4": I32, "i8": I64, "u8": I64,
}  # fmt: skip


class Vector(types.Type):
    """Numba's type of the elements of type ``element`` that one thread holds."""

    def __init__(self, element, lanes):
        self.element, self.lanes = element, lanes
        super().__init__(name=f"device_vector({element}, {lanes})")


class Mask(types.Type):
    """Numba's type of a vector of booleans."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"device_mask({lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(scalar(fe_type), fe_type.lanes))


@register_model(Mask)
class MaskModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(I1, fe_type.lanes))


def scalar(vector):
    return DOUBLE if vector.element == types.float64 else FLOAT


def element_of(compute):
    return types.float64 if compute == "f8" else types.float32


def i32(value):
    return ir.Constant(I32, value)


def lane(builder, vector, i):
    return builder.extract_element(vector, i32(i))


def lanes_of(builder, vector):
    return [lane(builder, vector, i) for i in range(vector.type.count)]


def assembled(builder, values):
    values = list(values)
    vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        vector = builder.insert_element(vector, value, i32(i))
    return vector


def call(builder, name, result, *args):
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), args)


def asm(builder, result, text, constraints, *args, effect=False):
    return builder.asm(ir.FunctionType(result, [a.type for a in args]), text, constraints, args, effect)


def widest(given):
    """The vector type of the result of an operation on vectors (one lane goes with any) and numbers."""
    vectors = [a for a in given if isinstance(a, Vector)]
    if not vectors or not all(isinstance(a, (Vector, types.Number)) for a in given):
        return None
    most = max(vectors, key=lambda v: v.lanes)
    fits = all(v.element == most.element and v.lanes in (1, most.lanes) for v in vectors)
    return most if fits else None


def spread(context, builder, value, given, vector):
    """The lanes of an operand: a number, rounded to the element's type, and one lane go into all."""
    if isinstance(given, Vector):
        one = lanes_of(builder, value)
    else:
        one = [context.cast(builder, value, given, vector.element)]
    return one if len(one) == vector.lanes else one * vector.lanes


def lanewise(emit, result=None):
    """An intrinsic's typing and lowering from what it does to one lane."""

    def typed(*given):
        vector = widest(given)
        if vector is None:
            return None
        kind = result(vector) if result else vector

        def lower(context, builder, sig, args):
            pairs = zip(args, sig.args, strict=True)
            operands = [spread(context, builder, a, t, vector) for a, t in pairs]
            return assembled(builder, [emit(builder, *o) for o in zip(*operands, strict=True)])

        return kind(*given), lower

    return typed


# Operators.


def add_operator(op, typed):
    @typing_registry.register_global(op)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            found = typed(*args)
            return found and found[0]

    def lower(context, builder, sig, args):
        return typed(*sig.args)[1](context, builder, sig, args)

    for args in (Vector, Vector), (Vector, types.Number), (types.Number, Vector):
        lowering_registry.lower(op, *args)(lower)


for op, name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    add_operator(op, lanewise(lambda builder, a, b, name=name: getattr(builder, name)(a, b)))
for op, name in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    add_operator(
        op,
        lanewise(lambda builder, a, b, name=name: builder.fcmp_ordered(name, a, b), lambda v: Mask(v.lanes)),
    )


def add_logic(op, name):
    @typing_registry.register_global(op)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            masks = all(isinstance(a, Mask) for a in args) and args[0] == args[1]
            return signature(args[0], *args) if masks else None

    @lowering_registry.lower(op, Mask, Mask)
    def lower(context, builder, sig, args):
        pairs = zip(*(lanes_of(builder, a) for a in args), strict=True)
        return assembled(builder, [getattr(builder, name)(a, b) for a, b in pairs])


add_logic(operator.and_, "and_")
add_logic(operator.or_, "or_")


# Arithmetic.


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c with a single rounding."""
    return lanewise(
        lambda builder, a, b, c: call(
            builder, "llvm.fma.f64" if a.type == DOUBLE else "llvm.fma.f32", a.type, a, b, c
        )
    )(a, b, c)


def rounded(name):
    """Addition or subtraction of what a and b were rounded to: ptxas fuses no multiplication with it."""

    def emit(builder, a, b):
        kind, letter = ("f64", "d") if a.type == DOUBLE else ("f32", "f")
        return asm(builder, a.type, f"{name}.rn.{kind} $0, $1, $2;", f"={letter},{letter},{letter}", a, b)

    return lanewise(emit)


@intrinsic
def plus(typingctx, a, b):
    """a + b, which may be products, each rounded."""
    return rounded("add")(a, b)


@intrinsic
def minus(typingctx, a, b):
    """a - b, which may be products, each rounded."""
    return rounded("sub")(a, b)


def larger(builder, a, b):
    if a.type == FLOAT:
        return asm(builder, FLOAT, "max.NaN.f32 $0, $1, $2;", "=f,f,f", a, b)
    is_larger = builder.or_(builder.fcmp_ordered(">", a, b), builder.fcmp_unordered("uno", a, a))
    return builder.select(is_larger, a, b)


@intrinsic
def maximum(typingctx, a, b):
    """The larger of a and b in every lane; NaN where one of them is."""
    return lanewise(larger)(a, b)


@intrinsic
def absolute(typingctx, a):
    """The absolute value."""

    def emit(builder, a):
        bits, mask = (I64, 0x7FFFFFFFFFFFFFFF) if a.type == DOUBLE else (I32, 0x7FFFFFFF)
        return builder.bitcast(builder.and_(builder.bitcast(a, bits), ir.Constant(bits, mask)), a.type)

    return lanewise(emit)(a)


@intrinsic
def select(typingctx, mask, a, b):
    """a where the mask holds, else b."""
    vector = widest((a, b))
    if vector is not None and vector.lanes == 1 and isinstance(mask, Mask):
        vector = Vector(vector.element, mask.lanes)
    if vector is None or not isinstance(mask, Mask) or mask.lanes not in (1, vector.lanes):
        return None

    def lower(context, builder, sig, args):
        holds = lanes_of(builder, args[0])
        holds = holds if len(holds) == vector.lanes else holds * vector.lanes
        a, b = (spread(context, builder, v, t, vector) for v, t in zip(args[1:], sig.args[1:], strict=True))
        return assembled(builder, [builder.select(*o) for o in zip(holds, a, b, strict=True)])

    return vector(mask, a, b), lower


@intrinsic
def mask_of(typingctx, condition):
    """A bool as a mask of one lane."""
    if condition != types.boolean:
        return None

    def lower(context, builder, sig, args):
        bit = builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, 0))
        return assembled(builder, [bit])

    return Mask(1)(condition), lower


@intrinsic
def number(typingctx, like, value):
    """A number as a vector of one lane, of the element type of the vector ``like``."""
    if not isinstance(like, Vector) or not isinstance(value, types.Number):
        return None

    def lower(context, builder, sig, args):
        return assembled(builder, [context.cast(builder, args[1], value, like.element)])

    return Vector(like.element, 1)(like, value), lower


@intrinsic
def first(typingctx, vector):
    """The first lane as a number."""
    if not isinstance(vector, Vector):
        return None
    return vector.element(vector), lambda context, builder, sig, args: lane(builder, args[0], 0)


@intrinsic
def vector_of(typingctx, value):
    """A float32 or float64 number as a vector of one lane."""
    if value not in (types.float32, types.float64):
        return None
    return Vector(value, 1)(value), lambda context, builder, sig, args: assembled(builder, [args[0]])


@intrinsic
def times_power(typingctx, v, t):
    """v * 2**n, where n is what the low bits of t say, with the exponent's bias: 0 < n < all ones."""

    def emit(builder, v, t):
        bits, place = (I64, 52) if v.type == DOUBLE else (I32, 23)
        power = builder.shl(builder.bitcast(t, bits), ir.Constant(bits, place))
        return builder.fmul(v, builder.bitcast(power, v.type))

    return lanewise(emit)(v, t)


def power_of_bits(part):
    """An intrinsic's typing and lowering: 2**n, n with the exponent's bias being ``part`` of the low bits of t."""

    def emit(builder, t):
        bits, place = (I64, 52) if t.type == DOUBLE else (I32, 23)
        n = part(builder, builder.bitcast(t, bits), ir.Constant(bits, 1))
        return builder.bitcast(builder.shl(n, ir.Constant(bits, place)), t.type)

    return lanewise(emit)


@intrinsic
def first_half_power(typingctx, t):
    """2**(n // 2), where n is what the low bits of t say, with twice the exponent's bias."""
    return power_of_bits(lambda builder, n, one: builder.lshr(n, one))(t)


@intrinsic
def second_half_power(typingctx, t):
    """2**(n - n // 2), with n as of ``first_half_power``."""
    return power_of_bits(lambda builder, n, one: builder.sub(n, builder.lshr(n, one)))(t)


@intrinsic
def power_of_two_above(typingctx, v):
    """The power of two in (v, 2 v], as if v were at least 2**-80 (float64: 2**-900); at most the largest."""

    def emit(builder, v):
        bits, low, high = (I64, 2.0**-900, 2.0**1022) if v.type == DOUBLE else (I32, 2.0**-80, 2.0**126)
        exponent = 0x7FF0000000000000 if v.type == DOUBLE else 0x7F800000
        low, high = ir.Constant(v.type, low), ir.Constant(v.type, high)
        v = builder.select(builder.fcmp_ordered("<", v, low), low, v)
        v = builder.select(builder.fcmp_ordered(">", v, high), high, v)
        kept = builder.and_(builder.bitcast(v, bits), ir.Constant(bits, exponent))
        return builder.fmul(builder.bitcast(kept, v.type), ir.Constant(v.type, 2.0))

    return lanewise(emit)(v)


@intrinsic
def exponent(typingctx, v):
    """n of 2**n, for powers of two that are normal numbers."""

    def emit(builder, v):
        bits, place, bias = (I64, 52, 1023) if v.type == DOUBLE else (I32, 23, 127)
        biased = builder.lshr(builder.bitcast(v, bits), ir.Constant(bits, place))
        return builder.sitofp(builder.sub(biased, ir.Constant(bits, bias)), v.type)

    return lanewise(emit)(v)


@intrinsic
def exp2_approximate(typingctx, v):
    """2**v of float32 with a relative error of 2**-22; subnormal results are 0."""
    return lanewise(lambda builder, v: asm(builder, FLOAT, "ex2.approx.ftz.f32 $0, $1;", "=f,f", v))(v)


# Sums that are exact, as integers.


def in_pairs(values, combine):
    while len(values) > 1:
        odd = values[-1:] if len(values) % 2 else []
        values = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)] + odd
    return values[0]


MAGIC_64 = 1.5 * 2.0**52
LOW_BITS = 47


def whole_number(builder, x):
    """A number rounded to an integer; of float64 below 2**50."""
    if x.type == FLOAT:
        return call(builder, "llvm.nvvm.f2ll.rn", I64, x)
    magic = ir.Constant(DOUBLE, MAGIC_64)
    return builder.sub(builder.bitcast(builder.fadd(x, magic), I64), builder.bitcast(magic, I64))


@intrinsic
def integer_sum(typingctx, v):
    """The sum of all lanes, each rounded to an integer, and of what rounding left times 2**47.

    The second is 0 for float32, whose elements are below 2**50 and have few bits below 1.
    float64 elements are below 2**50.
    """
    if not isinstance(v, Vector):
        return None

    def lower(context, builder, sig, args):
        values = lanes_of(builder, args[0])
        if v.element == types.float32:
            parts = [whole_number(builder, x) for x in values]
            pair = in_pairs(parts, builder.add), ir.Constant(I64, 0)
        else:
            magic = ir.Constant(DOUBLE, MAGIC_64)
            bits = builder.bitcast(magic, I64)
            high, low = [], []
            for x in values:
                t = builder.fadd(x, magic)
                rest = builder.fsub(x, builder.fsub(t, magic))
                u = call(builder, "llvm.fma.f64", DOUBLE, rest, ir.Constant(DOUBLE, 2.0**LOW_BITS), magic)
                high.append(builder.sub(builder.bitcast(t, I64), bits))
                low.append(builder.sub(builder.bitcast(u, I64), bits))
            pair = in_pairs(high, builder.add), in_pairs(low, builder.add)
        return context.make_tuple(builder, sig.return_type, pair)

    return types.UniTuple(types.int64, 2)(v), lower


@intrinsic
def integer_sum_of_rests(typingctx, v):
    """What ``integer_sum`` gives of numbers so small that one of its sums is 0: the other.

    float32 elements are below 2**24, float64 elements below 2**-4, and a thread has at most 64.
    """
    if not isinstance(v, Vector):
        return None

    def lower(context, builder, sig, args):
        values = lanes_of(builder, args[0])
        if v.element == types.float32:
            parts = [call(builder, "llvm.nvvm.f2i.rn", I32, x) for x in values]
            return builder.sext(in_pairs(parts, builder.add), I64)
        magic, unit = ir.Constant(DOUBLE, MAGIC_64), ir.Constant(DOUBLE, 2.0**LOW_BITS)
        bits = builder.bitcast(magic, I64)
        rounded = [call(builder, "llvm.fma.f64", DOUBLE, x, unit, magic) for x in values]
        return in_pairs([builder.sub(builder.bitcast(x, I64), bits) for x in rounded], builder.add)

    return types.int64(v), lower


@intrinsic
def integer_as(typingctx, like, value):
    """An int64 as a vector of one lane of the element type of ``like``, rounded to nearest."""
    if not isinstance(like, Vector) or value != types.int64:
        return None

    def lower(context, builder, sig, args):
        return assembled(builder, [builder.sitofp(args[1], scalar(like))])

    return Vector(like.element, 1)(like, value), lower


@intrinsic
def as_integer(typingctx, v):
    """A vector of one lane that holds an integer, as int64."""
    if not isinstance(v, Vector) or v.lanes != 1:
        return None
    return types.int64(v), lambda context, builder, sig, args: builder.fptosi(lane(builder, args[0], 0), I64)


@intrinsic
def high_product(typingctx, a, b):
    """The upper 64 bits of the product of two integers, each taken as 64 bits without a sign."""
    if not all(kind in (types.int64, types.uint64) for kind in (a, b)):
        return None

    def lower(context, builder, sig, args):
        return asm(builder, I64, "mul.hi.u64 $0, $1, $2;", "=l,l,l", *args)

    return types.int64(a, b), lower


@intrinsic
def leading_zeros(typingctx, value):
    """How many bits of an int64 are 0 before the first that is not."""
    if value != types.int64:
        return None

    def lower(context, builder, sig, args):
        return builder.ctlz(args[0], ir.Constant(I1, 0))

    return types.int64(value), lower


@intrinsic
def add_to_bins(typingctx, bins, v, amounts, low, step, used):
    """Add every lane's amount, rounded to an integer, to one of the first ``used`` of an array of int64.

    To which, the bits of the lane of v say: those of ``low`` have the first, and a bin has 2**step of them. v is
    not negative, and the array is in shared memory; threads may add at once, and what is elsewhere is left out.
    """
    if not isinstance(bins, types.Array) or not isinstance(v, Vector) or amounts != v:
        return None

    def lower(context, builder, sig, args):
        data = context.make_array(bins)(context, builder, args[0]).data
        low, step, used = args[3:]
        for x, amount in zip(lanes_of(builder, args[1]), lanes_of(builder, args[2]), strict=True):
            word = builder.bitcast(x, I64 if x.type == DOUBLE else I32)
            word = builder.zext(word, I64) if word.type == I32 else word
            bin_ = builder.lshr(builder.sub(word, low), step)
            amount = whole_number(builder, amount)
            adds = builder.icmp_unsigned("!=", amount, ir.Constant(I64, 0))
            with builder.if_then(builder.and_(builder.icmp_unsigned("<", bin_, used), adds)):
                builder.atomic_rmw("add", builder.gep(data, [bin_]), amount, "monotonic")
        return context.get_dummy_value()

    return types.none(bins, v, amounts, types.int64, types.int64, types.int64), lower


@intrinsic
def count(typingctx, mask):
    """How many lanes of a mask hold."""
    if not isinstance(mask, Mask):
        return None

    def lower(context, builder, sig, args):
        ones = [builder.zext(b, I32) for b in lanes_of(builder, args[0])]
        return builder.zext(in_pairs(ones, builder.add), I64)

    return types.int64(mask), lower


@intrinsic
def largest_lane(typingctx, v):
    """The largest lane, NaN if there is one, as a vector of one lane."""
    if not isinstance(v, Vector):
        return None

    def lower(context, builder, sig, args):
        value = in_pairs(lanes_of(builder, args[0]), lambda a, b: larger(builder, a, b))
        return assembled(builder, [value])

    return Vector(v.element, 1)(v), lower


# Threads.


@intrinsic
def from_lane(typingctx, value, distance):
    """The same variable in the thread of the warp whose lane number differs in the bits ``distance``."""
    if not (value == types.int64 or (isinstance(value, Vector) and value.lanes == 1)):
        return None

    def lower(context, builder, sig, args):
        plain = lane(builder, args[0], 0) if isinstance(value, Vector) else args[0]
        wide = plain.type in (I64, DOUBLE)
        words = [builder.bitcast(plain, I64 if wide else I32)]
        if wide:
            high = builder.lshr(words[0], ir.Constant(I64, 32))
            words = [builder.trunc(words[0], I32), builder.trunc(high, I32)]
        step = builder.trunc(args[1], I32) if args[1].type == I64 else args[1]
        text = "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;"
        got = [asm(builder, I32, text, "=r,r,r", w, step, effect=True) for w in words]
        for shuffle in got:  # else NVVM makes copies, for a part of the warp each
            shuffle.attributes.add("convergent")
        result = got[0]
        if wide:
            high = builder.shl(builder.zext(got[1], I64), ir.Constant(I64, 32))
            result = builder.or_(high, builder.zext(got[0], I64))
        result = builder.bitcast(result, plain.type)
        return assembled(builder, [result]) if isinstance(value, Vector) else result

    return value(value, distance), lower


@intrinsic
def bits_of(typingctx, value):
    """The bits of a vector of one lane, or of an int64, as int64: what a cell of shared memory holds."""
    if value == types.int64:
        return types.int64(value), lambda context, builder, sig, args: args[0]
    if not isinstance(value, Vector) or value.lanes != 1:
        return None

    def lower(context, builder, sig, args):
        plain = lane(builder, args[0], 0)
        if plain.type == DOUBLE:
            return builder.bitcast(plain, I64)
        return builder.zext(builder.bitcast(plain, I32), I64)

    return types.int64(value), lower


@intrinsic
def from_bits(typingctx, like, bits):
    """What ``bits_of`` was given, a value of the type of ``like``."""
    if like == types.int64:
        return types.int64(like, bits), lambda context, builder, sig, args: args[1]
    if not isinstance(like, Vector) or like.lanes != 1:
        return None

    def lower(context, builder, sig, args):
        wide = like.element == types.float64
        plain = args[1] if wide else builder.trunc(args[1], I32)
        return assembled(builder, [builder.bitcast(plain, scalar(like))])

    return like(like, bits), lower


# Memory.


def offset_in_vector(builder, address, storage):
    """How many elements an address lies behind a multiple of 16 bytes."""
    low = builder.and_(builder.trunc(address, I32), i32(VECTOR_BYTES - 1))
    return builder.udiv(low, i32(ITEMSIZE[storage]))


def element_address(builder, address, index, storage):
    return builder.add(address, builder.mul(builder.sext(index, I64), ir.Constant(I64, ITEMSIZE[storage])))


def load_vector(builder, address, storage):
    """16 bytes as words of the size of an element."""
    return unpacked(builder, load_packed(builder, address, storage), storage)


def load_packed(builder, address, storage):
    """16 bytes as words of 32 bits (float64: of 64)."""
    if storage == "f8":
        kind = ir.LiteralStructType([I64] * 2)
        text = "ld.global.L1::no_allocate.v2.b64 {$0, $1}, [$2];"
        got = asm(builder, kind, text, "=l,=l,l", address, effect=True)
        return [builder.extract_value(got, i) for i in range(2)]
    kind = ir.LiteralStructType([I32] * 4)
    text = "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];"
    got = asm(builder, kind, text, "=r,=r,=r,=r,l", address, effect=True)
    return [builder.extract_value(got, i) for i in range(4)]


def unpacked(builder, words, storage):
    """Words of 32 bits (float64: of 64) as words of the size of an element."""
    if ITEMSIZE[storage] > 2:
        return words
    halves = [(builder.trunc(w, I16), builder.trunc(builder.lshr(w, i32(16)), I16)) for w in words]
    return [h for pair in halves for h in pair]


def in_words(builder, words, storage):
    """What ``unpacked`` was given."""
    if ITEMSIZE[storage] > 2:
        return words
    pairs = [[builder.zext(w, I32) for w in words[i : i + 2]] for i in range(0, len(words), 2)]
    return [builder.or_(low, builder.shl(high, i32(16))) for low, high in pairs]


def packed(builder, values, storage):
    """16 bytes of numbers as words of 32 bits (float64: of 64)."""
    if storage == "f8":
        return [builder.bitcast(v, I64) for v in values]
    values = [narrowed(builder, v, storage) for v in values]
    if storage == "f4":
        return [builder.bitcast(v, I32) for v in values]
    text = f"cvt.rn.{'bf16' if storage == 'b2' else 'f16'}x2.f32 $0, $1, $2;"
    pairs = zip(values[::2], values[1::2], strict=True)
    return [asm(builder, I32, text, "=r,f,f", high, low) for low, high in pairs]


def store_vector(builder, address, values, storage):
    """Store 16 bytes of numbers."""
    words = packed(builder, values, storage)
    if storage == "f8":
        text = "st.global.cs.v2.b64 [$0], {$1, $2};"
        return asm(builder, ir.VoidType(), text, "l,l,l", address, *words, effect=True)
    text = "st.global.cs.v4.b32 [$0], {$1, $2, $3, $4};"
    return asm(builder, ir.VoidType(), text, "l,r,r,r,r", address, *words, effect=True)


def word_pointer(builder, address, storage):
    return builder.inttoptr(address, ir.PointerType(WORD.get(storage) or INTEGER[storage], 1))


def from_word(builder, word, storage, compute):
    """The number that a word of memory holds."""
    if storage in INTEGER:
        convert = builder.sitofp if storage[0] == "i" else builder.uitofp
        return convert(word, DOUBLE if compute == "f8" else FLOAT)
    if storage == "b2":
        wide = builder.shl(builder.zext(word, I32), i32(16))
        value = builder.bitcast(wide, FLOAT)
    elif storage == "f2":
        value = builder.fpext(builder.bitcast(word, HALF), FLOAT)
    else:
        value = builder.bitcast(word, FLOAT if storage == "f4" else DOUBLE)
    return builder.fpext(value, DOUBLE) if compute == "f8" and storage != "f8" else value


def narrowed(builder, value, storage):
    """A number as float32 (float64 if that is stored), rounded so that rounding it again does no harm."""
    if value.type != DOUBLE or storage == "f8":
        return value
    if storage == "f4":
        return builder.fptrunc(value, FLOAT)
    # to odd: the second rounding then sees whether the first left anything out
    toward_zero = asm(builder, FLOAT, "cvt.rz.f32.f64 $0, $1;", "=f,d", value)
    is_exact = builder.fcmp_unordered("==", builder.fpext(toward_zero, DOUBLE), value)
    odd = builder.bitcast(builder.or_(builder.bitcast(toward_zero, I32), i32(1)), FLOAT)
    return builder.select(is_exact, toward_zero, odd)


def to_word(builder, value, storage):
    """A number rounded once, to nearest even, to what memory holds."""
    if storage == "b1":
        return builder.zext(builder.fcmp_unordered("!=", value, ir.Constant(value.type, 0.0)), I8)
    value = narrowed(builder, value, storage)
    if storage == "b2":
        return asm(builder, I16, "cvt.rn.bf16.f32 $0, $1;", "=h,f", value)
    if storage == "f2":
        return builder.bitcast(builder.fptrunc(value, HALF), I16)
    return builder.bitcast(value, WORD[storage])


def pieces(builder, args, storage, vectors, aligned):
    """For each vector of a thread: its first element, and whether all and some of it are the row's.

    args are the row's address, the anchor, the thread's place in its team, the team's size and
    the row's length. Vectors lie at multiples of 16 bytes if the row begins where the anchor
    does, so many bytes behind such a multiple; the first and the last may reach beyond the row.
    Where the row begins elsewhere no vector is whole: its elements are taken one by one.
    """
    address, anchor, thread, team, n = args
    lanes = VECTOR_BYTES // ITEMSIZE[storage]
    offset = i32(0) if aligned else offset_in_vector(builder, anchor, storage)
    index = thread
    for _ in range(vectors):
        start = builder.sub(builder.mul(index, i32(lanes)), offset)
        some = builder.icmp_signed("<", start, n)
        every = some
        if not aligned:
            end = builder.add(start, i32(lanes))
            some = builder.and_(some, builder.icmp_signed(">", end, i32(0)))
            inside = builder.icmp_signed("<=", end, n)
            every = builder.and_(inside, builder.icmp_signed(">=", start, i32(0)))
            apart = builder.and_(builder.xor(address, anchor), ir.Constant(I64, VECTOR_BYTES - 1))
            every = builder.and_(every, builder.icmp_unsigned("==", apart, ir.Constant(I64, 0)))
        yield start, every, some
        index = builder.add(index, team)


def as_i32(builder, value):
    return builder.trunc(value, I32) if value.type == I64 else value


FILL = {
    0.0: {"b2": 0, "f2": 0, "f4": 0, "f8": 0},
    float("-inf"): {"b2": 0xFF80, "f2": 0xFC00, "f4": 0xFF800000, "f8": 0xFFF0000000000000},
}


def when(builder, condition, emit, otherwise):
    """The values that ``emit`` gives where the condition holds, else ``otherwise``."""
    before = builder.block
    with builder.if_then(condition):
        values = emit()
        inside = builder.block
    result = []
    for value, default in zip(values, otherwise, strict=True):
        phi = builder.phi(value.type)
        phi.add_incoming(value, inside)
        phi.add_incoming(default, before)
        result.append(phi)
    return result


def elements_inside(builder, start, n, lanes):
    """For the elements of a vector that begins at element ``start``: the index, and whether it is the row's."""
    for i in range(lanes):
        j = builder.add(start, i32(i))
        yield j, builder.and_(builder.icmp_signed(">=", j, i32(0)), builder.icmp_signed("<", j, n))


def load_word(builder, address, storage):
    return [builder.load(word_pointer(builder, address, storage))]


def load_elements(builder, address, start, n, storage, empty):
    """The words of a vector that begins at element ``start`` of a row of n, one by one."""
    words = []
    for j, is_inside in elements_inside(builder, start, n, VECTOR_BYTES // ITEMSIZE[storage]):
        at = element_address(builder, address, j, storage)
        words += when(builder, is_inside, partial(load_word, builder, at, storage), [empty])
    return words


def loader(storage, compute, vectors, aligned, fill, early=False):
    """The function that loads a thread's vectors of a row; ``fill`` stands where the row has no element.

    ``aligned`` promises a row that begins and ends at multiples of 16 bytes. Where a vector
    belongs to the row in part, its elements are loaded one by one. ``early``: all whole vectors
    are asked for before any is waited for; else ptxas waits for each of 16 bits where some are in part.
    """
    lanes = VECTOR_BYTES // ITEMSIZE[storage]

    def in_turn(builder, args, empty):
        for start, every, some in pieces(builder, args, storage, vectors, aligned):
            at = element_address(builder, args[0], start, storage)
            words = when(builder, every, partial(load_vector, builder, at, storage), [empty] * lanes)
            if not aligned:
                in_part = partial(load_elements, builder, args[0], start, args[4], storage, empty)
                words = when(builder, builder.and_(some, builder.not_(every)), in_part, words)
            yield words

    def at_once(builder, args, empty):
        nothing = in_words(builder, [empty] * lanes, storage)
        found = []
        for start, every, some in list(pieces(builder, args, storage, vectors, aligned)):
            at = element_address(builder, args[0], start, storage)
            words = when(builder, every, partial(load_packed, builder, at, storage), nothing)
            found.append((words, start, builder.and_(some, builder.not_(every))))
        for words, start, in_part in found:
            if not aligned:

                def elements(start=start):
                    halves = load_elements(builder, args[0], start, args[4], storage, empty)
                    return in_words(builder, halves, storage)

                words = when(builder, in_part, elements, words)
            yield unpacked(builder, words, storage)

    @intrinsic
    def load(typingctx, address, anchor, thread, team, n):
        """A thread's elements of a row of n at an address, as one vector.

        ``anchor`` is the address of the row by which elements are given to threads.
        """

        def lower(context, builder, sig, args):
            args = [*args[:2], *(as_i32(builder, a) for a in args[2:])]
            empty = ir.Constant(WORD[storage], FILL[fill][storage])
            numbers = []
            for words in (at_once if early else in_turn)(builder, args, empty):
                numbers += [from_word(builder, w, storage, compute) for w in words]
            return assembled(builder, numbers)

        return Vector(element_of(compute), lanes * vectors)(address, anchor, thread, team, n), lower

    return load


def storer(storage, compute, vectors, aligned):
    """The function that stores what ``loader``'s function loads, where ``on`` is true."""
    lanes = VECTOR_BYTES // ITEMSIZE[storage]

    @intrinsic
    def store(typingctx, address, anchor, thread, team, n, on, value):
        """Store a thread's elements of a row of n at an address."""

        def lower(context, builder, sig, args):
            on = context.cast(builder, args[5], sig.args[5], types.boolean)
            on = builder.icmp_unsigned("!=", on, ir.Constant(on.type, 0))
            where = [*args[:2], *(as_i32(builder, a) for a in args[2:5])]
            done = 0
            for start, every, some in pieces(builder, where, storage, vectors, aligned):
                numbers = [lane(builder, args[6], i) for i in range(done, done + lanes)]
                with builder.if_then(builder.and_(on, every)):
                    at = element_address(builder, args[0], start, storage)
                    store_vector(builder, at, numbers, storage)
                if not aligned:
                    with builder.if_then(builder.and_(on, builder.and_(some, builder.not_(every)))):
                        for v, (j, is_inside) in zip(
                            numbers, elements_inside(builder, start, where[4], lanes), strict=True
                        ):
                            with builder.if_then(is_inside):
                                at = element_address(builder, args[0], j, storage)
                                word = to_word(builder, v, storage)
                                builder.store(word, word_pointer(builder, at, storage))
                done += lanes
            return context.get_dummy_value()

        return types.none(address, anchor, thread, team, n, on, value), lower

    return store


# Rows in shared memory: slots of 16 bytes, each of a thread's own.

SHARED = 3  # NVVM's name of that memory


@intrinsic
def room(typingctx):
    """Where the shared memory begins that a launch gives to every block."""

    def lower(context, builder, sig, args):
        name, module = "numbasoft_room", builder.module
        memory = module.globals.get(name)
        if memory is None:
            memory = ir.GlobalVariable(module, ir.ArrayType(I8, 0), name, addrspace=SHARED)
            memory.linkage, memory.align = "external", VECTOR_BYTES
        return builder.ptrtoint(memory, I64)

    return types.int64(), lower


def slots_of(builder, room, first, thread, team, slots, vectors, storage):
    """For each vector of a thread: whether there is room for it, and a pointer to where."""
    kind = ir.VectorType(I64, 2) if storage == "f8" else ir.VectorType(I32, 4)
    index = thread
    for _ in range(vectors):
        slot = builder.sext(builder.add(first, index), I64)
        at = builder.add(room, builder.mul(slot, ir.Constant(I64, VECTOR_BYTES)))
        yield builder.icmp_signed("<", index, slots), builder.inttoptr(at, ir.PointerType(kind, SHARED))
        index = builder.add(index, team)


def holder(storage, vectors):
    """The function that keeps vectors in shared memory, as they are in a row of this storage type."""
    lanes = VECTOR_BYTES // ITEMSIZE[storage]

    @intrinsic
    def hold(typingctx, room, first, thread, team, slots, value):
        """Put a thread's vectors into its slots, of so many from number ``first`` on; those beyond are left out."""

        def lower(context, builder, sig, args):
            where = args[0], *(as_i32(builder, a) for a in args[1:5])
            for k, (is_there, at) in enumerate(slots_of(builder, *where, vectors, storage)):
                numbers = [lane(builder, args[5], i) for i in range(k * lanes, (k + 1) * lanes)]
                with builder.if_then(is_there):
                    words = assembled(builder, packed(builder, numbers, storage))
                    builder.store(words, at, align=VECTOR_BYTES)
            return context.get_dummy_value()

        return types.none(room, first, thread, team, slots, value), lower

    return hold


def recaller(storage, compute, vectors, fill):
    """The function that takes what ``holder``'s function has kept; ``fill`` stands where it had no slot."""
    lanes = VECTOR_BYTES // ITEMSIZE[storage]

    @intrinsic
    def recall(typingctx, room, first, thread, team, slots):
        """A thread's vectors from its slots, as one."""

        def lower(context, builder, sig, args):
            where = args[0], *(as_i32(builder, a) for a in args[1:])
            empty = [ir.Constant(WORD[storage], FILL[fill][storage])] * lanes
            numbers = []
            for is_there, at in slots_of(builder, *where, vectors, storage):

                def words_at(at=at):
                    words = builder.load(at, align=VECTOR_BYTES)
                    return unpacked(builder, lanes_of(builder, words), storage)

                words = when(builder, is_there, words_at, empty)
                numbers += [from_word(builder, w, storage, compute) for w in words]
            return assembled(builder, numbers)

        return Vector(element_of(compute), lanes * vectors)(room, first, thread, team, slots), lower

    return recall


@intrinsic
def address_of_row(typingctx, array, row):
    """The address of a row of a two-dimensional array."""
    if not isinstance(array, types.Array) or array.ndim != 2:
        return None

    def lower(context, builder, sig, args):
        view = context.make_array(array)(context, builder, args[0])
        row = context.cast(builder, args[1], sig.args[1], types.int64)
        offset = builder.mul(row, builder.extract_value(view.strides, 0))
        return builder.add(builder.ptrtoint(view.data, I64), offset)

    return types.int64(array, row), lower


def placer(storage, compute, vectors):
    """The function that tells which elements of a row ``loader``'s function loads."""

    @intrinsic
    def places(typingctx, address, thread, team):
        """The index of every element, as numbers; outside the row they are below 0 or not below n."""

        def lower(context, builder, sig, args):
            kind = DOUBLE if compute == "f8" else FLOAT
            where = [args[0], args[0], *(as_i32(builder, a) for a in args[1:]), i32(2**31 - 1)]
            starts = [start for start, _, _ in pieces(builder, where, storage, vectors, False)]
            lanes = range(VECTOR_BYTES // ITEMSIZE[storage])
            return assembled(
                builder, [builder.sitofp(builder.add(s, i32(i)), kind) for s in starts for i in lanes]
            )

        lanes = VECTOR_BYTES // ITEMSIZE[storage] * vectors
        return Vector(element_of(compute), lanes)(address, thread, team), lower

    return places


def stepped(builder, address, index, step):
    return builder.add(address, builder.mul(builder.sext(index, I64), step))


def load_byte(builder, address):
    return [builder.load(builder.inttoptr(address, ir.PointerType(I8, 1)))]


def bytes_at(builder, address, step, places):
    """Whether the bytes at steps j from an address are not 0, for pairs of j and whether to read it at all."""
    zero = ir.Constant(I8, 0)
    for j, is_inside in places:
        at = stepped(builder, address, j, step)
        (byte,) = when(builder, is_inside, partial(load_byte, builder, at), [zero])
        yield builder.icmp_unsigned("!=", byte, zero)


def strided_places(builder, first, distance, n, lanes):
    j = first
    for _ in range(lanes):
        yield j, builder.icmp_signed("<", j, n)
        j = builder.add(j, distance)


def gatherer(storage, compute, fill):
    """The function that loads every ``distance``-th element of a column from its element ``first`` on."""

    @intrinsic
    def gather(typingctx, address, step, first, distance, n):
        """Elements of a column of n, ``step`` bytes apart; ``fill`` where it has no more."""

        def lower(context, builder, sig, args):
            address, step = args[:2]
            empty = ir.Constant(WORD[storage], FILL[fill][storage])
            words = []
            places = strided_places(builder, *(as_i32(builder, a) for a in args[2:]), STRIDED_LANES)
            for j, is_inside in places:
                at = stepped(builder, address, j, step)
                words += when(builder, is_inside, partial(load_word, builder, at, storage), [empty])
            return assembled(builder, [from_word(builder, w, storage, compute) for w in words])

        return Vector(element_of(compute), STRIDED_LANES)(address, step, first, distance, n), lower

    return gather


def scatterer(storage):
    """The function that stores what ``gatherer``'s function loads, where ``on`` is true."""

    @intrinsic
    def scatter(typingctx, address, step, first, distance, n, on, value):
        """Store elements of a column."""

        def lower(context, builder, sig, args):
            address, step, on = args[0], args[1], args[5]
            on = builder.icmp_unsigned("!=", on, ir.Constant(on.type, 0))
            places = strided_places(builder, *(as_i32(builder, a) for a in args[2:5]), STRIDED_LANES)
            for i, (j, is_inside) in enumerate(places):
                with builder.if_then(builder.and_(on, is_inside)):
                    word = to_word(builder, lane(builder, args[6], i), storage)
                    builder.store(word, word_pointer(builder, stepped(builder, address, j, step), storage))
            return context.get_dummy_value()

        return types.none(address, step, first, distance, n, on, value), lower

    return scatter


@intrinsic
def gather_kept(typingctx, address, step, first, distance, n):
    """As ``gather``, of a mask's bytes; beyond its end it keeps none."""

    def lower(context, builder, sig, args):
        places = strided_places(builder, *(as_i32(builder, a) for a in args[2:]), STRIDED_LANES)
        return assembled(builder, bytes_at(builder, args[0], args[1], places))

    return Mask(STRIDED_LANES)(address, step, first, distance, n), lower


def reader(storage, compute):
    """The function that reads one number, as a vector of one lane."""

    @intrinsic
    def read(typingctx, address):
        """The number at an address."""

        def lower(context, builder, sig, args):
            word = builder.load(word_pointer(builder, args[0], storage))
            return assembled(builder, [from_word(builder, word, storage, compute)])

        return Vector(element_of(compute), 1)(address), lower

    return read


def writer(storage):
    """The function that writes one number."""

    @intrinsic
    def write(typingctx, address, value):
        """Write a vector of one lane, rounded to what memory holds."""
        if not isinstance(value, Vector) or value.lanes != 1:
            return None

        def lower(context, builder, sig, args):
            word = to_word(builder, lane(builder, args[1], 0), storage)
            builder.store(word, word_pointer(builder, args[0], storage))
            return context.get_dummy_value()

        return types.none(address, value), lower

    return write


@intrinsic
def read_cell(typingctx, address):
    """The int64 at an address."""

    def lower(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], ir.PointerType(I64, 1)))

    return types.int64(address), lower


@intrinsic
def write_cell(typingctx, address, value):
    """Write an int64."""

    def lower(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(I64, 1)))
        return context.get_dummy_value()

    return types.none(address, value) if value == types.int64 else None, lower


def keeper(storage, vectors):
    """The function that loads which of a thread's elements a mask keeps; outside the row it keeps none."""
    lanes = VECTOR_BYTES // ITEMSIZE[storage]

    @intrinsic
    def kept(typingctx, address, mask, step, thread, team, n):
        """The mask of a row at ``address``: bytes at ``mask``, ``step`` bytes from one to the next."""

        def lower(context, builder, sig, args):
            address, mask, step = args[:3]
            where = [address, address, *(as_i32(builder, a) for a in args[3:])]
            places = [
                place
                for start, _, _ in pieces(builder, where, storage, vectors, False)
                for place in elements_inside(builder, start, where[4], lanes)
            ]
            return assembled(builder, bytes_at(builder, mask, step, places))

        return Mask(lanes * vectors)(address, mask, step, thread, team, n), lower

    return kept


def integer_reader(storage):
    """The function that reads one integer."""

    @intrinsic
    def read(typingctx, address):
        """The integer at an address as int64; from uint64 the same bits."""

        def lower(context, builder, sig, args):
            word = builder.load(word_pointer(builder, args[0], storage))
            if word.type == I64:
                return word
            return builder.sext(word, I64) if storage[0] == "i" else builder.zext(word, I64)

        return types.int64(address), lower

    return read


def is_between(builder, j, low, high):
    return builder.and_(builder.icmp_signed(">=", j, low), builder.icmp_signed("<", j, high))


def spanner(storage, vectors):
    """The function that tells which of a thread's elements, as ``loader`` loads them, are in a range."""
    lanes = VECTOR_BYTES // ITEMSIZE[storage]

    @intrinsic
    def within(typingctx, address, thread, team, low, high):
        """Whether each element's index is from ``low`` to below ``high``."""

        def lower(context, builder, sig, args):
            thread, team, low, high = (as_i32(builder, a) for a in args[1:])
            where = args[0], args[0], thread, team, i32(2**31 - 1)
            starts = [start for start, _, _ in pieces(builder, where, storage, vectors, False)]
            places = [builder.add(s, i32(i)) for s in starts for i in range(lanes)]
            return assembled(builder, [is_between(builder, j, low, high) for j in places])

        return Mask(lanes * vectors)(address, thread, team, low, high), lower

    return within


@intrinsic
def gather_within(typingctx, first, distance, low, high):
    """As ``spanner``'s function, for the elements that ``gather`` loads."""

    def lower(context, builder, sig, args):
        first, distance, low, high = (as_i32(builder, a) for a in args)
        places = strided_places(builder, first, distance, i32(2**31 - 1), STRIDED_LANES)
        return assembled(builder, [is_between(builder, j, low, high) for j, _ in places])

    return Mask(STRIDED_LANES)(first, distance, low, high), lower


def class_loader(storage, compute, vectors):
    """The function that loads, one by one, a number of the computing type for each element of a row."""
    lanes = VECTOR_BYTES // ITEMSIZE[storage]

    @intrinsic
    def load(typingctx, address, anchor, thread, team, n):
        """Of n numbers those of a thread's elements of the row at ``anchor``; 0 outside the row."""

        def lower(context, builder, sig, args):
            where = [args[1], args[1], *(as_i32(builder, a) for a in args[2:])]
            words = []
            for start, _, _ in pieces(builder, where, storage, vectors, False):
                for j, is_inside in elements_inside(builder, start, where[4], lanes):
                    at = element_address(builder, args[0], j, compute)
                    empty = ir.Constant(WORD[compute], 0)
                    words += when(builder, is_inside, partial(load_word, builder, at, compute), [empty])
            return assembled(builder, [from_word(builder, w, compute, compute) for w in words])

        return Vector(element_of(compute), lanes * vectors)(address, anchor, thread, team, n), lower

    return load
