"""Content hashes: which bytes a data set is made of, and which records are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def fingerprint(fields: Mapping[str, Any]) -> str:
    """sha256 (64 hex digits) over the sorted field names, their dtypes, shapes and bytes.

    A field that is not an array (`ImageFiles`) answers for its content with its own `digest()`.
    """
    digest = hashlib.sha256()
    for name in sorted(fields):
        column = fields[name]
        digest.update(f"{name}:{column.dtype.str}:{column.shape};".encode())
        is_array = isinstance(column, np.ndarray)
        digest.update(np.ascontiguousarray(column).data if is_array else column.digest())
    return digest.hexdigest()


def held_out(key: str) -> bool:
    """Whether the record called `key` belongs to the tenth that is kept for testing.

    A hash decides, so a record stays on its side when others come or go, and classes stored in turn
    (0, 1, ..., 9, 0, 1, ...) are not split by class, as every tenth record would be.
    """
    return (
        int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") % 10 == 0
    )
