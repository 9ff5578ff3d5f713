"""Devices: the mesh, where arrays live on it, and how a process's rows become a global array."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen.types import Array, Key, PyTree, UserError


def initialize(*, distributed: bool) -> None:
    """Called once, before the first use of a device; `distributed` joins the processes of a cluster."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Several CPU devices on few cores starve XLA's thread pool and abort; more threads cure it.
        os.environ.setdefault("NPROC", "16")
    if distributed:
        jax.distributed.initialize()


def make_mesh() -> Mesh:
    """All devices of all processes along the one axis `data`."""
    # Linen's Embed, Dropout and RNN fail under Explicit axes, which are jax.make_mesh's default.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """The batch axis is laid over the devices in blocks."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def check_divides(mesh: Mesh, batch_size: int, name: str) -> None:
    """UserError unless every device gets the same number of the batch's rows."""
    if batch_size % mesh.size:
        raise UserError(
            f"{name}={batch_size} does not divide over {mesh.size} devices: use a multiple of {mesh.size}."
        )


def place(mesh: Mesh, batch: Mapping[str, np.ndarray], *, axis: int = 0) -> dict[str, Array]:
    """This process's rows of every field -> global arrays with `axis` over the devices."""
    sharding = batch_sharding(mesh, axis=axis)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def replicated_key(mesh: Mesh, seed: int) -> Key:
    """jax.random.key(seed) on every device (a typed key cannot be put on other processes' devices)."""
    return jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(mesh))()


def to_host(tree: PyTree) -> PyTree:
    """Global arrays -> NumPy arrays, whole on every process."""

    def gather(leaf: Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(gather, tree)
