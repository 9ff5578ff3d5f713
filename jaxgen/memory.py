"""The memory of a process that runs JAX: settings better than the defaults, and the error when it ran out."""

from __future__ import annotations

import ctypes
import gc

# names of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
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

    To be called before there are other threads: each would get an arena of its own, and such an arena gives
    buffers above 64 MiB back whatever the settings (an update of a Transformer: 67,000 faults, 468 ms instead
    of 430; of the medium LSTM: 364 ms instead of 337).
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
            (_M_ARENA_MAX, 1),
        )
    ]
    return all(taken)
