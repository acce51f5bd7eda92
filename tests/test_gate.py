"""The regression gate, on a scratch clone with a slow, an inaccurate and an unchanged commit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HAS_HISTORY = (ROOT / ".git").exists()
COUNTED = () if shutil.which("valgrind") is None else ("--instructions",)
needs_history = pytest.mark.skipif(not HAS_HISTORY, reason="no git history here to make a scratch clone of")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.gate_trial import Scratch
    finally:
        sys.path.remove(str(ROOT))
    return Scratch(tmp_path_factory.mktemp("gate") / "clone")


@pytest.fixture(scope="module")
def slow(scratch):
    return scratch.gate(scratch.slower(100), *COUNTED)  # every row is computed twice


@pytest.fixture(scope="module")
def unchanged(scratch):
    return scratch.gate(scratch.unchanged(), *COUNTED)


@needs_history
def test_a_slow_commit_fails(slow):
    code, result = slow
    (row,) = result["speed"]
    assert code == 1
    assert row["slower"] and row["ratio"] > 1.3
    assert not any(record["worse"] for record in result["accuracy"])


@needs_history
def test_an_inaccurate_commit_fails(scratch):
    code, result = scratch.gate(scratch.less_accurate())
    worse = [record for record in result["accuracy"] if record["worse"]]
    assert code == 1
    assert worse and all(record["max_ulp"] > record["base_ulp"] for record in worse)
    assert {record["function"] for record in worse} == {"softmax"}


@needs_history
def test_a_commit_that_changes_nothing_passes(unchanged):
    code, result = unchanged
    assert code == 0, result


@needs_history
@pytest.mark.skipif(not COUNTED, reason="instructions are counted by valgrind, which is not on the PATH")
def test_the_count_of_instructions_tells_slower_code_from_a_busy_machine(slow, unchanged):
    assert unchanged[1]["speed"][0]["instructions"] == pytest.approx(1, abs=0.001)
    assert slow[1]["speed"][0]["instructions"] == pytest.approx(2, abs=0.05)


@needs_history
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-commit"], "git has no 'no-such-commit' here"),
        (["HEAD", "--only", "no such workload"], "--only is 'no such workload'"),
        (["HEAD", "--threshold", "1"], "--threshold is 1.0"),
    ],
)
def test_what_cannot_be_measured(arguments, said):
    command = [sys.executable, "-m", "benchmarks.gate", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
