"""Several runs of an experiment in one program: seeds side by side, and the values of a sweep.

Each replica is an experiment of its own, built from its own config, and is trained on its own batches from
its own key. What they share is the compiled program: the update is traced for every replica, and where the
traces differ in numbers alone (a learning rate, a label smoothing), these numbers become arguments, one a
replica, and `vmap` runs the rest. What differs otherwise (shapes, operations) cannot be one program, and is
refused.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding

from jaxgen import sharding
from jaxgen.types import (
    Array,
    Batch,
    Experiment,
    Key,
    Metrics,
    PyTree,
    Score,
    Scores,
    System,
    TrainState,
    UserError,
)


class Different(Exception):
    """Two programs differ in more than numbers; the text says where."""


@dataclasses.dataclass(frozen=True)
class Label:
    """Which replica: the value it has in a sweep, in words ("" without one), and its seed."""

    value: str  # optim.learning_rate=0.001
    seed: int | None  # None: the only seed of its value

    def __str__(self) -> str:
        seed = None if self.seed is None else f"seed={self.seed}"
        return ",".join(part for part in (self.value, seed) if part)


# ---- programs that differ in numbers


def merge_functions(
    functions: Sequence[Callable[..., PyTree]], *args: PyTree
) -> tuple[Callable[..., PyTree], list[np.ndarray]]:
    """(run, numbers): run(numbers of replica i, *args) is functions[i](*args) for arrays shaped like `args`.

    numbers: each [R, ...]; empty where all the functions are one program, which then is the first function.
    Raises Different where the functions differ in more than numbers, or in one inside a loop or a branch.
    """
    traced = [jax.make_jaxpr(function, return_shape=True)(*args) for function in functions]
    structures = [jax.tree.structure(shape) for _, shape in traced]
    _check_equal(structures, "what is kept of an update")
    program, numbers = _with_arguments([program for program, _ in traced])
    if not numbers:
        return lambda _, *args: functions[0](*args), []

    def run(numbers: Sequence[Array], *args: PyTree) -> PyTree:
        return jax.tree.unflatten(structures[0], core.jaxpr_as_fun(program)(*numbers, *jax.tree.leaves(args)))

    return run, numbers


def _with_arguments(
    programs: Sequence[core.ClosedJaxpr],
) -> tuple[core.ClosedJaxpr, list[np.ndarray]]:
    """The program that all of them are, with what differs as its first arguments, and the values of these."""
    places, constants = _differences(programs, exactly=False)
    numbers = [*constants.values(), *places.values()]
    jaxpr = programs[0].jaxpr
    variables = jax.make_jaxpr(lambda *numbers: numbers)(*(each[0] for each in places.values())).jaxpr.invars
    standing = dict(zip(places, variables, strict=True))
    equations = [
        equation.replace(
            invars=[standing.get((at, place), operand) for place, operand in enumerate(equation.invars)]
        )
        for at, equation in enumerate(jaxpr.eqns)
    ]
    lifted = [jaxpr.constvars[index] for index in constants]
    kept = [index for index in range(len(jaxpr.constvars)) if index not in constants]
    arguments = jaxpr.replace(
        constvars=[jaxpr.constvars[index] for index in kept],
        invars=[*lifted, *variables, *jaxpr.invars],
        eqns=equations,
    )
    return core.ClosedJaxpr(arguments, [programs[0].consts[index] for index in kept]), numbers


def _differences(
    programs: Sequence[core.ClosedJaxpr], *, exactly: bool
) -> tuple[dict[tuple[int, int], np.ndarray], dict[int, np.ndarray]]:
    """The literals {(equation, operand): values [R]} and constants {number: values [R, ...]} that differ.

    Raises Different where anything else does; with `exactly`, where anything does.
    """
    places: dict[tuple[int, int], np.ndarray] = {}
    constants: dict[int, np.ndarray] = {}
    jaxprs = [program.jaxpr for program in programs]
    # A variable is told by when it was defined.
    order: list[dict[Any, int]] = [{} for _ in jaxprs]

    def define(rows: Sequence[Sequence[Any]]) -> None:
        _check_equal([[str(variable.aval) for variable in row] for row in rows], "an array's shape")
        for known, row in zip(order, rows, strict=True):
            for variable in row:
                known[variable] = len(known)

    def tell(operand: Any, known: dict[Any, int]) -> Any:
        return str(operand.aval) if isinstance(operand, core.Literal) else known[operand]

    define([[*jaxpr.constvars, *jaxpr.invars] for jaxpr in jaxprs])
    for index, values in enumerate(zip(*(program.consts for program in programs), strict=True)):
        if not _same(values):
            constants[index] = np.stack([_as_numbers(value) for value in values])
            if exactly or any(_is_key(value) for value in values):
                raise Different("a constant inside a loop, or a key, differs")
    _check_equal([len(jaxpr.eqns) for jaxpr in jaxprs], "the number of operations")
    for at, equations in enumerate(zip(*(jaxpr.eqns for jaxpr in jaxprs), strict=True)):
        _check_equal([equation.primitive.name for equation in equations], "an operation")
        _check_equal(
            [
                [tell(operand, known) for operand in equation.invars]
                for equation, known in zip(equations, order, strict=True)
            ],
            "what an operation reads",
        )
        for place, operands in enumerate(zip(*(equation.invars for equation in equations), strict=True)):
            if isinstance(operands[0], core.Literal) and not _same([operand.val for operand in operands]):
                places[at, place] = np.stack([np.asarray(operand.val) for operand in operands])
                if exactly:
                    raise Different("a number inside a loop, a branch or a function differs")
        _check_parameters(equations)
        define([equation.outvars for equation in equations])
    ends = [[str(out) for out in jaxpr.outvars if isinstance(out, core.Literal)] for jaxpr in jaxprs]
    _check_equal(ends, "a number that is returned as it stands")
    returned = [
        [tell(out, known) for out in jaxpr.outvars] for jaxpr, known in zip(jaxprs, order, strict=True)
    ]
    _check_equal(returned, "what is returned")
    return places, constants


def _check_parameters(equations: Sequence[Any]) -> None:
    """Different unless the operation is the same; programs in it must be equal to the last number."""
    for name in equations[0].params:
        values = [equation.params[name] for equation in equations]
        rows = [value if isinstance(value, tuple | list) else (value,) for value in values]
        _check_equal([len(row) for row in rows], f"{name} of {equations[0].primitive.name}")
        for items in zip(*rows, strict=True):
            if isinstance(items[0], core.ClosedJaxpr):
                _differences(items, exactly=True)
            elif isinstance(items[0], core.Jaxpr):
                _differences([core.ClosedJaxpr(item, ()) for item in items], exactly=True)
            elif not callable(items[0]):  # a function is one to derive or print with, not one that is run
                texts = [re.sub(r"0x[0-9a-f]+", "", str(item)) for item in items]
                _check_equal(texts, f"{name} of {equations[0].primitive.name}")


def _check_equal(values: Sequence[Any], what: str) -> None:
    if any(value != values[0] for value in values[1:]):
        raise Different(f"{what} differs")


def _same(values: Sequence[Any]) -> bool:
    numbers = [_as_numbers(value) for value in values]
    # By their bits, for a program may hold NaN.
    return len({(each.shape, each.dtype.name, each.tobytes()) for each in numbers}) == 1


def _as_numbers(constant: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(constant) if _is_key(constant) else constant)


def _is_key(constant: Any) -> bool:
    return isinstance(constant, jax.Array) and jnp.issubdtype(constant.dtype, jax.dtypes.prng_key)


# ---- experiments side by side


@dataclasses.dataclass(frozen=True)
class Replicated(Experiment):
    """Experiments trained as one: arrays of the state and the batches have an axis [R] before their own.

    The state's `step` alone is shared. `parts` are the R experiments, `labels` say which is which.
    """

    labels: tuple[Label, ...] = ()
    parts: tuple[Experiment, ...] = ()

    def slices(self, mesh: Mesh, state: TrainState) -> list[TrainState]:
        """The state of each replica, placed as the state of a run of its own would be."""
        shapes = jax.eval_shape(lambda state: _replica(state, 0), state)
        where = jax.tree.map(lambda leaf: sharding.state_sharding(mesh, leaf.shape), shapes)
        cut = jax.jit(_replica, out_shardings=where)
        return [cut(state, jnp.int32(number)) for number in range(len(self.parts))]


def _replica(state: TrainState, number: Array | int) -> TrainState:
    """Replica `number` of a stacked state."""
    return _map_stacked(lambda leaf: leaf[number], state)


def _map_stacked(function: Callable[[Array], Any], state: TrainState) -> TrainState:
    """`function` of every array that has a replica axis: of all but the step."""
    return TrainState(state.step, *(jax.tree.map(function, part) for part in state[1:]))


def combine(experiments: Mapping[Label, Experiment], mesh: Mesh) -> Experiment:
    """The experiments as one; a single one is itself.

    Raises UserError where they cannot share a loop or a program (the program, when it is first traced).
    """
    labels, parts = tuple(experiments), tuple(experiments.values())
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.loop != first.loop for part in parts):
        raise UserError(
            "A sweep cannot change a field of the group train, as all replicas share one loop: sweep a "
            "number that only the computation sees, such as optim.learning_rate."
        )
    needs = [
        {name: (need.source, need.config, need.workdir) for name, need in p.needs.items()} for p in parts
    ]
    if any(need != needs[0] for need in needs):
        raise UserError("A sweep cannot change which other run the evaluation needs: sweep another field.")
    fingerprints = [part.data_fingerprints for part in parts]
    replicated = Replicated(
        system=_stacked_system(labels, parts),
        loop=first.loop,
        train_batch=functools.partial(_stacked_batch, labels, parts),
        validate=lambda state: _validate(replicated, mesh, state),
        evaluate=lambda state, needed: _evaluate_parts(replicated, mesh, state, needed),
        write_samples=lambda *args: _write_samples(replicated, mesh, *args),
        data_fingerprints=(
            fingerprints[0]
            if all(prints == fingerprints[0] for prints in fingerprints)
            else {
                f"{name}@{label}": value
                for label, prints in zip(labels, fingerprints, strict=True)
                for name, value in prints.items()
            }
        ),
        seed=first.seed,
        needs=first.needs,
        labels=labels,
        parts=parts,
    )
    return replicated


def _stacked_system(labels: Sequence[Label], parts: Sequence[Experiment]) -> System:
    """init(key, batch [R, B, ...]) -> state; the key of each replica is that of its own experiment's seed."""
    axes = TrainState(step=None, params=0, model_state=0, opt_state=0, ema=0, key=0)  # type: ignore[arg-type]
    cut = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    one_batch = lambda batch: {name: cut(field) for name, field in batch.items()}
    merged: dict[str, tuple[Callable, list[np.ndarray]]] = {}

    def program(what: str, functions: Sequence[Callable], *args: PyTree) -> tuple[Callable, list[np.ndarray]]:
        if what not in merged:
            try:
                merged[what] = merge_functions(functions, *args)
            except Different as error:
                raise UserError(
                    f"{labels[0]} and {labels[-1]} cannot be trained in one program ({error} in the {what}): "
                    "run them one by one, or sweep a number that changes no shape and stands in no loop."
                ) from error
        return merged[what]

    def init(key: Key, batch: Batch) -> TrainState:
        del key
        shape = jax.eval_shape(lambda: jax.random.key(0))
        run, numbers = program("start", [part.system.init for part in parts], shape, one_batch(batch))
        keys = jax.vmap(jax.random.key)(_seeds(parts))
        return jax.vmap(run, out_axes=axes)(numbers, keys, batch)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        shape = _map_stacked(cut, state)
        run, numbers = program("update", [part.system.step for part in parts], shape, one_batch(batch))
        return jax.vmap(run, in_axes=(0, axes, 0), out_axes=(axes, 0))(numbers, state, batch)

    return System(init, step)


def _stacked_batch(labels: Sequence[Label], parts: Sequence[Experiment], step: int) -> dict[str, np.ndarray]:
    """{field: [R, b, ...]}: the batches that the replicas' own runs would see at this step."""
    batches = [part.train_batch(step) for part in parts]
    for label, batch in zip(labels, batches, strict=True):
        shapes = [{name: np.shape(field) for name, field in rows.items()} for rows in (batches[0], batch)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"The batches of {labels[0]} and {label} have different shapes at step {step}, so they "
                "cannot be trained in one program: give the data fixed sizes, or run them one by one."
            )
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _validate(experiment: Replicated, mesh: Mesh, state: TrainState) -> Metrics:
    """The means over all replicas by name, and each replica's as name@replica."""
    of_each = [
        jax.device_get(part.validate(replica))
        for part, replica in zip(experiment.parts, experiment.slices(mesh, state), strict=True)
    ]
    merged = dict(of_each[0])
    for metrics in of_each[1:]:
        merged = {name: mean.merge(metrics[name]) for name, mean in merged.items()}
    for label, metrics in zip(experiment.labels, of_each, strict=True):
        merged |= {f"{name}@{label}": mean for name, mean in metrics.items()}
    return merged


def _evaluate_parts(
    experiment: Replicated, mesh: Mesh, state: TrainState, needed: Mapping[str, TrainState]
) -> Scores:
    replicas = experiment.slices(mesh, state)
    scores = [part.evaluate(each, needed) for part, each in zip(experiment.parts, replicas, strict=True)]
    return summary(dict(zip(experiment.labels, scores, strict=True)))


def _write_samples(
    experiment: Replicated, mesh: Mesh, state: TrainState, key: Key, num: int, directory: Path
) -> list[Path]:
    """The samples of each replica in a folder of its own; key [R], see `run_key`."""
    paths = []
    replicas = experiment.slices(mesh, state)
    for number, (label, part) in enumerate(zip(experiment.labels, experiment.parts, strict=True)):
        paths += part.write_samples(replicas[number], key[number], num, directory / str(label))
    return paths


def run_key(experiment: Experiment, mesh: Mesh, draw: int | None = None) -> Key:
    """The key of the experiment's seed, with a number folded in where one is given; of replicas [R]."""

    def make(seed: Any) -> Key:
        key = jax.random.key(seed)
        return key if draw is None else jax.random.fold_in(key, draw)

    where = sharding.replicated(mesh)
    if isinstance(experiment, Replicated):
        return jax.jit(lambda: jax.vmap(make)(_seeds(experiment.parts)), out_shardings=where)()
    return jax.jit(lambda: make(experiment.seed), out_shardings=where)()


def _seeds(parts: Sequence[Experiment]) -> np.ndarray:
    return np.array([part.seed for part in parts], np.uint32)


def summary(scores: Mapping[Label, Scores]) -> dict[str, Score]:
    """Over the seeds of each swept value the mean of every score and its spread, then the replicas' own.

    Names: accuracy, accuracy_spread and accuracy@seed=3; in a sweep accuracy@optim.learning_rate=0.001 and so
    on. The spread is the standard deviation over the seeds (n - 1), and its `n` their number. A score that
    only some replicas have is that of those.
    """
    means: dict[str, Score] = {}
    singles: dict[str, Score] = {}
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        for value in dict.fromkeys(label.value for label in scores):
            suffix = f"@{value}" if value else ""
            group = {
                label: found[name]
                for label, found in scores.items()
                if label.value == value and name in found
            }
            if not group:
                continue
            values = [score.value for score in group.values()]
            one = next(iter(group.values()))
            means[name + suffix] = dataclasses.replace(one, value=statistics.fmean(values))
            if len(group) > 1:
                means[f"{name}_spread{suffix}"] = Score(
                    float(np.std(values, ddof=1)), f"{one.unit}, standard deviation", len(values), False
                )
                singles |= {f"{name}@{label}": score for label, score in group.items()}
    return means | singles


# ---- where replicas live


def labels_of(experiment: Experiment) -> tuple[Label, ...]:
    """What the replicas are called; () for an experiment that is one run."""
    return experiment.labels if isinstance(experiment, Replicated) else ()


def over_replicas(experiment: Experiment, mesh: Mesh) -> bool:
    """Whether whole replicas are dealt to the devices, rather than the rows of each one's batch.

    They are where their number divides; over several processes, each of which makes its rows of every batch,
    the rows are.
    """
    if not isinstance(experiment, Replicated) or jax.process_count() > 1:
        return False
    return len(experiment.parts) % mesh.size == 0


def state_sharding(experiment: Experiment, mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of the experiment's state lives."""
    if shape and over_replicas(experiment, mesh):
        return sharding.batch_sharding(mesh)
    return sharding.state_sharding(mesh, shape)


def rows_axis(experiment: Experiment) -> int:
    """The axis of a batch's fields along which its rows lie."""
    return 1 if isinstance(experiment, Replicated) else 0


def batch_axis(experiment: Experiment, mesh: Mesh) -> int:
    """The axis of a batch's fields that is laid over the devices."""
    return 0 if over_replicas(experiment, mesh) else rows_axis(experiment)
