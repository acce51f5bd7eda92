"""python -m numbasoft: what is here, is it right, how fast is it; and softmax of .npy files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import NoReturn

from numbasoft import __version__

FUNCTIONS = ("softmax", "log_softmax", "logsumexp")
OF_THE_REPORT = ("json", "markdown", "plot", "quick", "threads", "rounds")


class Parser(argparse.ArgumentParser):
    """Errors in one sentence."""

    def error(self, message: str) -> NoReturn:
        if message == "argument --axis: expected one argument":
            message += "; what begins with - is written --axis=-2,-1"
        fail(message)


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"numbasoft: {message}", file=sys.stderr)
    raise SystemExit(code)


def axes(text: str) -> int | tuple[int, ...] | None:
    """'all', an integer, or integers with commas between."""
    if text == "all":
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be an integer, integers like 0,2, or all; it was {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; it was {text!r}")
    return int(text)


def parser() -> Parser:
    top = Parser(
        prog="python -m numbasoft",
        description="Without a command: what is here, is it right, how fast is it (about two minutes).",
    )
    top.add_argument("--version", action="version", version=f"numbasoft {__version__}")
    form = top.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON")
    form.add_argument("--markdown", action="store_true", help="print the README's tables")
    top.add_argument("--plot", metavar="FILE", help="also draw the ratios into FILE (.png, .svg, .pdf)")
    top.add_argument("--quick", action="store_true", help="fewer workloads, rows and repetitions")
    top.add_argument(
        "--threads", type=count, metavar="N", help="threads of every library (default: all cores)"
    )
    top.add_argument(
        "--rounds",
        type=count,
        metavar="N",
        help="processes per library, in turn, the best of which counts: more on a busy machine (default: 2, with --quick 1)",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name in FUNCTIONS:
        command = commands.add_parser(
            name,
            help=f"{name} of a .npy file of any size",
            description=f"Write {name} of the array in INPUT to OUTPUT. Files may be larger than memory.",
        )
        command.add_argument("input", metavar="INPUT", help=".npy file of logits")
        command.add_argument(
            "output", metavar="OUTPUT", help=".npy file that appears, or is replaced, when it is complete"
        )
        command.add_argument(
            "--axis",
            type=axes,
            default=-1,
            help="an integer, integers like --axis=0,-1, or all (default: -1)",
        )
        command.add_argument(
            "--temperature", type=float, default=1.0, metavar="T", help="divide the logits by T"
        )
        command.add_argument(
            "--memory", type=count, default=256, metavar="MIB",
            help="size of the buffers; a row is never cut (default: 256). An axis that is not the last in the "
            "file needs one pass over the file per buffer.",
        )  # fmt: skip
    return top


def convert(arguments) -> int:
    given = next((name for name in OF_THE_REPORT if getattr(arguments, name)), None)
    if given:
        fail(f"--{given} is an option of the report, which {arguments.command} does not make")
    import numbasoft
    from numbasoft.report import files

    def stop(number, _):
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    try:
        files.convert(
            getattr(numbasoft, arguments.command),
            arguments.input,
            arguments.output,
            axis=arguments.axis,
            temperature=arguments.temperature,
            memory=arguments.memory << 20,
        )
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    except (ValueError, TypeError, IndexError, MemoryError) as error:
        fail(" ".join(str(error).split()) or type(error).__name__)
    return 0


def report(arguments) -> int:
    from numbasoft import jit
    from numbasoft.report import run, show

    if arguments.threads and arguments.threads > jit.processors():
        fail(f"--threads {arguments.threads}: this process may use {jit.processors()} processors")
    if arguments.plot:
        if Path(arguments.plot).suffix.lower() not in (".png", ".svg", ".pdf"):
            fail(f"--plot {arguments.plot}: its name must end in .png, .svg or .pdf")
        if not Path(arguments.plot).absolute().parent.is_dir():
            fail(f"--plot {arguments.plot}: its directory does not exist")
        if importlib.util.find_spec("matplotlib") is None:
            fail("--plot needs matplotlib: pip install matplotlib")
    result = run.report(threads=arguments.threads, quick=arguments.quick, rounds=arguments.rounds)
    if arguments.plot:
        show.plot(result, arguments.plot)
    if arguments.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        print(show.markdown(result) if arguments.markdown else show.text(result))
    return 0 if result["ok"] else 1


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return convert(arguments) if arguments.command else report(arguments)
    except KeyboardInterrupt:
        fail("interrupted", 130)


if __name__ == "__main__":
    raise SystemExit(main())
