"""Kernels on disk: never stale, never a reason to fail, never open to others. tests/test_cuda.py runs this.

Real processes on a copy of the package, with a driver that only counts (benchmarks/driver.c): what it
has linked was compiled, what it has loaded without linking came from the disk. That the cubins of a
real driver are taken again is for a GPU to show.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import numbasoft
from numbasoft import jit

CALL = """
import json, numpy as np, numbasoft
from numba import cuda
from benchmarks.gpu_host import StandIn
driver = StandIn()
driver.keep(12)
x = cuda.to_device(np.zeros((8, 100), "f4"))
numbasoft.softmax(x, out=x)
given = driver.parameters
same = [given[0] == given[10], given[1], given[5], *(v & 0xFFFFFFFF for v in given[6:10]), given[11]]
print(json.dumps([driver.links, driver.loads, [driver.launches, driver.grid, driver.block, *same]]))
"""


class Place:
    """A copy of the package, and a folder for what it keeps."""

    def __init__(self, folder, like=None):
        self.package, self.cache = folder / "package" / "numbasoft", folder / "cache"
        no_code = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(numbasoft.__file__).parent, self.package, ignore=no_code)
        if like:
            shutil.copytree(like.cache, self.cache)
        self.temporary = folder / "temporary"
        self.temporary.mkdir()

    def run(self, **environment):
        """How many kernels were linked, how many loaded, and what was launched."""
        path = os.pathsep.join([str(self.package.parent), *sys.path])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", environment.pop("BEFORE", "") + CALL], capture_output=True, text=True, timeout=300,
            env={**os.environ, "NUMBA_CACHE_DIR": str(self.cache), "TMPDIR": str(self.temporary),
                 "PYTHONPATH": path, **environment},
            cwd=self.package.parent, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def files(self):
        return sorted(self.cache.rglob("*.cubin"))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Where one process has been, and what it did."""
    place = Place(tmp_path_factory.mktemp("first"))
    return place, place.run()


@pytest.fixture
def place(first, tmp_path):
    return Place(tmp_path, first[0])


def test_a_process_loads_what_another_has_compiled(first):
    place, (links, loads, launched) = first
    assert (links, loads) == (1, 1)
    (file,) = place.files()
    assert file.name.startswith("softmax_forward-")
    for path in file, file.parent, file.parent.parent:
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    assert place.run() == [0, 1, launched]
    assert place.files() == [file]


def test_other_sources_are_other_kernels(place):
    # the kernel's own file does not change, but one that it is made with
    with open(place.package / "cuda" / "elementary.py", "a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert place.run()[:2] == [1, 1]
    assert len(place.files()) == 2 and len({f.parent for f in place.files()}) == 2


def test_a_source_written_after_the_import_is_not_believed(place):
    code = "import numbasoft, os, pathlib; pathlib.Path(numbasoft.__file__).touch()\n"
    assert place.run(BEFORE=code)[:2] == [1, 1]


@pytest.mark.parametrize("damage", ["cut", "changed", "refused", "empty"])
def test_damaged_files_are_compiled_anew(damage, first, place):
    launched = first[1][2]
    (file,) = place.files()
    content = file.read_bytes()
    refused = b"softmax_forward\nno machine code"  # though it is what was written
    file.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "changed": content[:-1] + bytes([content[-1] ^ 1]),
            "refused": jit.DIGEST(refused).digest() + refused,
            "empty": b"",
        }[damage]
    )
    assert place.run() == [1, 1, launched]
    assert file.read_bytes() == content


def test_a_folder_that_others_can_write_to_is_not_used(place):
    (file,) = place.files()
    file.parent.parent.chmod(0o777)
    assert place.run()[:2] == [1, 1]


def test_nowhere_to_write_is_no_reason_to_fail(place, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    nowhere = f"import tempfile; tempfile.tempdir = {str(blocked)!r}\n"
    for _ in range(2):
        assert place.run(NUMBA_CACHE_DIR=str(blocked / "cache"), BEFORE=nowhere)[:2] == [1, 1]


def test_other_options_of_numba_are_other_kernels(place):
    assert place.run(NUMBA_OPT="1")[:2] == [1, 1]
    assert len(place.files()) == 2
