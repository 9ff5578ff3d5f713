"""The memory of a process that runs JAX: settings better than the defaults, and the error when it ran out."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # names of glibc's malloc.h
_GIB = 1 << 30


def collect_garbage_seldom() -> None:
    """A third less time until the first update: tracing makes millions of objects and hardly any garbage.

    Measured on the DDPM's smoke preset with its programs in the cache: 8.1 s of processor time, not 11.6 s.
    """
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


def ran_out(error: BaseException) -> bool:
    """Whether this says that memory, the device's or the machine's, did not suffice; JAX says so in words."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def keep_freed_memory() -> bool:
    """Lets malloc keep what is freed for the next step; False where this C library has no such setting.

    XLA on CPUs asks for the buffers of a program at every call and frees them afterwards. glibc gives large
    ones back to the system, which then hands over the same pages anew, cleared, a fault for each. Without
    that a step of the small LSTM of Zaremba et al. takes 38 ms instead of 61 ms; PyTorch gains less there and
    more with convolutions. What the process holds stays at its peak.

    Buffers above 64 MiB that threads other than the first ask for are still given back: so much an arena of
    theirs can hold. One arena for all threads (M_ARENA_MAX) keeps these too, which takes an update of a
    Transformer from 468 to 430 ms and of the medium LSTM from 364 to 337, but the threads then wait for one
    another: 50 steps of DDIM for 8 images take 4.8 s instead of 3.9.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    taken = [
        mallopt(name, size) == 1
        for name, size in (
            (_M_MMAP_THRESHOLD, _GIB),
            (_M_TRIM_THRESHOLD, 2 * _GIB - 1),
            (_M_TOP_PAD, _GIB // 16),
        )
    ]
    return all(taken)
