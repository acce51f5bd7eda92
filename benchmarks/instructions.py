"""How many instructions a call executes, by valgrind's callgrind: a number that a busy machine does not change.

The code is compiled for one fixed CPU (x86-64-v3, what valgrind knows), so the counts of two
machines agree as far as their C libraries do.
"""

from __future__ import annotations

import re
import shutil
import subprocess

FIXED_CPU = {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "", "PYTHONHASHSEED": "0"}
CALLGRIND = (
    "valgrind",
    "--tool=callgrind",
    "--instr-atstart=no",
    "--callgrind-out-file=/dev/null",
    "--quiet",
)
CALLS = 4
TOTAL = re.compile(r"Th 1\s+([\d,]+)")


def missing() -> str | None:
    """The program that counting needs and that is not here."""
    return next((name for name in ("valgrind", "callgrind_control") if shutil.which(name) is None), None)


def control(pid: int, *arguments: str) -> str:
    command = ["callgrind_control", *arguments, str(pid)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def per_call(worker) -> float:
    """Instructions of one call of the workload that the worker has prepared.

    What the requests cost is in both counts, of one call and of several, and cancels.
    """
    pid = worker.process.pid
    control(pid, "-i", "on")
    worker.ask(task="call", calls=1)
    totals = [total(pid)]
    for calls in (1, 1 + CALLS):
        worker.ask(task="call", calls=calls)
        totals.append(total(pid))
    control(pid, "-i", "off")
    start, one, several = totals
    return ((several - one) - (one - start)) / CALLS


def total(pid: int) -> int:
    """What callgrind has counted in the main thread so far."""
    state = control(pid, "-e", "-b")
    found = TOTAL.search(state)
    if found is None:
        raise RuntimeError(f"callgrind_control tells no count of instructions: {state}")
    return int(found[1].replace(",", ""))
