"""python -m benchmarks.gpu: numbasoft on a GPU, beside a copy of the same bytes and other libraries.

Every result is checked before it is timed. A time is the median of single calls between two
CUDA events, each after a write that empties the second cache; the queue is filled ahead, so
that host time does not count. JAX has a stream of its own: its time is that of many such pairs
of a write and a call less that of the writes, by the clock. GB/s counts each input read once and
each output written once; the copy moves as many bytes in all. Host time per call is a line of
its own.
"""

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

from numbasoft import cuda as numbasoft_cuda
from numbasoft.report import workloads

SECONDS = 420  # no new workload is begun after this; all is over within eight minutes
REPEATS = 30
FLUSH = 256 << 20  # bytes; more than any second cache
MOST_BYTES = 1 << 29  # of an array

WIDTHS = [64, 256, 1000, 1003, 1024, 4096, 16_384, 24_576, 50_257, 65_536, 262_144]
SHAPES = [(min(32_768, MOST_BYTES // 4 // n), n) for n in WIDTHS] + [(8, 262_144), (256, 1000)]
TWO_ARRAYS = "sigmoid", "binary_cross_entropy", "kl_divergence"  # read, or one read and one written
# With the options of ours.
DRAWS: dict[str, dict[str, Any]] = {
    "sample": {"rng": 1}, "sample, filtered": {"rng": 1, "top_k": 50, "top_p": 0.9}, "gumbel_softmax": {"rng": 1},
}  # fmt: skip
FEW = *DRAWS, "perplexity"  # of fewer shapes, and in the first two dtypes
FEW_SHAPES = [(32_768, 64), (32_768, 1000), (2048, 50_257), (64, 128_256), (1, 128_256)]
FUNCTIONS = *workloads.FUNCTIONS, *workloads.LOSSES, *TWO_ARRAYS, *FEW
DTYPES = ["bfloat16", "float32", "float16", "float64"]
JAX_DTYPES = ["bfloat16", "float32"]  # it compiles for every shape, which takes longer than measuring


class Rival(NamedTuple):
    """A library: functions by name, what they take of PyTorch's tensors, and how they are timed."""

    functions: dict
    given: Any
    timed: Any
    dtypes: list = DTYPES


def libraries(flush):
    """All libraries by name, and why others are missing."""
    import torch

    import numbasoft

    def same(*tensors):
        return tensors

    by_events = partial(timed, flush=flush)
    ours = {n: partial(getattr(numbasoft, n.partition(",")[0]), **DRAWS.get(n, {})) for n in FUNCTIONS}
    result = {"numbasoft": Rival(ours, same, by_events)}
    of_torch = {
        "softmax": lambda x: torch.softmax(x, -1),
        "log_softmax": lambda x: torch.log_softmax(x, -1),
        "logsumexp": lambda x: torch.logsumexp(x, -1),
        "softmax_backward": lambda g, y: torch.ops.aten._softmax_backward_data(g, y, -1, y.dtype),
        "log_softmax_backward": lambda g, y: torch.ops.aten._log_softmax_backward_data(g, y, -1, y.dtype),
        # as its autograd does
        "logsumexp_backward": lambda g, x, lse: g[:, None] * (x - lse[:, None]).exp(),
        "sigmoid": torch.sigmoid,
        "binary_cross_entropy": torch.nn.functional.binary_cross_entropy_with_logits,
        "kl_divergence": divergence,
    }
    of_torch |= {
        "cross_entropy": torch.nn.functional.cross_entropy,
        "cross_entropy_value_and_grad": torch_value_and_grad,
        "token_log_probs": lambda x, target: of_classes(torch.log_softmax(x, -1), target),
        "sample": lambda x: torch.multinomial(torch.softmax(x, -1), 1)[:, 0],
        "sample, filtered": torch_filtered,
        "gumbel_softmax": torch.nn.functional.gumbel_softmax,
        "perplexity": lambda x, target: torch.nn.functional.cross_entropy(x.float(), target).exp(),
    }
    result["PyTorch"] = Rival(of_torch, same, by_events)
    missing = {}
    try:
        import cupy
        from cupyx.scipy import special
    except ImportError as error:
        missing["CuPy"] = sentence(error)
    else:

        def to_cupy(*tensors):
            return [cupy.from_dlpack(t) for t in tensors]

        names = "softmax", "log_softmax", "logsumexp"
        of_cupy = {n: partial(getattr(special, n), axis=-1) for n in names}
        result["CuPy"] = Rival(of_cupy, to_cupy, by_events)
    try:
        result["Triton"] = Rival({"softmax": triton_softmax()}, same, by_events)
    except ImportError as error:
        missing["Triton"] = sentence(error)
    try:
        result["JAX"] = jax_rival()
    except (ImportError, RuntimeError) as error:
        missing["JAX"] = sentence(error)
    return result, missing


def sentence(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def jax_functions():
    import jax
    from jax import numpy as jnp

    functions = {
        "softmax": lambda x: jax.nn.softmax(x, axis=-1),
        "log_softmax": lambda x: jax.nn.log_softmax(x, axis=-1),
        "logsumexp": lambda x: jax.nn.logsumexp(x, axis=-1),
        "softmax_backward": lambda g, y: y * (g - (g * y).sum(-1, keepdims=True)),
        "log_softmax_backward": lambda g, y: g - jnp.exp(y) * g.sum(-1, keepdims=True),
        "logsumexp_backward": lambda g, x, lse: g[:, None] * jnp.exp(x - lse[:, None]),
    }

    def in_float32(function):
        return lambda *given: function(*(a.astype("float32") for a in given)).astype(given[-1].dtype)

    return {name: jax.jit(in_float32(function)) for name, function in functions.items()}


def jax_rival():
    """JAX, where it has a CUDA device; else an error that says what is missing."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # three quarters of the memory
    import jax

    jax.devices("cuda")
    written = [jax.device_put(jax.numpy.zeros(FLUSH // 4, "float32"), jax.devices("cuda")[0])]
    write = jax.jit(lambda a: a + 1, donate_argnums=0)

    def to_jax(*tensors):
        import torch

        torch.cuda.synchronize()
        return [jax.dlpack.from_dlpack(t) for t in tensors]

    def seconds(call):
        begin = time.perf_counter()
        for _ in range(REPEATS):
            written[0] = write(written[0])
            last = call()
        jax.block_until_ready((last, written[0]))
        return time.perf_counter() - begin

    def by_clock(call):
        """Milliseconds of one call, by pairs of a write and a call and by writes alone."""
        seconds(call), seconds(lambda: None)
        pairs = [seconds(call) - seconds(lambda: None) for _ in range(3)]
        return statistics.median(pairs) / REPEATS * 1e3

    return Rival(jax_functions(), to_jax, by_clock, JAX_DTYPES)


def torch_value_and_grad(x, target):
    import torch

    x = x.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, target)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


def torch_filtered(x):
    import torch

    top, classes = torch.topk(x, DRAWS["sample, filtered"]["top_k"], -1)
    p = torch.softmax(top, -1)
    p = torch.where(p.cumsum(-1) - p < DRAWS["sample, filtered"]["top_p"], p, 0)
    return classes.gather(-1, torch.multinomial(p, 1))[:, 0]


def of_classes(log_p, target):
    return log_p.gather(-1, target[:, None])[:, 0]


def divergence(x, y):
    import torch

    p, q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")


def triton_softmax():
    """The softmax of Triton's tutorial: a row to a program, padded to a power of two."""
    global tl  # Triton up to 3.3 looks up a kernel's names in its module alone
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, y, n, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, block)
        v = tl.load(x + row * n + columns, mask=columns < n, other=-float("inf")).to(tl.float32)
        e = tl.exp(v - tl.max(v, axis=0))
        tl.store(y + row * n + columns, e / tl.sum(e, axis=0), mask=columns < n)

    def softmax(x):
        rows, n = x.shape
        if n > 65_536 or x.dtype == torch.float64:
            return None
        y = torch.empty_like(x)
        block = triton.next_power_of_2(n)
        kernel[(rows,)](x, y, n, block, num_warps=min(16, max(1, block // 256)))
        return y

    return softmax


def arguments(name, rows, n, dtype, generator):
    import torch

    x = torch.randn((rows, n), device="cuda", generator=generator).to(dtype)
    if name in workloads.LOSSES or name == "perplexity":
        return x, torch.randint(n, (rows,), device="cuda", generator=generator)
    if name in ("binary_cross_entropy", "kl_divergence"):
        other = torch.randn((rows, n), device="cuda", generator=generator).to(dtype)
        return x, torch.sigmoid(other) if name == "binary_cross_entropy" else other
    if not name.endswith("_backward"):
        return (x,)
    if name == "logsumexp_backward":
        return torch.randn(rows, device="cuda", generator=generator).to(dtype), x, torch.logsumexp(x, -1)
    y = torch.softmax(x, -1) if name.startswith("softmax") else torch.log_softmax(x, -1)
    return torch.randn((rows, n), device="cuda", generator=generator).to(dtype), y


def expected(name, given):
    """The first rows in float64, or one number for all, by PyTorch."""
    import torch

    if name.startswith("cross_entropy") or name == "perplexity":
        x, target = given
        rows, step = len(x), 64
        parts = [
            torch.nn.functional.cross_entropy(x[i : i + step].double(), target[i : i + step], reduction="sum")
            for i in range(0, rows, step)
        ]
        loss = torch.stack(parts).sum() / rows
        if name == "perplexity":
            return loss.exp()
        p = torch.softmax(x[:4].double(), -1)
        p[torch.arange(len(p)), target[:4]] -= 1
        return loss if name == "cross_entropy" else (loss, p / rows)
    if name == "binary_cross_entropy":  # in blocks: float64 of all would not fit beside the rest
        parts = zip(*(a.split(1024) for a in given), strict=True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return sum(loss(x.double(), t.double(), reduction="sum") for x, t in parts) / given[0].numel()
    if name == "kl_divergence":
        parts = zip(*(a.split(1024) for a in given), strict=True)
        return sum(divergence(x.double(), y.double()) * len(x) for x, y in parts) / len(given[0])
    if name == "token_log_probs":
        x, target = given
        return of_classes(torch.log_softmax(x[:4].double(), -1), target[:4])
    rows = [a[:4].double() for a in given]
    if name == "softmax_backward":
        g, y = rows
        return y * (g - (g * y).sum(-1, keepdim=True))
    if name == "log_softmax_backward":
        g, y = rows
        return g - y.exp() * g.sum(-1, keepdim=True)
    if name == "logsumexp_backward":
        g, x, lse = rows
        return g[:, None] * (x - lse[:, None]).exp()
    if name == "sigmoid":
        return torch.sigmoid(rows[0])
    return getattr(torch, name)(rows[0], -1)


def is_draw(name, given, got, ours):
    """Whether classes are in range, and probabilities sum to 1; ours are those of the CPU besides."""
    import torch

    import numbasoft

    x = given[0][:4].float().cpu().numpy()
    want = torch.from_numpy(getattr(numbasoft, name.partition(",")[0])(x, **DRAWS[name]))
    if name == "gumbel_softmax":
        got = got[:4].double().cpu()
        near = not ours or torch.allclose(got, want.double(), rtol=2e-2, atol=1e-6)
        return near and bool(((got.sum(-1) - 1).abs() < 2e-2).all())
    in_range = bool(((got >= 0) & (got < given[0].shape[1])).all())
    return in_range and (not ours or torch.equal(got[:4].cpu(), want))


def is_right(name, given, got, ours=True):
    if name in DRAWS:
        return is_draw(name, given, got, ours)
    if isinstance(got, tuple):
        return all(is_close(given, g, w) for g, w in zip(got, expected(name, given), strict=True))
    return is_close(given, got, expected(name, given))


def is_close(given, got, want):
    import torch

    got = torch.as_tensor(got) if isinstance(got, torch.Tensor) else torch.from_dlpack(got)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
    if not want.ndim:
        return bool((got.double() - want).abs() <= tolerance[given[0].dtype] * want.abs())
    want = torch.atleast_1d(want)
    allowed = tolerance[given[0].dtype] * want.abs().clamp_min(want.abs().amax(-1, keepdim=True) * 1e-3)
    finfo = torch.finfo(given[0].dtype)  # a mean's gradient may be less than the smallest number of 16 bits
    allowed = allowed + max(1e-30, finfo.smallest_normal * finfo.eps)
    return bool(((torch.atleast_1d(got)[:4].double() - want).abs() <= allowed).all())


def timed(call, flush):
    """Median milliseconds of one call, without what is left in the second cache."""
    import torch

    for _ in range(3):
        call()
    pairs = []
    for _ in range(REPEATS):
        flush.zero_()
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def measure(name, dtype, rows, n, rivals, flush, generator):
    import torch

    given = arguments(name, rows, n, getattr(torch, dtype), generator)
    full = max(given, key=lambda tensor: tensor.numel())
    if name in FEW:
        elements = rows * n * (2 if name == "gumbel_softmax" else 1)
    else:
        elements = 2 * rows * n if name in TWO_ARRAYS else workloads.Workload(name, (rows, n)).elements_moved
    moved = elements * full.element_size()
    half = torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device="cuda", generator=generator)
    target = torch.empty_like(half)
    row = {"function": name, "dtype": dtype, "shape": [rows, n], "bytes": moved, "GB/s": {}}
    row["GB/s"]["copy"] = moved / timed(partial(target.copy_, half), flush) / 1e6
    del half, target
    for library, rival in rivals.items():
        if name not in rival.functions or dtype not in rival.dtypes:
            continue
        try:
            theirs = rival.given(*given)
            call = partial(rival.functions[name], *theirs)
            got = call()
        except Exception as error:  # out of memory, or a compiler's: of every library's own kind
            row.setdefault("failed", {})[library] = sentence(error)
            continue
        if got is None:
            continue
        if not is_right(name, given, got, library == "numbasoft"):
            row.setdefault("failed", {})[library] = "wrong result"
            continue
        del got
        row["GB/s"][library] = moved / rival.timed(call) / 1e6
    return row


def host_cost(generator):
    """Microseconds of host time for a call on preallocated arrays, the launch included."""
    import torch

    import numbasoft

    x = torch.randn((8, 1000), device="cuda", generator=generator)
    y = torch.empty_like(x)
    result = {}
    for library, call in (
        ("numbasoft", lambda: numbasoft.softmax(x, out=y)),
        ("PyTorch", lambda: torch.softmax(x, -1, out=y)),
    ):
        for _ in range(100):
            call()
        torch.cuda.synchronize()
        best = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(100):
                call()
            best = min(best, (time.perf_counter() - start) / 100)
            torch.cuda.synchronize()
        result[library] = best * 1e6
    return result


def line(row, names):
    rates = row["GB/s"]
    ours, copy = rates.get("numbasoft"), rates["copy"]
    share = f"{ours / copy:6.1%}" if ours else "     -"
    figures = " ".join(f"{rates[n]:10.0f}" if n in rates else f"{'-':>10}" for n in names)
    rows, n = row["shape"]
    text = f"{row['function']:28} {row['dtype']:8} {rows:6} x {n:<7} {figures} {share}"
    return text + "".join(f"  {k}: {v}" for k, v in row.get("failed", {}).items())


def cases():
    """What is measured, in turn: softmax's family in every dtype before anything else, should time run out."""
    others = [name for name in FUNCTIONS if name not in workloads.FUNCTIONS]
    return [
        (name, dtype, shape)
        for names in (workloads.FUNCTIONS, others)
        for dtype in DTYPES
        for name in names
        if name not in FEW or dtype in DTYPES[:2]
        for shape in (FEW_SHAPES if name in FEW else SHAPES)
    ]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    missing = numbasoft_cuda.reason()
    if missing:
        sys.exit(f"benchmarks.gpu: {missing[1]}")
    if find_spec("torch") is None:
        sys.exit("benchmarks.gpu: PyTorch is not installed, which makes the inputs and is compared with")
    import torch

    begin = time.monotonic()
    generator = torch.Generator(device="cuda").manual_seed(1)
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    rivals, missing = libraries(flush)
    names = ["copy", *rivals]
    result = {"device": torch.cuda.get_device_name(), "rows": [], "skipped": 0}
    result["not compared"] = missing
    result["host microseconds"] = host_cost(generator)
    print(f"{result['device']}, GB/s; the last column is numbasoft's share of the copy")
    print(
        "host time of a call, us: "
        + ", ".join(f"{k} {v:.1f}" for k, v in result["host microseconds"].items())
    )
    print("".join(f"not compared with {name}: {reason}\n" for name, reason in missing.items()), end="")
    print(f"{'function':28} {'dtype':8} {'rows':>6}   {'width':7} " + " ".join(f"{n:>10}" for n in names))
    for name, dtype, (rows, n) in cases():
        if time.monotonic() - begin > SECONDS:
            result["skipped"] += 1
            continue
        row = measure(name, dtype, rows, n, rivals, flush, generator)
        result["rows"].append(row)
        print(line(row, names), flush=True)
    if result["skipped"]:
        print(f"{result['skipped']} workloads were left out: {SECONDS} seconds are over")
    text = json.dumps(result)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text)
    print(text)
    wrong = [r for r in result["rows"] if "numbasoft" in r.get("failed", {})]
    sys.exit(f"{len(wrong)} results of numbasoft were wrong or failed" if wrong else 0)


if __name__ == "__main__":
    main()
