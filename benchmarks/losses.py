"""Cross-entropy against PyTorch and a parallel copy: ``python -m benchmarks.losses``.

Every library runs in a process of its own, in turns (see benchmarks/NOTES.md for what it gave). What
PyTorch is timed on is what a training loop calls: the loss with autograd, and backward.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from numbasoft import jit
from numbasoft.report import rivals, worker, workloads

SHAPES = ((32, 32000), (256, 128256), (4096, 1000), (65536, 64))
FUNCTIONS = ("cross_entropy_value_and_grad", "cross_entropy", "token_log_probs")
LIBRARIES = ("numbasoft", "PyTorch", "copy")
ROUNDS = 3


def inputs(shape):
    (x,) = workloads.Workload("softmax", tuple(shape)).inputs()
    return x, np.random.default_rng(3).integers(shape[1], size=shape[0])


def numbasoft_call(function, x, target, threads):
    import numba

    import numbasoft

    numba.set_num_threads(threads)
    out = np.zeros_like(x)
    return {
        "cross_entropy_value_and_grad": lambda: numbasoft.cross_entropy_value_and_grad(x, target, out=out)[0],
        "cross_entropy": lambda: numbasoft.cross_entropy(x, target),
        "token_log_probs": lambda: -numbasoft.token_log_probs(x, target).mean(dtype="f8"),
    }[function]


def torch_call(function, x, target, threads):
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(threads)
    logits, target = torch.from_numpy(x), torch.from_numpy(target)

    def value_and_grad():
        logits.grad = None
        loss = cross_entropy(logits, target)
        loss.backward()
        return loss.detach()

    logits.requires_grad_(function == "cross_entropy_value_and_grad")
    return {
        "cross_entropy_value_and_grad": value_and_grad,
        "cross_entropy": lambda: cross_entropy(logits, target),
        "token_log_probs": lambda: -torch.log_softmax(logits, 1).gather(1, target[:, None]).mean(),
    }[function]


def copy_call(function, x, target, threads):
    """The bytes of the call: the logits read once, and as many written where there is a gradient."""
    copy = rivals.parallel_copy(threads)
    parts = 1 if function == "cross_entropy_value_and_grad" else 2
    source = x.reshape(-1).view("u1")[: x.nbytes // parts]
    result = np.zeros_like(source)
    return lambda: copy(source, result)


CALLS = {"numbasoft": numbasoft_call, "PyTorch": torch_call, "copy": copy_call}


def one_library(library, function, shape, threads, seconds):
    """Run in a process of its own: the best time, and the result for comparison."""
    call = CALLS[library](function, *inputs(shape), threads)
    result = call()
    return worker.time_call(call, seconds)["best"], None if library == "copy" else float(result)


def measure(function, shape, threads, seconds):
    """The best seconds of each library over some rounds; results must agree before a time counts."""
    best = dict.fromkeys(LIBRARIES, math.inf)
    for _ in range(ROUNDS):
        results = {}
        for library in LIBRARIES:
            request = json.dumps(
                dict(library=library, function=function, shape=shape, threads=threads, seconds=seconds)
            )
            limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "NUMBA", "OPENBLAS", "MKL")}
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.losses", request],
                cwd=Path(__file__).parents[1], env=os.environ | limits, capture_output=True, text=True, check=True,
            )  # fmt: skip
            seconds_per_call, results[library] = json.loads(done.stdout.splitlines()[-1])
            best[library] = min(best[library], seconds_per_call)
        assert abs(results["numbasoft"] / results["PyTorch"] - 1) < 1e-4, results
    return best


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=jit.processors())
    parser.add_argument("--functions", nargs="+", default=FUNCTIONS, choices=FUNCTIONS, metavar="FUNCTION")
    parser.add_argument("--seconds", type=float, default=1.0, help="per library, workload and round")
    chosen = parser.parse_args()
    print(f"{f'float32, threads: {chosen.threads}':46s} numbasoft   PyTorch      copy of the bytes")
    for function in chosen.functions:
        ratios = []
        for shape in SHAPES:
            best = measure(function, shape, chosen.threads, chosen.seconds)
            ours, theirs, copy = (best[library] for library in LIBRARIES)
            ratios.append(theirs / ours)
            name = f"{function} {shape[0]}x{shape[1]}"
            print(f"{name:46s} {ours * 1e3:6.2f} ms {theirs / ours:8.2f}x {copy / ours:8.2f}x", flush=True)
        print(f"{'geometric mean':46s}           {math.prod(ratios) ** (1 / len(ratios)):8.2f}x", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # a process that `measure` started
        print(json.dumps(one_library(**json.loads(sys.argv[1]))))
    else:
        main()
