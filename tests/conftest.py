"""Strict settings for every test: rank promotion raises, reused keys raise, warnings are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: less optimisation takes a quarter of the time to compile.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import chex
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    chex.clear_trace_counter()
