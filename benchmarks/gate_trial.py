"""How far the gate can be trusted, on this machine: ``python -m benchmarks.gate_trial``.

Makes a scratch clone with commits that are slower by known percentages, a commit that changes nothing and one that
is less accurate, runs the gate on each, and prints how often it failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONLY = "^softmax float32 256x1000$"
SLOWDOWNS = (5, 10, 15, 20, 30)  # percent
PATIENCE = 900  # seconds a run of the gate may take

CALL = "                    run(rows, None, None, high, low, y if rows is x else y.reshape(rows.shape))\n"
ROWS = "run(x[: {0}], None, None, high, low, y[: {0}])"
COEFFICIENT = "0.24022653698921204"  # C2 of float32's polynomial


class Scratch:
    """A clone whose last commit is the base, and commits made on top of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        self.base = self.git("rev-parse", "HEAD")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=gate", "-c", "user.email=gate@localhost"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self, file: str, old: str, new: str) -> str:
        """A commit on top of the base in which one text is replaced."""
        self.git("checkout", "--quiet", "--detach", self.base)
        path = self.folder / file
        text = path.read_text()
        if text.count(old) != 1:
            raise LookupError(f"{file} holds {old!r} {text.count(old)} times, not once")
        path.write_text(text.replace(old, new))
        self.git("commit", "--quiet", "--all", "--message", f"trial: {file}")
        return self.git("rev-parse", "HEAD")

    def slower(self, percent: int) -> str:
        """A commit that computes a part of the rows twice."""
        again = ROWS.format(f"x.shape[0] * {percent} // 100")
        return self.commit("numbasoft/ops/softmax/api.py", CALL, f"{CALL}                    {again}\n")

    def less_accurate(self) -> str:
        return self.commit("numbasoft/elementary.py", COEFFICIENT, "0.2402")

    def unchanged(self) -> str:
        return self.commit("numbasoft/passes.py", "MOST_SEGMENTS = 64\n", "MOST_SEGMENTS = 64  # as before\n")

    def gate(self, contender: str, *options: str) -> tuple[int, dict]:
        """The exit code of the gate between the base and a commit, and what it measured."""
        command = [
            sys.executable,
            "-m",
            "benchmarks.gate",
            self.base,
            contender,
            "--only",
            ONLY,
            "--json",
            *options,
        ]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"the gate ended with exit code {done.returncode}: {done.stderr}")
        return done.returncode, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate_trial", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=10, help="runs of each commit (default %(default)s)")
    parser.add_argument(
        "--slowdowns", type=int, nargs="+", default=SLOWDOWNS, metavar="PERCENT", help="(default %(default)s)"
    )
    parser.add_argument("--unchanged", type=int, default=20, help="runs of the one that changes nothing")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder, "clone"))
        trials = [("unchanged", scratch.unchanged(), chosen.unchanged)]
        trials += [(f"{p} % slower", scratch.slower(p), chosen.runs) for p in chosen.slowdowns]
        trials.append(("less accurate", scratch.less_accurate(), 1))
        print(f"{'commit':16} failed   ratios measured")
        for name, commit, runs in trials:
            results = [scratch.gate(commit) for _ in range(runs)]
            measured = sorted(result["speed"][0]["ratio"] for _, result in results)
            failed = sum(code for code, _ in results)
            print(f"{name:16} {failed:2} of {runs:2} {measured[0]:8.3f} to {measured[-1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
