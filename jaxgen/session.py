"""A run of an experiment in its workdir: who may write there, the runs it needs, the modes of the command."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import jax
from ml_collections import ConfigDict

from jaxgen import cli, loop, record, recorded, sharding
from jaxgen import report as report_page
from jaxgen import workdir as files
from jaxgen.types import Experiment, Need, Scores, TrainState, UserError

# Modes evaluate and sample may be given other values of these groups than the run was trained with.
_FREE_GROUPS = ("sampling.", "evaluation.")


class Session:
    """One experiment, built, in one workdir."""

    def __init__(self, source: str, config: ConfigDict, workdir: Path, *, distributed: bool = False) -> None:
        self.source, self.config, self.workdir = source, config, workdir
        _check_workdir(workdir)
        sharding.initialize(distributed=distributed)
        _use_compilation_cache()
        file, _, self.preset = source.partition(":")
        self.module = cli.load_experiment(file)
        self.mesh = sharding.make_mesh()
        self.experiment: Experiment = self.module.module.build(config, self.mesh)

    # ---- modes

    def train(self, *, profile: bool = False) -> None:
        """Trains to the end (going on where it stopped), then evaluates, samples and reports."""
        with _WorkdirLock(self.workdir):
            _claim(self.workdir, self.experiment, self.config.to_dict(), self.source)
            started = time.perf_counter()
            try:
                state = loop.train(self.experiment, self.workdir, self.mesh, profile=profile)
                print(f"Trained to update {int(state.step)} in {_duration(time.perf_counter() - started)}.")
                self._finish(state)
            except loop.Interrupted as stopped:
                _exit_by_signal(stopped)
            scores = files.read_result(self.workdir)
            page = report_page.write_report(self.workdir)
        print(recorded.score_table(scores))
        print(f"Report: {page}")

    def evaluate(self, which: Literal["newest", "best"]) -> None:
        """Scores a checkpoint of a trained run; writes result.json and the report."""
        state = self._restore(which)
        self._evaluate(state)
        page = report_page.write_report(self.workdir)
        print(recorded.score_table(files.read_result(self.workdir)))
        print(f"Report: {page}")

    def sample(self, which: Literal["newest", "best"], *, num: int, seed: int) -> None:
        """Draws samples from a checkpoint into samples/seed_<seed>/."""
        state = self._restore(which)
        key = jax.random.fold_in(jax.random.key(self.experiment.seed), seed)
        for path in self.experiment.write_samples(state, key, num, self.workdir / "samples" / f"seed_{seed}"):
            print(path)

    # ---- parts

    def _finish(self, state: TrainState) -> None:
        """Evaluation and samples of a trained state; a signal meanwhile ends the process at once, as the
        trained state is on disk and the same command comes back to here."""
        with loop.StopRequest() as stop, stop.interruptible():
            key = jax.random.key(self.experiment.seed)
            self.experiment.write_samples(state, key, 0, self.workdir / "samples")
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        needed = {name: self._needed_state(name, need) for name, need in self.experiment.needs.items()}
        scores: Scores = self.experiment.evaluate(state, needed)
        files.write_result(self.workdir, scores)

    def _restore(self, which: Literal["newest", "best"]) -> TrainState:
        check_is_run(self.workdir)
        _check_same_config(self.workdir, self.config.to_dict(), free=_FREE_GROUPS)
        return _restore(self.experiment, self.workdir, self.mesh, which)

    def _needed_state(self, name: str, need: Need) -> TrainState:
        """The trained state of another run that the evaluation uses, trained now unless it was before."""
        if need.workdir:
            workdir = Path(need.workdir)
            check_is_run(workdir)
            _check_same_config(workdir, need.config, free=("train.", "optim.", *_FREE_GROUPS))
            return _restore(need.experiment, workdir, self.mesh, "newest")
        workdir = self.workdir / "needs" / name
        _claim(workdir, need.experiment, need.config, need.source)
        print(f"Training what the evaluation needs: {need.source} in {workdir}")
        state = loop.train(need.experiment, workdir, self.mesh)
        files.write_result(workdir, need.experiment.evaluate(state, {}))
        return state


def report(workdir: Path, *, record_it: bool, tag: str) -> None:
    """Writes the report page again and, with record_it, the recorded run."""
    check_is_run(workdir)
    if record_it:
        path = recorded.record_run(workdir, _results_dir(), name=_recorded_name(workdir), tag=tag)
        print(f"Recorded: {path}")
    print(f"Report: {report_page.write_report(workdir)}")


def compare(workdir: Path, *, tag: str) -> None:
    """Sets a run beside the recorded one of the same experiment and preset."""
    check_is_run(workdir)
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
    config = files.read_json(workdir / "config.json")
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
        raise UserError(f"{workdir} holds no checkpoint yet: train it first, with --mode=train.")
    return state


# ---- the workdir


def _check_workdir(workdir: Path) -> None:
    for part in (workdir, *workdir.parents):
        if part.exists() and not part.is_dir():
            raise UserError(f"The workdir {workdir} cannot be a folder: {part} is a file.")


def check_is_run(workdir: Path) -> None:
    """UserError unless the folder holds a run."""
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no run (no config.json in it).")


def _check_same_config(workdir: Path, config: Mapping[str, Any], *, free: tuple[str, ...] = ()) -> None:
    saved = recorded.flatten(files.read_json(workdir / "config.json")["config"])
    given = recorded.flatten(files.plain(config))
    different = sorted(
        name
        for name in saved.keys() | given.keys()
        if saved.get(name) != given.get(name) and not name.startswith(free)
    )
    if different:
        first = different[0]
        raise UserError(
            f"{workdir} holds a run with another config: {first} is {saved.get(first)!r} there and "
            f"{given.get(first)!r} now"
            + (f" ({len(different)} fields differ)" if different[1:] else "")
            + "; "
            "use that config, or another --workdir."
        )


def _claim(workdir: Path, experiment: Experiment, config: Mapping[str, Any], source: str) -> None:
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
    if (workdir / "config.json").exists():
        _check_same_config(workdir, config)
        first = files.read_json(workdir / "manifest.json")
        if first["data"] != manifest["data"]:
            raise UserError(f"The data have changed since the run in {workdir} began; use another --workdir.")
        first.setdefault("resumed", []).append(manifest)
        manifest = first
    elif workdir.exists() and any(path.name not in (".lock", "needs") for path in workdir.iterdir()):
        raise UserError(f"{workdir} holds files of something else; use an empty or a new --workdir.")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / "manifest.json", manifest)
        files.write_json(workdir / "config.json", {"experiment": file, "preset": preset, "config": config})


class _WorkdirLock:
    """Keeps a second run out of a workdir; freed by the system however the process ends."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        if jax.process_index() != 0:
            return
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(self._workdir / ".lock", "w")
        except OSError as error:
            raise UserError(
                f"The workdir {self._workdir} cannot be written ({error.strerror}); choose another --workdir."
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UserError(f"Another process is training in {self._workdir}; wait for it.") from error

    def __exit__(self, *exc: object) -> None:
        if self._file:
            self._file.close()


# ---- the process


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs, in JAXGEN_CACHE_DIR (default ~/.cache/jaxgen)."""
    cache = os.environ.get("JAXGEN_CACHE_DIR", os.path.expanduser("~/.cache/jaxgen"))
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _exit_by_signal(stopped: loop.Interrupted) -> NoReturn:
    print(f"jaxgen: {stopped}; the same command goes on.", file=sys.stderr)
    raise SystemExit(128 + stopped.signal_number)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
