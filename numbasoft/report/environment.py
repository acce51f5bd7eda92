"""What is here: versions, the processor, threads, and what there is of CUDA."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np

import numbasoft

from .. import jit
from . import rivals

# The instruction sets that decide which vector code LLVM writes, widest first.
VECTOR = (
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx2",
    "fma",
    "f16c",
    "avx",
    "sse4.2",
    "sve2",
    "sve",
    "neon",
)


def describe(threads: int) -> dict:
    """Plain values, ready for JSON."""
    jit.launch()  # only then Numba says which threading layer it took
    features = llvmlite.binding.get_host_cpu_features()
    return {
        "numbasoft": numbasoft.__version__,
        "numba": numba.__version__,
        "llvmlite": rivals.version("llvmlite"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "rivals": {r.name: rivals.version(r.packages[0]) for r in rivals.RIVALS},
        "ml_dtypes": rivals.version("ml_dtypes"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "llvm_cpu": llvmlite.binding.get_host_cpu_name(),
        "vector": [name for name in VECTOR if features.get(name)],
        "cores": jit.processors(),
        "threads": threads,
        "threading_layer": jit.threading_layer(),
        "cuda": cuda(),
    }


def cuda() -> dict:
    """The CUDA device that arrays may live on, or the reason why there is none."""
    from ..cuda import reason

    missing = reason()
    if missing:
        return {"device": None, "reason": missing[1]}
    from numba import cuda

    name = cuda.get_current_device().name
    name = name.decode() if isinstance(name, bytes) else name
    return {"device": name, "reason": "device arrays run here, all else on the CPU; python -m benchmarks.gpu"}


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout.strip()
    return platform.processor() or platform.machine()
