"""A run of an experiment in its workdir: who may write there, the runs it needs, the modes of the command."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

import jax
from ml_collections import ConfigDict

from jaxgen import cli, loop, record, recorded, replicas, sharding
from jaxgen import report as report_page
from jaxgen import workdir as files
from jaxgen.types import Experiment, Need, Scores, TrainState, UserError

# Modes evaluate and sample may be given other values of these groups than the run was trained with.
_FREE_GROUPS = ("sampling.", "evaluation.")
# Fields that runs from before they existed lack, and what those did.
_SINCE_ADDED = {"num_seeds": 1, "sweep": "", "evaluation.inception": ""}


class Session:
    """One experiment, built, in one workdir."""

    def __init__(
        self,
        source: str,
        config: ConfigDict,
        workdir: Path,
        *,
        trained: bool = False,
        distributed: bool = False,
        fsdp: int = 1,
    ) -> None:
        """Builds the experiment and looks for mistakes; nothing is written or computed yet.

        source: FILE:PRESET, where `config` comes from
        trained: the workdir must hold a run of this config; else it may hold nothing
        distributed: join the processes of a cluster
        fsdp: the number of devices that each large array of the state is laid over

        Raises UserError.
        """
        self.source, self.config, self.workdir = source, config, workdir
        _check_writable(workdir)
        if trained:
            check_is_run(workdir)
            _check_same_config(workdir, source, config.to_dict(), free=_FREE_GROUPS)
        else:
            _check_free_or_same(workdir, source, config.to_dict())
        self.mesh = _start_jax(distributed=distributed, fsdp=fsdp)
        file, _, _ = source.partition(":")
        self.experiment = build(cli.load_experiment(file).module, config, self.mesh)
        # Models say what does not fit them when they are traced.
        abstract = loop.abstract_state(self.experiment, self.mesh)
        if replicas.labels_of(self.experiment):
            loop.abstract_update(self.experiment, abstract)
        if trained:
            _check_same_data(workdir, self.experiment, config.to_dict())

    # ---- modes

    def train(self, *, profile: bool = False) -> None:
        """Trains to the end (going on where it stopped), then evaluates, samples and reports."""
        self._check_needs()
        with _WorkdirLock(self.workdir):
            _claim(self.workdir, self.experiment, self.source, self.config.to_dict())
            started = time.perf_counter()
            with _exit_when_interrupted():
                state = loop.train(self.experiment, self.workdir, self.mesh, profile=profile)
                _say(f"Trained to update {int(state.step)} in {_duration(time.perf_counter() - started)}.")
                self._finish(state)
            self._report()

    def evaluate(self, which: Literal["newest", "best"]) -> None:
        """Scores a checkpoint of a trained run; writes result.json and the report."""
        self._check_needs()
        state = _restore(self.experiment, self.workdir, self.mesh, which)
        with _exit_when_interrupted():  # it may train what the evaluation needs
            self._evaluate(state, which)
        self._report()

    def sample(self, which: Literal["newest", "best"], *, num: int, seed: int) -> None:
        """Draws samples from a checkpoint into samples/seed_<seed>/."""
        state = _restore(self.experiment, self.workdir, self.mesh, which)
        key = replicas.run_key(self.experiment, self.mesh, seed)
        directory = self.workdir / "samples" / f"seed_{seed}"
        for path in loop.write_samples(self.experiment, self.mesh, state, key, num, directory):
            _say(path)

    # ---- parts

    def _finish(self, state: TrainState) -> None:
        """Evaluation and samples of a trained state; a signal meanwhile ends the process at once, as the
        trained state is on disk and the same command comes back to here."""
        with loop.StopRequest() as stop, stop.interruptible(), sharding.others_watched():
            key = replicas.run_key(self.experiment, self.mesh)
            loop.write_samples(self.experiment, self.mesh, state, key, 0, self.workdir / "samples")
            self._evaluate(state, "newest")

    def _evaluate(self, state: TrainState, which: Literal["newest", "best"]) -> None:
        needed = {name: self._needed_state(name, need) for name, need in self.experiment.needs.items()}
        needed = {name: sharding.fetchable(self.mesh, trained) for name, trained in needed.items()}
        scores: Scores = self.experiment.evaluate(sharding.fetchable(self.mesh, state), needed)
        _write_scores(self.workdir, scores, which, int(state.step), self.config.to_dict())

    def _report(self) -> None:
        with sharding.together():
            if sharding.is_first_process():
                page = report_page.write_report(self.workdir)
                print(recorded.score_table(files.read_result(self.workdir)))
                print(f"Report: {page}")

    def _check_needs(self) -> None:
        """Finds now what the evaluation would stumble over after the training."""
        for name, need in self.experiment.needs.items():
            loop.abstract_state(need.experiment, self.mesh)
            if need.workdir:
                workdir = _folder(need.workdir)
                check_is_run(workdir)
                free = ("train.", "optim.", *_FREE_GROUPS)
                _check_same_config(workdir, need.source, need.config, free=free)
                _check_finished(workdir, need.experiment)
            else:
                _check_free_or_same(self._need_workdir(name), need.source, need.config)

    def _need_workdir(self, name: str) -> Path:
        return self.workdir / "needs" / name

    def _needed_state(self, name: str, need: Need) -> TrainState:
        """The trained state of another run that the evaluation uses, trained now unless it was before."""
        if need.workdir:
            return _restore(need.experiment, _folder(need.workdir), self.mesh, "newest")
        workdir = self._need_workdir(name)
        with _WorkdirLock(workdir):  # another evaluation of the run may have come here too
            _claim(workdir, need.experiment, need.source, need.config)
            _say(f"Training what the evaluation needs: {need.source} in {workdir}")
            state = loop.train(need.experiment, workdir, self.mesh)
            scores = need.experiment.evaluate(sharding.fetchable(self.mesh, state), {})
            _write_scores(workdir, scores, "newest", int(state.step), need.config)
        return state


def build(module: ModuleType, config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """The experiment that the config describes: one run, or with num_seeds or sweep several side by side."""
    configs = cli.replica_configs(config)
    parts = {label: module.build(each, mesh) for label, each in configs.items()}
    return replicas.combine(parts, mesh)


def report(workdir: Path, *, record_it: bool, tag: str) -> None:
    """Writes the report page again and, with record_it, the recorded run."""
    name = _recorded_name(workdir)
    if record_it:
        path = recorded.record_run(workdir, _results_dir(), name=name, tag=tag)
        print(f"Recorded: {path}")
    print(f"Report: {report_page.write_report(workdir)}")


def compare(workdir: Path, *, tag: str) -> None:
    """Sets a run beside the recorded one of the same experiment and preset."""
    name = _recorded_name(workdir)
    record_file = _results_dir() / f"{name}{'_' + tag if tag else ''}.json"
    if not record_file.is_file():
        known = sorted(path.stem for path in _results_dir().glob("*.json"))
        raise UserError(
            f"There is no recorded run {record_file}; recorded are: {', '.join(known) or 'none'}."
        )
    print(recorded.compare(workdir, record_file))


def _results_dir() -> Path:
    return cli.experiments_folder() / "results"


def _recorded_name(workdir: Path) -> str:
    """What the run in the workdir is called when it is recorded: ddpm_digits."""
    check_is_run(workdir)
    config, _ = _read_config(workdir), _read_manifest(workdir)
    return f"{Path(config['experiment']).stem}_{config['preset']}"


def _restore(
    experiment: Experiment, workdir: Path, mesh: jax.sharding.Mesh, which: Literal["newest", "best"]
) -> TrainState:
    checkpoints = loop.open_checkpoints(experiment, workdir)
    try:
        state = checkpoints.restore(loop.abstract_state(experiment, mesh), which)
    finally:
        checkpoints.close()
    if state is None:
        raise _without_checkpoint(workdir)
    return state


def _without_checkpoint(workdir: Path) -> UserError:
    return UserError(f"{workdir} holds no checkpoint yet: train it first, with --mode=train.")


# ---- the workdir


def _check_writable(workdir: Path) -> None:
    there = next(part for part in (workdir, *workdir.parents) if part.exists())
    if not there.is_dir():
        raise UserError(f"The workdir {workdir} cannot be a folder: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"The workdir {workdir} cannot be written; choose another --workdir.")
    if (workdir / "checkpoints").is_file():
        raise UserError(f"{workdir / 'checkpoints'} is a file where a folder belongs: take it away.")


def check_is_run(workdir: Path) -> None:
    """UserError unless the folder holds a run."""
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no run (no config.json in it).")


def _check_free_or_same(workdir: Path, source: str, config: Mapping[str, Any]) -> None:
    """UserError where the workdir holds another run, or anything else than a run."""
    if (workdir / "config.json").exists():
        _check_same_config(workdir, source, config)
        _read_manifest(workdir)
    elif workdir.exists() and not all(_is_of_a_beginning(path.name) for path in workdir.iterdir()):
        raise UserError(f"{workdir} holds files of something else; use an empty or a new --workdir.")


def _is_of_a_beginning(name: str) -> bool:
    """Whether a run that was killed before config.json was written may have left a file of this name."""
    return name in (".lock", "needs", "manifest.json") or (name.startswith(".") and name.endswith(".tmp"))


def _check_same_config(
    workdir: Path, source: str, config: Mapping[str, Any], *, free: tuple[str, ...] = ()
) -> None:
    """UserError unless the run in the workdir is of this experiment and config, but for the `free` groups."""
    run = _read_config(workdir)
    file, _, _ = source.partition(":")
    if Path(run["experiment"]).stem != Path(file).stem:
        raise UserError(f"{workdir} holds a run of {run['experiment']}; use another --workdir for {file}.")
    saved, given = _fields(run["config"], config)
    different = sorted(
        name
        for name in saved.keys() | given.keys()
        if (name in saved, saved.get(name)) != (name in given, given.get(name)) and not name.startswith(free)
    )
    if different:
        first = different[0]
        there, now = (repr(fields[first]) if first in fields else "absent" for fields in (saved, given))
        raise UserError(
            f"{workdir} holds a run with another config: {first} is {there} there and {now} now"
            + (f" ({len(different)} fields differ)" if different[1:] else "")
            + "; use that config, or another --workdir."
        )


def _check_same_data(workdir: Path, experiment: Experiment, config: Mapping[str, Any]) -> None:
    """UserError where the data, a tokeniser made from them included, are not those of the run in the workdir.

    How many held-out ones there are may depend on the free groups: with other values of these only what was
    trained on counts.
    """
    saved, given = _fields(_read_config(workdir)["config"], config)
    first, now = _read_manifest(workdir)["data"], experiment.data_fingerprints
    changed = {name for name in first.keys() | now.keys() if first.get(name) != now.get(name)}
    if saved != given:
        changed = {name for name in changed if name.partition("@")[0] not in ("validation", "test")}
    if changed:
        raise UserError(f"The data have changed since the run in {workdir} began; use another --workdir.")


def _check_finished(workdir: Path, experiment: Experiment) -> None:
    """UserError where the run in a workdir was stopped before its last update."""
    num_steps = recorded.flatten(_read_config(workdir)["config"]).get("train.num_steps")
    checkpoints = loop.open_checkpoints(experiment, workdir)
    steps = checkpoints.steps()
    checkpoints.close()
    if not steps:
        raise _without_checkpoint(workdir)
    if isinstance(num_steps, int) and steps[-1] < num_steps:
        raise UserError(
            f"The run in {workdir} is at update {steps[-1]} of {num_steps}: train it to the end first, by "
            "the command that began it."
        )


def _fields(saved: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's own config and the one that is given now, by dotted name."""
    theirs, ours = recorded.flatten(saved), recorded.flatten(files.plain(given))
    return {**{name: value for name, value in _SINCE_ADDED.items() if name in ours}, **theirs}, ours


def _read_config(workdir: Path) -> dict[str, Any]:
    return _read_object(workdir / "config.json", {"experiment": str, "preset": str, "config": dict})


def _read_manifest(workdir: Path) -> dict[str, Any]:
    return _read_object(workdir / "manifest.json", {"data": dict})


def _read_object(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object whose named values are of these kinds; UserError where it is something else."""
    content = files.read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), kind) for name, kind in kinds.items()
    ):
        names = " and ".join(kinds)
        raise UserError(f"{path} is damaged (it should hold {names}): restore it, or use a new --workdir.")
    return content


def _claim(workdir: Path, experiment: Experiment, source: str, config: Mapping[str, Any]) -> None:
    """Writes config.json and manifest.json, or checks that the run already there is this one."""
    file, _, preset = source.partition(":")
    manifest = record.manifest(
        config=config,
        experiment=file,
        preset=preset,
        seed=experiment.seed,
        data_fingerprints=dict(experiment.data_fingerprints),
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
    )
    with sharding.together():
        _check_free_or_same(workdir, source, config)
        if (workdir / "config.json").exists():
            _check_same_data(workdir, experiment, config)
            first = _read_manifest(workdir)
            manifest = {**first, "resumed": [*first.get("resumed", []), manifest]}
    with sharding.together():
        if sharding.is_first_process():
            workdir.mkdir(parents=True, exist_ok=True)
            files.write_json(workdir / "manifest.json", manifest)
            content = {"experiment": file, "preset": preset, "config": config}
            files.write_json(workdir / "config.json", content)


def _write_scores(
    workdir: Path, scores: Scores, which: Literal["newest", "best"], step: int, config: Mapping[str, Any]
) -> None:
    """Writes result.json, and into the manifest of what: mode evaluate may depart from the run's config."""
    with sharding.together():
        if sharding.is_first_process():
            saved, given = _fields(_read_config(workdir)["config"], config)
            changed = {name: value for name, value in given.items() if (name, value) not in saved.items()}
            evaluated = {"checkpoint": which, "step": step, "config": changed}
            files.write_json(workdir / "manifest.json", {**_read_manifest(workdir), "evaluated": evaluated})
            files.write_result(workdir, scores)


class _WorkdirLock:
    """Keeps a second run out of a workdir; freed by the system however the process ends."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        with sharding.together():
            if sharding.is_first_process():
                self._lock()

    def _lock(self) -> None:
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(self._workdir / ".lock", "w")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(
                f"The workdir {self._workdir} cannot be written ({error.strerror}); choose another --workdir."
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UserError(f"Another process is training in {self._workdir}; wait for it.") from error

    def __exit__(self, *exc: object) -> None:
        if self._file:
            self._file.close()


# ---- the process


def _folder(path: str) -> Path:
    return Path(os.path.expanduser(path))


def _say(text: object) -> None:
    if sharding.is_first_process():
        print(text)


def _start_jax(*, distributed: bool, fsdp: int) -> jax.sharding.Mesh:
    """The mesh of all devices; UserError where there is no cluster to join, or no device."""
    _use_compilation_cache()
    try:
        sharding.initialize(distributed=distributed)
        return sharding.make_mesh(fsdp)
    except (RuntimeError, ValueError) as error:
        asked = "--distributed" if distributed else f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        raise UserError(
            f"JAX cannot start with {asked}: {error}"
            + (
                " Outside SLURM, Kubernetes and TPU pods give each process JAX_COORDINATOR_ADDRESS, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID."
                if distributed
                else ""
            )
        ) from error


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs, in JAXGEN_CACHE_DIR (default ~/.cache/jaxgen)."""
    cache = os.environ.get("JAXGEN_CACHE_DIR") or os.path.expanduser("~/.cache/jaxgen")
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@contextlib.contextmanager
def _exit_when_interrupted() -> Iterator[None]:
    try:
        yield
    except loop.Interrupted as stopped:
        print(f"jaxgen: {stopped}; the same command goes on.", file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from stopped


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
