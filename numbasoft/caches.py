"""How large the caches of this machine's CPU are, as far as the system tells."""

import contextlib
import functools
from pathlib import Path

FOLDER = "/sys/devices/system/cpu/cpu0/cache"
FIRST, LAST = 32 << 10, 32 << 20  # bytes, where it does not tell


def first_cache(folder=FOLDER):
    """The bytes of the first cache; as little as there is, where the system does not tell."""
    return next((size for size, _ in caches(folder, "1")), FIRST)


@functools.cache
def last_caches(threads, folder=FOLDER):
    """The bytes of as many third caches as so many threads need at least, of whose CPUs some share one."""
    size, folder = next(caches(folder, "3"), (LAST, None))
    return size * -(-threads // (sharing(folder) or threads))


def caches(folder, level):
    """The bytes of every cache of a level that holds data, and the folder that describes it."""
    with contextlib.suppress(OSError):
        for index in sorted(Path(folder).glob("index*")):
            with contextlib.suppress(OSError, ValueError):
                found, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
                size = int(size.removesuffix("K")) << 10
                if found == level and kind != "Instruction" and size > 0:
                    yield size, index


def sharing(folder):
    """How many CPUs share a cache, from a list such as 0-3,8; 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        parts = [part.split("-") for part in (folder / "shared_cpu_list").read_text().split(",")]
        return max(0, sum(int(ends[-1]) - int(ends[0]) + 1 for ends in parts))
    return 0
