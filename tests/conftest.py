"""Strict settings for every test: rank promotion raises, reused keys raise, warnings are errors."""

import gc
import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without optimisation they take half the time to compile. The emitters
# can be left out where XLA still knows them by this flag; an unknown flag ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""),
)

import chex
import jax
import miscompiled
import pytest

from jaxgen import memory

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
memory.collect_garbage_seldom()
miscompiled.refuse()


@pytest.fixture(scope="module", autouse=True)
def _nothing_kept_of_other_files():
    """Programs of other files are of no use here, and thousands of them make collections of garbage slow."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    chex.clear_trace_counter()
