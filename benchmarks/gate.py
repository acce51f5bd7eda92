"""Two commits side by side: ``python -m benchmarks.gate BASE [CONTENDER]``.

Both are measured in one run, in processes that take turns every few milliseconds, because the same
code is up to twice as slow an hour later on a shared machine. Exits with 1 where the contender
is slower than the threshold or less accurate, with 0 where it is neither, with 2 where it could
not be measured. CONTENDER is the working tree unless a commit is named.

How it decides. A pair of processes, one per commit, measures a workload in turns; the median of
the ratios is that pair's verdict, which removes the machine's drift. What two processes of the
same code keep apart for as long as they live (where their memory lies) only other
processes can tell: so each workload is measured by several pairs, and a slowdown counts if the median
of the pairs reaches the threshold and all pairs but one reach half of it. What is found is then
measured again by fresh pairs, and reported only if it is found again. ``--instructions`` adds how many
instructions a call executes, which no other program on the machine can change: a slowdown with a ratio
of 1.000 there is not in the code.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from benchmarks import instructions
from numbasoft.report.terminal import Progress
from numbasoft.report.workloads import BACKWARD, DTYPES, FORWARD, Workload

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("gate_worker.py")
PAIRS, CONFIRMATIONS = 3, 4  # pairs of processes per workload; and to confirm what was found
ROUNDS = 12  # turns of a pair
SLICE = 0.02  # seconds of a turn
ULP_TOLERANCE = 0.05  # the largest error of the same rows is the same number: this forgives another libm

# One workload per kernel and regime: each stands for what would be slow if its code were.
WORKLOADS = (
    *(Workload("softmax", shape) for shape in ((1, 10), (256, 1000), (4096, 64), (16, 32000))),
    *(Workload("softmax", (256, 1000), dtype) for dtype in ("float16", "bfloat16", "float64")),
    Workload("softmax", (1000, 512), axis=0),
    *(Workload(f, (256, 1000), dtype) for f in FORWARD[1:] for dtype in ("float32", "float64")),
    *(Workload(f, (256, 1000), dtype) for f in BACKWARD for dtype in ("float32", "float64")),
    Workload("cross_entropy_value_and_grad", (256, 1000)),
)


class NotMeasured(RuntimeError):
    """A commit could not be checked out, or its worker failed."""


def export(commit: str, folder: Path) -> None:
    """The tracked files of a commit, without touching the working tree."""
    found = subprocess.run(
        ["git", "archive", commit, "numbasoft"], cwd=ROOT, capture_output=True, check=False
    )
    if found.returncode != 0:
        raise NotMeasured(f"git has no {commit!r} here: {found.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")


class Worker:
    """A process that runs one commit's package."""

    def __init__(self, package: Path, threads: int, runner: tuple[str, ...] = (), **environment: str):
        surroundings = os.environ | {
            "PYTHONPATH": str(package),
            "NUMBA_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        python = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
        self.process = subprocess.Popen(
            [*runner, *python, str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=surroundings | environment, cwd=package, text=True,
        )  # fmt: skip

    def ask(self, **request) -> dict:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise NotMeasured(f"the worker ended with exit code {self.process.wait()} on {request}")
        return json.loads(answer)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def workers(packages: tuple[Path, Path], threads: int, *runner: str, **environment) -> Iterator[list[Worker]]:
    both = [Worker(package, threads, runner, **environment) for package in packages]
    try:
        yield both
    finally:
        for worker in both:
            worker.stop()


def ratios(packages, works, pairs: int, threads: int, progress) -> dict[Workload, list[float]]:
    """Time of the contender / time of the base, one median per pair of processes."""
    medians: dict[Workload, list[float]] = {work: [] for work in works}
    for pair in range(pairs):
        with workers(packages, threads) as both:
            for work in works:
                progress.advance(0, work.name)
                at_once(both, task="prepare", work=describe(work))
                turns = []
                for turn in range(ROUNDS):
                    order = both if (turn + pair) % 2 == 0 else both[::-1]
                    seconds = {worker: worker.ask(task="time", seconds=SLICE)["seconds"] for worker in order}
                    turns.append(seconds[both[1]] / seconds[both[0]])
                medians[work].append(statistics.median(turns))
                progress.advance(1)
    return medians


def counted(packages, works, progress) -> dict[Workload, float]:
    """Instructions of the contender / instructions of the base, in one thread."""
    with workers(packages, 1, **instructions.FIXED_CPU) as both:  # compiles, which valgrind would slow down
        for work in works:
            progress.advance(0, f"compiling {work.name}")
            at_once(both, task="prepare", work=describe(work))
    found = {}
    with workers(packages, 1, *instructions.CALLGRIND, **instructions.FIXED_CPU) as both:
        for work in works:
            progress.advance(0, f"counting {work.name}")
            at_once(both, task="prepare", work=describe(work))
            base, contender = (instructions.per_call(worker) for worker in both)
            found[work] = contender / base
            progress.advance(1)
    return found


def at_once(both: list[Worker], **request) -> list[dict]:
    """The answers of both workers, which work at the same time: for what is not timed."""
    with ThreadPoolExecutor(len(both)) as pool:
        return list(pool.map(lambda worker: worker.ask(**request), both))


def describe(work: Workload) -> dict:
    return {"function": work.function, "shape": list(work.shape), "dtype": work.dtype, "axis": work.axis}


def is_slower(medians: list[float], threshold: float) -> bool:
    half = math.sqrt(threshold)
    return statistics.median(medians) >= threshold and sorted(medians)[1] >= half


def errors(packages, functions, dtypes, threads: int) -> list[dict]:
    """The largest error in ULP of both commits on the same rows, per function, dtype and kind of rows."""
    records = []
    with workers(packages, threads) as both:
        for dtype in dtypes:
            old, new = at_once(both, task="errors", dtype=dtype, functions=functions)
            for a, b in zip(old["records"], new["records"], strict=True):
                records.append(b | {"base_ulp": a["max_ulp"]})
    return records


def is_less_accurate(record: dict) -> bool:
    old, new = (math.inf if record[k] is None else record[k] for k in ("base_ulp", "max_ulp"))
    return new > record["bound"] >= old or new > old + ULP_TOLERANCE


def known(packages, works, threads: int) -> list[Workload]:
    """The workloads that both commits have."""
    with workers(packages, threads) as both:
        names = [set(answer["functions"]) for answer in at_once(both, task="functions")]
    return [work for work in works if all(work.function in name for name in names)]


def compare(packages, works, *, threshold: float, threads: int, count: bool = False) -> dict:
    asked, works = works, known(packages, works, threads)
    named = {work.function for work in works}
    named |= {function.removesuffix("_backward") for function in named}  # gives the backward pass its input
    functions = [function for function in (*FORWARD, *BACKWARD) if function in named]
    dtypes = [dtype for dtype in DTYPES if any(work.dtype == dtype for work in works)]
    with Progress((PAIRS + count) * len(works), "compiling") as progress:
        first = ratios(packages, works, PAIRS, threads, progress)
        suspects = [work for work, medians in first.items() if is_slower(medians, threshold)]
        again = ratios(packages, suspects, CONFIRMATIONS, threads, progress) if suspects else {}
        progress.advance(0, "accuracy")
        accuracy = errors(packages, functions, dtypes, threads)
        executed = counted(packages, works, progress) if count else {}
    return {
        "threshold": threshold,
        "threads": threads,
        "left_out": [work.name for work in asked if work not in works],
        "speed": [
            {
                "workload": work.name,
                "ratio": statistics.median(again.get(work, medians)),
                "pairs": medians + again.get(work, []),
                "instructions": executed.get(work),
                "slower": work in again and is_slower(again[work], threshold),
            }
            for work, medians in first.items()
        ],
        "accuracy": [record | {"worse": is_less_accurate(record)} for record in accuracy],
    }


def show(result: dict) -> str:
    lines = [f"{'workload':44} contender / base   lowest to highest pair of processes"]
    for row in sorted(result["speed"], key=lambda row: -row["ratio"]):
        verdict = "  SLOWER" if row["slower"] else ""
        executed = "" if row["instructions"] is None else f"   instructions {row['instructions']:.3f}"
        lines.append(
            f"{row['workload']:44} {row['ratio']:16.3f}   "
            f"{min(row['pairs']):.3f} to {max(row['pairs']):.3f} of {len(row['pairs'])}{executed}{verdict}"
        )
    lines += [f"{name:44} left out: one of the commits has no such workload" for name in result["left_out"]]
    worse = [r for r in result["accuracy"] if r["worse"]]
    lines.append("")
    lines += [
        f"LESS ACCURATE: {r['function']} {r['dtype']}, rows {r['rows']}: {r['base_ulp']} to {r['max_ulp']} ULP"
        for r in worse
    ] or [f"accuracy: none of {len(result['accuracy'])} largest errors grew"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("contender", nargs="?", help="a commit; the working tree if not given")
    parser.add_argument(
        "--only", default="", help="a regular expression that the workload's name must contain"
    )
    parser.add_argument(
        "--threshold", type=float, default=1.10, help="the slowdown that fails (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each commit (default %(default)s)")
    parser.add_argument(
        "--instructions", action="store_true", help="also count the instructions of a call (needs valgrind)"
    )
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    chosen = parser.parse_args(arguments)
    if not chosen.threshold > 1:
        parser.error(f"--threshold is {chosen.threshold}, but must be larger than 1")
    works = [work for work in WORKLOADS if re.search(chosen.only, work.name)]
    if not works:
        parser.error(
            f"--only is {chosen.only!r}, which no workload contains: {', '.join(w.name for w in WORKLOADS)}"
        )
    if chosen.instructions and instructions.missing():
        parser.error(f"--instructions needs {instructions.missing()}, which is not on the PATH")
    try:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder, "base")
            export(chosen.base, base)
            contender = ROOT
            if chosen.contender is not None:
                contender = Path(folder, "contender")
                export(chosen.contender, contender)
            result = compare(
                (base, contender), works,
                threshold=chosen.threshold, threads=chosen.threads, count=chosen.instructions,
            )  # fmt: skip
    except NotMeasured as problem:
        print(f"not measured: {problem}", file=sys.stderr)
        return 2
    print(json.dumps(result) if chosen.json else show(result))
    return int(any(r["slower"] for r in result["speed"]) or any(r["worse"] for r in result["accuracy"]))


if __name__ == "__main__":
    sys.exit(main())
