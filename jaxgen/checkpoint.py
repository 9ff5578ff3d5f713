"""THE checkpoint path: Orbax behind one class, with digests that it lacks.

Orbax restores a flipped bit without a word. A digest of every leaf is therefore computed on the devices
when the state is saved, kept beside it, and compared after every restore. A checkpoint that cannot be read
or whose digests differ is set aside and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxgen import memory, sharding
from jaxgen.types import Array, Metrics, PyTree, TrainState, UserError

# Odd multipliers: a word that changes by 2^k changes each sum by an odd multiple of 2^k, which is not 0
# modulo 2^32, so every single flipped bit is seen; two sums make a chance agreement 2^-64.
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)


def _words(leaf: Array) -> Array:
    """The leaf's bits as a flat uint32 array, one word an element (two for 64-bit elements)."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).reshape(-1)


def leaf_digest(leaf: Array) -> Array:
    """uint32 [2]: Σ_i word_i (2 i + 1) m mod 2^32 for two multipliers m, whatever way the leaf is sharded."""
    words = _words(leaf)
    odd = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    # The second sum mixes the position differently, or it would be a multiple of the first.
    first = jnp.sum(words * odd * jnp.uint32(_MULTIPLIERS[0]), dtype=jnp.uint32)
    second = jnp.sum(words * ((odd ^ (odd >> 15)) * jnp.uint32(_MULTIPLIERS[1]) | 1), dtype=jnp.uint32)
    return jnp.stack([first, second])


@jax.jit
def _digests(state: PyTree) -> list[Array]:
    return [leaf_digest(leaf) for leaf in jax.tree.leaves(state)]


def _described(state: PyTree) -> dict[str, Any]:
    """{leaf's path: its shape, dtype and digest}, as JSON."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    digests = sharding.to_host(_digests(state))
    return {
        jax.tree_util.keystr(path): {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "digest": [int(word) for word in digest],
        }
        for (path, leaf), digest in zip(paths, digests, strict=True)
    }


def _fingerprint(leaves: Mapping[str, Any]) -> str:
    """Of what `_described` said: a flipped bit in it would else be taken for another model's."""
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _check_same_model(found: dict[str, Any], state: PyTree, directory: Path) -> None:
    """UserError naming the first leaf that another model's checkpoint lacks, adds or shapes differently."""
    expected = {
        jax.tree_util.keystr(path): (list(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    for path in [*expected, *found]:
        here = expected.get(path)
        there = (found[path]["shape"], found[path]["dtype"]) if path in found else None
        if here != there:
            raise UserError(
                f"The checkpoint {directory} belongs to another model: {path} is "
                f"{_shape_text(there)} in it and {_shape_text(here)} in this config; "
                "use the config it was made with, or another workdir."
            )


def _shape_text(shape_and_dtype: tuple[list[int], str] | None) -> str:
    return "absent" if shape_and_dtype is None else f"{shape_and_dtype[1]}{shape_and_dtype[0]}"


class _Damaged(Exception):
    """This checkpoint cannot be used; an older one may be."""


def _read(what: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; _Damaged, on every process, where it raises on any.

    Running out of memory is no damage and is raised as it is.
    """
    try:
        content = read()
    except Exception as error:  # Orbax, TensorStore and JSON raise many kinds for a file cut off or gone
        sharding.everywhere(False)
        if memory.ran_out(error):
            raise
        raise _Damaged(f"{what} cannot be read: {type(error).__name__}") from error
    if not sharding.everywhere(True):
        raise _Damaged(f"{what} cannot be read by another process")
    return content


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its own watch for SIGTERM to one process of several.

    It would name updates where `sharding.StopAgreement` names dispatches, to the one counter that JAX has for
    both, and the processes would then wait for a dispatch of that far higher number.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one workdir: saved asynchronously, the newest `keep` and the best one kept.

    best_metric: name of the validation metric that decides the best checkpoint; "" keeps none for being best.
    report: called with a sentence when a checkpoint had to be passed over.
    writing: remove what an earlier process left half saved; for the one process (or those of one run) that
        trains here, as to any other a save that is under way looks the same.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        best_metric: str = "",
        best_is_higher: bool = False,
        report: Callable[[str], None] = print,
        writing: bool = False,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._best_metric, self._best_is_higher = best_metric, best_is_higher
        self._report = report
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self._goodness, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # best_fn makes Orbax keep the metrics on disk; which checkpoints stay is the policy's word.
            best_fn=self._goodness if best_metric else None,
            cleanup_tmp_directories=writing,
        )
        self._open()

    def _open(self) -> None:
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        try:
            self._manager = _Manager(self.directory, options=self._options, item_handlers=handlers)
        except ValueError as error:  # Orbax reads every checkpoint's description of itself and metrics here
            damaged = next(
                (path for path in sorted(self.directory.glob("*/metrics/metrics")) if not _is_json(path)),
                f"A file _CHECKPOINT_METADATA in {self.directory}",
            )
            raise UserError(
                f"{damaged} is not what was saved ({error}); delete it, the checkpoint can be read without."
            ) from error
        self._best_saved = max(self._goodness_by_step().values(), default=-math.inf)

    def _goodness(self, metrics: Any) -> float:
        value = metrics.get(self._best_metric, math.nan)
        if not math.isfinite(value):  # NaN compares with nothing: it would stand in the real best's place
            return -math.inf
        return value if self._best_is_higher else -value

    def is_best(self, metrics: Metrics) -> bool:
        """Whether a save of these metrics would be the best one; every process calls it."""
        if self._best_metric not in metrics:
            return False
        values = {self._best_metric: float(metrics[self._best_metric].value)}
        return sharding.everywhere(self._goodness(values) > self._best_saved)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, metrics: Metrics | None = None) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        metrics: {name: Mean} of this very step, among them best_metric if that is to count for this step.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        values = {name: float(mean.value) for name, mean in (metrics or {}).items()}
        leaves = _described(state)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave({"leaves": leaves, "sha256": _fingerprint(leaves)}),
                ),
                metrics=values if self._best_metric in values else None,
            )
        except (OSError, ValueError) as error:  # the latter is TensorStore's, and may be of the save before
            raise _disk_error(self.directory, error) from error
        if self._best_metric in values:
            self._best_saved = max(self._best_saved, self._goodness(values))

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise _disk_error(self.directory, error) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def restore(
        self, abstract_state: PyTree, which: Literal["newest", "best"] = "newest", *, set_aside: bool = False
    ) -> TrainState | None:
        """The newest (or best) usable state, or None where there is no checkpoint at all.

        abstract_state: a TrainState of ShapeDtypeStructs with their shardings, which may differ from those
        the state was saved under.
        set_aside: move damaged checkpoints out of the way (to `<directory>_damaged`), so that a run that
        comes to the same step again can save it.

        Raises UserError if the checkpoint belongs to another model, if every checkpoint is damaged, and, for
        the best, if that one is or none has a value of the metric.
        """
        steps = self.steps()[::-1]
        if which == "best" and steps:
            steps = [self._best_step()]
        damaged: list[int] = []
        for step in steps:
            try:
                state = self._restore_step(step, abstract_state)
            except _Damaged as error:
                self._report(f"Checkpoint {step} in {self.directory} is damaged ({error}).")
                damaged.append(step)
                continue
            if damaged:
                self._report(f"Going on from checkpoint {step} instead.")
                if set_aside:
                    self._set_aside(damaged)
            return state
        if damaged and which == "best":
            raise UserError("The best checkpoint is damaged: use --checkpoint=newest.")
        if damaged:
            raise UserError(
                f"Every checkpoint in {self.directory} is damaged: "
                "restore the folder from a copy, or start again in another workdir."
            )
        return None

    def _best_step(self) -> int:
        if not self._best_metric:
            raise UserError("This run keeps no best checkpoint: it was trained without train.best_metric.")
        goodness = self._goodness_by_step()
        if not goodness:
            raise UserError("No checkpoint has a value of train.best_metric yet: use --checkpoint=newest.")
        return max(goodness, key=lambda step: (goodness[step], step))

    def _goodness_by_step(self) -> dict[int, float]:
        """Of the complete checkpoints that have a value of best_metric."""
        goodness: dict[int, float] = {}
        for step in self.steps() if self._best_metric else []:
            with contextlib.suppress(Exception):  # a metrics file damaged since the start: no title for it
                metrics = self._manager.metrics(step)
                if metrics and self._best_metric in metrics:
                    goodness[step] = self._goodness(metrics)
        return goodness

    def _restore_step(self, step: int, abstract_state: PyTree) -> TrainState:
        directory = self.directory / str(step)

        def read_description() -> dict[str, Any]:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            leaves = {path: dict(leaf) for path, leaf in meta["leaves"].items()}
            if meta.get("sha256", _fingerprint(leaves)) != _fingerprint(leaves):  # older ones have none
                raise ValueError("not what was saved")
            return leaves

        leaves = _read("its description", read_description)
        _check_same_model(leaves, abstract_state, directory)
        arrays = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        state = _read("its arrays", lambda: self._manager.restore(step, args=arrays)["state"])
        for path, leaf in _described(state).items():
            if leaf["digest"] != leaves[path]["digest"]:
                raise _Damaged(f"{path} is not what was saved")
        return state

    def _set_aside(self, steps: list[int]) -> None:
        grave = self.directory.with_name(self.directory.name + "_damaged")
        with sharding.together():
            if sharding.is_first_process():
                grave.mkdir(exist_ok=True)
                for step in steps:
                    target = grave / str(step)
                    while target.exists():
                        target = target.with_name(target.name + "_again")
                    shutil.move(self.directory / str(step), target)
        self._manager.close()
        self._open()


def _disk_error(directory: Path, error: Exception) -> UserError:
    if isinstance(error, TimeoutError):  # Orbax looks at the clock, so a clock that jumps ends its patience
        return UserError(
            f"Saving a checkpoint in {directory} took too long, or the system's clock jumped: run the same "
            "command again, it goes on from the last complete checkpoint."
        )
    free = shutil.disk_usage(directory).free if os.path.isdir(directory) else 0
    reason = "no space left on the device" if "No space left" in str(error) else error
    return UserError(
        f"Saving a checkpoint in {directory} failed ({reason}); {free / 2**20:.0f} MiB are free there: "
        "make room and run the same command again, it goes on from the last complete checkpoint."
    )
