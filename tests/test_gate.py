"""The regression gate, on a scratch clone with a slow, an inaccurate and an unchanged commit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HAS_HISTORY = (ROOT / ".git").exists()
needs_history = pytest.mark.skipif(not HAS_HISTORY, reason="no git history here to make a scratch clone of")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.gate_trial import Scratch
    finally:
        sys.path.remove(str(ROOT))
    return Scratch(tmp_path_factory.mktemp("gate") / "clone")


@needs_history
def test_a_slow_commit_fails(scratch):
    code, result = scratch.gate(scratch.slower(100))
    (row,) = result["speed"]
    assert code == 1
    assert row["slower"] and row["ratio"] > 1.3  # every row is computed twice
    assert not any(record["worse"] for record in result["accuracy"])


@needs_history
def test_an_inaccurate_commit_fails(scratch):
    code, result = scratch.gate(scratch.less_accurate())
    worse = [record for record in result["accuracy"] if record["worse"]]
    assert code == 1
    assert worse and all(record["max_ulp"] > record["base_ulp"] for record in worse)
    assert {record["function"] for record in worse} == {"softmax"}


@needs_history
def test_a_commit_that_changes_nothing_passes(scratch):
    code, result = scratch.gate(scratch.unchanged())
    assert code == 0, result


@needs_history
@pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="instructions are counted by valgrind, not found here"
)
def test_the_count_of_instructions_tells_slower_code_from_a_busy_machine(scratch):
    counts = [
        scratch.gate(c, "--instructions")[1]["speed"][0]["instructions"]
        for c in (scratch.base, scratch.slower(10))
    ]
    assert counts[0] == pytest.approx(1, abs=0.001)
    assert counts[1] == pytest.approx(1.1, abs=0.03)


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
