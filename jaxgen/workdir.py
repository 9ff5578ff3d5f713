"""The files of a workdir: JSON written whole or not at all, `metrics.jsonl` and `result.json`.

Every file is JSON that any reader can parse. JSON has no NaN and no infinity, so those three floats are
written as the strings "NaN", "Infinity" and "-Infinity", which Python's `float` reads back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.types import Score, UserError

Curve = list[tuple[int, float]]  # (step, value), by rising step


# ---- files


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the operating system's refusal to write `path` into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = (
                f"No space is left to write {path}: free some and run the same command again, which goes on "
                "from the newest checkpoint."
            )
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"{path} cannot be written ({error.strerror}): choose a workdir that you may write to."
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            text = (
                f"{path} cannot be written because a file and a folder are in each other's place "
                f"({error.strerror}): choose another workdir."
            )
        else:
            reason = error.strerror or error
            text = f"{path} cannot be written ({reason}): check the disk or choose another workdir."
        raise UserError(text) from error


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file or nothing: whatever stood at `path` stays until the new bytes are on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def append(file: io.RawIOBase, data: bytes) -> None:
    """Writes all of `data` to an unbuffered file; a disk that fills up takes a part before it refuses."""
    while data:
        data = data[file.write(data) or 0 :]


def plain(obj: Any) -> Any:
    """`obj` in JSON's types alone; non-finite floats become strings (see the module's docstring).

    Takes mappings (ml_collections' ConfigDict too), dataclasses, sequences, paths, and NumPy or JAX scalars
    and arrays. Raises TypeError for anything else.
    """
    if obj is None or isinstance(obj, (str, bool, int)):
        return obj
    if isinstance(obj, float):
        if math.isfinite(obj):
            return obj
        return "NaN" if math.isnan(obj) else ("Infinity" if obj > 0 else "-Infinity")
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping) or hasattr(obj, "items"):
        return {str(name): plain(value) for name, value in obj.items()}
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [plain(value) for value in (sorted(obj) if isinstance(obj, (set, frozenset)) else obj)]
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, (np.generic, np.ndarray, jax.Array)):
        return plain(np.asarray(obj).tolist())
    raise TypeError(f"{type(obj).__name__} has no JSON form: {obj!r}")


def _format(value: Any, indent: str = "") -> str:
    """Objects indented, everything in a list on one line: a curve of 200 points is one line of a diff."""
    if isinstance(value, dict) and value:
        inner = indent + "  "
        items = [
            f"{inner}{json.dumps(name, ensure_ascii=False)}: {_format(item, inner)}"
            for name, item in value.items()
        ]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _sorted(value: Any) -> Any:
    return {name: _sorted(value[name]) for name in sorted(value)} if isinstance(value, dict) else value


def to_json(obj: Any, *, sort: bool = True) -> bytes:
    """What `write_json` writes: UTF-8, with a line end."""
    value = plain(obj)
    # A command line may hold bytes that are no UTF-8; \udc80 is how JSON spells what Python makes of them.
    return (_format(_sorted(value) if sort else value) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: str | os.PathLike[str], obj: Any, *, sort: bool = True) -> None:
    """Writes `obj` (see `plain`) as indented JSON, whole or not at all; `sort=False` keeps the keys' order.

    Raises UserError where the disk refuses (full, read-only, not a folder); the old file is then intact.
    """
    write_bytes(path, to_json(obj, sort=sort))


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises UserError where the file is missing, unreadable or damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: check the path, or run the command that writes it."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): restore it, or delete it to start anew."
        ) from error


# ---- curves


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None where it is damaged."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            return None
        return {"step": row.pop("step"), **{name: float(value) for name, value in row.items()}}
    except (ValueError, TypeError):
        return None


def truncate_metrics(path: Path, last_step: int) -> int:
    """Drops from a metrics file the lines after `last_step` and those that are damaged.

    Returns how many were damaged, not counting a last line that was cut short.
    """
    if not path.exists():
        return 0
    old = path.read_bytes()
    rows = [(line, _parse_line(line)) for line in old.split(b"\n") if line]
    kept = [line for line, row in rows if row is not None and row["step"] <= last_step]
    new = b"".join(line + b"\n" for line in kept)
    if old.startswith(new):
        os.truncate(path, len(new))  # needs no space, which may be what ended the run before
    else:
        write_bytes(path, new)
    return sum(row is None for _, row in rows[:-1])


def read_metrics(workdir: str | os.PathLike[str]) -> dict[str, Curve]:
    """The curves of a run by name, each [(step, value), …] by rising step; {} before anything was logged.

    Where a step was logged twice under one name the later line counts. A last line that was cut short is
    passed over; damage elsewhere raises UserError.
    """
    path = Path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    curves: dict[str, dict[int, float]] = {}
    last = max((number for number, line in enumerate(lines) if line), default=0)
    for number, line in enumerate(lines):
        if not line:
            continue
        row = _parse_line(line)
        if row is None and number == last:
            continue
        if row is None:
            raise UserError(f"Line {number + 1} of {path} is damaged: delete that line and try again.")
        step = row.pop("step")
        for name, value in row.items():
            curves.setdefault(name, {})[step] = value
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def thin(curve: Sequence[tuple[int, float]], limit: int) -> Curve:
    """At most `limit` (≥ 5) points of a curve.

    Kept are the first, the last, the least, the greatest, the first that is not finite, and others spread
    evenly over the rest.
    """
    points = [(int(step), float(value)) for step, value in curve]
    if len(points) <= limit:
        return points
    values = np.array([value for _, value in points])
    keep = {0, len(points) - 1}
    finite = np.flatnonzero(np.isfinite(values))
    if finite.size:
        keep |= {int(finite[np.argmin(values[finite])]), int(finite[np.argmax(values[finite])])}
    if finite.size < len(points):
        keep.add(int(np.argmin(np.isfinite(values))))
    keep |= set(np.linspace(0, len(points) - 1, limit - len(keep)).round().astype(int).tolist())
    return [points[index] for index in sorted(keep)]


# ---- scores


def write_result(workdir: str | os.PathLike[str], scores: Mapping[str, Score]) -> None:
    """Writes `result.json`: the scores by name, in the order given."""
    write_json(Path(workdir) / "result.json", scores, sort=False)


def read_result(workdir: str | os.PathLike[str]) -> dict[str, Score]:
    """The scores of `result.json`. Raises UserError where it is missing or is something else."""
    path = Path(workdir) / "result.json"
    return parse_scores(read_json(path), path)


def parse_scores(content: Any, path: Path) -> dict[str, Score]:
    """Scores from JSON that was read from `path`. Raises UserError where it is something else."""
    try:
        return {
            name: Score(
                value=float(fields["value"]),
                unit=str(fields["unit"]),
                n=int(fields["n"]),
                higher_is_better=bool(fields["higher_is_better"]),
                reference=None if fields["reference"] is None else float(fields["reference"]),
                reference_source=str(fields["reference_source"]),
            )
            for name, fields in content.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no scores as jaxgen writes them: evaluate the run again.") from error
