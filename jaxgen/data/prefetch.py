"""Batches made in the background while the device computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def prefetch(
    stream: Callable[[int], Mapping[str, np.ndarray]],
    spans: Iterable[tuple[int, int]],
    place: Callable[[dict[str, np.ndarray]], T],
    depth: int = 2,
) -> Generator[tuple[int, T], None, None]:
    """For each (first_step, num_steps) of `spans`: first_step and `place` of its batches, stacked.

    stream: step -> {field: [B, ...]}, such as a `Stream`
    place: puts {field: [num_steps, B, ...]} where the computation wants it
    depth: how many placed spans may wait at most

    Both are called in one background thread, which starts with the first `next`. What is raised there is
    raised here, after the spans that were made before it. Closing the generator ends the thread before it
    returns.
    """
    ready: queue.Queue[tuple[str, int, Any]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def produce() -> None:
        try:
            for first, num_steps in spans:
                if closed.is_set():
                    return
                batches = [stream(step) for step in range(first, first + num_steps)]
                stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
                ready.put(("span", first, place(stacked)))
            ready.put(("end", 0, None))
        except BaseException as error:  # handed over whatever it is, or the consumer would wait for ever
            ready.put(("error", 0, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, first, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield first, value
    finally:
        closed.set()
        while thread.is_alive():  # a producer that waits for room must get it, or it never sees `closed`
            try:
                ready.get_nowait()
            except queue.Empty:
                thread.join(timeout=0.01)
