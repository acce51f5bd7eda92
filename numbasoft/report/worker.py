"""One library in a process of its own: ``python -m numbasoft.report.worker REQUEST``.

REQUEST is JSON; the answers are lines of JSON on what was standard output when the process started.
Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time

import numpy as np

from . import accuracy, rivals, workloads

SAMPLE_SECONDS = 200e-6  # a sample is at least this long, so that the clock's own 50 ns do not matter


def time_call(call, seconds: float) -> dict:
    """Best and median seconds per call, over at least two samples. The call has run once already."""
    gc.disable()
    start = time.perf_counter()
    stop = start + seconds
    call()
    once = time.perf_counter() - start
    inner = max(1, int(SAMPLE_SECONDS / once))
    samples = [once] if inner == 1 else []
    while len(samples) < 2 or time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        samples.append((time.perf_counter() - start) / inner)
    gc.enable()
    return {"best": min(samples), "median": statistics.median(samples), "samples": len(samples)}


def speed(library: rivals.Rival, works, seconds: float):
    """Check the result of each workload, then time it."""
    for work in works:
        record = {"workload": work.name}
        arrays = work.inputs()
        try:
            call, read = library.prepare(work, arrays)
            difference = 0.0
            if isinstance(library, rivals.Copy):
                call()
            else:
                difference = work.difference(read(call()), work.expected(arrays))
            if difference <= 1:
                record |= time_call(call, seconds) | {"difference": difference}
            else:
                record["problem"] = (
                    f"its result differs from NumPy's in float64 by {difference:.2g} times the tolerance"
                )
        except NotImplementedError as error:
            record["unsupported"] = str(error)
        except Exception as error:  # whatever a rival raises is its own row's problem
            record["problem"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield record


def compile_ahead(library: rivals.Rival, works):
    """Call everything once, so that the processes that measure find it in the disk cache."""
    for work in works:
        call, _ = library.prepare(work, work.inputs())
        call()
        yield {"workload": work.name}


def errors(library: rivals.Rival, dtype: str, quick: bool):
    """Accuracy of numbasoft in full, of a rival in its forward passes at temperature 1."""

    def ours(function, arrays, temperature):
        import numbasoft

        return getattr(numbasoft, function)(*arrays, temperature=temperature)

    def theirs(function, arrays, temperature):
        call, read = library.prepare(workloads.Workload(function, arrays[0].shape, dtype), arrays)
        return np.array(read(call()))  # a copy: the library may free its buffer with `call`

    if isinstance(library, rivals.Numbasoft):
        return accuracy.measure(ours, dtype, quick=quick)
    return accuracy.measure(theirs, dtype, workloads.FORWARD, quick=quick, temperatures=(1.0,))


def main(request: dict) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    library = rivals.EVERYONE[request["library"]](request["threads"])
    if request["task"] == "speed":
        records = speed(library, workloads.LISTS[request["works"]], request["seconds"])
    elif request["task"] == "compile":
        records = compile_ahead(library, workloads.LISTS[request["works"]])
    else:
        records = errors(library, request["dtype"], request["quick"])
    for record in records:
        answers.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
