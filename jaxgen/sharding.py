"""Devices: the mesh, where arrays live on it, and what the processes of a run must agree on.

The mesh has two axes. A batch is laid over both, `data` and `model`, whatever their sizes; a large array of
the state is laid over `model` alone and repeated along `data`. With one device along `model`, the usual case,
that is plain data parallelism; with all of them it is what is called FSDP; in between, each group of `model`
devices holds the state once. The state is the same either way, so a run may go on under another mesh.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen.types import Array, Key, PyTree, UserError

_AXES = ("data", "model")
# Arrays with fewer elements stay whole on every device: laying them out would cost more than it saves.
SMALLEST_SHARDED = 1024
# How long a process that is gone may go unnoticed where no broken connection tells of it.
_HEARTBEAT_SECONDS = 60
_MESSAGE_BYTES = 1000


def initialize(*, distributed: bool) -> None:
    """Called once, before the first use of a device; `distributed` joins the processes of a cluster.

    SLURM, Open MPI, Cloud TPU and TPUs of Kubernetes say themselves who belongs together. Elsewhere the
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do, all three of them.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Several CPU devices on few cores starve XLA's thread pool and abort; more threads cure it.
        os.environ.setdefault("NPROC", "16")
    if distributed and not jax.distributed.is_initialized():
        jax.distributed.initialize(
            coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
            num_processes=_whole_number("JAX_NUM_PROCESSES"),
            process_id=_whole_number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )


def _whole_number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"The variable {variable} must be a whole number, not {text!r}.")
    return int(text)


def make_mesh(fsdp: int = 1, *, num_devices: int | None = None) -> Mesh:
    """The first `num_devices` devices of all processes, by default all, `fsdp` of them along `model`.

    Raises UserError where that does not divide.
    """
    devices = jax.devices()[:num_devices]
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"--fsdp={fsdp} does not divide the {len(devices)} devices: use a divisor of that.")
    shape, types = (len(devices) // fsdp, fsdp), (AxisType.Auto, AxisType.Auto)
    # Linen's Embed, Dropout and RNN fail under Explicit axes, which are jax.make_mesh's default.
    return jax.make_mesh(shape, _AXES, axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """The batch axis is laid over the devices in blocks."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, _AXES))


def state_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of the state lives: a large one with its longest axis that divides over `model`.

    The rule looks at the shape alone, so that a parameter, its moments and its average lie alike. Of axes
    that are equally long the last is taken; an array with none that divides is whole on every device.
    """
    parts = mesh.shape["model"]
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not divisible or np.prod(shape) < SMALLEST_SHARDED:
        return replicated(mesh)
    longest = max(divisible, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "model"))


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


def spread(mesh: Mesh, rows: np.ndarray | Array) -> Array:
    """Rows that every process holds whole -> a global array, over the devices where they divide evenly."""
    where = batch_sharding(mesh) if len(rows) % mesh.size == 0 else replicated(mesh)
    return jax.device_put(np.asarray(rows), where)


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


def fetchable(mesh: Mesh, tree: PyTree) -> PyTree:
    """The tree, made whole where other processes hold parts: what is computed from it can be fetched."""
    if jax.process_count() == 1 or mesh.shape["model"] == 1:
        return tree
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)


# ---- several processes


class LostProcess(UserError):
    """A collective operation failed because another process of the run is gone."""


@contextlib.contextmanager
def others_watched() -> Iterator[None]:
    """Turns what a collective operation raises when another process is gone into a LostProcess."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        signs = ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "heartbeat")
        if jax.process_count() == 1 or not any(sign in str(error) for sign in signs):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise LostProcess(
            f"Another process of this run is gone ({reason}): see what it said, and start all of them again, "
            "which goes on from the newest checkpoint."
        ) from error


def is_first_process() -> bool:
    """Whether this is the process that writes what all of them share."""
    return jax.process_index() == 0


def everywhere(fine: bool) -> bool:
    """Whether all processes, each of which must call this, found it fine."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """UserError on every process where the block raised one on any, for which the others would wait.

    All processes must come here, and the block must not wait for another process.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        text = np.zeros(_MESSAGE_BYTES, np.uint8)
        if mine is not None:
            encoded = (str(mine) or "it failed").encode()[:_MESSAGE_BYTES]
            text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        for message in multihost_utils.process_allgather(text):
            if mine is None and message.any():
                mine = UserError(bytes(message[message > 0]).decode(errors="replace"))
    if mine is not None:
        raise mine


class StopAgreement:
    """SIGTERM to one process of several: all of them stop after the same dispatch.

    jax.distributed notes the signal, tells the others, and names a count of calls that none has reached.
    """

    def __init__(self) -> None:
        self._calls = 0

    def reached(self) -> bool:
        """Called by every process after every dispatch: whether this is the one to stop after."""
        if jax.process_count() == 1:
            return False
        from jax.experimental import multihost_utils

        self._calls += 1
        return bool(multihost_utils.reached_preemption_sync_point(self._calls))
