"""Tables and a progress bar for a terminal, without a dependency."""

from __future__ import annotations

import sys
import time

WIDTH = 30  # characters of the bar


class Progress:
    """A bar on standard error where that is a terminal, nothing elsewhere."""

    def __init__(self, total: float, what: str):
        self.total, self.what, self.done = max(total, 1), what, 0.0
        self.started, self.drawn = time.monotonic(), 0.0
        self.visible = sys.stderr.isatty()

    def advance(self, amount: float = 1, what: str | None = None) -> None:
        self.done += amount
        self.what = what or self.what
        now = time.monotonic()
        if self.visible and (now - self.drawn > 0.05 or self.done >= self.total):
            self.drawn = now
            part = min(self.done / self.total, 1)
            bar = ("#" * round(WIDTH * part)).ljust(WIDTH, "-")
            line = f"{bar} {part:4.0%} {now - self.started:4.0f} s  {self.what}"
            sys.stderr.write(f"\r{line[:100]:100}")
            sys.stderr.flush()

    def close(self) -> None:
        if self.visible:
            sys.stderr.write(f"\r{'':100}\r")
            sys.stderr.flush()

    def __enter__(self):
        self.advance(0)
        return self

    def __exit__(self, *_):
        self.close()


def table(header: list[str], rows: list[list[str]], *, markdown: bool = False, left: int = 1) -> str:
    """Columns as wide as their widest cell, the first `left` of them flush left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells, separator):
        return separator.join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )

    if markdown:
        rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        return "\n".join(f"| {line(cells, ' | ')} |" for cells in [header, rule, *rows])
    return "\n".join(line(cells, "  ").rstrip() for cells in [header, ["-" * w for w in widths], *rows])


def duration(seconds: float) -> str:
    """Three digits and a unit: '84.2 us'."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            value = seconds / scale
            return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"
    raise AssertionError
