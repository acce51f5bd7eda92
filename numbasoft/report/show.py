"""The report as text for a terminal and as Markdown for the README."""

from __future__ import annotations

from . import rivals
from .terminal import duration, table


def text(result: dict) -> str:
    """All three parts, for people."""
    return "\n\n".join(
        [
            "WHAT IS HERE",
            environment(result),
            "IS IT RIGHT",
            accuracy(result),
            "HOW FAST IS IT",
            speed(result),
        ]
    )


def markdown(result: dict) -> str:
    """The tables of the README."""
    return "\n\n".join(
        [
            "### Results",
            f"{machine(result)}.",
            speed(result, markdown=True),
            "### Accuracy",
            accuracy(result, markdown=True),
        ]
    )


def machine(result: dict) -> str:
    here = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in here["rivals"].items() if version)
    return (
        f"{here['cpu']} ({', '.join(here['vector'][:3])}), {here['system']}, {here['threads']} threads of {here['cores']} "
        f"cores; numbasoft {here['numbasoft']}, numba {here['numba']}, Python {here['python']}; {versions}"
    )


def environment(result: dict) -> str:
    here = result["environment"]
    cuda = here["cuda"]
    lines = {
        "numbasoft": f"{here['numbasoft']} on Python {here['python']}, {here['system']}",
        "built on": f"numba {here['numba']}, llvmlite {here['llvmlite']}, numpy {here['numpy']}, "
        f"ml_dtypes {here['ml_dtypes'] or 'not installed (no bfloat16)'}",
        "processor": f"{here['cpu']}, LLVM's {here['llvm_cpu']}: {' '.join(here['vector']) or 'no vector unit known'}",
        "threads": f"{here['threads']} of {here['cores']} cores, threading layer {here['threading_layer']}",
        "CUDA": f"{cuda['device'] or 'none'}: {cuda['reason']}",
        "rivals": ", ".join(f"{name} {v or 'not installed'}" for name, v in here["rivals"].items()),
    }
    return "\n".join(f"{name:10} {line}" for name, line in lines.items())


def accuracy(result: dict, *, markdown: bool = False) -> str:
    """One line per function and dtype, one column per kind of row."""
    part = result["accuracy"]
    records = part["numbasoft"]
    families = list(dict.fromkeys(r["rows"] for r in records))
    parts = [
        "Largest error in ULP over all elements, against decimal or extended precision; temperatures 1 and 0.7. "
        "Rows by their logits: N(0, 3), normal with that mean and deviation; confident, one of them 10 to 60, the others "
        "N(0, 1); tied, three values only; rectified, 0 where N(-1, 1) is negative; tiny, N(0, 1e-6); huge, a deviation of 1/64 of the dtype's largest number.",
        table(
            ["function", "dtype", *families, "bound", "kept"],
            [
                [function, dtype, *cells, f"{limit:g}", "yes" if ok else "NO"]
                for (function, dtype), (cells, limit, ok) in _by_line(records, families).items()
            ],
            markdown=markdown,
            left=2,
        ),
    ]
    others = [
        [name, function, *cells]
        for name, theirs in part["rivals"].items()
        for (function, _), (cells, _, _) in _by_line(theirs, families).items()
    ]
    if others:
        parts += [
            "The same rows in the other libraries, float32, temperature 1:",
            table(["library", "function", *families], others, markdown=markdown, left=2),
        ]
    parts += [f"{dtype}: not checked, {reason}." for dtype, reason in part["skipped"].items()]
    parts += [f"{job}: {problem}." for job, problem in part["problems"].items()]
    return "\n\n".join(parts)


def _by_line(records, families):
    lines = {}
    for r in records:
        lines.setdefault((r["function"], r["dtype"]), {})[r["rows"]] = r
    return {
        key: (
            [_ulp(by_rows[f]["max_ulp"]) if f in by_rows else "-" for f in families],
            next(iter(by_rows.values()))["bound"],
            all(r["ok"] for r in by_rows.values()),
        )
        for key, by_rows in lines.items()
    }


def _ulp(error: float | None) -> str:
    if error is None:
        return "wrong"
    return f"{error:.2f}" if error < 10 else f"{error:.0f}" if error < 1e5 else f"{error:.0e}"


def speed(result: dict, *, markdown: bool = False) -> str:
    """One line per workload; each rival's cell is its time and that time over numbasoft's."""
    part = result["speed"]
    ours = [r.name for r in rivals.OURS]
    others = [name for name in part["summary"] if part["summary"][name]]
    rows = [
        [
            row["workload"],
            *(_time(row["libraries"][name]) for name in ours),
            *(_time_and_ratio(row["libraries"][name]) for name in others),
        ]
        for row in part["rows"]
    ]
    summary = part["summary"]
    rows.append(["geometric mean", "", "", *(f"{summary[n]['geometric_mean']:.2f}x" for n in others)])
    rows.append(["lowest", "", "", *(f"{summary[n]['lowest']:.2f}x" for n in others)])
    given = " and ".join(name for name in part["given_output"] if name not in ours)
    lines = [
        table(["workload", *ours, *others], rows, markdown=markdown),
        f"Best of {part['rounds']} process{'es' if part['rounds'] > 1 else ''} per library, run in turn, {part['threads']} thread{'s' if part['threads'] > 1 else ''} each; every result checked "
        f"before it is timed. 3.00x: the library takes three times as long as numbasoft. {given}: against numbasoft with "
        "out= where it takes one, the rest against numbasoft allocating as they do. The parallel copy moves the bytes of the workload, each "
        "input read once, each output written once: 0.90x is 90 % of that copy's speed; a copy may be beaten, too.",
    ]
    lines += [
        f"{name}: not measured, {package} is not installed." for name, package in part["missing"].items()
    ]
    lines += [f"{name}: {problem}." for name, problem in part["problems"].items()]
    lines += [
        f"{row['workload']}: {name}: {cell['problem']}."
        for row in part["rows"]
        for name, cell in row["libraries"].items()
        if "problem" in cell and name not in part["problems"]
    ]
    return "\n\n".join(lines[:2]) + "".join(f"\n{line}" for line in lines[2:])


def _time(cell):
    return duration(cell["best"]) if "best" in cell else "failed" if "problem" in cell else "-"


def _time_and_ratio(cell):
    return f"{_time(cell)} {cell['ratio']:6.2f}x" if "ratio" in cell else _time(cell)


def plot(result: dict, path: str) -> None:
    """Each rival's time over numbasoft's, by workload, on a logarithmic axis."""
    import matplotlib.figure

    rows, summary = result["speed"]["rows"], result["speed"]["summary"]
    names = [name for name in summary if summary[name]]
    figure = matplotlib.figure.Figure(figsize=(10, 1.5 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        found = [
            (i, row["libraries"][name]["ratio"])
            for i, row in enumerate(rows)
            if "ratio" in row["libraries"][name]
        ]
        offset = (place - (len(names) - 1) / 2) * 0.12
        axes.plot(
            [ratio for _, ratio in found], [i + offset for i, _ in found], "o", markersize=5, label=name
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["workload"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the library / time of numbasoft (right of 1: numbasoft is faster)")
    axes.set_title(f"{result['environment']['cpu']}, {result['speed']['threads']} threads", fontsize=9)
    axes.grid(axis="x", which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=150)
