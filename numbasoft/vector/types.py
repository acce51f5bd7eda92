"""The vector and mask types, and how Numba and LLVM see them."""

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import models, register_model

LANES = {"float32": 16, "float64": 8}
WIDEST = max(LANES.values())
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


class Vector(types.Type):
    """Numba's type of a vector of ``lanes`` elements of type ``element``."""

    def __init__(self, element, lanes):
        self.element, self.lanes = element, lanes
        super().__init__(name=f"vector({element}, {lanes})")


class Mask(types.Type):
    """Numba's type of a vector of booleans: the result of comparing two vectors."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"mask({lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, llvm_vector(fe_type))


@register_model(Mask)
class MaskModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(I1, fe_type.lanes))


def llvm_vector(vector):
    return ir.VectorType(DOUBLE if vector.element == types.float64 else FLOAT, vector.lanes)


def llvm_integers(vector):
    """The vector of integers with the same bits as a vector of floats."""
    return ir.VectorType(I64 if vector.element == types.float64 else I32, vector.lanes)


def vector_of(array):
    """The vector type that the elements of an array are computed in."""
    if array.dtype == types.float64:
        return Vector(types.float64, LANES["float64"])
    return Vector(types.float32, LANES["float32"])


def constant(kind, value):
    """An LLVM constant, the same in every lane where ``kind`` is a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def call(builder, name, result, args):
    """Call an LLVM intrinsic by its full name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def broadcast(builder, scalar, lanes):
    kind = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, constant(ir.VectorType(I32, lanes), 0))


def coerce(context, builder, value, given, vector):
    """A vector as it is; a scalar rounded to the element's type and put into every lane.

    A Python float in a kernel is a float64; here it takes the type of the vector it
    meets, so that one literal serves float32 and float64 and never widens a loop.
    """
    if isinstance(given, Vector):
        return value
    return broadcast(builder, context.cast(builder, value, given, vector.element), vector.lanes)


def cpu_has(feature):
    """Whether the code that Numba generates may use a feature of the CPU."""
    if config.CPU_FEATURES is not None:
        return f"+{feature}" in config.CPU_FEATURES
    return bool(llvm.get_host_cpu_features().get(feature, False))


IS_X86 = llvm.get_process_triple().startswith(("x86_64", "i686"))
HAS_FMA = not IS_X86 or cpu_has("fma")
HAS_AVX2 = IS_X86 and cpu_has("avx2")
HAS_AVX512 = IS_X86 and cpu_has("avx512f")
HAS_HALF = not IS_X86 or cpu_has("f16c")
