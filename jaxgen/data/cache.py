"""Decoded arrays kept on disk, so that a data set is prepared once a machine and then loads in a moment.

Layout: `<cache>/decoded/<set>/<split>/{meta.json, <field>-<fingerprint>.npy}`. Every file is written under a
temporary name and renamed, `meta.json` last, so that processes that prepare the same set at once, or die
while at it, never leave a set that reads as whole but is not; the fingerprint is checked at every load.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxgen.data.notes import note
from jaxgen.data.source import Source
from jaxgen.types import UserError


def cache_dir() -> Path:
    """Where prepared data goes: the environment's JAXGEN_CACHE_DIR, else ~/.cache/jaxgen."""
    return Path(os.environ.get("JAXGEN_CACHE_DIR") or Path.home() / ".cache" / "jaxgen")


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The error for a cache folder that is read-only, full or no folder."""
    return UserError(
        f"prepared data cannot be written to {folder} ({error.strerror or error}): set JAXGEN_CACHE_DIR to a "
        "folder that is writable and has room"
    )


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, pieces: Iterable[str]) -> None:
    """A text file in the cache, whole or not at all. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, lambda file: file.writelines(piece.encode() for piece in pieces))
    except OSError as error:
        raise cannot_write(path.parent, error) from error


def store(folder: Path, source: Source) -> None:
    """Keep `source` in `folder`. Raises UserError where the folder cannot be written."""
    files = {name: f"{name}-{source.fingerprint[:16]}.npy" for name in source.fields}
    meta = {
        "name": source.name,
        "split": source.split,
        "num_classes": source.num_classes,
        "num_levels": source.num_levels,
        "fingerprint": source.fingerprint,
        "files": files,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, file_name in files.items():
            _write(folder / file_name, lambda file: np.save(file, source.fields[name], allow_pickle=False))
        _write(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    except OSError as error:
        raise cannot_write(folder, error) from error


def fetch(folder: Path) -> Source | None:
    """What `store` kept in `folder`; None where there is nothing, or it is damaged (which is said)."""
    if not (folder / "meta.json").exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        source = Source(
            name=meta["name"],
            split=meta["split"],
            fields={name: np.load(folder / file, allow_pickle=False) for name, file in meta["files"].items()},
            num_classes=meta["num_classes"],
            num_levels=meta["num_levels"],
        )
        if source.fingerprint != meta["fingerprint"]:
            raise ValueError("the content does not have the fingerprint that was noted when it was written")
    except Exception as error:  # whatever a damaged file makes NumPy or json raise: the remedy is the same
        note(f"The decoded data in {folder} are damaged and are made anew: {error}")
        return None
    return source
