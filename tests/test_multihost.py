"""On one device, on eight, with the state laid over devices, and on two processes: it is the same run.

Nothing here is bit-equal: a sum over a batch that lies on several devices is added in another order, which
costs one rounding (6e-8) a sum. Compared is each array of the state after four updates, by the norm of the
difference. Gradients that nearly cancel carry that error magnified: moments, whose errors were 6e-7 of their
norm when this was written, may differ by 1e-4. Parameters have moved by little of their size, so that a part
of their norm would hide a wrong update: they may differ by 1e-2 of the distance that they moved.
"""

import shutil
import signal
import time

import elastic
import jax
import numpy as np
import pytest
from command import jaxgen_command

from jaxgen import loop, sharding
from jaxgen.types import UserError
from jaxgen.workdir import read_metrics, read_result


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run on one device, in this process; its checkpoints are of updates 2 and 4."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    elastic.train(workdir, until=4, devices=1)
    return workdir


def _seen(workdir):
    with np.load(workdir / "seen.npz") as content:
        return dict(content)


def _stopped_at_2(whole, workdir):
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    return workdir


def _norm(array):
    return np.linalg.norm(np.asarray(array, np.float64))


def _assert_same_run(workdir, one, *, first_batch):
    found, expected = _seen(workdir), _seen(one)
    assert found.keys() == expected.keys()
    # Batch 0 is looked at for its shape; after that, no batch before the checkpoint is made again.
    assert set(found["batches"]) - {0} == {1, 2, 3} - set(range(first_batch))
    for name, there in expected.items():
        if not name.startswith("state"):
            continue
        here = found[name]
        assert here.shape == there.shape
        if not np.issubdtype(there.dtype, np.floating):
            np.testing.assert_array_equal(here, there)
        elif name.startswith("state.opt_state"):
            assert _norm(here - there) <= 1e-4 * _norm(there), name
        else:
            assert _norm(here - there) <= 1e-2 * _moved(one, name) + 1e-7 * _norm(there), name
    for curve in ("train/loss", "validation/loss"):
        here, there = (read_metrics(run)[curve][-1] for run in (workdir, one))
        assert here[0] == there[0] == 4
        np.testing.assert_allclose(here[1], there[1], rtol=1e-4)


_STARTS = {}


def _moved(one, name):
    """How far an array of the state is from where it began, in the run on one device."""
    if not _STARTS:
        experiment, mesh = elastic.build(devices=1)
        abstract = loop.abstract_state(experiment, mesh)
        _STARTS.update(elastic.as_arrays(loop.initial_state(experiment, mesh, abstract)))
    return _norm(_seen(one)[name] - _STARTS[name])


def test_a_run_goes_on_with_other_devices_and_its_state_laid_over_them(one, tmp_path):
    run = tmp_path / "run"
    elastic.train_elsewhere(
        {"workdir": str(run), "until": 2, "devices": 8},
        {"workdir": str(run), "until": 4, "devices": 4, "fsdp": 4},
        devices=8,
    )
    _assert_same_run(run, one, first_batch=2)
    assert _seen(one)["largest_share"] == 1
    assert _seen(run)["largest_share"] == 1 / 4


def test_a_run_goes_on_with_more_and_with_fewer_processes(one, tmp_path):
    more, fewer = _stopped_at_2(one, tmp_path / "more"), tmp_path / "fewer"
    told = elastic.train_elsewhere(
        {"workdir": str(fewer), "until": 2, "fsdp": 2},
        {"workdir": str(more), "until": 4},
        "fail_on_process_1",
        {"workdir": str(tmp_path / "poisoned"), "until": 4, "poisoned": 1},
        processes=2,
    )
    assert _seen(fewer)["largest_share"] == 1 / 2  # neither process holds the whole state
    _assert_same_run(more, one, first_batch=2)
    elastic.train(fewer, until=4, devices=1)
    _assert_same_run(fewer, one, first_batch=2)

    # A mistake of one process, and a NaN in the rows of one, are the other's too: it would wait for ever.
    for number, (mistake, stop) in enumerate(told):
        assert mistake == "UserError: The disk of process 1 is full."
        assert stop.startswith("UserError: Update 3 is not finite (first: loss, gradient_norm,")
        path = tmp_path / "poisoned" / f"bad_batch_{number}.npz"
        assert str(path) in stop
        with np.load(path) as rows:
            assert np.isnan(rows["image"]).any() == (number == 1)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_update(tmp_path):
    """Orbax asks JAX about SIGTERM at a save by the number of its update, which is ten times ours."""
    extra = ["--config.train.num_steps=100000", "--config.train.steps_per_dispatch=10", "--distributed"]
    every = [f"--config.train.{what}_every=10" for what in ("checkpoint", "log")]
    changes = [*elastic.AS_FLAGS, *extra, *every, "--config.train.validate_every=100000"]
    command = jaxgen_command("--config=experiments/ddpm.py:smoke", f"--workdir={tmp_path}", *changes)
    running = elastic.start(command, processes=2)

    def newest():
        return max((int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*0")), default=0)

    while newest() < 200 and running[0].poll() is None:
        time.sleep(0.05)
    signalled_at = newest()
    running[1].send_signal(signal.SIGTERM)
    for status, _, stderr in elastic.finish(running, seconds=300):
        assert status == 128 + signal.SIGTERM, stderr
        assert "stopped by SIGTERM; the same command goes on" in stderr
    assert newest() - signalled_at < 500  # 20 when this was written; by Orbax's count 1,800


@pytest.mark.slow
def test_the_command_on_two_processes_scores_and_samples_as_on_one(tmp_path):
    pictures, scores = [], []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        extra = ["--distributed"] if processes > 1 else []
        command = jaxgen_command(
            "--config=experiments/ddpm.py:smoke", f"--workdir={workdir}", *elastic.AS_FLAGS, *extra
        )
        done = elastic.finish(elastic.start(command, processes=processes))
        for status, _, stderr in done:
            assert status == 0, stderr
        assert "Report: " in done[0][1]
        assert all("Report: " not in stdout for _, stdout, _ in done[1:])
        pictures.append({path.name: path.read_bytes() for path in (workdir / "samples").glob("*.png")})
        scores.append(read_result(workdir))
    assert pictures[0].keys() == pictures[1].keys() != set()
    assert scores[0].keys() == scores[1].keys() != set()
    for name, score in scores[0].items():
        assert scores[1][name].n == score.n
        # The parameters differ as said above, and a bound of some bits/dim is a mean over their outputs.
        np.testing.assert_allclose(scores[1][name].value, score.value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), (None, None, None, "model")),
        ((128, 64), ("model",)),
        ((64, 64), (None, "model")),
        ((63, 65), ()),  # no axis divides
        ((511,), ()),
        ((8,), ()),  # too small
        ((), ()),
    ],
)
def test_the_longest_axis_that_divides_is_laid_over_the_devices(shape, spec):
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    assert tuple(sharding.state_sharding(mesh, shape).spec) == spec
    alone = jax.sharding.AbstractMesh((8, 1), ("data", "model"))
    assert tuple(sharding.state_sharding(alone, shape).spec) == ()


def test_devices_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"--fsdp=3 does not divide the 1 devices"):
        sharding.make_mesh(3, num_devices=1)


def test_alone_an_error_is_raised_as_it_is():
    error = UserError("a mistake")
    with pytest.raises(UserError) as raised, sharding.together():
        raise error
    assert raised.value is error
