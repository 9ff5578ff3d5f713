"""The settings of a process: freed memory is kept, and garbage is looked for seldom."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In another thread: XLA's buffers are asked for by threads of its own.
_FAULTS = """
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from jaxgen import memory

def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        b"x" * (96 << 20)  # 24,576 pages, beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def faults():
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(count).result()

kept = len(sys.argv) > 1 and memory.keep_freed_memory()
faults()
print(kept, faults())
"""


def _kept_and_faults(*args):
    done = subprocess.run([sys.executable, "-c", _FAULTS, *args], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_memory_that_was_freed_is_used_again_without_faults():
    if sys.platform != "linux":
        pytest.skip("faults are counted on Linux")
    kept, faults = _kept_and_faults("keep")
    if not kept:
        pytest.skip("this C library cannot be told to keep memory")
    assert faults < _kept_and_faults()[1] / 10


def test_garbage_is_looked_for_seldom():
    code = (
        "import gc; from jaxgen import memory; memory.collect_garbage_seldom(); print(gc.get_threshold()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000
