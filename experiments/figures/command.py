"""What the commands of the figures share: their arguments, and the file they write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of `python -m experiments.figures.<name>`, with its --out."""
    made = argparse.ArgumentParser(prog=f"python -m experiments.figures.{name}")
    made.add_argument("--out", type=Path, required=True, help=f"the folder to write {name}.png to")
    return made


def whole_numbers(text: str) -> tuple[int, ...]:
    """An argument such as 10,20,40."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("numbers from 1 on are needed")
    return numbers


def write(figure: Figure, out: Path, name: str) -> int:
    """Writes <out>/<name>.png and says so; returns the exit status."""
    path = out.expanduser() / f"{name}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"wrote {path}")
    return 0


def print_table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> None:
    """Rows under a head, right-aligned; floats with 4 significant digits."""
    text = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in text) + 2 for i in range(len(head))]
    for row in text:
        print("".join(f"{x:>{width}}" for x, width in zip(row, widths, strict=True)))
