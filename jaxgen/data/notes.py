"""One way of saying what a user should know of the data."""

from __future__ import annotations

import functools
import sys


@functools.cache
def note(text: str) -> None:
    """Prints a sentence to stderr, once: several seeds of one run load the same data again."""
    print(text, file=sys.stderr)
