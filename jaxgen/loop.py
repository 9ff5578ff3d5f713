"""THE loop: restore, then step, log, validate, save, until done; stops cleanly on a signal or a NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import jax
import numpy as np

from jaxgen import data, replicas, sharding
from jaxgen.checkpoint import Checkpoints
from jaxgen.record import Recorder
from jaxgen.types import Batch, Experiment, Key, LoopSettings, Metrics, PyTree, System, TrainState, UserError


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came; the state has been saved. `signal_number` says which."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class StopRequest:
    """Notes SIGTERM and SIGINT instead of dying; the loop looks at it between dispatches.

    Within `interruptible()` the signal raises Interrupted at once: used where the state is whole and the
    work (validation, samples) can be thrown away.

    handle: False leaves the signals alone: where several processes must stop together, jax.distributed
        listens, and `sharding.StopAgreement` says what it heard.
    """

    def __init__(self, *, handle: bool = True) -> None:
        self.signal_number: int | None = None
        self._raise = False
        self._handled = (signal.SIGTERM, signal.SIGINT) if handle else ()

    def __enter__(self) -> StopRequest:
        self._previous = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in self._handled:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # None: it was not set from Python, and cannot be set again from there
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:  # asked twice: do not save, just go
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.signal_number = number
        if self._raise:
            raise Interrupted(number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        self._raise = True
        try:
            if self.signal_number is not None:
                raise Interrupted(self.signal_number)
            yield
        finally:
            self._raise = False


def spans(settings: LoopSettings, first_step: int) -> Iterator[tuple[int, int]]:
    """The dispatches from `first_step` on, as (first step, number of steps).

    A dispatch never runs across a step at which something is due, and which steps it holds does not depend on
    where the run was interrupted: only then is a resumed run the same program, bit for bit.
    """
    intervals = [
        every
        for every in (
            settings.log_every,
            settings.validate_every,
            settings.sample_every,
            settings.checkpoint_every,
        )
        if every
    ]
    step = first_step
    while step < settings.num_steps:
        due = min([settings.num_steps, *((step // every + 1) * every for every in intervals)])
        size = settings.steps_per_dispatch if due - step >= settings.steps_per_dispatch else 1
        yield step, size
        step += size


def make_steps(system: System, mesh: jax.sharding.Mesh, state_sharding: object, *, batch_axis: int = 0):
    """The compiled (state, batches [S, B, ...]) -> (state, metrics [S]): S updates in one `lax.scan`.

    batch_axis: the axis of a single batch that is laid over the devices
    """

    def run(state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(system.step, state, batches)

    return jax.jit(
        run,
        donate_argnums=0,
        in_shardings=(state_sharding, sharding.batch_sharding(mesh, axis=1 + batch_axis)),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
    )


def abstract_state(experiment: Experiment, mesh: jax.sharding.Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings, without computing anything."""
    batch = _abstract_batch(experiment)
    shapes = jax.eval_shape(experiment.system.init, jax.eval_shape(lambda: jax.random.key(0)), batch)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = replicas.state_sharding(experiment, mesh, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, shapes)


def abstract_update(experiment: Experiment, state: TrainState) -> tuple[TrainState, Metrics]:
    """The shapes after an update of `abstract_state`'s; what does not fit is said while it is traced."""
    return jax.eval_shape(experiment.system.step, state, _abstract_batch(experiment))


def _abstract_batch(experiment: Experiment) -> PyTree:
    """The global batch's shapes, from this process's rows of it."""
    rows = experiment.train_batch(0)
    axis = replicas.rows_axis(experiment)

    def whole(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:axis], shape[axis] * jax.process_count(), *shape[axis + 1 :])

    return {name: jax.ShapeDtypeStruct(whole(field.shape), field.dtype) for name, field in rows.items()}


def _shardings(state: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def initial_state(experiment: Experiment, mesh: jax.sharding.Mesh, abstract: TrainState) -> TrainState:
    """The state before the first update; a model whose start depends on data sees the first batch."""
    batch = sharding.place(mesh, experiment.train_batch(0), axis=replicas.batch_axis(experiment, mesh))
    # It runs once: on CPU, where XLA's optimiser takes three quarters of its compilation, that is left out.
    fast_compile = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init = jax.jit(experiment.system.init, out_shardings=_shardings(abstract), compiler_options=fast_compile)
    return init(sharding.replicated_key(mesh, experiment.seed), batch)


@dataclasses.dataclass
class _PendingMetrics:
    """Metrics still on the devices, until a logging step fetches them all at once.

    labels: of replicas, whose metrics are [S, R]
    """

    labels: Sequence[object] = ()
    dispatches: list[tuple[int, Metrics]] = dataclasses.field(default_factory=list)

    def fetch(self, save_batch: Callable[[int], str]) -> dict[str, float]:
        """The means over the pending steps, and each replica's loss as loss@replica.

        Stops the run at the first step with a non-finite number.

        save_batch: step -> where it saved the batch of that step, in words
        """
        fetched = [(first, jax.device_get(metrics)) for first, metrics in self.dispatches]
        self.dispatches.clear()
        for first, metrics in fetched:
            _check_finite(first, metrics, self.labels, save_batch)

        def mean(name: str, replica: int | slice = slice(None)) -> float:
            total, count = (
                sum(float(np.sum(getattr(metrics[name], part)[..., replica])) for _, metrics in fetched)
                for part in ("total", "count")
            )
            return total / count if count else math.nan

        means = {name: mean(name) for name in fetched[0][1]}
        return means | {f"loss@{label}": mean("loss", index) for index, label in enumerate(self.labels)}


def _check_finite(
    first_step: int, metrics: Metrics, labels: Sequence[object], save_batch: Callable[[int], str]
) -> None:
    bad = {name: ~np.isfinite(mean.total) for name, mean in metrics.items()}
    steps = np.any(np.stack(list(bad.values())), axis=0)
    if not steps.any():
        return
    index: int | tuple[int, int]
    step = index = int(np.argmax(steps if not labels else steps.any(axis=1)))
    whose = ""
    if labels:
        replica = int(np.argmax(steps[step]))
        index, whose = (step, replica), f" of replica {labels[replica]}"
    # The loss comes before its gradient, that before the update, and that before the parameters.
    order = ("gradient_norm", "update_norm", "parameter_norm")
    names = sorted(bad, key=lambda name: order.index(name) if name in order else -1)
    culprits = ", ".join(name for name in names if bad[name][index])
    raise UserError(
        f"Update {first_step + step + 1}{whose} is not finite (first: {culprits}); the run stopped and its "
        "last checkpoint is from before it: lower optim.learning_rate, set optim.clip_norm or look at the "
        f"data{save_batch(first_step + step)}."
    )


def save_bad_batch(experiment: Experiment, workdir: Path, step: int) -> str:
    """Writes this process's rows of the batch of `step` for inspection; says where, or why not."""
    which = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = Path(workdir) / f"bad_batch{which}.npz"
    try:
        np.savez(path, step=np.int64(step), **experiment.train_batch(step))
    except OSError as error:
        return f" (its batch could not be saved: {error.strerror or error})"
    return f" (its batch is in {path})"


def train(
    experiment: Experiment,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    *,
    show_progress: bool = True,
    profile: bool = False,
) -> TrainState:
    """Trains from the newest checkpoint of `workdir`, or from the start, to the end; returns the last state.

    Raises Interrupted after SIGTERM or Ctrl-C with everything saved, and UserError on a non-finite number.
    """
    checkpoints = open_checkpoints(experiment, workdir, writing=True)
    try:
        with sharding.others_watched():
            state = _train(experiment, workdir, mesh, checkpoints, show_progress, profile)
    except sharding.LostProcess:
        raise  # a save that is under way would wait for the process that is gone
    except BaseException:
        checkpoints.close()
        raise
    checkpoints.close()
    return state


def _train(
    experiment: Experiment,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    show_progress: bool,
    profile: bool,
) -> TrainState:
    settings = experiment.loop
    # ---- restore, or start
    abstract = abstract_state(experiment, mesh)
    state = checkpoints.restore(abstract, set_aside=True)
    if state is None:
        state = initial_state(experiment, mesh, abstract)
    first_step = int(state.step)
    if first_step >= settings.num_steps:
        return state
    with (
        StopRequest(handle=jax.process_count() == 1) as stop,
        Recorder(
            workdir,
            start_step=first_step,
            num_steps=settings.num_steps,
            enabled=sharding.is_first_process(),
            show_progress=show_progress,
        ) as recorder,
    ):
        return _run(experiment, workdir, mesh, state, checkpoints, recorder, stop, profile)


def write_samples(
    experiment: Experiment, mesh: jax.sharding.Mesh, state: TrainState, key: Key, num: int, directory: Path
) -> list[Path]:
    """The experiment's samples: all processes draw them, what the first one writes is kept."""
    state = sharding.fetchable(mesh, state)
    if sharding.is_first_process():
        return experiment.write_samples(state, key, num, directory)
    with tempfile.TemporaryDirectory() as unwanted:
        return experiment.write_samples(state, key, num, Path(unwanted))


def open_checkpoints(experiment: Experiment, workdir: Path, *, writing: bool = False) -> Checkpoints:
    """The checkpoints of a run of this experiment; `writing` only for who holds the lock of its workdir."""
    return Checkpoints(
        Path(workdir) / "checkpoints",
        keep=experiment.loop.keep_checkpoints,
        best_metric=experiment.loop.best_metric,
        best_is_higher=experiment.loop.best_is_higher,
        writing=writing,
    )


def _run(
    experiment: Experiment,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    checkpoints: Checkpoints,
    recorder: Recorder,
    stop: StopRequest,
    profile: bool,
) -> TrainState:
    settings = experiment.loop
    first_step = step = int(state.step)
    batch_axis = replicas.batch_axis(experiment, mesh)
    run_steps = make_steps(experiment.system, mesh, state_sharding=_shardings(state), batch_axis=batch_axis)
    agreement = sharding.StopAgreement()
    pending = _PendingMetrics(replicas.labels_of(experiment))
    throughput = _Throughput(step)

    if first_step == 0:
        checkpoints.save(state)
    batches = data.prefetch(
        experiment.train_batch,
        spans(settings, first_step),
        lambda rows: sharding.place(mesh, rows, axis=1 + batch_axis),
    )
    with contextlib.closing(batches), _Profiler(workdir, enabled=profile) as profiler:
        for span_start, batch in batches:
            # ---- update
            size = jax.tree.leaves(batch)[0].shape[0]
            state, metrics = run_steps(state, batch)
            pending.dispatches.append((span_start, metrics))
            step = span_start + size
            last = step >= settings.num_steps
            profiler.after_dispatch(state)
            if span_start == first_step:  # the first dispatch compiles, which is not throughput
                jax.block_until_ready(metrics)
                throughput = _Throughput(step)

            # ---- log: nothing is validated, sampled or saved before its numbers are known to be finite
            due_log, due_validation, due_samples, due_save = (
                last or (every > 0 and step % every == 0)
                for every in (
                    settings.log_every,
                    settings.validate_every,
                    settings.sample_every,
                    settings.checkpoint_every,
                )
            )
            if agreement.reached():
                stop.signal_number = signal.SIGTERM
            stopping = stop.signal_number is not None
            if due_log or due_validation or due_samples or due_save or stopping:
                means = pending.fetch(lambda step: save_bad_batch(experiment, workdir, step))
                means.update(throughput.since_last(step))
                recorder.log(step, means, prefix="train/")
                recorder.advance(step, {"loss": means["loss"]})

            # ---- validate and sample; both can be thrown away when a signal comes
            validation: Metrics | None = None
            try:
                with stop.interruptible():
                    if due_validation:
                        validation = jax.device_get(experiment.validate(state))
                        values = {name: float(mean.value) for name, mean in validation.items()}
                        recorder.log(step, values, prefix="validation/")
                    if due_samples and settings.sample_every and not last:
                        key = replicas.run_key(experiment, mesh, step)
                        directory = Path(workdir) / "samples" / f"step_{step}"
                        write_samples(experiment, mesh, state, key, 0, directory)
                    if due_validation or due_samples:
                        throughput.skip()
            except Interrupted:
                stopping = True

            # ---- save
            if due_save or last or stopping or (validation is not None and checkpoints.is_best(validation)):
                checkpoints.save(state, validation)
                if last:  # while signals are still heard
                    checkpoints.wait()
                if stop.signal_number is not None:  # it may have come during the save, and this be the last
                    checkpoints.wait()
                    recorder.message(f"Stopped after update {step}, all saved; the same command goes on.")
                    raise Interrupted(stop.signal_number)
    return state


class _Throughput:
    """Updates a second, leaving out validation, sampling and compilation."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def since_last(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        rate = {"steps_per_second": (step - self._step) / (now - self._time)} if step > self._step else {}
        self._step, self._time = step, now
        return rate

    def skip(self) -> None:
        self._time = time.perf_counter()


class _Profiler:
    """A trace of dispatches 2 to 4 in `<workdir>/profile`, for TensorBoard's profile page or Perfetto."""

    def __init__(self, workdir: Path, *, enabled: bool) -> None:
        self._directory = str(Path(workdir) / "profile")
        self._enabled, self._dispatches, self._running = enabled, 0, False

    def __enter__(self) -> _Profiler:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def after_dispatch(self, state: TrainState) -> None:
        self._dispatches += 1
        if not self._enabled or self._dispatches not in (1, 4):
            return
        jax.block_until_ready(state.step)
        if self._dispatches == 1:
            jax.profiler.start_trace(self._directory)
            self._running = True
        else:
            self._stop()
