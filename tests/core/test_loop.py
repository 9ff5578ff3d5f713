"""The loop on a small noisy regression: resume, signals, non-finite numbers, what is written when."""

import dataclasses
import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import loop, sharding, systems
from jaxgen.types import Experiment, LoopSettings, Mean, UserError

SETTINGS = LoopSettings(
    num_steps=23, steps_per_dispatch=4, log_every=4, validate_every=8, checkpoint_every=8, sample_every=12
)


def _experiment(tmp_path, settings=SETTINGS, batch=None, validate=None, calls=None):
    def init(key, batch):
        return {"w": jax.random.normal(key, (3,))}, {}

    def loss(params, model_state, batch, key):
        noise = 0.1 * jax.random.normal(key, batch["y"].shape)
        mean = Mean.of(jnp.square(batch["x"] @ params["w"] - batch["y"] + noise))
        return mean.value, ({"loss": mean}, model_state)

    def train_batch(step):
        if calls is not None:
            calls.append(step)
        if batch is not None:
            return batch(step)
        x = np.random.default_rng([5, step]).normal(size=(8, 3)).astype(np.float32)
        return {"x": x, "y": x @ np.float32([1, -1, 2])}

    def write_samples(state, key, num, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "w.txt").write_text(str(state.params["w"]))
        return [directory / "w.txt"]

    return Experiment(
        system=systems.gradient_system(init, loss, optax.adam(0.05), ema_decay=0.9),
        loop=settings,
        train_batch=train_batch,
        validate=validate
        or (lambda state: {"error": Mean.of(state.params["w"] - jnp.array([1.0, -1.0, 2.0]))}),
        evaluate=lambda state, needs: {},
        write_samples=write_samples,
        data_fingerprints={},
        seed=3,
    )


def _train(experiment, workdir):
    return loop.train(experiment, workdir, sharding.make_mesh(), show_progress=False)


def _bits(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_spans_stop_at_every_due_step_and_do_not_depend_on_the_start():
    whole = list(loop.spans(SETTINGS, 0))
    assert sum(size for _, size in whole) == 23
    assert {size for _, size in whole} == {4, 1}
    ends = {start + size for start, size in whole}
    assert {4, 8, 12, 16, 20, 23} <= ends
    for first, _ in whole:
        assert list(loop.spans(SETTINGS, first)) == [span for span in whole if span[0] >= first]


@pytest.mark.parametrize("stop_at", [1, 7, 8, 13, 22])
def test_interrupted_anywhere_and_resumed_is_bit_equal_to_uninterrupted(tmp_path, stop_at):
    """The process dies without warning while the batch of step `stop_at` is made."""

    class Died(BaseException):
        pass

    def dying_batch(step):
        if step == stop_at:
            raise Died
        return _experiment(tmp_path).train_batch(step)

    expected = _train(_experiment(tmp_path), tmp_path / "whole")
    with pytest.raises(Died):
        _train(_experiment(tmp_path, batch=dying_batch), tmp_path / "parts")
    half_saved = tmp_path / "parts" / "checkpoints" / "99.orbax-checkpoint-tmp"
    half_saved.mkdir()
    calls = []
    found = _train(_experiment(tmp_path, calls=calls), tmp_path / "parts")
    chex.assert_trees_all_equal(_bits(found), _bits(expected))
    assert int(found.step) == 23
    assert not half_saved.exists()
    assert [line["step"] for line in _lines(tmp_path / "parts")] == [
        line["step"] for line in _lines(tmp_path / "whole")
    ]
    # Skipping costs nothing: no batch before the checkpoint is made again (0 is looked at for its shape).
    assert min(set(calls) - {0}, default=0) >= (stop_at // 8) * 8 - 1


def test_training_goes_where_it_should_and_averages_are_kept(tmp_path):
    state = _train(_experiment(tmp_path, dataclasses.replace(SETTINGS, num_steps=400)), tmp_path)
    # The stationary noise of Adam at rate 0.05 on a loss with noise 0.1 stays within a few rates.
    np.testing.assert_allclose(state.params["w"], [1, -1, 2], atol=0.2)
    assert float(jnp.abs(state.ema["w"] - state.params["w"]).max()) > 0


def test_what_is_due_is_done_and_logged(tmp_path):
    _train(_experiment(tmp_path), tmp_path)
    lines = _lines(tmp_path)
    train = [line["step"] for line in lines if "train/loss" in line]
    validation = [line["step"] for line in lines if "validation/error" in line]
    assert train == [4, 8, 12, 16, 20, 23]
    assert validation == [8, 16, 23]
    assert (tmp_path / "samples" / "step_12" / "w.txt").exists()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == [
        16,
        23,
    ]
    assert {"train/gradient_norm", "train/update_norm", "train/parameter_norm", "train/loss"} <= set(lines[0])


def test_the_logged_mean_is_that_of_the_steps_since_the_last_line(tmp_path):
    one = _experiment(tmp_path, dataclasses.replace(SETTINGS, log_every=1, num_steps=8))
    _train(one, tmp_path / "each")
    _train(_experiment(tmp_path, dataclasses.replace(SETTINGS, num_steps=8)), tmp_path / "four")
    each = [line["train/loss"] for line in _lines(tmp_path / "each") if "train/loss" in line]
    four = [line["train/loss"] for line in _lines(tmp_path / "four") if "train/loss" in line]
    np.testing.assert_allclose(four, np.mean(np.reshape(each, (2, 4)), axis=1), rtol=1e-5)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = _train(_experiment(tmp_path), tmp_path)
    calls = []
    again = _train(_experiment(tmp_path, calls=calls), tmp_path)
    chex.assert_trees_all_equal(_bits(first), _bits(again))
    assert set(calls) <= {0}


def test_a_non_finite_number_stops_the_run_names_itself_and_is_never_saved(tmp_path):
    def poisoned(step):
        rows = _experiment(tmp_path).train_batch(step)
        if step == 13:
            rows["x"][0, 0] = np.nan
        return rows

    with pytest.raises(UserError, match=r"Update 14 is not finite \(first: loss, gradient_norm, update_norm"):
        _train(_experiment(tmp_path, batch=poisoned), tmp_path)
    with np.load(tmp_path / "bad_batch.npz") as saved:
        assert int(saved["step"]) == 13
        np.testing.assert_array_equal(saved["x"], poisoned(13)["x"])
        np.testing.assert_array_equal(saved["y"], poisoned(13)["y"])
    healthy = _train(_experiment(tmp_path), tmp_path)  # goes on from step 8
    assert np.isfinite(healthy.params["w"]).all()


@pytest.mark.parametrize("during", ["batch", "validation"])
def test_sigterm_saves_at_the_next_chance_and_resume_is_bit_equal(tmp_path, during):
    expected = _train(_experiment(tmp_path), tmp_path / "whole")

    def batch(step):
        if during == "batch" and step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return _experiment(tmp_path).train_batch(step)

    def validate(state):
        if during == "validation" and int(state.step) == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"error": Mean.of(state.params["w"])}

    with pytest.raises(loop.Interrupted) as stopped:
        _train(_experiment(tmp_path, batch=batch, validate=validate), tmp_path / "parts")
    assert stopped.value.signal_number == signal.SIGTERM
    saved = max(int(path.name) for path in (tmp_path / "parts" / "checkpoints").iterdir())
    assert saved == 16 if during == "validation" else 0 < saved <= 12
    found = _train(_experiment(tmp_path), tmp_path / "parts")
    chex.assert_trees_all_equal(_bits(found), _bits(expected))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("step", [8, 23])
def test_sigterm_during_a_save_stops_after_it(tmp_path, monkeypatch, step):
    save = loop.Checkpoints.save

    def signalled(checkpoints, state, metrics=None):
        if int(state.step) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        save(checkpoints, state, metrics)

    monkeypatch.setattr(loop.Checkpoints, "save", signalled)
    with pytest.raises(loop.Interrupted):
        _train(_experiment(tmp_path), tmp_path)
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert _lines(tmp_path)[-1]["step"] == step


def test_sigterm_while_the_last_save_is_written_is_heard(tmp_path, monkeypatch):
    wait, waits = loop.Checkpoints.wait, []

    def signalled(checkpoints):
        if not waits:
            os.kill(os.getpid(), signal.SIGTERM)
        waits.append(checkpoints)
        wait(checkpoints)

    monkeypatch.setattr(loop.Checkpoints, "wait", signalled)
    default = signal.signal(signal.SIGTERM, lambda *_: None)  # where nobody listens it must not end pytest
    try:
        with pytest.raises(loop.Interrupted):
            _train(_experiment(tmp_path), tmp_path)
    finally:
        signal.signal(signal.SIGTERM, default)
    assert (tmp_path / "checkpoints" / "23").is_dir()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_second_signal_ends_at_once_by_its_own_name(number, error):
    with loop.StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
        with pytest.raises(error) as ended:
            os.kill(os.getpid(), number)
    assert number == signal.SIGINT or ended.value.code == 128 + number


@pytest.mark.parametrize("best_metric", ["", "error"])
def test_the_best_validation_is_saved_wherever_it_falls(tmp_path, best_metric):
    """Validations at 8 and 16, saves at the end alone; the best is at 8."""
    settings = dataclasses.replace(SETTINGS, checkpoint_every=23, best_metric=best_metric)
    validate = lambda state: {"error": Mean.of(jnp.float32(state.step)[None])}
    _train(_experiment(tmp_path, settings, validate=validate), tmp_path)
    steps = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == ({"0", "8", "23"} - ({"0"} if best_metric else {"8"}))


def test_profile_writes_a_trace(tmp_path):
    loop.train(_experiment(tmp_path), tmp_path, sharding.make_mesh(), show_progress=False, profile=True)
    assert [path for path in (tmp_path / "profile").rglob("*") if path.is_file()]


@pytest.mark.parametrize("field", ["num_steps", "steps_per_dispatch", "log_every", "keep_checkpoints"])
def test_impossible_settings_are_refused(field):
    with pytest.raises(UserError, match=f"train.{field}"):
        dataclasses.replace(SETTINGS, **{field: 0})


def test_one_trace_a_dispatch_size(tmp_path):
    experiment = _experiment(tmp_path)
    step = chex.assert_max_traces(experiment.system.step, n=2)  # sizes 4 and 1
    _train(dataclasses.replace(experiment, system=experiment.system._replace(step=step)), tmp_path)
