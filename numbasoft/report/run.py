"""Runs the workers and puts together what they answer."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from .. import jit
from . import accuracy, environment, rivals, workloads
from .terminal import Progress

ROUNDS = 2  # each library's process runs this often, in turn: A B C A B C
SECONDS = {True: 0.03, False: 0.06}  # per workload, library and round; quick or not
LONGEST = 40  # seconds; where the first round took longer, there is no second unless it was asked for
SPEED_STEP = 3  # a workload takes the bar as far as three accuracy records: about as long
ACCURACY_RIVALS = ("SciPy", "PyTorch", "ONNX Runtime", "JAX")


class WorkerFailed(RuntimeError):
    """A worker ended before it had answered everything."""


class Workers:
    """Starts workers; whichever still run when the block is left, by an error or by Ctrl-C, are killed."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        self.stopped = True
        for process in list(self.running):
            process.kill()

    def ask(self, request: dict, module: str = "numbasoft.report.worker") -> Iterator[dict]:
        """The records of one worker, as they come."""
        threads = str(request["threads"])
        surroundings = os.environ | {
            "NUMBA_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        command = [sys.executable, "-m", module, json.dumps(request)]
        with tempfile.TemporaryFile("w+") as complaints:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=complaints, env=surroundings, text=True
            )
            self.running.add(process)
            try:
                if self.stopped:  # another thread starts a process while `stop` runs
                    process.kill()
                assert process.stdout is not None
                for line in process.stdout:
                    yield json.loads(line)
                if process.wait() != 0:
                    complaints.seek(0)
                    last = (complaints.read().strip() or "no message").splitlines()[-1]
                    raise WorkerFailed(
                        f"{request['library']} ended with exit code {process.returncode}: {last}"
                    )
            finally:
                process.kill()
                process.wait()
                self.running.discard(process)


def report(*, threads: int | None, quick: bool, rounds: int | None) -> dict:
    """Everything that ``python -m numbasoft`` knows, ready for JSON."""
    longest = math.inf if rounds else LONGEST
    threads = threads or jit.processors()
    present = [r for r in rivals.RIVALS if r.missing() is None]
    works = "quick" if quick else "report"
    entrants = [*rivals.OURS, rivals.Copy, *present]
    rounds = rounds or (1 if quick else ROUNDS)
    dtypes = [dtype for dtype, reason in accuracy.available().items() if reason is None]
    others = [] if quick else [r.name for r in present if r.name in ACCURACY_RIVALS]
    jobs = [("numbasoft", dtype) for dtype in reversed(dtypes)] + [(name, "float32") for name in others]
    units = accuracy.KINDS[quick] * (
        len(dtypes) * len(workloads.FUNCTIONS) + len(others) * len(workloads.FORWARD)
    )
    steps = units + SPEED_STEP * rounds * len(entrants) * len(workloads.LISTS[works])
    with Progress(steps, "starting") as progress, Workers() as workers:
        result: dict = {
            "environment": environment.describe(threads),
            "accuracy": _accuracy(workers, jobs, threads, quick, works, progress),
            "speed": _speed(workers, entrants, works, rounds, longest, threads, SECONDS[quick], progress),
        }
    result["ok"] = _right(result)
    return result


def speed(
    works: str, *, threads: int, seconds: float, rounds: int, entrants: list[type[rivals.Rival]]
) -> dict:
    """The part of the report on speed, for one list of workloads."""
    steps = SPEED_STEP * rounds * len(entrants) * len(workloads.LISTS[works])
    with Progress(steps, "starting") as progress, Workers() as workers:
        return _speed(workers, entrants, works, rounds, math.inf, threads, seconds, progress)


def _accuracy(workers, jobs, threads, quick, works, progress) -> dict:
    """Two workers at a time: nothing is timed here. One compiles what will be timed, into the disk cache."""
    collected: dict[tuple[str, str], list[dict]] = {}
    problems: dict[str, str] = {}

    def work(job):
        library, dtype = job
        request = {"task": "accuracy", "library": library, "dtype": dtype, "quick": quick, "threads": 1}
        for record in workers.ask(request):
            collected.setdefault(job, []).append(record)
            progress.advance(1, f"is it right: {library} {dtype}")

    def compile_ahead():
        for _ in workers.ask({"task": "compile", "library": "numbasoft", "works": works, "threads": threads}):
            pass

    with ThreadPoolExecutor(2) as pool:
        try:
            started = {pool.submit(compile_ahead): ("numbasoft", "compilation")}
            started |= {pool.submit(work, job): job for job in jobs}
            for future in as_completed(started):
                try:
                    future.result()
                except WorkerFailed as error:
                    problems[" ".join(started[future])] = str(error)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            workers.stop()
            raise
    skipped = {dtype: reason for dtype, reason in accuracy.available().items() if reason}
    return {
        "numbasoft": [r for job in jobs if job[0] == "numbasoft" for r in collected.get(job, [])],
        "rivals": {job[0]: collected.get(job, []) for job in jobs if job[0] != "numbasoft"},
        "skipped": skipped,
        "problems": problems,
    }


def _speed(workers, entrants, works, rounds, longest, threads, seconds, progress) -> dict:
    seen: dict[tuple[str, str], list[dict]] = {}
    problems: dict[str, str] = {}
    started, turn = time.monotonic(), 0
    while turn < rounds and (turn == 0 or time.monotonic() - started < longest):
        turn += 1
        for entrant in entrants:
            request = {"task": "speed", "library": entrant.name, "threads": threads, "works": works}
            progress.advance(0, f"how fast: {entrant.name}, round {turn} of {rounds}")
            try:
                for record in workers.ask(request | {"seconds": seconds}):
                    seen.setdefault((entrant.name, record["workload"]), []).append(record)
                    progress.advance(SPEED_STEP)
            except WorkerFailed as error:
                problems[entrant.name] = str(error)
    rows = [
        {
            "workload": work.name,
            "function": work.function,
            "shape": list(work.shape),
            "dtype": work.dtype,
            "axis": work.axis,
            "bytes_moved": work.bytes_moved,
            "libraries": {e.name: _merge(seen.get((e.name, work.name), [])) for e in entrants},
        }
        for work in workloads.LISTS[works]
    ]
    for row in rows:
        for entrant in entrants:
            mine = row["libraries"][rivals.Numbasoft.name]
            if entrant.given and "unsupported" not in row["libraries"][rivals.NumbasoftGiven.name]:
                mine = row["libraries"][rivals.NumbasoftGiven.name]
            theirs = row["libraries"][entrant.name]
            if entrant not in rivals.OURS and "best" in mine and "best" in theirs:
                theirs["ratio"] = theirs["best"] / mine["best"]
    return {
        "threads": threads,
        "rounds": turn,
        "ratio": "time of the library / time of numbasoft, best of all rounds; both with a given output or both without",
        "given_output": [e.name for e in entrants if e.given],
        "missing": {r.name: r.missing() for r in rivals.RIVALS if r.missing()},
        "problems": problems,
        "rows": rows,
        "summary": {e.name: _summary(rows, e.name) for e in entrants if e not in rivals.OURS},
    }


def _merge(records: list[dict]) -> dict:
    """One library on one workload: the best of all rounds and the median of their medians."""
    if not records:
        return {"problem": "no answer"}
    for key in ("unsupported", "problem"):
        found = [record[key] for record in records if key in record]
        if found:
            return {key: found[0]}
    medians = sorted(r["median"] for r in records)
    return {
        "best": min(r["best"] for r in records),
        "median": (medians[(len(medians) - 1) // 2] + medians[len(medians) // 2]) / 2,
        "samples": sum(r["samples"] for r in records),
        "difference": max(r["difference"] for r in records),
    }


def _summary(rows, name) -> dict | None:
    ratios = [
        (row["libraries"][name]["ratio"], row["workload"])
        for row in rows
        if "ratio" in row["libraries"][name]
    ]
    if not ratios:
        return None
    lowest, where = min(ratios)
    mean = math.exp(sum(math.log(r) for r, _ in ratios) / len(ratios))
    return {"geometric_mean": mean, "lowest": lowest, "lowest_on": where, "workloads": len(ratios)}


def _right(result) -> bool:
    """Whether numbasoft kept every bound, gave right results in every workload, and no worker of its own failed."""
    ours = {r.name for r in rivals.OURS}
    return (
        all(record["ok"] for record in result["accuracy"]["numbasoft"])
        and not any(job.split()[0] == "numbasoft" for job in result["accuracy"]["problems"])
        and not any("best" not in row["libraries"][name] for row in result["speed"]["rows"] for name in ours)
    )
