"""What a process that runs JAX is better off with than the defaults of Python and of the C library."""

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


def keep_freed_memory() -> bool:
    """Lets malloc keep what is freed for the next step; False where this C library has no such setting.

    XLA on CPUs asks for the buffers of a program at every call and frees them afterwards. glibc gives large
    ones back to the system, which then hands over the same pages anew, cleared, a fault for each. Without
    that a step of the small LSTM of Zaremba et al. takes 38 ms instead of 61 ms; PyTorch gains less there and
    more with convolutions. What the process holds stays at its peak.
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
