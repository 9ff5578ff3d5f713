"""Closed-form and EM models as pure fit, log_prob, sample and predict functions over NamedTuple parameters.

Each function works on one problem and is jitted; `jax.vmap` batches it over many. Ragged data come padded,
with a mask that is 1 where an entry counts.
"""
