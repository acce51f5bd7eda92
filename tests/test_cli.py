"""``python -m numbasoft``: the report, and the commands for files."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import numbasoft
from numbasoft import jit
from numbasoft.__main__ import main
from numbasoft.report import accuracy, files, oracle, rivals, run, show, terminal, workloads

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [str(Path(numbasoft.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
}
THREADS = min(2, jit.processors())
DTYPES = [name for name, reason in accuracy.available().items() if reason is None]


needs_posix = pytest.mark.skipif(os.name == "nt", reason="sends the signals of POSIX systems")


def python(*arguments, **options):
    """Run this Python on numbasoft in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def failure(capsys, *arguments):
    """The sentence that a failing command prints; its exit code must be 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("numbasoft: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"numbasoft {numbasoft.__version__}\n"


# --------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("dtype", DTYPES)
def test_oracle_agrees_with_mpmath(dtype):
    """To a thousandth of an ULP of the dtype and less, in all kinds of rows, at both temperatures."""
    mp = pytest.importorskip("mpmath").mp
    kind = workloads.dtype_of(dtype)
    digits = oracle.format_of(kind)[0]
    with mp.workprec(400):
        for family, rows in accuracy.families(kind, quick=True):
            x = rows[:1, :40]
            g = np.random.default_rng(3).standard_normal(x.shape).astype(kind)
            for temperature in accuracy.TEMPERATURES:
                t = mp.mpf(temperature)
                z = [mp.mpf(v) / t for v in x[0].astype("f8").tolist()]
                total = mp.fsum(map(mp.exp, z))
                expected = {
                    "softmax": [mp.exp(v) / total for v in z],
                    "log_softmax": [v - mp.log(total) for v in z],
                    "logsumexp": [mp.log(total)],
                }
                forward = oracle.Forward(oracle.wide(x, kind), temperature)
                found = {name: getattr(forward, name)() for name in workloads.FORWARD}
                # What a forward pass would have stored, in the dtype.
                y, log_y, lse = (found[n][0].astype("f8").astype(kind) for n in workloads.FORWARD)
                found["softmax_backward"] = oracle.softmax_backward(*wide(kind, g, y), temperature)
                found["log_softmax_backward"] = oracle.log_softmax_backward(
                    *wide(kind, g, log_y), temperature
                )
                found["logsumexp_backward"] = oracle.logsumexp_backward(
                    *wide(kind, g[:, 0], x, lse), temperature
                )
                mg, my, ml = ([mp.mpf(v) for v in a[0].astype("f8").tolist()] for a in (g, y, log_y))
                dot = mp.fsum(a * b for a, b in zip(mg, my, strict=True))
                expected["softmax_backward"] = [p * (a - dot) / t for a, p in zip(mg, my, strict=True)]
                expected["log_softmax_backward"] = [
                    (a - mp.exp(b) * mp.fsum(mg)) / t for a, b in zip(mg, ml, strict=True)
                ]
                expected["logsumexp_backward"] = [mg[0] * mp.exp(v - mp.mpf(float(lse[0]))) / t for v in z]
                for name, (values, scales) in found.items():
                    for value, scale, truth in zip(
                        values.ravel(), scales.ravel(), expected[name], strict=True
                    ):
                        if not mp.mpf(2) ** -16_000 < abs(truth) < mp.mpf(2) ** 16_000:
                            continue  # beyond longdouble, and far beyond any result
                        off = abs(mp.mpf(exactly(value)) - truth) / max(abs(truth), mp.mpf(exactly(scale)))
                        assert off < mp.mpf(2) ** (-digits - 10), (name, family, temperature, value, truth)


def wide(kind, *arrays):
    return [oracle.wide(a, kind) for a in arrays]


def exactly(number):
    """A longdouble or a Decimal as something that mpmath reads without rounding it to float64."""
    if isinstance(number, np.longdouble) and np.isfinite(number):
        import mpmath

        mantissa, exponent = np.frexp(number)
        high = float(mantissa)
        return mpmath.ldexp(
            mpmath.mpf(high) + mpmath.mpf(float(mantissa - np.longdouble(high))), int(exponent)
        )
    return str(number)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_in_ulp(dtype):
    kind = workloads.dtype_of(dtype)
    digits, lowest = oracle.format_of(kind)

    def error(got, exact):
        got, exact = (np.array([v], "f8") for v in (got, exact))
        truth = oracle.wide(exact, kind)
        return oracle.error_in_ulp(got.astype(kind), truth, truth, kind)

    step = 2.0 ** (1 - digits)
    assert error(1.0, 1.0) == 0
    assert error(1.0 + step, 1.0) == 1
    assert error(1.0 - step / 2, 1.0) == 0.5  # above 1 the numbers lie twice as far apart
    assert error(0.0, 2.0 ** (lowest - digits + 1)) == 1  # one subnormal number
    assert error(0.0, 0.0) == 0
    assert error(np.nan, 1.0) == np.inf
    assert error(np.inf, 1.0) == np.inf
    assert error(1.0, np.inf) == np.inf
    assert error(np.inf, np.inf) == 0
    if kind.itemsize < 8:
        assert error(1.0, 1.0 - step / 1024) == pytest.approx(
            1 / 1024
        )  # rounds up to 1: the unit is that of 1


def test_a_wrong_function_does_not_pass():
    def evaluate(function, arrays, temperature):
        right = getattr(numbasoft, function)(*arrays, temperature=temperature)
        return right if function == "softmax" else right * np.float32(1 + 2e-6)

    records = list(accuracy.measure(evaluate, "float32", ("softmax", "log_softmax"), quick=True))
    assert all(r["ok"] for r in records if r["function"] == "softmax")
    assert not any(r["ok"] for r in records if r["function"] == "log_softmax")

    def forgets_the_dtype(function, arrays, temperature):
        return numbasoft.softmax(arrays[0], temperature=temperature).astype("f8")

    assert not any(r["ok"] for r in accuracy.measure(forgets_the_dtype, "float32", ("softmax",), quick=True))


# --------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def quick():
    """One quick run of the whole command."""
    ran = python("-m", "numbasoft", "--quick", "--json", "--threads", str(THREADS), "--rounds", "2")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr
    assert ran.stderr == ""
    return json.loads(ran.stdout)


def test_report_says_what_is_here(quick):
    here = quick["environment"]
    assert {"numbasoft", "numba", "llvmlite", "numpy", "python", "cpu", "vector", "system"} <= set(here)
    assert here["threads"] == THREADS
    assert here["threading_layer"] in ("tbb", "omp", "workqueue")
    assert here["cuda"]["device"] is None or here["cuda"]["reason"]
    assert set(here["rivals"]) == {r.name for r in rivals.RIVALS}


def test_report_checks_every_function_and_dtype(quick):
    records = quick["accuracy"]["numbasoft"]
    assert {(r["function"], r["dtype"]) for r in records} == {
        (f, d) for f in workloads.FUNCTIONS for d in DTYPES
    }
    assert all(r["ok"] and 0 <= r["max_ulp"] <= r["bound"] and r["elements"] for r in records)
    assert quick["accuracy"]["problems"] == {}
    assert quick["ok"] is True


def test_report_times_every_installed_library(quick):
    part = quick["speed"]
    assert part["threads"] == THREADS and part["rounds"] == 2
    assert part["problems"] == {}
    for row in part["rows"]:
        assert row["bytes_moved"] > 0
        for name, cell in row["libraries"].items():
            assert "problem" not in cell, (row["workload"], name, cell)
            if "unsupported" not in cell:
                assert 0 < cell["best"] <= cell["median"]
                assert cell["difference"] <= 1
                ours = "numbasoft out=" if name in part["given_output"] else "numbasoft"
                if not name.startswith("numbasoft"):
                    assert cell["ratio"] == pytest.approx(cell["best"] / row["libraries"][ours]["best"])
    entrants = {r.name for r in rivals.RIVALS} - set(part["missing"])
    assert {"parallel copy", "NumPy"} <= set(part["summary"]) == entrants | {"parallel copy"}


def test_report_as_text_and_markdown(quick):
    text = show.text(quick)
    for word in (
        "WHAT IS HERE",
        "IS IT RIGHT",
        "HOW FAST IS IT",
        "numba-cuda",
        "softmax_backward",
        "geometric mean",
    ):
        assert word in text
    markdown = show.markdown(quick)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(tables) > 20
    assert all(line.endswith("|") for line in tables)


def test_plot(quick, tmp_path):
    pytest.importorskip("matplotlib")
    show.plot(quick, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


def test_plot_without_matplotlib_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install matplotlib" in failure(capsys, "--plot", "ratios.png")


def test_plot_into_a_missing_directory_is_refused_at_once(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert "directory" in failure(capsys, "--plot", tmp_path / "none" / "ratios.png")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"],
        ["--threads", "two"],
        ["--threads", "100000"],
        ["--rounds", "0"],
        ["--json", "--markdown"],
        ["--fast"],
        ["hardmax", "a", "b"],
    ],
)
def test_wrong_arguments(capsys, arguments):
    failure(capsys, *arguments)


def test_a_library_that_fails_is_a_sentence_not_the_end():
    broken = {"task": "speed", "library": "no such library", "threads": 1, "quick": True, "seconds": 0.01}
    with (
        run.Workers() as workers,
        pytest.raises(run.WorkerFailed, match="no such library ended with exit code 1"),
    ):
        list(workers.ask(broken))


@needs_posix
def test_interrupted_report_leaves_no_process(tmp_path):
    started = subprocess.Popen(
        [sys.executable, "-m", "numbasoft"], env=ENVIRONMENT, stderr=subprocess.PIPE, preexec_fn=_hear_ctrl_c
    )
    deadline = time.monotonic() + 30
    while not (children := _children(started.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert started.wait(20) == 130
    assert started.stderr.read() == b"numbasoft: interrupted\n"
    assert children
    while alive := [pid for pid in children if Path(f"/proc/{pid}").exists()]:  # until init has reaped it
        assert time.monotonic() < deadline + 30, f"still running: {alive}"
        time.sleep(0.05)


def _hear_ctrl_c():
    """A process started in the background of a shell ignores Ctrl-C, and its children do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _children(pid):
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.parent.parent.joinpath("self").exists():
        pytest.skip("finds the processes in /proc")
    return [int(p) for task in tasks.iterdir() for p in (task / "children").read_text().split()]


def test_workload_table():
    assert len({w.name for w in workloads.WORKLOADS}) == len(workloads.WORKLOADS)
    softmax = workloads.Workload("softmax", (256, 1000))
    assert softmax in workloads.WORKLOADS
    assert softmax.bytes_moved == 2 * 4 * 256_000
    assert workloads.Workload("softmax_backward", (256, 1000)).bytes_moved == 3 * 4 * 256_000
    assert workloads.Workload("logsumexp", (256, 1000), "float64").bytes_moved == 8 * 256_256
    (x,) = softmax.inputs()
    (again,) = softmax.inputs()
    assert np.array_equal(x, again)
    assert len(np.unique(x)) > 1000


def test_a_problem_in_any_round_counts():
    timed = {"best": 1.0, "median": 2.0, "samples": 3, "difference": 0.0}
    wrong = {"problem": "wrong"}
    for records in ([timed, wrong, timed], [wrong, timed, timed], [timed, timed, wrong]):
        assert run._merge(records) == wrong
    assert run._merge([timed, timed | {"best": 0.5}, timed]) == timed | {"best": 0.5, "samples": 9}


@pytest.mark.parametrize("function", workloads.LOSSES)
def test_losses_of_the_workload_table(function):
    # the expected values come from NumPy, the rival's from its own formula
    work = workloads.Workload(function, (4, 7, 5), axis=1)
    arrays = work.inputs()
    expected = work.expected(arrays)
    assert expected.size == np.prod(work.out_shape)
    for library in (rivals.ours(work), rivals.NumPy):
        call, read = library(1).prepare(work, arrays)
        assert work.difference(read(call()), expected) <= 1
        assert work.difference(read(call()) + 0.01, expected) > 1
    if not work.takes_out:
        with pytest.raises(NotImplementedError, match="out="):
            rivals.NumbasoftGiven(1).prepare(work, arrays)


def test_importing_numbasoft_imports_no_report_and_no_cuda():
    ran = python("-c", "import sys, numbasoft; print([m for m in sys.modules if 'numbasoft.report' in m])")
    assert ran.stdout == "[]\n"
    if importlib.util.find_spec("numba_cuda") is None:
        ran = python(
            "-c",
            "import sys; from numbasoft.report import environment as e; e.cuda(); print('numba.cuda' in sys.modules)",
        )
        assert ran.stdout == "False\n"


def test_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with terminal.Progress(4, "rows") as progress:
        progress.advance(4)
    drawn = capsys.readouterr().err
    assert "0%" in drawn
    assert "100%" in drawn
    assert drawn.endswith("\r")  # and wiped at the end


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.25, "1.25 s"), (0.0123, "12.3 ms"), (4.56e-4, "456 us"), (3.2e-7, "0.32 us")]
)
def test_duration(seconds, text):
    assert terminal.duration(seconds) == text


# --------------------------------------------------------------------------------------------- files


@pytest.fixture
def small_pieces(monkeypatch):
    """Small arrays go through the paths of large ones."""
    monkeypatch.setattr(files, "PIECE", 64)


LAYOUTS = [(shape, order) for shape in [(7,), (5, 6), (3, 4, 5), (2, 3, 4, 5)] for order in "CF"]


@pytest.mark.parametrize(("shape", "order"), LAYOUTS)
def test_files_along_every_axis(tmp_path, rng, small_pieces, shape, order):
    """Bit for bit what the function gives for the whole array, whatever the blocks."""
    x = np.asarray(rng.normal(0, 3, shape).astype("f4"), order=order)
    source, target = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(source, x)
    for axis in [None, -1, *range(len(shape)), *([(0, -1), (1, 0)] if len(shape) > 1 else [])]:
        for function in (numbasoft.softmax, numbasoft.logsumexp):
            for memory in (1, 100, 1 << 20):
                files.convert(function, source, target, axis=axis, temperature=0.7, memory=memory)
                expected = function(x, axis=axis, temperature=0.7)
                found = np.load(target)
                assert found.dtype == np.float32
                assert np.array_equal(found, expected), (axis, function, memory)
                assert found.flags.c_contiguous or order == "F"
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy"]


@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i1", "u1", "i8", "?"])
def test_file_commands_and_dtypes(tmp_path, rng, function, dtype):
    x = rng.integers(0, 2, (4, 9)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    assert (
        main([function, str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), "--axis=0", "--temperature", "2"])
        == 0
    )
    expected = getattr(numbasoft, function)(x, axis=0, temperature=2.0)
    found = np.load(tmp_path / "y.npy")
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_bfloat16_file(tmp_path, rng):
    """NumPy stores bfloat16 as raw two-byte items, and so does the output."""
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    x = rng.normal(0, 3, (4, 9)).astype(bfloat16)
    np.save(tmp_path / "x.npy", x)
    assert main(["softmax", str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]) == 0
    found = np.load(tmp_path / "y.npy")
    assert found.dtype == np.dtype("V2")
    assert np.array_equal(found.view(bfloat16), numbasoft.softmax(x))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)])
def test_files_without_rows_or_axes(tmp_path, shape):
    x = np.zeros(shape)
    np.save(tmp_path / "x.npy", x)
    assert main(["logsumexp", str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), "--axis", "all"]) == 0
    assert np.array_equal(np.load(tmp_path / "y.npy"), numbasoft.logsumexp(x, axis=None))


def test_wrong_files_and_arguments(tmp_path, capsys):
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, np.ones((3, 4)))
    np.save(tmp_path / "complex.npy", np.ones(3, complex))
    np.save(tmp_path / "objects.npy", np.array([None, 1]), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", a=np.ones(3))
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "short.npy").write_bytes(x.read_bytes()[:-8])
    (tmp_path / "link.npy").symlink_to(x)
    before = sorted(os.listdir(tmp_path))
    for words, arguments in {
        "No such file": [tmp_path / "none.npy", y],
        "complex128": [tmp_path / "complex.npy", y],
        "objects.npy": [tmp_path / "objects.npy", y],
        ".npz archive": [tmp_path / "archive.npz", y],
        "not a complete .npy file": [tmp_path / "text.npy", y],
        "short.npy": [tmp_path / "short.npy", y],
        "is the input": [x, x],
        "link.npy is the input": [x, tmp_path / "link.npy"],
        "not a file": [x, tmp_path],
        "does not exist": [x, tmp_path / "none" / "y.npy"],
        "axis": [x, y, "--axis", "2"],
        "integer": [x, y, "--axis", "last"],
        "written --axis=-2,-1": [x, y, "--axis", "-2,-1"],
        "temperature": [x, y, "--temperature", "0"],
        "OUTPUT": [x],
        "--memory": [x, y, "--memory", "0"],
    }.items():
        assert words in failure(capsys, "softmax", *arguments)
    for option in (["--json"], ["--threads", "1"], ["--plot", tmp_path / "y.png"]):
        assert f"{option[0]} is an option of the report" in failure(capsys, *option, "softmax", x, y)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_a_failed_run_leaves_the_old_output(tmp_path, monkeypatch, small_pieces, error):
    """The function works on the probe and on one block, then fails."""
    calls = []

    def fails(x, axis, temperature):
        calls.append(x.shape)
        if len(calls) == 3:
            raise error
        return numbasoft.softmax(x, axis=axis, temperature=temperature)

    np.save(tmp_path / "x.npy", np.ones((40, 10)))
    np.save(tmp_path / "y.npy", np.arange(3))
    with pytest.raises(error):
        files.convert(fails, tmp_path / "x.npy", tmp_path / "y.npy", axis=-1, temperature=1.0, memory=1000)
    assert len(calls) == 3
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "y.npy"]
    assert np.array_equal(np.load(tmp_path / "y.npy"), np.arange(3))


def zeros(path, shape):
    """A file of zeros that takes no room on the disk."""
    np.lib.format.open_memmap(path, "w+", "f4", shape)
    return path


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_file(tmp_path, number):
    """A thousand passes, one for every column, take seconds even where the system maps a file in large pages."""
    source = zeros(tmp_path / "x.npy", (120_000, 1000))
    started = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "numbasoft",
            "softmax",
            source,
            tmp_path / "y.npy",
            "--axis",
            "0",
            "--memory",
            "1",
        ],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        preexec_fn=_hear_ctrl_c,
    )
    deadline = time.monotonic() + 30
    while len(os.listdir(tmp_path)) == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert any(name.endswith(".part") for name in os.listdir(tmp_path))
    time.sleep(0.1)
    started.send_signal(number)
    assert started.wait(20) == (130 if number == signal.SIGINT else 143)
    assert b"Traceback" not in started.stderr.read()
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit to the size of a file")
def test_a_full_disk_is_a_sentence(tmp_path):
    source = zeros(tmp_path / "x.npy", (1000, 1000))
    ran = python(
        "-c",
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from numbasoft.__main__ import main; main(sys.argv[1:])",
        "softmax", source, tmp_path / "y.npy",
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.startswith("numbasoft: ")
    assert "File too large" in ran.stderr
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("axis", [-1, 0])
def test_resident_memory_does_not_grow_with_the_file(tmp_path, axis):
    """320 MB in and 320 MB out; the peak is at most 48 MiB above that of a small file."""

    def peak(rows):
        source = zeros(tmp_path / "x.npy", (rows, 1000))
        ran = python(
            "-c",
            "import sys; from numbasoft.__main__ import main; main(sys.argv[1:]);"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])",
            "softmax", source, tmp_path / "y.npy", f"--axis={axis}", "--memory=16",
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert np.load(tmp_path / "y.npy", mmap_mode="r").shape == (rows, 1000)
        return int(ran.stdout) / 1024

    # The first run of a kernel compiles it, which takes 80 MB.
    small, large = (min(peak(rows), peak(rows)) for rows in (8_000, 80_000))
    assert large < small + 48
