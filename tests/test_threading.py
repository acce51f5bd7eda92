"""Threads, forks and process pools under every threading layer: right results, never an abort or a hang.

Every test is a program of its own in a real process, with a time limit.
"""

import ctypes.util
import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap

import pytest

from numbasoft import jit

ROOT = os.path.dirname(jit.PACKAGE)  # the package may be in the working tree, not installed
LIMIT = 60  # seconds: a hang is a failure
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

PRELUDE = """
import json, os, signal, sys, threading
import numba
import numpy as np
import numbasoft
from numbasoft import jit, softmax

x = np.random.default_rng(1).normal(size=(500, 400)).astype("f4")
numba.set_num_threads(1)
expected = softmax(x).tobytes()
numba.set_num_threads(2)

def right(x=x):
    return softmax(x).tobytes() == expected

def entered():
    "whether a parallel kernel may be entered here and now"
    with jit.parallel_region() as allowed:
        return allowed and jit.threads() == 2

def forked(function):
    "what the function returns in a forked child: True, False, or the signal that ended the child"
    pid = os.fork()
    if not pid:
        status = 9
        try:
            signal.alarm(30)
            status = int(bool(function()))
        finally:
            os._exit(status)
    return {0: False, 256: True}.get(status := os.waitpid(pid, 0)[1], status)

def elsewhere(function):
    "what the function returns in a thread of its own"
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0] if results else None

def show(*values):
    print(json.dumps(values))
"""


def available(layer):
    if layer == "tbb":
        return any(file.name in jit.TBB_LIBRARY.values() for file in tbb_files())
    return layer == "workqueue" or ctypes.util.find_library("gomp") is not None


def tbb_files():
    try:
        return importlib.metadata.files("tbb") or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


@pytest.fixture(params=["tbb", "omp", "workqueue"])
def layer(request):
    if not available(request.param):
        pytest.skip(f"the {request.param} layer is not available here")
    return request.param


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def run(cache, tmp_path):
    """Run a program; what it prints last, as JSON, is the result."""

    def run(code, layer=None, prelude=PRELUDE, **environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
        places = {"NUMBA_CACHE_DIR": str(cache), "NUMBA_NUM_THREADS": "2", "PYTHONPATH": ROOT}
        if layer:
            places["NUMBA_THREADING_LAYER"] = layer
        program = tmp_path / "program.py"
        program.write_text(prelude + textwrap.dedent(code))
        outcome = subprocess.run(
            # Python 3.12 and later warn of every fork of a process with threads.
            [sys.executable, "-W", "ignore::DeprecationWarning", program],
            check=False,
            env=clean | places | environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stderr == ""
        return json.loads(outcome.stdout.splitlines()[-1])

    return run


def test_the_pip_wheel_of_tbb_is_found(run):
    if not available("tbb"):
        pytest.skip("tbb is not installed here")
    assert run("show(right(), entered(), jit.threading_layer())") == [True, True, "tbb"]


def test_the_layer_asked_for_is_the_one_in_use(run, layer):
    assert run("show(right(), entered(), jit.threading_layer())", layer) == [True, True, layer]


def test_sixteen_threads_at_once(run, layer):
    code = """
    from concurrent.futures import ThreadPoolExecutor
    barrier = threading.Barrier(16)
    def work(_):
        barrier.wait()
        return all(right() for _ in range(20))
    with ThreadPoolExecutor(16) as pool:
        show(*pool.map(work, range(16)))
    """
    assert run(code, layer) == [True] * 16


def test_sixteen_threads_at_once_with_long_rows(run, layer):
    # whose threads wait for each other inside the kernel (numbasoft.split)
    code = """
    from concurrent.futures import ThreadPoolExecutor
    long = np.random.default_rng(1).normal(size=(1, 150_000)).astype("f4")
    numba.set_num_threads(1)
    expected = softmax(long).tobytes()
    barrier = threading.Barrier(16)
    def work(_):
        numba.set_num_threads(2)
        barrier.wait()
        return all(right(long) for _ in range(20))
    with ThreadPoolExecutor(16) as pool:
        show(*pool.map(work, range(16)))
    """
    assert run(code, layer) == [True] * 16


def test_sixteen_threads_make_the_first_call(run, layer):
    code = """
    from concurrent.futures import ThreadPoolExecutor
    barrier = threading.Barrier(16)
    def work(_):
        barrier.wait()
        return softmax(x).tobytes()
    with ThreadPoolExecutor(16) as pool:
        results = set(pool.map(work, range(16)))
    show(len(results), results == {softmax(x).tobytes()})
    """
    begin = PRELUDE.replace("numba.set_num_threads(1)\nexpected", "expected = None #")
    assert run(code, layer, prelude=begin.replace("numba.set_num_threads(2)\n", "")) == [1, True]


@FORKS
def test_a_forked_child(run, layer):
    code = """
    before = right()
    child = forked(right), forked(lambda: elsewhere(right)), forked(lambda: forked(right))
    show(before, *child, right(), entered(), forked(entered))
    """
    fork_safe = layer != "omp"
    assert run(code, layer) == [True, True, True, True, True, True, fork_safe]


@FORKS
def test_a_fork_by_another_thread(run, layer):
    # TBB's threads do not come back in such a child, and Numba says so in words of its own.
    code = """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    right()
    children = [lambda: forked(right), lambda: forked(entered), lambda: forked(lambda: forked(entered))]
    show(*map(elsewhere, children), right(), entered())
    """
    survives = layer == "workqueue"
    assert run(code, layer) == [True, survives, survives, True, True]


@FORKS
def test_a_fork_after_another_thread_has_entered_at_once(run, layer):
    # without parallel_region, as from the second call on; TBB's threads do not come back in a child then
    code = """
    seen = [right(), right(), jit.threads_at_once(), forked(entered), elsewhere(right)]
    show(*seen, forked(entered), right(), entered())
    """
    at_once, none_else = 0 if layer == "workqueue" else 2, layer != "omp"
    assert run(code, layer) == [
        True, True, at_once, none_else, True, layer == "workqueue", True, True,
    ]  # fmt: skip


@FORKS
def test_forks_while_other_threads_compute(run, layer):
    code = """
    stop, wrong = threading.Event(), []
    def work():
        while not stop.is_set():
            if not right():
                wrong.append(1)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    children = [forked(right) for _ in range(10)]
    stop.set()
    for thread in threads: thread.join()
    show(children, wrong, right(), entered(), forked(entered))
    """
    assert run(code, layer) == [[True] * 10, [], True, True, layer == "workqueue"]


@FORKS
def test_a_fork_while_another_thread_compiles(run):
    code = """
    @numba.njit
    def slow(a):
        return np.sort(a)
    thread = threading.Thread(target=slow, args=(np.ones(3),))
    thread.start()
    while not slow.stats.cache_misses: pass
    child = forked(lambda: numba.njit(lambda a: a + 1)(1) == 2 and right())
    show(child, len(slow.overloads))
    thread.join()
    """
    assert run(code) == [True, 1]


POOLS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def work(_):
    return right()

if __name__ == "__main__":  # spawned children import this file
    context = multiprocessing.get_context(METHOD)
    before = right()
    with context.Pool(2) as pool:
        in_pool = pool.map_async(work, range(4)).get(timeout=30)
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        in_executor = list(executor.map(work, range(4), timeout=30))
    show(before, in_pool, in_executor, right(), entered())
"""


@FORKS
def test_forked_process_pools(run, layer):
    assert run("METHOD = 'fork'" + POOLS, layer) == [True, [True] * 4, [True] * 4, True, True]


def test_spawned_process_pools(run):
    assert run("METHOD = 'spawn'" + POOLS) == [True, [True] * 4, [True] * 4, True, True]


def test_the_thread_mask_is_obeyed_and_kept(run, layer):
    code = """
    seen = []
    for mask in 1, 2, 1:
        numba.set_num_threads(mask)
        seen += [jit.threads(), right(), numba.get_num_threads()]
    numba.set_num_threads(1)
    seen += [elsewhere(jit.threads), jit.threads()]
    show(*seen)
    """
    assert run(code, layer) == [1, True, 1, 2, True, 2, 1, True, 1, 2, 1]


def test_no_more_threads_than_processors(run):
    code = """
    seen = [right(), jit.threads_at_once()]
    jit.processors.cache_clear()
    jit.cgroup_quota = lambda: 1
    seen += [numba.get_num_threads(), jit.threads(), jit.threads_at_once()]
    with jit.parallel_region() as allowed:
        seen += [allowed, numba.get_num_threads()]
    show(*seen, numba.get_num_threads(), right())
    """
    assert run(code) == [True, 2, 2, 1, 0, True, 1, 2, True]


def test_inside_a_parallel_region_of_the_caller(run, layer):
    code = """
    @numba.njit(parallel=True)
    def caller(results):
        for i in numba.prange(results.size):
            with numba.objmode(good="boolean"):
                good = right()
            results[i] = good
    results = np.zeros(8, bool)
    caller(results)
    show(bool(results.all()), right(), entered())
    """
    assert run(code, layer) == [True, True, True]


def test_one_at_a_time_under_workqueue(run):
    code = """
    with jit.parallel_region() as first:
        inner = entered(), elsewhere(entered), right(), elsewhere(right)
    show(first, *inner, entered())
    """
    assert run(code, "workqueue") == [True, False, False, True, True, True]


@pytest.mark.parametrize("call", ["logsumexp(long)", "logsumexp(long, axis=0)", "softmax(long, out=out)"])
def test_a_long_call_can_be_interrupted(run, call):
    # all rows lie at the same place in memory, so this would take minutes, and the limit is one
    part = call.replace("long", "long[:4096]").replace("out)", "out[:4096])")
    code = f"""
    from numbasoft import logsumexp
    row = np.zeros(1 << 16, "f4")
    long = np.broadcast_to(row, (4_000_000, 1 << 16))
    if "axis=0" in "{call}":
        long = np.broadcast_to(row[:4096], (100_000_000, 4096))
    if "out" in "{call}":
        long = np.zeros((1 << 11, 1 << 16), "f4")  # in place, again and again
        out = long
    # all kernels are compiled first: Python ends where Numba's compiler is interrupted, handled or not
    for few in np.zeros((64, 4096), "f4"), np.zeros((4096, 64), "f4").T, np.zeros((1 << 20, 2), "f4"):
        logsumexp(few), logsumexp(few, axis=0), softmax(few)
    {part}
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        while True:
            {call}
    except KeyboardInterrupt:
        show(right())
    """
    assert run(code, "tbb") == [True]


def test_an_exception_ends_the_region(run):
    code = """
    try:
        with jit.parallel_region():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        show(entered())
    """
    assert run(code, "workqueue") == [True]


def test_importing_starts_compiles_and_changes_nothing(run):
    code = """
    import json, os, sys, threading
    import numba
    from numba.core import event
    from numba.np.ufunc import parallel

    tasks = "/proc/self/task" if os.path.isdir("/proc/self/task") else "."
    def state():
        return len(os.listdir(tasks)), threading.active_count(), dict(os.environ), parallel._is_initialized
    before = state()
    compiled = event.RecordingListener()
    event.register("numba:compile", compiled)
    import numbasoft
    import numbasoft.jit
    unchanged = state() == before and not parallel._is_initialized
    threads = numbasoft.jit.threads(), numbasoft.jit.threading_layer()
    cuda = [name for name in sys.modules if name.startswith("numba.cuda")]
    files = os.path.exists(os.environ["NUMBA_CACHE_DIR"])
    print(json.dumps([unchanged, state() == before, threads, len(compiled.buffer), cuda, files]))
    """
    outcome = run(code, prelude="", NUMBA_CACHE_DIR="a folder that is not there")
    assert outcome == [True, True, [min(2, jit.processors()), None], 0, [], False]


def test_the_quota_of_a_container(tmp_path):
    def quota(membership="0::/\n", **files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for place, text in files.items():
            path = folder / place.replace("__", "/") / "cpu.max"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        member = tmp_path / f"{folder.name}.member"
        member.write_text(membership)
        return jit.cgroup_quota(str(folder / "root"), str(member))

    unlimited = float("inf")
    assert quota(root="max 100000\n") == unlimited
    assert quota(root="200000 100000\n") == 2
    assert quota(root="250000 100000\n") == 3
    assert quota(root="1000 100000\n") == 1
    assert quota(root="not a number\n") == unlimited
    assert quota() == unlimited
    assert quota("1:cpu:/old\n0::/a/b\n", root="max 1\n", root__a="3 1\n", root__a__b="5 1\n") == 3
    assert quota("0::/../a\n", root__a="3 1\n") == 3
    assert jit.cgroup_quota("/nowhere", "/nowhere") == unlimited
