"""Strict settings for every test: rank promotion raises, reused keys raise, warnings are errors."""

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
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    chex.clear_trace_counter()
