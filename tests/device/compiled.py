"""Every production kernel as PTX and as machine code of the GPU, without one: tests/test_cuda.py runs this.

PTX comes from NVVM for an architecture that need not be here, cubins from ptxas.
NUMBASOFT_ALL_KERNELS=1 compiles every kernel for every architecture, which takes minutes.
"""

import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

import pytest
from numba import cuda
from numba.cuda import dispatcher
from numba.cuda.cudadrv import nvvm

from numbasoft.cuda import classes, copies, geometry, operations, split, totals
from numbasoft.ops.binary_cross_entropy import cuda as binary_cross_entropy
from numbasoft.ops.cross_entropy import cuda as cross_entropy
from numbasoft.ops.fit_temperature import cuda as fit_temperature
from numbasoft.ops.kl_divergence import cuda as kl_divergence
from numbasoft.ops.log_softmax import cuda as log_softmax
from numbasoft.ops.logsumexp import cuda as logsumexp
from numbasoft.ops.sample import cuda as sample
from numbasoft.ops.sigmoid import cuda as sigmoid
from numbasoft.ops.softmax import cuda as softmax

ARCHITECTURES = [(8, 0), (9, 0), (10, 0), (12, 0)]

# Registers that a thread may have, by the launch that they must fit: 65536 for a block at least, and
# for small rows few enough that a multiprocessor has a thousand threads.
BUDGET = {
    "few": 64,
    "middle": 128,
    "many": 128,
    "segments": 168,
    "columns": 128,
    "copies": 40,
    "losses": 96,
    "resident": 64,
}


class Kernel:
    """A kernel, what it is launched with, and how many 16-byte accesses it has to have (None: any).

    ``kept`` are those of shared memory, loads and stores.
    """

    def __init__(self, factory, options, regime, threads, loads=None, stores=None, kept=(0, 0)):
        self.factory, self.options, self.regime, self.threads = factory, options, regime, threads
        self.loads, self.stores, self.kept = loads, stores, kept
        room = factory.__module__.split(".")[-2]
        self.name = f"{room}.{factory.__name__}-{'-'.join(map(str, options))}"


# Kernels that treat every element alike: how many arrays they read and write, and their further options; a
# gradient for all elements is read as "wide".
ELEMENTWISE = [
    (sigmoid.FORWARD, 1, 1, ()),
    (sigmoid.BACKWARD, 2, 1, ()),
    (sigmoid.LOGIT, 1, 1, ()),
    (binary_cross_entropy.FORWARD, 2, 1, (False,)),
    (binary_cross_entropy.FORWARD, 2, 0, (True,)),
    (binary_cross_entropy.BACKWARD, 3, 1, (None,)),
    (binary_cross_entropy.BACKWARD, 2, 1, ("wide",)),
    (binary_cross_entropy.BACKWARD, 2, 1, (operations.NUMBER,)),
]


SIZES = "few", "middle", "many"  # of the vectors that a thread holds


def kernels(storage):
    """The kernels of softmax, log_softmax and logsumexp for a storage type."""
    kinds = (storage,)
    for room in softmax, log_softmax, logsumexp:
        stores = room is not logsumexp
        for aligned, masked in (True, False), (False, False), (False, True):
            held = (geometry.PAIR_VECTORS if masked else geometry.VECTORS)[storage]
            for vectors, size in dict(zip(held, SIZES, strict=True)).items():
                options, most = (
                    (*kinds, vectors, aligned, masked),
                    geometry.row_bounds(vectors, storage, masked),
                )
                yield Kernel(room.forward, options, size, most, vectors, vectors * stores)
        for masked in False, True:
            yield Kernel(
                room.forward_columns,
                (*kinds, masked),
                "columns",
                geometry.column_bounds(storage, False, masked),
            )
    n, part = geometry.SEGMENT_VECTORS[storage], geometry.LAST_VECTORS[storage]
    for room in softmax, log_softmax:
        for vectors, size in dict(zip(geometry.PAIR_VECTORS[storage], SIZES, strict=True)).items():
            for aligned in True, False:
                options, most = (*kinds, vectors, aligned), geometry.most_threads(vectors, storage, True)
                yield Kernel(room.backward, options, size, most, 2 * vectors, vectors)
        yield Kernel(room.backward_columns, kinds, "columns", geometry.column_bounds(storage, True))
        yield Kernel(room.backward_segments, kinds, "segments", geometry.SEGMENT_THREADS, 2 * part, part)
    for last in softmax.divide, log_softmax.subtract:
        for masked in False, True:
            yield Kernel(last, (*kinds, masked), "segments", geometry.SEGMENT_THREADS, part, part)
    yield Kernel(logsumexp.combine, kinds, "segments", geometry.SEGMENT_THREADS, 0, 0)
    for masked in False, True:
        yield Kernel(split.maxima, (*kinds, masked), "segments", geometry.SEGMENT_THREADS, n, 0)
        for others in False, True:
            most = geometry.sum_bounds(storage, masked, others)
            yield Kernel(split.sums, (*kinds, masked, others), "segments", most, n, 0)
    for product, last in itertools.product((False, True), repeat=2):
        options = *kinds, product, last
        yield Kernel(split.terms, options, "segments", geometry.SEGMENT_THREADS, 2 * n, 0)
    few, middle, _ = geometry.VECTORS[storage]
    for vectors, aligned in (few, True), (few, False), (middle, True), (middle, False):
        size = "few" if vectors == few else "middle"
        options = *kinds, vectors, aligned, storage
        most = geometry.most_threads(vectors, storage)
        yield Kernel(logsumexp.backward, options, size, most, vectors, vectors)
    yield Kernel(logsumexp.backward_columns, (*kinds, storage), "columns", geometry.MOST_COLUMN_THREADS)
    yield from in_shared_memory(storage)


def in_shared_memory(storage):
    """The kernels that keep rows in shared memory: each element is put there once and taken once a loop."""
    most, last = geometry.RESIDENT_BOUNDS, geometry.RESIDENT_LAST_VECTORS[storage]
    for aligned, masked in (True, False), (False, False), (False, True):
        n = (geometry.RESIDENT_MASKED_VECTORS if masked else geometry.RESIDENT_VECTORS)[storage]
        for room, stores, kept in (
            (softmax, last, 2 * last),
            (log_softmax, last, 2 * last),
            (logsumexp, 0, last),
        ):
            options = storage, aligned, masked
            yield Kernel(room.resident, options, "resident", most, n, stores, (kept, n))
    n = 2 * geometry.RESIDENT_PAIR_VECTORS[storage]
    for (room, taken), aligned in itertools.product(((softmax, 4), (log_softmax, 3)), (True, False)):
        options = storage, aligned
        yield Kernel(room.backward_resident, options, "resident", most, n, last, (taken * last, n))


def losses(storage):
    """The kernels of all losses for a storage type."""
    yield from elementwise(storage)
    yield from divergences(storage)
    yield from class_losses(storage)
    yield from before_and_after(storage)
    yield from draws(storage)
    yield Kernel(fit_temperature.moments, (storage,), "losses", geometry.moment_bounds(), 0, 0)


def draws(storage):
    """The kernels that draw, and those of softmax with noise."""
    n = geometry.DRAW_VECTORS[storage]
    for filtered, size, loads in (False, "few", 2 * n + 1), (True, "losses", 4 * n + 2):
        if storage == "f8":
            size, loads = "columns", None  # newer architectures get some loops twice
        yield Kernel(sample.draw, (storage, filtered), size, geometry.draw_bounds(storage), loads, 0)
    most, loads = geometry.RELAXED_THREADS, None if storage == "f8" else 2 * n
    if storage in ("f4", "f8"):
        yield Kernel(sample.relaxed, (storage,), "few", most, loads, n)
    yield Kernel(sample.hardened, (storage,), "few", most, loads, n)


def elementwise(storage):
    kinds, (few, middle, _) = (storage,), geometry.VECTORS[storage]
    kind = "f8" if storage == "f8" else "f4"
    for operation, inputs, stores, more in ELEMENTWISE:
        held = (few,) if operation.few else (few, middle)
        for vectors, aligned in itertools.product(held, (True, False)):
            size = "few" if vectors == few and not operation.few else "middle"
            options = *kinds, vectors, aligned, *(kind if option == "wide" else option for option in more)
            most = geometry.MOST_THREADS
            yield Kernel(operation.kernel, options, size, most, inputs * vectors, vectors * stores)
    yield Kernel(totals.total, (kind, storage), "few", geometry.TOTAL_THREADS, 0, 0)
    if kind == storage:
        yield Kernel(totals.total, (kind, "f8", True), "few", geometry.TOTAL_THREADS, 0, 0)
        for vectors in few, middle:
            yield Kernel(totals.sums, (*kinds, vectors), "middle", geometry.MOST_THREADS, vectors, 0)


def divergences(storage):
    kinds, n = (storage,), geometry.SEGMENT_VECTORS[storage]
    for vectors, aligned in itertools.product(sorted(set(geometry.HEAVY_VECTORS[storage])), (True, False)):
        options = *kinds, vectors, aligned, storage
        yield Kernel(kl_divergence.forward, options, "middle", geometry.MOST_THREADS, 2 * vectors, 0)
    for vectors, size in dict(zip(geometry.PAIR_VECTORS[storage], SIZES, strict=True)).items():
        for aligned in True, False:
            options = *kinds, vectors, aligned, storage
            most = geometry.MOST_THREADS
            yield Kernel(kl_divergence.backward, options, size, most, 2 * vectors, vectors)
    for factory in kl_divergence.forward_columns, kl_divergence.backward_columns:
        yield Kernel(factory, (*kinds, storage), "columns", geometry.column_bounds(storage, True))
    held, most = geometry.PIECE_VECTORS[storage], geometry.SEGMENT_THREADS
    for last in False, True:
        yield Kernel(split.sums, (*kinds, False, last, True), "segments", most, n, 0)
        options = *kinds, last
        yield Kernel(kl_divergence.terms, options, "segments", geometry.term_bounds(storage), 2 * held, 0)
    yield Kernel(kl_divergence.combine, (*kinds, storage), "segments", most, 0, 0)
    most = geometry.MOST_THREADS
    yield Kernel(kl_divergence.backward_segments, (*kinds, storage), "segments", most, 2 * held, held)


def class_losses(storage):
    """The kernels of cross-entropy for a storage type."""
    n = geometry.SEGMENT_VECTORS[storage]
    for target, gradient in itertools.product(operations.REGIONS, (False, True)):
        has_class, is_plain = target in operations.OF_CLASSES, target == operations.CLASS
        held = (geometry.VECTORS if is_plain else geometry.SHARE_VECTORS)[storage]
        rows = 1 if has_class else 2
        kinds = storage, target, gradient
        for (vectors, size), aligned in itertools.product(zip(held, SIZES, strict=True), (True, False)):
            options = *kinds, storage, vectors, aligned
            loads, stores = rows * vectors, vectors * gradient
            size = "losses" if size == "few" and (storage == "f8" or not is_plain) else size
            most = geometry.loss_row_bounds(vectors, storage, 0 if is_plain else geometry.SHARES, gradient)
            yield Kernel(cross_entropy.rows, options, size, most, loads, stores)
        most = geometry.loss_column_bounds(storage)
        yield Kernel(cross_entropy.columns, (*kinds, storage), "columns", most)
        most = geometry.loss_combine_bounds(storage)
        yield Kernel(cross_entropy.combine, (*kinds, storage), "segments", most, 0, 0)
        if not is_plain:
            for last in False, True:
                options, most = (*kinds, last), geometry.loss_share_bounds(storage)
                yield Kernel(cross_entropy.segment_shares, options, "segments", most)
        if gradient:
            loads, stores = (n, n) if is_plain else (None, None)
            options = storage, target
            yield Kernel(cross_entropy.segments, options, "segments", geometry.SEGMENT_THREADS, loads, stores)
    yield Kernel(split.sums, (storage, False, True, True), "segments", geometry.SEGMENT_THREADS, n, 0)


def before_and_after(storage):
    """What stands before the rows, whatever they are; and the losses of log-probabilities."""
    kind = "f8" if storage == "f8" else "f4"
    for kernel in (
        (classes.tally, ("i8",)), (classes.tally, ("u1",)), (cross_entropy.scales, (kind, "f8")),
        (cross_entropy.class_weights, (kind, "f4")), (cross_entropy.picked, (storage, storage)),
        (cross_entropy.placed, (storage,)),
    ):  # fmt: skip
        yield Kernel(*kernel, "copies", totals.THREADS)


# Of the kernels of a storage type every so many is compiled by default; of float32 every other.
EVERY = {"f4": 4, "b2": 9, "f8": 12, "f2": 20}
# Of the losses the largest kernel of every regime in float32, and in the others every so many of those.
EVERY_LARGEST = {"f4": 1, "b2": 7, "f8": 8, "f2": 15}


def largest_losses(storage):
    """Of every regime, and of whole rows for every kind of target, the kernel with the most accesses."""
    found = {}
    for kernel in losses(storage):
        regime = kernel.factory, kernel.options[1] if kernel.factory is cross_entropy.rows else None
        accesses = (kernel.loads or 0) + (kernel.stores or 0)
        if regime not in found or accesses >= found[regime][0]:
            found[regime] = accesses, kernel
    return [kernel for _, kernel in found.values()]


def chosen():
    """Pairs of a kernel and an architecture: by default some kernels for one in turn, the largest for all."""
    everything = os.environ.get("NUMBASOFT_ALL_KERNELS") == "1"
    turn = itertools.cycle(ARCHITECTURES)
    for storage, every in EVERY.items():
        for i, kernel in enumerate(kernels(storage)):
            largest = kernel.regime == "many" and kernel.options[2] is False and storage == "f4"
            if everything or largest:
                yield from ((kernel, cc) for cc in ARCHITECTURES)
            elif i % every == 0:
                yield kernel, next(turn)
    for storage, every in EVERY_LARGEST.items():
        if everything:
            yield from itertools.product(losses(storage), ARCHITECTURES)
        else:
            yield from ((kernel, next(turn)) for kernel in largest_losses(storage)[every // 2 :: every])
    if not everything:
        yield from nearest_to_a_spill()
        yield from ((kernel, next(turn)) for kernel in (*draws("b2"), *draws("f8")) if True in kernel.options)
    for options in ("f4", "f4"), ("f8", "b2"), ("u8", "f8"), ("b1", "b1"), ("u1", "i8"):
        yield Kernel(copies.copy, options, "copies", copies.THREADS), next(turn)


def nearest_to_a_spill():
    """Kernels that have spilled or been over their budget, for the architecture where they were."""
    named = {
        "kl_divergence.forward_columns-f8-f8": (9, 0), "cross_entropy.combine-f4-spread-True-f4": (9, 0),
        "log_softmax.forward-f4-1-False-True": (12, 0), "log_softmax.forward_columns-f4-True": (10, 0),
        "cross_entropy.columns-f4-weighted-False-f4": (12, 0), "cross_entropy.columns-b2-probabilities-False-b2": (12, 0),
        "cross_entropy.columns-f8-weighted-False-f8": (9, 0), "cross_entropy.combine-f8-weighted-True-f8": (10, 0),
        "kl_divergence.terms-b2-False": (9, 0), "kl_divergence.terms-f2-True": (8, 0),
        "cross_entropy.rows-f8-class-True-f8-8-False": (8, 0), "cross_entropy.rows-b2-weighted-True-b2-1-False": (10, 0),
    }  # fmt: skip
    made = [kernel for s in EVERY for kernel in (*kernels(s), *losses(s))]
    found = [(kernel, named[kernel.name]) for kernel in made if kernel.name in named]
    assert len(found) == len(named)
    return found


# What counts rows and adds losses, however the rows are computed.
IN_FLOAT64 = (
    classes.tally,
    cross_entropy.scales,
    cross_entropy.class_weights,
    totals.total,
    fit_temperature.moments,
)


def ptxas():
    """NVIDIA's assembler: on the path, or from its wheel."""
    found = shutil.which("ptxas")
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    return found or next((str(p) for p in wheels.glob("*/bin/ptxas")), None)


@pytest.fixture(autouse=True)
def any_device(monkeypatch):
    """Device functions ask for a device while they are compiled; any will do."""

    class Device:
        compute_capability = 9, 0

    monkeypatch.setattr(dispatcher, "get_current_device", lambda: Device)


def assembled(ptx, cc, folder):
    """Registers, bytes of stack and bytes spilled of a kernel's machine code."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [ptxas(), "-v", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "kernel.cubin").stat().st_size > 0
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", done.stderr).groups()
    )
    return registers, stack, stores + loads


def test_there_is_an_assembler():
    assert ptxas(), "no ptxas: pip install 'nvidia-cuda-nvcc==13.0.*'"


@pytest.mark.parametrize(
    ("kernel", "cc"), [pytest.param(k, cc, id=f"{k.name}-sm_{cc[0]}{cc[1]}") for k, cc in chosen()]
)
def test_kernel(kernel, cc, tmp_path, record_property):
    function, signature = kernel.factory(*kernel.options)
    ptx, _ = cuda.compile(function, signature, cc=cc, device=False, abi="numba", launch_bounds=kernel.threads)
    narrow = "f8" not in kernel.options and kernel.factory not in IN_FLOAT64
    if narrow and "u8" not in kernel.options:
        assert ".f64" not in ptx
    assert "ld.local" not in ptx and "st.local" not in ptx
    assert ".extern .func" not in ptx
    wide_loads = len(re.findall(r"ld\.global\S*\.v[24]\.b(?:32|64)", ptx))
    wide_stores = len(re.findall(r"st\.global\S*\.v[24]\.b(?:32|64)", ptx))
    kept = [len(re.findall(rf"{word}\.shared\S*\.v[24]\.[bfu](?:32|64)", ptx)) for word in ("ld", "st")]
    if kernel.regime == "resident" and cc >= (10, 0):  # some last loops are unrolled
        wide_stores, kept[0] = min(wide_stores, kernel.stores), min(kept[0], kernel.kept[0])
    if kernel.loads is not None:
        assert (wide_loads, wide_stores) == (kernel.loads, kernel.stores)
    assert tuple(kept) == kernel.kept
    registers, stack, spilled = assembled(ptx, cc, tmp_path)
    record_property("registers", registers)
    print(f"{kernel.name} sm_{cc[0]}{cc[1]}: {registers} registers")
    assert registers <= BUDGET[kernel.regime]
    assert spilled == 0
    assert stack == 0 if narrow else stack <= 8  # float64 division is a call


@pytest.mark.parametrize("cc", ARCHITECTURES)
def test_threads_meet_in_one_shuffle(cc):
    # a copy for those that leave the loop at once would not be the one that the others come to
    from numbasoft.cuda.intrinsics import read_cell, write_cell
    from numbasoft.cuda.team import warp_sum

    def kernel(x, out, n):
        v, i = read_cell(x), cuda.threadIdx.x
        while True:
            v = warp_sum(v, 2)
            if i >= n:
                break
            write_cell(out + 8 * i, v)
            i += 32
        write_cell(out, v)

    whole = cuda.types.int64
    ptx, _ = cuda.compile(kernel, (whole, whole, whole), cc=cc, device=False, abi="numba")
    assert len(re.findall(r"shfl\.sync", ptx)) == 2  # of two words each


def test_exact_sums_of_products_are_not_fused():
    # ptxas may fuse what is not told how to round: then the product's own error counted as lost
    from numbasoft.cuda.elementary import two_sum
    from numbasoft.cuda.intrinsics import vector_of, writer

    def kernel(a, b, c, out):
        s, lost = two_sum(vector_of(a) * vector_of(b), vector_of(c))
        write(out, s)
        write(out + 4, lost)

    write, f4 = writer("f4"), cuda.types.float32
    ptx, _ = cuda.compile(kernel, (f4, f4, f4, cuda.types.int64), cc=(9, 0), device=False, abi="numba")
    assert len(re.findall(r"\b(?:add|sub)\.rn\.f32", ptx)) == 6
    assert not re.search(r"\b(?:add|sub|fma\.rn)\.f32", ptx)


def fused(ptx):
    """Sums of products that ptxas may fuse, and what is multiplied; of PTX in which NVVM has fused none.

    Exact are products with a constant power of two; and 0 - a * b and a * b - a * b come to the same.
    """
    given, found = {}, []
    in_assembly = False
    for line in ptx.splitlines():
        in_assembly = (in_assembly or "begin inline asm" in line) and "end inline asm" not in line
        known = re.match(r"\s*(\w+)(?:\.rn)?\.f(?:32|64)\s+(%\w+), (.*);", line)
        if in_assembly or not known:
            continue
        word, result, operands = known[1], known[2], known[3].split(", ")
        given[result] = word, operands
        for i in (0, 1) if word in ("add", "sub") else ():
            first, factors = given.get(operands[i], ("", ()))
            is_same = word == "sub" and (operands[0] == operands[1] or is_constant(operands[0], given, 0.0))
            if first == "mul" and not is_same:
                found += [(line, factors)] * (not any(is_constant(f, given) for f in factors))
    return found


def is_constant(name, given, value=None):
    """Whether an operand is this number, or a power of two."""
    word, operands = given.get(name, ("", ()))
    text = operands[0] if word == "mov" else name
    if not re.fullmatch(r"0[fd][0-9A-F]+", text):
        return False
    number = struct.unpack(">f" if text[1] == "f" else ">d", bytes.fromhex(text[2:]))[0]
    return number == value if value is not None else abs(math.frexp(number)[0]) == 0.5


ROUNDED_THE_SAME = {
    "softmax.forward-f4-1-False-False", "softmax.forward_columns-f4-False", "softmax.resident-f4-False-False",
    "softmax.divide-f4-False", "softmax.backward-f4-1-False", "log_softmax.forward-f4-1-False-False",
    "log_softmax.backward-f4-1-False", "logsumexp.forward-f4-1-False-False", "logsumexp.backward-f4-1-False-f4",
    "kl_divergence.forward-f4-1-False-f4", "kl_divergence.backward-f4-1-False-f4",
    "binary_cross_entropy.forward-f4-1-False-False", "sample.relaxed-f4",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ROUNDED_THE_SAME))
def test_compilers_have_nothing_to_fuse(name, monkeypatch):
    # a product fused with a sum in one kernel and not in another is a row with other bits there
    (kernel,) = (k for k in (*kernels("f4"), *losses("f4")) if k.name == name)
    compile_ir = nvvm.compile_ir
    monkeypatch.setattr(nvvm, "compile_ir", lambda code, **options: compile_ir(code, **options, fma=False))
    function, signature = kernel.factory(*kernel.options)
    ptx, _ = cuda.compile(function, signature, cc=(9, 0), device=False, abi="numba")
    assert len(re.findall(r"(?:mul|add|sub)\.rn\.f32", ptx)) > 40
    assert not fused(ptx)


# --- functions for users' kernels --------------------------------------------------------------------------


def test_the_documented_kernel_compiles(tmp_path):
    from numbasoft.cuda import device

    code = device.__doc__.partition("::\n\n")[2].partition("\n    attention_weights[")[0]
    namespace = {}
    exec("\n".join(line[4:] for line in code.splitlines()), namespace)
    kernel = namespace["attention_weights"].py_func
    matrix = cuda.types.float32[:, ::1]
    types = (matrix, cuda.types.float32, cuda.types.int64, matrix)
    for cc in ARCHITECTURES:
        ptx, _ = cuda.compile(kernel, types, cc=cc, device=False, abi="numba", launch_bounds=128)
        assert ".f64" not in ptx
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 9
        assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == 9
        registers, stack, spilled = assembled(ptx, cc, tmp_path)
        assert registers <= 168 and (stack, spilled) == (0, 0)


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_device_functions_compile(kind, tmp_path):
    from numbasoft.cuda import device

    CELLS = device.CELLS
    load, store = device.loader(kind, 2), device.storer(kind, 2)
    log_softmax_of, logsumexp_of, push = device.log_softmax(kind), device.logsumexp(kind), device.push(kind)
    log1p, exp_below = device.log1p(kind), device.exp_below(kind)

    def every_function(x, y):
        cells = cuda.shared.array(CELLS, cuda.types.int64)
        row, thread, n = device.first_row(64), device.place(64), x.shape[1]
        at = device.address_of_row(x, row)
        v = load(at, at, thread, 64, n)
        y_row = log_softmax_of(v, 64, cells)
        cuda.syncthreads()
        lse = logsumexp_of(v, 64, cells)
        one = device.largest_lane(v)
        m, s, lost = push(one, one, one, v)
        result = y_row + lse + exp_below(v, m) + log1p(s) + lost
        store(device.address_of_row(y, row), at, thread, 64, n, True, result)

    number = cuda.types.float32 if kind == "f4" else cuda.types.float64
    ptx, _ = cuda.compile(every_function, (number[:, ::1],) * 2, cc=(9, 0), device=False, abi="numba")
    assert (".f64" in ptx) == (kind == "f8")
    _, stack, spilled = assembled(ptx, (9, 0), tmp_path)
    assert spilled == 0 and stack <= (0 if kind == "f4" else 8)
