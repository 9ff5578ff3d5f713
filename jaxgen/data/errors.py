"""One way of saying that a name is not known, and of saying what a user should know of the data."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Sequence

from jaxgen.types import UserError


def unknown(what: str, name: str, choices: Sequence[str]) -> UserError:
    """The error for a `name` that is none of `choices`; `what` says what is being named."""
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(choices)}"
    return UserError(f"unknown {what} {name!r}: {hint}")


@functools.cache
def note(text: str) -> None:
    """Prints a sentence to stderr, once: several seeds of one run load the same data again."""
    print(text, file=sys.stderr)
