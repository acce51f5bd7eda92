"""A seeded fuzz of good and malformed calls in worker processes.

Failures are: a crash, a hang, a wrong value, nonsense that is accepted, a good call that is refused, a
changed argument, an `out` that lost its contents in a call that raised, an exception other than ValueError,
TypeError and IndexError, and a message that is no single sentence. One call is run again with
`python tests/test_hostile.py SEED INDEX`.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import oracle
import pytest
from numpy.exceptions import AxisError
from oracle import BFLOAT16, DTYPES
from samples import BACKWARD, FORWARD

import numbasoft

CALLS = 1000
TIMEOUT = 150

SHAPES = [
    (),
    (1,),
    (5,),
    (40,),
    (3, 4),
    (1, 7),
    (7, 1),
    (2, 3, 4),
    (2, 1, 5),
    (0,),
    (3, 0),
    (0, 3),
    (2, 0, 3),
    (2, 300),
    (300, 2),
]


class Odd:
    """An object that is nothing in particular."""

    def __repr__(self):
        return "Odd()"


def pick(rng, options):
    return options[rng.integers(len(options))]


def values(rng, shape, dtype):
    """Logits, at times with special values."""
    x = rng.normal(0, pick(rng, [0.0, 3.0, 30.0]), shape)
    if rng.random() < 0.25 and x.size:
        x.ravel()[rng.integers(x.size, size=1 + x.size // 5)] = pick(
            rng, [np.nan, np.inf, -np.inf, -np.inf, 0.0]
        )
    if dtype.kind in "biu":
        return rng.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)
    return np.asarray(x).astype(dtype)


def relaid(rng, a):
    """The same values in another layout."""
    kind = rng.integers(7)
    a = np.asarray(a)
    if kind == 0 and a.ndim:
        return np.asfortranarray(a)
    if kind == 1 and a.ndim:
        return np.repeat(a, 2, axis=-1)[..., ::2]
    if kind == 2 and a.ndim:
        return a[..., ::-1].copy()[..., ::-1]
    if kind == 3 and a.ndim:
        return a[::-1].copy()[::-1]
    if kind == 4 and a.dtype != BFLOAT16:
        return a.astype(a.dtype.newbyteorder())
    if kind == 5:
        a = a.copy()
        a.flags.writeable = False
    return a


NO_ARRAYS = [
    None,
    "x",
    b"x",
    {},
    Odd(),
    {1, 2},
    1j,
    [[1, 2], [3]],
    [None],
    ["a"],
    [1.0, "a"],
    len,
    np.datetime64(1, "s"),
    (1j,),
    [Odd()],
]
BAD_DTYPES = [
    np.complex64,
    np.complex128,
    np.longdouble,
    object,
    "U3",
    "S2",
    "datetime64[s]",
    "timedelta64[s]",
    [("a", "f4")],
]
GOOD_DTYPES = [*DTYPES.values()] * 3 + [np.dtype(t) for t in (bool, np.int8, np.uint8, np.int32, np.uint64)]

# Each generator returns (value, verdict): "good", "bad" (to be refused) or "open" (the contract is silent).


def some_axis(rng, ndim):
    kind = rng.random()
    if kind < 0.6:
        if ndim == 0:
            return pick(rng, [-1, 0, None]), "good"
        return int(rng.integers(-ndim, ndim)), "good"
    if kind < 0.68:
        return None, "good"
    if kind < 0.8 and ndim:
        chosen = rng.permutation(ndim)[: rng.integers(1, ndim + 1)]
        return tuple(int(a) - ndim * int(rng.integers(2)) for a in chosen), "good"
    if kind < 0.83:
        return (), "open"
    high = max(ndim, 1)
    bad = [high, -high - 1, 2**31, -(2**31), 2**63, 2**70, 1.0, "0", b"", 1j, [0], (0.5,), ("a",), (0, high),
           {0}, True, False, np.nan, np.inf, Odd(), np.array([0, 0]), ((0,),), np.float64(0), (None,),
           *([(0, 0), (0, -high)] if ndim else [(1,)])]  # fmt: skip
    return pick(rng, bad), "bad"


def some_temperature(rng):
    kind = rng.random()
    if kind < 0.8:
        return pick(rng, [1.0, 1, 0.5, 3.0, np.float32(0.25), np.int64(2), np.array(1.5), 1e-3, 1e3]), "good"
    bad = [0, -1.0, np.nan, np.inf, -np.inf, "1", b"1", None, True, False, 1j, [1.0, 2.0], np.ones(3), Odd(),
           {}, 10**400, -(10**400), np.float32(0), np.datetime64(1, "s"), np.zeros((0,)), 1e-320, 1e300,
           np.complex64(1), np.array("1")]  # fmt: skip
    return pick(rng, bad), "bad"


def some_mask(rng, shape):
    kind = rng.random()
    if kind < 0.6:
        return None, "good"
    if kind < 0.85:
        cut = tuple(pick(rng, [n, n, 1]) for n in shape)[int(rng.integers(len(shape) + 1)) :]
        return relaid_mask(rng, rng.random(cut) < pick(rng, [0.0, 0.3, 0.8, 1.0])), "good"
    if kind < 0.9:
        return pick(rng, [True, False, np.True_]), "good"
    wrong = np.ones((*shape, 2) if shape else (2,), bool)
    longer = tuple(n + 2 for n in shape) or (3,)
    bad = [1, 0.5, "yes", b"", Odd(), {}, np.ones(shape, int), np.ones(shape), np.ones((2, *shape), bool),
           wrong, np.ones(longer, bool), np.full(shape, None), [None], np.ones(shape, complex)]  # fmt: skip
    return pick(rng, bad), "bad"


def relaid_mask(rng, a):
    a = np.asarray(a)
    return a[..., ::-1] if a.ndim and rng.random() < 0.3 else a.copy(order="F")


def reduced_shape(shape, axis, keepdims):
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = {a % len(shape) for a in axes} if shape else set()
    return tuple(1 if i in axes else n for i, n in enumerate(shape) if keepdims or i not in axes)


def same_kind(a, shape, dtype):
    return type(a) is np.ndarray and a.shape == shape and a.dtype == dtype and a.flags.writeable


def some_out(rng, shape, dtype, inputs):
    kind = rng.random()
    if kind < 0.55:
        return None, "good"
    if kind < 0.7:
        out = np.zeros(shape, dtype)
        return out if rng.random() < 0.5 else out.copy(order="F"), "good"
    if kind < 0.8:
        fit = [a for a in inputs if same_kind(a, shape, dtype)]
        if fit:
            return fit[0], "good"
    other = np.float32 if dtype != np.float32 else np.float64
    longer = tuple(n + 1 for n in shape) or (1,)
    bad = [1, 1.0, "out", [0.0], (), {}, Odd(), True, (np.zeros(shape, dtype),), np.zeros((*shape, 1), dtype),
           np.zeros((2, *shape), dtype), np.zeros(shape, np.int64), np.zeros(shape, complex),
           np.zeros(shape, object), np.zeros(shape, other), np.zeros(longer, dtype)]  # fmt: skip
    locked = np.zeros(shape, dtype)
    locked.flags.writeable = False
    bad.append(locked)
    if any(n > 1 for n in shape) and 0 not in shape:
        bad += [np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, (0,) * len(shape))] * 2
        for a in inputs:
            if same_kind(a, shape, dtype) and shape[-1] > 1:
                bad += [a[..., ::-1]] * 3
    return pick(rng, bad), "bad"


def some_array(rng, shape, dtype, make=values):
    kind = rng.random()
    if kind < 0.93:
        return relaid(rng, make(rng, shape, dtype)), "good"
    if kind < 0.96:
        with np.errstate(all="ignore"):
            return np.ones(shape).astype(pick(rng, BAD_DTYPES)), "bad"
    return pick(rng, NO_ARRAYS), "bad"


def probabilities(rng, shape, dtype):
    p = rng.random(shape) * 0.2
    return np.asarray(np.where(rng.random(shape) < 0.2, 0, p)).astype(dtype)


def logs(rng, shape, dtype):
    with np.errstate(divide="ignore"):
        return np.log(probabilities(rng, shape, np.dtype(np.float64))).astype(dtype)


def finite(rng, shape, dtype):
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def sum_of(x, shape, axis, options):
    """The logsumexp of x: of another number the backward pass need not be right."""
    with np.errstate(all="ignore"):
        expected = oracle.logsumexp(x, axis, temperature=options.get("temperature", 1.0)).floats()
        return np.asarray(expected.astype(oracle.result_dtype(x.dtype))).reshape(shape)


def some_call(seed, index):
    """A function's name, its arguments and options, and whether the call is good, bad or open."""
    rng = np.random.default_rng([seed, index])
    name = pick(rng, FORWARD + BACKWARD)
    shape = pick(rng, SHAPES)
    axis, verdict = some_axis(rng, len(shape))
    verdicts = [verdict]
    options = {"axis": axis} if rng.random() < 0.9 or not shape or verdict == "bad" else {}
    axis = options.get("axis", -1)
    temperature, verdict = some_temperature(rng)
    if rng.random() < 0.5:
        options["temperature"] = temperature
        verdicts.append(verdict)
    fair_axis = axis if verdicts[0] == "good" else -1
    keepdims = bool(rng.random() < 0.5)
    if name in FORWARD:
        dtype = pick(rng, GOOD_DTYPES)
        given = [some_array(rng, shape, dtype)]
        where, verdict = some_mask(rng, shape)
        if where is not None:
            options["where"] = where
            verdicts.append(verdict)
        if name == "logsumexp" and keepdims:
            options["keepdims"] = True
    else:
        dtype = pick(rng, [*DTYPES.values()])
        small = reduced_shape(shape, fair_axis, keepdims)
        if name == "logsumexp_backward":
            shapes, makes = (small, shape, small), (finite, finite, finite)
        else:
            shapes, makes = (shape, shape), (finite, logs if name.startswith("log") else probabilities)
        # of logsumexp_backward not x: with an axis of 2 more the reduced shape may still be the same
        wrong = pick(rng, (0, 2) if len(shapes) == 3 else (0, 1)) if rng.random() < 0.08 else None
        given = []
        for i, (s, make) in enumerate(zip(shapes, makes, strict=True)):
            given.append(some_array(rng, (*s, 2) if i == wrong else s, dtype, make))
            if i == wrong:
                given[-1] = given[-1][0], "bad"
    verdicts += [v for _, v in given]
    arguments = [a for a, _ in given]
    if name == "logsumexp_backward" and set(verdicts) == {"good"}:
        arguments[2] = sum_of(arguments[1], arguments[2].shape, axis, options)
    result = oracle.result_dtype(dtype)
    wanted = reduced_shape(shape, fair_axis, keepdims) if name == "logsumexp" else shape
    # in place only where the shapes cannot agree by chance alone, as they do of reduced axes of length 1
    large = {"logsumexp": [], "logsumexp_backward": arguments[1:2]}.get(name, arguments)
    out, verdict = some_out(rng, wanted, result, large)
    if out is not None:
        options["out"] = out
        verdicts.append(verdict)
    return name, arguments, options, "bad" if "bad" in verdicts else "open" if "open" in verdicts else "good"


def shown(value):
    if isinstance(value, np.ndarray):
        text = f"array(shape={value.shape}, strides={value.strides}, dtype={value.dtype}"
        text += ")" if value.flags.writeable else ", read-only)"
        return text + (f" = {value.tolist()}" if value.size <= 12 else "")
    return repr(value)[:100]


def described(name, arguments, options):
    parts = [shown(a) for a in arguments] + [f"{k}={shown(v)}" for k, v in options.items()]
    return f"{name}({', '.join(parts)})"


def snapshot(value):
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.tobytes(), value.shape, value.strides, str(value.dtype), value.flags.writeable
    return repr(value)


def fault(name, arguments, options, verdict):
    """What is wrong with how the call went, or None."""
    out = options.get("out")
    watched = [a for a in (*arguments, *options.values()) if a is not out]
    before, out_before = [snapshot(a) for a in watched], snapshot(out)
    plain = [np.array(a, copy=True) if isinstance(a, np.ndarray) else a for a in arguments]
    try:
        got = getattr(numbasoft, name)(*arguments, **options)
    except (ValueError, TypeError, IndexError) as error:
        message = str(error)
        if type(error) not in (ValueError, TypeError, IndexError, AxisError):
            return f"raised {type(error)!r}"
        if verdict == "good":
            return f"a good call was refused: {message}"
        if "\n" in message or not 15 < len(message) < 400:
            return f"the message is no single sentence: {message!r}"
        if not re.search(r"\b(x|grad|y|log_y|lse|axis|temperature|where|out|keepdims)\b", message):
            return f"the message names no argument: {message!r}"
        if snapshot(out) != out_before:
            return "out lost its contents in a call that raised"
    except BaseException as error:
        return f"raised {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    else:
        if verdict == "bad":
            return f"nonsense was accepted and gave {shown(np.asarray(got))}"
        if out is not None and got is not out:
            return "out was not returned"
        if verdict == "good" and (wrong := wrong_value(name, plain, options, got)):
            return wrong
    # where `out` is one of the arguments, or shares their memory, they may change with it
    for a, was in zip(watched, before, strict=True):
        shares = isinstance(a, np.ndarray) and isinstance(out, np.ndarray) and np.may_share_memory(a, out)
        if snapshot(a) != was and not shares:
            return f"an argument was changed: {shown(a)}"
    return None


def wrong_value(name, plain, options, got):
    keep = {k: v for k, v in options.items() if k in ("axis", "where", "temperature", "keepdims")}
    with np.errstate(all="ignore"):
        expected = getattr(oracle, name)(*plain, **keep)
    result = oracle.result_dtype(plain[-1].dtype if name != "logsumexp_backward" else plain[1].dtype)
    if np.asarray(got).dtype != result:
        return f"dtype {np.asarray(got).dtype}, expected {result}"
    try:
        oracle.check(got, expected, oracle.limit(name, result))
    except AssertionError as error:
        return f"wrong value: {error}"
    return None


def work(seed, count, progress):
    """Run the calls, note each before it starts, print the faults."""
    faults = 0
    for index in range(count):
        name, arguments, options, verdict = some_call(seed, index)
        note = f"call {seed} {index}: {verdict}: {described(name, arguments, options)}"
        os.pwrite(progress, note.encode().ljust(4000)[:4000], 0)
        if problem := fault(name, arguments, options, verdict):
            print(f"{note}\n    {problem}", flush=True)
            faults += 1
            if faults == 20:
                break
    print(f"done {count}", flush=True)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_thousands_of_hostile_calls(seed):
    environment = dict(os.environ)
    package = str(Path(numbasoft.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
    with tempfile.NamedTemporaryFile() as progress:
        command = [sys.executable, __file__, str(seed), "all", progress.name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.fail(f"hang (or {TIMEOUT} s were not enough) at {Path(progress.name).read_text().strip()}")
        last = Path(progress.name).read_text().strip()
    assert done.returncode == 0, f"crash with {done.returncode} at {last}\n{done.stderr[-2000:]}"
    assert done.stdout == f"done {CALLS}\n", done.stdout


def test_the_fuzz_makes_good_and_bad_calls_of_everything():
    # a generator that had drifted into one kind would test nothing
    seen = {}
    for index in range(CALLS):
        name, _, _, verdict = some_call(1, index)
        seen[name, verdict] = seen.get((name, verdict), 0) + 1
    for name in FORWARD + BACKWARD:
        assert seen[name, "good"] >= 40
        assert seen[name, "bad"] >= 40


if __name__ == "__main__":
    if sys.argv[2] == "all":
        work(int(sys.argv[1]), CALLS, os.open(sys.argv[3], os.O_RDWR))
    else:
        call = some_call(int(sys.argv[1]), int(sys.argv[2]))
        print(described(*call[:3]), "is", call[3])
        print("fault:", fault(*call))
