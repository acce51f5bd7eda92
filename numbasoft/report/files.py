"""softmax, log_softmax and logsumexp of .npy files, also of files larger than memory.

The files are memory-mapped. A block of whole rows is copied into memory, computed there, and copied out;
the pages of the maps are given back as soon as they are copied, so that resident memory is that of the
blocks whatever the size of the files. The output grows under a temporary name beside the final one, which
it gets only when it is complete and on the disk.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .terminal import Progress

PIECE = 1 << 23  # bytes that a piece may span in a map before its pages are given back

Index = tuple[slice, ...]


def convert(
    function: Callable,
    source: str,
    target: str,
    *,
    axis: int | tuple[int, ...] | None,
    temperature: float,
    memory: int,
) -> None:
    """Write `function` of the array in `source` to `target`, with about `memory` bytes of buffers.

    Raises ValueError, TypeError, IndexError or OSError with one sentence; `target` is then as it was.
    """
    x = _open(source)
    final = Path(os.path.realpath(target))
    if final.exists() and final.samefile(source):
        raise ValueError(f"the output {target} is the input: give it another name")
    if final.exists() and not final.is_file():
        raise ValueError(f"the output {target} is there and is not a file")
    if not final.parent.is_dir():
        raise ValueError(f"the directory {final.parent} of the output does not exist")
    stored = x.dtype
    if stored.kind == "V" and stored.itemsize == 2 and stored.fields is None:
        x = x.view(_bfloat16())  # a .npy file cannot name bfloat16: NumPy writes it as raw two-byte items

    # The function itself, on one element, says whether the arguments are right and what comes out.
    probe = function(np.zeros([1] * x.ndim, x.dtype), axis=axis, temperature=temperature)
    reduced = _axes(axis, x.ndim)
    reduces = probe.ndim < x.ndim
    kept = [a for a in range(x.ndim) if not (reduces and a in reduced)]
    shape = tuple(x.shape[a] for a in kept)
    fortran = x.flags.f_contiguous and not x.flags.c_contiguous

    part = final.with_name(f".{final.name}.{secrets.token_hex(6)}.part")
    try:
        if x.size == 0:
            result = function(np.asarray(x), axis=axis, temperature=temperature)
            with part.open("xb") as file:
                np.save(file, _storable(result))
        else:
            y = np.lib.format.open_memmap(
                part, "w+", _storable(probe).dtype, shape, fortran_order=fortran
            ).view(probe.dtype)
            _reserve(part)
            with Progress(x.nbytes, Path(source).name) as progress:
                per_element = x.dtype.itemsize + (0 if reduces else probe.dtype.itemsize)
                for block in _blocks(x, reduced, max(1, memory // per_element)):
                    buffer = _read(_cut(x, block), x, progress)
                    result = function(buffer, axis=axis, temperature=temperature)
                    _write(np.asarray(result), _cut(y, tuple(block[a] for a in kept)), y)
            del y
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(final)
    finally:
        part.unlink(missing_ok=True)


def _open(source: str) -> np.ndarray:
    with open(source, "rb") as file:  # the operating system's own words for a file that is not there
        head = file.read(8)
    if head[:4] == b"PK\x03\x04":
        raise ValueError(f"the input {source} is an .npz archive: save one array of it with numpy.save")
    try:
        return np.lib.format.open_memmap(source, "r")
    except ValueError as error:
        size = os.path.getsize(source)
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"the input {source} ({size} bytes) is not a complete .npy file of numbers: {reason}"
        ) from None


def _bfloat16() -> np.dtype:
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError(
            "the input holds raw two-byte items, as bfloat16 is stored, and ml_dtypes is not installed: pip install ml_dtypes"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def _storable(array: np.ndarray) -> np.ndarray:
    return array.view("V2") if array.dtype.name == "bfloat16" else array


def _axes(axis, ndim) -> set[int]:
    if axis is None:
        return set(range(ndim))
    return {a % ndim for a in (axis if isinstance(axis, tuple) else (axis,))} if ndim else set()


def _reserve(path: Path) -> None:
    """Take the disk space now: a full disk met while writing through a map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _blocks(x: np.ndarray, reduced: set[int], limit: int) -> Iterator[Index]:
    """Cut the axes that are not reduced, outermost in the file first, into blocks of at most `limit` elements.

    A block holds whole rows, and one row at least.
    """
    others = sorted((a for a in range(x.ndim) if a not in reduced), key=lambda a: -x.strides[a])
    size = math.prod(x.shape[a] for a in reduced)
    cut = len(others)
    while cut and size * x.shape[others[cut - 1]] <= limit:
        cut -= 1
        size *= x.shape[others[cut]]
    whole = [slice(None)] * x.ndim
    if cut == 0:
        yield tuple(whole)
        return
    last, step = others[cut - 1], max(1, limit // size)
    for outer in np.ndindex(*(x.shape[a] for a in others[: cut - 1])):
        for a, i in zip(others, outer, strict=False):
            whole[a] = slice(i, i + 1)
        for start in range(0, x.shape[last], step):
            whole[last] = slice(start, start + step)
            yield tuple(whole)


def _pieces(view: np.ndarray, index: Index | None = None) -> Iterator[Index]:
    """Indices that cut a view of a map into parts that span at most PIECE bytes of it."""
    index = index or (slice(None),) * view.ndim
    part = view[index]
    axes = [a for a in range(part.ndim) if part.shape[a] > 1]
    if sum((part.shape[a] - 1) * part.strides[a] for a in axes) < PIECE:
        yield index
        return
    outermost = max(axes, key=lambda a: part.strides[a])
    step = max(1, PIECE // part.strides[outermost])
    for start in range(0, part.shape[outermost], step):
        yield from _pieces(view, (*index[:outermost], slice(start, start + step), *index[outermost + 1 :]))


def _cut(mapped: np.ndarray, block: Index) -> np.ndarray:
    """A view of the map, also where the block has no axes."""
    return mapped[(*block, ...)]  # type: ignore[arg-type]


def _read(view, mapped, progress) -> np.ndarray:
    buffer = np.empty_like(view, subok=False)
    for piece in _pieces(view):
        buffer[piece] = view[piece]
        _give_back(mapped)
        progress.advance(buffer[piece].nbytes)
    return buffer


def _write(result, view, mapped) -> None:
    for piece in _pieces(view):
        view[piece] = result[piece]
        _give_back(mapped)


def _give_back(mapped) -> None:
    """Drop the map's pages from this process; what was written to them stays in the system's cache of the file."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)
