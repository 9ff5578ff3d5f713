"""The shared vocabulary: what the loop, the losses, the samplers and the experiments say to one another.

Everything that crosses a module boundary in jaxgen is one of the types below; they are pytrees or plain
callables, so each layer can be tested alone.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array  # a typed key, jax.random.key(seed)
PyTree: TypeAlias = Any
Batch: TypeAlias = Mapping[str, Array]  # fields: image, label, tokens, targets, mask
Metrics: TypeAlias = Mapping[str, "Mean"]


class UserError(Exception):
    """A mistake that the user can mend: shown as one sentence, without a traceback, with exit status 2."""


def unknown(what: str, name: str, choices: Sequence[str]) -> UserError:
    """The error for a `name` that is none of `choices`; `what` says what is being named."""
    return UserError(f"unknown {what} {name!r}: {advice(name, choices)}")


def advice(name: str, choices: Sequence[str]) -> str:
    """'did you mean X?', or the choices where none is near."""
    near = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mergeable average: `total` and `count` are float32 scalars (or stacked `[S]`)."""

    total: Array
    count: Array

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Mean:
        """The mean of `values` (any shape) over the entries where `mask` (same shape, 0 or 1) is 1."""
        values = jnp.asarray(values, jnp.float32)
        if mask is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
        if mask.shape != values.shape:
            raise ValueError(f"mask has shape {mask.shape} but values have shape {values.shape}")
        mask = jnp.asarray(mask, jnp.float32)
        # where, not a product: a masked NaN must not poison the sum.
        return cls(jnp.sum(jnp.where(mask > 0, values * mask, 0.0)), jnp.sum(mask))

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Array:
        return self.total / self.count

    @property
    def value_or_zero(self) -> Array:
        """The mean of whole entries, and 0 of none: a batch that is masked whole must cost 0, not 0 / 0."""
        return self.total / jnp.maximum(self.count, 1.0)


# (params, model_state, batch, key) -> (scalar, (metrics, new_model_state)). `metrics["loss"]` is a Mean whose
# count says how many items the scalar averages over, so that accumulated micro-batches weigh right.
LossFn: TypeAlias = Callable[[PyTree, PyTree, Batch, Key], tuple[Array, tuple[Metrics, PyTree]]]

# (params, key, num) -> samples [num, ...]; sample i depends on (params, key, i) alone.
SampleFn: TypeAlias = Callable[[PyTree, Key, int], Any]


class Chain(NamedTuple):
    """A sampler run by `samplers.chain.run_chain`, a single `lax.scan` over `xs`.

    init: (keys [B], shape) -> carry, the state of B chains of samples of `shape`
    step: (keys [B], carry, x) -> carry, where x is one entry of `xs`
    xs: pytree whose leaves have a leading axis of the number of steps (schedules ride here)
    finish: carry -> samples [B, *shape]
    """

    init: Callable[[Key, tuple[int, ...]], PyTree]
    step: Callable[[Key, PyTree, PyTree], PyTree]
    xs: PyTree
    finish: Callable[[PyTree], Array]


class TrainState(NamedTuple):
    """Everything that resuming needs. `ema` is a tree like `params`, or None where no average is kept."""

    step: Array  # int32 scalar: the number of updates done
    params: PyTree
    model_state: PyTree  # for example BatchNorm's running statistics; {} where a model has none
    opt_state: PyTree
    ema: PyTree | None
    key: Key  # the run's key, never changed: step n uses fold_in(key, n)

    @property
    def sampling_params(self) -> PyTree:
        """The averaged weights where they are kept, else the weights themselves."""
        return self.params if self.ema is None else self.ema


class System(NamedTuple):
    """What is trained: `init` makes the state, `step` makes one update. Both are pure and jittable."""

    init: Callable[[Key, Batch], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Score:
    """A number shown to a user, with what is needed to trust it.

    n: how many items it was computed from; reference: a published or measured value to set beside it.
    """

    value: float
    unit: str
    n: int
    higher_is_better: bool
    reference: float | None = None
    reference_source: str = ""


Scores: TypeAlias = Mapping[str, Score]


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long the loop runs and how often it does what; all counts are in update steps.

    steps_per_dispatch: updates done by one compiled call, so that Python costs little beside a small model
    best_metric: the validation metric whose best checkpoint is kept besides the newest `keep_checkpoints`,
        saved wherever the best validation falls ("" keeps none)
    """

    num_steps: int
    steps_per_dispatch: int = 1
    log_every: int = 100
    validate_every: int = 1000
    sample_every: int = 0  # 0: only at the end
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    best_metric: str = ""
    best_is_higher: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "sample_every" else 1
            if field.type == "int" and value < least:
                raise UserError(f"train.{field.name} must be at least {least}, not {value}.")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model, an objective, data, a sampler and metrics, bound together by an `experiments/x.py`.

    system: what is trained.
    train_batch: step -> this process's rows of the global batch (NumPy), a pure function of the step.
    validate: state -> {name: Mean}, cheap, called during training.
    evaluate: (state, {need: its TrainState}) -> Scores, thorough, called at the end.
    write_samples: (state, key, num, directory) -> the files it wrote; num 0 means the preset's number.
    data_fingerprints: {what: sha256 of the data it was read from}.
    needs: other runs whose trained states `evaluate` uses, by name.
    """

    system: System
    loop: LoopSettings
    train_batch: Callable[[int], Mapping[str, Any]]
    validate: Callable[[TrainState], Metrics]
    evaluate: Callable[[TrainState, Mapping[str, TrainState]], Scores]
    write_samples: Callable[[TrainState, Key, int, Path], list[Path]]
    data_fingerprints: Mapping[str, str]
    seed: int
    needs: Mapping[str, Need] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Need:
    """Another run that an experiment's evaluation uses, such as the classifier that judges samples.

    workdir: where a finished run of it is; "" trains it inside the workdir of the run that needs it.
    """

    experiment: Experiment
    source: str  # experiments/classifier.py:digits
    config: Mapping[str, Any]
    workdir: str = ""
