"""What the gate runs, once per commit: it measures the numbasoft that comes first on the path.

Requests are lines of JSON on standard input, answers lines of JSON on what was standard output.
"""

import json
import os
import sys
import time

import numpy as np

import numbasoft
from numbasoft.report import accuracy, rivals, workloads

CLOCK = 100e-6  # seconds: what is timed at once lasts at least this long


class Job:
    """One workload of numbasoft with a given output, ready to be called."""

    def __init__(self, function, shape, dtype, axis):
        work = workloads.Workload(function, tuple(shape), dtype, axis)
        self.call, _ = rivals.NumbasoftGiven(threads=1).prepare(work, work.inputs())
        self.call()  # compiles, or loads what was compiled
        start = time.perf_counter()
        self.call()
        self.inner = max(1, int(CLOCK / (time.perf_counter() - start)))

    def seconds(self, limit):
        """The best time of a call within ``limit`` seconds."""
        stop, best = time.perf_counter() + limit, np.inf
        while True:
            start = time.perf_counter()
            for _ in range(self.inner):
                self.call()
            end = time.perf_counter()
            best = min(best, (end - start) / self.inner)
            if end >= stop:
                return best


def errors(dtype, functions):
    def ours(function, arrays, temperature):
        return getattr(numbasoft, function)(*arrays, temperature=temperature)

    return list(accuracy.measure(ours, dtype, tuple(functions), quick=True))


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["task"] == "prepare":
            job, answer = Job(**request["work"]), {}
        elif request["task"] == "functions":  # LOSSES came later than the gate
            answer = {"functions": [*workloads.FUNCTIONS, *getattr(workloads, "LOSSES", ())]}
        elif request["task"] == "time":
            answer = {"seconds": job.seconds(request["seconds"])}
        elif request["task"] == "call":
            for _ in range(request["calls"]):
                job.call()
            answer = {}
        else:
            answer = {"records": errors(request["dtype"], request["functions"])}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
