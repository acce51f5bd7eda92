"""How large the caches of this machine's CPU are, as far as the system tells."""

import contextlib
import functools
from pathlib import Path

FOLDER = "/sys/devices/system/cpu/cpu0/cache"
FIRST, LAST = 32 << 10, 32 << 20  # bytes, where it does not tell


def described(folder):
    """The level, the size in bytes and the number of CPUs of every cache that holds data."""
    for index in Path(folder).glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            level, kind, size, cpus = (
                (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
            if kind != "Instruction":
                yield int(level), int(size.removesuffix("K")) << 10, counted(cpus)


def counted(cpus):
    """How many CPUs a list such as 0-3,8 names."""
    ranges = [part.split("-") for part in cpus.split(",")]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def first_cache(folder=FOLDER):
    """The bytes of the first cache; as little as there is, where the system does not tell."""
    return next((size for level, size, _ in described(folder) if level == 1), FIRST)


@functools.cache
def last_caches(threads, folder=FOLDER):
    """The bytes of all third caches that so many threads may use, of which some CPUs share one."""
    size, cpus = next(
        ((size, cpus) for level, size, cpus in described(folder) if level == 3), (LAST, threads)
    )
    return size * -(-threads // cpus)
