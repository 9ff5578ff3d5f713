"""The settings of a process: freed memory is kept, and garbage is looked for seldom."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FAULTS = """
import resource
from jaxgen import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        b"x" * (64 << 20)  # 16,384 pages, beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
kept = memory.keep_freed_memory()
faults()
print(kept, given_back, faults())
"""


def test_memory_that_was_freed_is_used_again_without_faults():
    if sys.platform != "linux":
        pytest.skip("faults are counted on Linux")
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    if kept != "True":
        pytest.skip("this C library cannot be told to keep memory")
    assert int(after) < int(before) / 10


def test_garbage_is_looked_for_seldom():
    code = (
        "import gc; from jaxgen import memory; memory.collect_garbage_seldom(); print(gc.get_threshold()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000
