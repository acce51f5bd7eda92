"""Cross-entropy against the other libraries and a copy: ``python -m benchmarks.losses``.

benchmarks/NOTES.md has what it gave.
"""

import argparse
import sys

from numbasoft import jit
from numbasoft.report import rivals, run, show


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=jit.processors())
    parser.add_argument("--seconds", type=float, default=1.0, help="per library, workload and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--rivals",
        nargs="*",
        default=["PyTorch", "JAX"],
        choices=[r.name for r in rivals.RIVALS],
        metavar="NAME",
    )
    chosen = parser.parse_args()
    others = [r for r in rivals.RIVALS if r.name in chosen.rivals and r.missing() is None]
    result = run.speed(
        "losses",
        threads=chosen.threads,
        seconds=chosen.seconds,
        rounds=chosen.rounds,
        entrants=[*rivals.OURS, rivals.Copy, *others],
    )
    print(show.speed({"speed": result}))


if __name__ == "__main__":
    sys.exit(main())
