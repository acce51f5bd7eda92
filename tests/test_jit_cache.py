"""Compiled code on disk: never stale, never a reason to fail, never open to others.

Each test has a package of its own, with our jit.py and small kernels, and runs real processes.
"""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from numbasoft import jit

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534
POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no POSIX permissions here")

HELPER = """
from ..jit import inline

@inline
def factor(v):
    return v * 2
"""

KERNELS = """
import json
import numpy as np
from numba import prange, types
from .deeper.helper import factor
from .jit import compiled, kernel, parallel_kernel, parallel_region

ROW = types.Array(types.float64, 1, "A", readonly=True), types.Array(types.float64, 1, "A")

@kernel
def serial(x, y):
    for i in range(x.size):
        y[i] = factor(x[i])

@parallel_kernel
def parallel(x, y):
    for i in prange(x.size):
        y[i] = factor(x[i])

def make(k):
    @parallel_kernel
    def frozen(x, y):
        for i in prange(x.size):
            y[i] = k * x[i]
    return frozen

def fresh(k):
    return kernel(k.py_func)

def report(*kernels):
    x, y, results = np.ones(3), np.zeros(3), []
    for k in kernels:
        compiled(k, *ROW)(x, y)
        results.append(y[0])
    hits = [sum(k.stats.cache_hits.values()) for k in kernels]
    print(json.dumps({"results": results, "hits": hits}))
"""

SERIAL = "from numbasoft.kernels import *; report(serial)"
BOTH = "from numbasoft.kernels import *; report(serial, parallel)"


class Package:
    """A package of jit.py and the kernels above, and a home for its user."""

    def __init__(self, folder):
        self.folder = folder
        self.home = folder / "home"
        self.temporary = folder / "tmp"
        self.source = folder / "numbasoft"
        for place in self.home, self.temporary, self.source / "deeper":
            place.mkdir(parents=True)
        shutil.copy(jit.__file__, self.source)
        self.edit("__init__.py", "")  # or an installed numbasoft would be found first
        self.edit("deeper/helper.py", HELPER)
        self.edit("kernels.py", KERNELS)

    def edit(self, name, text):
        (self.source / name).write_text(text)

    def start(self, code, **environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_", "PYTHON"))}
        places = {"HOME": str(self.home), "TMPDIR": str(self.temporary), "PYTHONPATH": str(self.folder)}
        return subprocess.Popen(
            [sys.executable, "-B", "-W", "error", "-c", code],
            env=clean | places | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self, code, **options):
        return finish(self.start(code, **options))

    def run(self, code, **options):
        return json.loads(self.lines(code, **options)[-1])

    def files(self, place=None):
        return sorted((place or self.in_tree).glob("*/*"))

    @property
    def in_tree(self):
        return self.source / "__pycache__" / "kernels"


def finish(process):
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), err
    return out.splitlines()


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path)


def test_a_second_process_loads_what_the_first_compiled(package):
    # and does so without the 0.3 s of imports that Numba needs before it compiles
    code = BOTH + "; import sys; print(json.dumps('numba.cpython.unicode' in sys.modules))"
    for hit in 0, 1:
        outcome, imported = map(json.loads, package.lines(code))
        assert outcome == {"results": [2, 2], "hits": [hit, hit]}
        assert imported is not bool(hit)


def test_a_changed_helper_in_another_file_is_compiled(package):
    assert package.run(BOTH)["results"] == [2, 2]
    package.edit("deeper/helper.py", HELPER.replace("2", "3"))
    assert package.run(BOTH) == {"results": [3, 3], "hits": [0, 0]}
    package.edit("deeper/helper.py", HELPER)
    assert package.run(BOTH) == {"results": [2, 2], "hits": [1, 1]}


def test_a_source_changed_between_import_and_call_is_not_stamped_with_the_new_text(package):
    changed = HELPER.replace("2", "3")
    code = f"""
import pathlib, time, numbasoft.kernels
time.sleep(0.05)
pathlib.Path({str(package.source / "deeper/helper.py")!r}).write_text({changed!r})
"""
    assert package.run(code + SERIAL)["results"] == [2]
    assert package.files() == []
    assert package.run(SERIAL) == {"results": [3], "hits": [0]}


def test_a_source_changed_between_two_imports_is_not_stamped_with_the_old_text(package):
    assert package.run(SERIAL)["results"] == [2]
    changed = HELPER.replace("2", "3")
    code = f"""
import pathlib, time, numbasoft.jit
numbasoft.jit.stamp()
time.sleep(0.05)
pathlib.Path({str(package.source / "deeper/helper.py")!r}).write_text({changed!r})
"""
    assert package.run(code + SERIAL) == {"results": [3], "hits": [0]}
    assert len(package.files()) == 1


def test_options_that_change_the_code_have_entries_of_their_own(package):
    package.run(SERIAL)
    for options in {"NUMBA_OPT": "1"}, {"NUMBA_CPU_NAME": "generic"}:
        assert package.run(SERIAL, **options)["hits"] == [0]
    assert package.run(SERIAL, NUMBA_OPT="1")["hits"] == [1]
    assert len(package.files()) == 3


def test_one_function_with_two_sets_of_options_has_two_entries(package):
    code = "from numbasoft.kernels import *; report(fresh(parallel), parallel, fresh(parallel))"
    assert package.run(code) == {"results": [2, 2, 2], "hits": [0, 0, 1]}
    assert len(package.files()) == 2


def test_parallel_kernels_of_two_processes_keep_their_own_loops(package):
    # Addresses name the loops, and without address randomisation they repeat.
    same = "import numba.parfors.parfor as p; p.Parfor.__hash__ = lambda self: 1; "
    code = same + "from numbasoft.kernels import *; report(*map(make, {}))"
    assert package.run(code.format([2.0]))["results"] == [2]
    assert package.run(code.format([3.0]))["results"] == [3]
    assert package.run(code.format([2.0, 3.0, 5.0])) == {"results": [2, 3, 5], "hits": [1, 1, 0]}


def test_a_damaged_file_is_compiled_anew_and_replaced(package):
    code = """
from numbasoft.kernels import *
from numbasoft import jit
import pathlib

report(serial)
file, = pathlib.Path("numbasoft").glob("__pycache__/kernels/*/*")
whole = file.read_bytes()
digested = lambda content: jit.DIGEST(content).digest() + content
damaged = {
    "empty": b"",
    "cut off": whole[:20],
    "halved": whole[:len(whole) // 2],
    "one byte short": whole[:-1],
    "one bit changed": whole[:9999] + bytes([whole[9999] ^ 1]) + whole[10000:],
    "no pickle": digested(b"no pickle"),
    "another pickle": digested(b"]."),  # an empty list
}
for damage, content in damaged.items():
    assert content != whole
    file.write_bytes(content)
    print(damage)
    report(fresh(serial), fresh(serial))
"""
    lines = package.lines(code)[1:]
    assert len(lines) == 14
    for damage, outcome in zip(lines[::2], lines[1::2], strict=True):
        assert json.loads(outcome) == {"results": [2, 2], "hits": [0, 1]}, damage
    assert package.run(SERIAL)["hits"] == [1]


def test_something_that_is_no_file_in_the_place_of_one(package):
    package.run(SERIAL)
    (file,) = package.files()
    file.unlink()
    file.mkdir()
    assert package.run(SERIAL) == {"results": [2], "hits": [0]}


def test_numba_without_what_we_use_of_it_still_compiles(package):
    code = "from numba.core.compiler import CompileResult as C; C._reduce = C._rebuild = None; " + SERIAL
    assert package.run(code) == {"results": [2], "hits": [0]}
    assert package.files() == []


def test_numba_that_numbers_functions_in_another_way_keeps_no_parallel_kernels(package):
    code = (
        "from numbasoft import jit; jit.number_functions_by = lambda key: jit.FunctionIdentity._unique_ids; "
    )
    assert package.run(code + BOTH) == {"results": [2, 2], "hits": [0, 0]}
    assert [file.name.partition("-")[0] for file in package.files()] == ["serial"]


def test_code_that_needs_more_of_numba_than_is_loaded_gets_it(package):
    blind = "from numbasoft import jit; found = jit.llvm.address_of_symbol; "
    blind += "jit.llvm.address_of_symbol = lambda name: {} and found(name); "
    package.run(SERIAL)
    later = blind.format("'numba.cpython.unicode' in jit.sys.modules")
    assert package.run(later + SERIAL) == {"results": [2], "hits": [1]}
    never = blind.format("False")
    assert package.run(never + SERIAL) == {"results": [2], "hits": [0]}


def test_nowhere_to_write_is_no_error(package):
    (package.source / "__pycache__").write_text("a file where a directory is wanted")
    blocked = str(package.source / "__pycache__")
    untemporary = f"import tempfile; tempfile.tempdir = {blocked!r}; "  # or it finds /tmp
    for _ in range(2):
        assert package.run(untemporary + SERIAL, HOME=blocked) == {"results": [2], "hits": [0]}
    assert package.run(SERIAL, HOME=blocked)["hits"] == [0]
    assert package.run(SERIAL, HOME=blocked)["hits"] == [1]
    (place,) = package.temporary.glob("numbasoft-*")
    assert len(package.files(place)) == 1


def test_no_temporary_directory_is_no_error(monkeypatch):
    def missing():
        raise FileNotFoundError

    count = len(list(jit.directories()))
    monkeypatch.setattr(jit.tempfile, "gettempdir", missing)
    assert len(list(jit.directories())) == count - 1


@POSIX
def test_a_read_only_install_and_home():
    # Root may write anywhere: the child becomes somebody else once it has imported all it needs.
    code = "import os, numba, numbasoft.kernels; numba.njit('f8(f8)')(lambda x: x); "
    code += f"os.setgid({NOBODY}); os.setuid({NOBODY}); " if ROOT else ""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        package = Package(Path(folder) / "site")
        package.temporary.chmod(0o777)
        readonly = [Path(folder), package.folder, package.home, package.source]
        for place in readonly:
            place.chmod(0o555)
        try:
            assert package.run(code + SERIAL) == {"results": [2], "hits": [0]}
            assert package.run(code + SERIAL) == {"results": [2], "hits": [1]}
            (place,) = package.temporary.glob("numbasoft-*")
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
        finally:
            for place in readonly:
                place.chmod(0o755)


def test_numba_cache_dir_is_where_files_go(package):
    wanted = package.folder / "wanted"
    assert package.run(SERIAL, NUMBA_CACHE_DIR="wanted")["hits"] == [0]
    assert package.run(SERIAL, NUMBA_CACHE_DIR=str(wanted))["hits"] == [1]
    assert not package.in_tree.exists()


class Intruder:
    """Unpickled, it leaves a folder behind."""

    def __reduce__(self):
        return os.mkdir, ("it was run",)


@POSIX
def test_a_directory_that_others_can_write_to_is_not_used(package):
    package.run(SERIAL)
    assert stat.S_IMODE(package.in_tree.stat().st_mode) == 0o700
    content = pickle.dumps(Intruder())
    package.files()[0].write_bytes(jit.DIGEST(content).digest() + content)
    package.in_tree.chmod(0o707)
    assert package.run(SERIAL) == {"results": [2], "hits": [0]}
    assert package.run(SERIAL) == {"results": [2], "hits": [1]}, "the user's own cache is next"
    assert not (package.folder / "it was run").exists()
    package.in_tree.chmod(0o700)
    package.run(SERIAL)
    assert (package.folder / "it was run").exists(), "the intruder of this test is harmless"


@POSIX
def test_which_directories_are_private(tmp_path):
    directory = tmp_path / "cache"
    directory.mkdir()
    link = tmp_path / "link"
    link.symlink_to(directory)
    for mode, private in (0o700, True), (0o755, True), (0o770, False), (0o707, False), (0o1777, False):
        directory.chmod(mode)
        assert jit.is_private(directory) is private, oct(mode)
    directory.chmod(0o700)
    assert not jit.is_private(link)
    if ROOT:
        os.chown(directory, NOBODY, NOBODY)
        assert not jit.is_private(directory)


def test_eight_processes_start_cold_at_once(package):
    go = package.folder / "go"
    wait = f"import numbasoft.kernels, os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    processes = [package.start(wait + SERIAL) for _ in range(8)]
    time.sleep(3)
    go.touch()
    assert [json.loads(finish(p)[-1])["results"] for p in processes] == [[2]] * 8
    assert [file.suffix for file in package.files()] == [".nbc"]
    assert package.run(SERIAL)["hits"] == [1]


def test_code_of_old_versions_does_not_pile_up(package):
    package.run(SERIAL)
    ours = package.files()[0].parent
    for age in range(1, 8):
        old = ours.with_name(f"{age:032x}")
        old.mkdir()
        (old / "serial.nbc").touch()
        os.utime(old, (time.time() - 1000 * age,) * 2)
    strange = ours.with_name("not ours")
    strange.mkdir()
    abandoned, recent = ours / "abandoned.tmp", ours / "recent.tmp"
    abandoned.touch()
    recent.touch()
    os.utime(abandoned, (time.time() - 2 * jit.ABANDONED,) * 2)
    package.run(BOTH)
    kept = {path.name for path in ours.parent.iterdir()}
    assert kept == {ours.name, strange.name} | {f"{age:032x}" for age in range(1, jit.STAMPS_KEPT)}
    assert recent.exists() and not abandoned.exists()


def test_a_kernel_from_outside_the_package_is_not_kept(package):
    (package.folder / "outside.py").write_text(KERNELS.replace(" .", " numbasoft."))
    code = SERIAL.replace("numbasoft.kernels", "outside")
    assert package.run(code) == {"results": [2], "hits": [0]}
    assert package.files() == []


def test_closures_are_described_by_value():
    def make(value):
        def inner():
            return value

        return inner

    values = 1, 1.0, True, None, "a", (1, 2.0), make(3), make(4)
    texts = [jit.described(make(value)) for value in values]
    assert len(set(texts)) == len(values)
    assert texts == [jit.described(make(value)) for value in values]
    with pytest.raises(jit.NotCachable):
        jit.described(make(object()))


def test_without_the_compiler_there_is_one_clear_error(package):
    code = """
from numbasoft.kernels import *
try:
    report(serial)
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    assert "NUMBA_DISABLE_JIT" in package.run(code, NUMBA_DISABLE_JIT="1")
