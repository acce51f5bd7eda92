"""The pictures of the README: ``python -m benchmarks.pictures measure FILE.json``, then ``... draw FILE.json FOLDER``.

(a) bandwidth against the width of a row, numbasoft, its rivals and a copy of the same bytes; (b) the largest error
against the width; (c) the ladder from the naive formula to the production kernel. softmax, float32, last axis, each
library in a process of its own that takes its turn twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from numbasoft import jit
from numbasoft.report import environment, oracle, rivals, run, worker, workloads
from numbasoft.report.terminal import Progress

WIDTHS = (*(2**k for k in range(4, 21)), 1000)
ELEMENTS = 1 << 22  # of each array: 16 MiB, which the last cache of a desktop still holds
JUDGED = 1 << 16  # elements whose error is looked at
SECONDS = 0.1  # of timing, per width and turn
TURNS = 2


def one_library(library: str, threads: int) -> dict:
    """What one process measures."""
    rival = rivals.EVERYONE[library](threads)
    found: dict = {"widths": {}, "ladder": {}}
    for width in sorted(WIDTHS):
        work = workloads.Workload("softmax", (ELEMENTS // width, width))
        inputs = work.inputs()
        call, read = rival.prepare(work, inputs)
        result = np.array(read(call()))
        record = {"bandwidth": work.bytes_moved / worker.time_call(call, SECONDS)["best"] / 1e9}
        if not isinstance(rival, rivals.Copy):
            rows = slice(max(1, JUDGED // width))
            exact = oracle.Forward(oracle.wide(inputs[0][rows], result.dtype), 1.0)
            record["ulp"] = oracle.error_in_ulp(result[rows], *exact.softmax(), result.dtype)
        found["widths"][width] = record
    if isinstance(rival, rivals.Numbasoft):
        from benchmarks.speed import STEPS

        work = workloads.Workload("softmax", (4096, 1000))
        for step, prepare in STEPS.items():
            found["ladder"][step] = worker.time_call(prepare(work), 1.0)["best"] / np.prod(work.shape)
    return found


def measure(threads: int) -> dict:
    names = ["numbasoft", "numbasoft out=", "parallel copy"]
    names += [rival.name for rival in rivals.RIVALS if rival.missing() is None]
    best: dict = {}
    with Progress(TURNS * len(names), "starting") as progress, run.Workers() as workers:
        for _ in range(TURNS):
            for name in names:
                progress.advance(0, name)
                (found,) = workers.ask({"library": name, "threads": threads}, module="benchmarks.pictures")
                best[name] = found if name not in best else merged(best[name], found)
                progress.advance()
    return {"environment": environment.describe(threads), "libraries": best}


def merged(a: dict, b: dict) -> dict:
    """The better of two turns."""
    for width, record in b["widths"].items():
        a["widths"][width]["bandwidth"] = max(a["widths"][width]["bandwidth"], record["bandwidth"])
    a["ladder"] = {step: min(seconds, b["ladder"][step]) for step, seconds in a["ladder"].items()}
    return a


def draw(stored: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "numbasoft"  # the same file from the same numbers
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    here = stored["environment"]
    title = f"softmax, float32, {here['threads']} threads, {here['cpu']}"

    def lines(key: str, label: str, file: str, hide: tuple[str, ...]) -> None:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, found in stored["libraries"].items():
            points = [(int(w), r[key]) for w, r in found["widths"].items() if key in r]
            if name not in hide and points:
                ours = name.startswith("numbasoft")
                style = {"color": "black", "linestyle": "--"} if name == "parallel copy" else {}
                axes.plot(
                    *zip(*points, strict=True),
                    marker=".",
                    linewidth=2.5 if ours else 1.2,
                    label=name,
                    **style,
                )
        axes.set(xscale="log", yscale="log", xlabel="elements of a row", ylabel=label)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(folder / file, metadata={"Date": None})

    lines("bandwidth", "GB/s (input read once, output written once)", "bandwidth.svg", ())
    lines("ulp", "largest error in ULP", "errors.svg", ("numbasoft out=",))

    ladder = stored["libraries"]["numbasoft"]["ladder"]
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(ladder), [seconds * 1e9 for seconds in ladder.values()])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("ns per element, one thread, 4096 x 1000")
    axes.set_title(f"from the naive formula to the production kernel, {here['cpu']}", fontsize=9)
    figure.savefig(folder / "ladder.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure and store")
    measuring.add_argument("file", type=Path)
    measuring.add_argument("--threads", type=int, default=jit.processors())
    drawing = commands.add_parser("draw", help="draw SVG files from what was stored")
    drawing.add_argument("file", type=Path)
    drawing.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "measure":
        chosen.file.write_text(json.dumps(measure(chosen.threads), indent=1))
    else:
        draw(json.loads(chosen.file.read_text()), chosen.folder)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # a process that `measure` started
        print(json.dumps(one_library(**json.loads(sys.argv[1]))))
    else:
        main()
