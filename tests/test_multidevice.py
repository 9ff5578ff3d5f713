"""The same commands on one device, on eight, and on two and four processes: the same runs.

A DDPM, a GAN, word vectors, a Transformer and a VAE are trained, scored, sampled and saved by the same
command everywhere. Sums over a batch that lies on several devices are added in another order, one rounding
(6e-8) each: after four updates arrays of the state were seen to differ by at most 5e-6 of their norm, moments
included, and may by 1e-4. An update or an average that were wrong would differ by their own size.
"""

import json
import re
import sys

import elastic
import numpy as np
import pytest
import whole_runs
from command import ROOT, run
from PIL import Image

from jaxgen import cli, loop, sharding
from jaxgen.workdir import read_metrics, read_result

# A bias before a batch norm does nothing: its gradient is what rounding leaves, and Adam makes that large.
_NOISE = {"gan": re.compile(r"\['generator'\].*\['conv\d+'\]\['bias'\]")}


# Two systems of different kinds. The DDPM goes through eight devices and two processes in test_multihost, the
# VAE is trained by the same system, and the GAN takes a minute to compile.
QUICK = ("word2vec", "language_model")
SLOW = tuple(name for name in whole_runs.RUNS if name not in QUICK)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(name): the workdir of a run on one device, made in this process when it is first asked for."""
    folder = tmp_path_factory.mktemp("alone")

    def workdir(name):
        if not (folder / name).exists():
            whole_runs.run_all(folder, [name])
        return folder / name

    return workdir


def _elsewhere(folder, names, *, processes=1, devices=1):
    command = [sys.executable, str(ROOT / "tests" / "whole_runs.py"), str(folder), ",".join(names)]
    extra = ["--distributed"] if processes > 1 else []
    running = elastic.start([*command, *extra], processes=processes, devices=devices)
    for status, _, stderr in elastic.finish(running):
        assert status == 0, stderr


def _state(name, workdir):
    """The arrays of the newest checkpoint, restored on one device whatever saved it."""
    module, mesh = cli.load_experiment(f"experiments/{name}.py").module, sharding.make_mesh()
    config = module.get_config("smoke")
    config.update_from_flattened_dict(whole_runs.RUNS[name])
    experiment = module.build(config, mesh)
    checkpoints = loop.open_checkpoints(experiment, workdir)
    state = checkpoints.restore(loop.abstract_state(experiment, mesh))
    checkpoints.close()
    return elastic.as_arrays(state)


def _assert_same(name, other, one):
    # metrics; norms of the update have the noise of all arrays in them
    curves, expected = read_metrics(other), read_metrics(one)
    assert curves.keys() == expected.keys()
    for curve in expected:
        if not curve.endswith("per_second"):
            np.testing.assert_allclose(curves[curve], expected[curve], rtol=1e-3, err_msg=curve)
    # evaluation
    scores, expected = read_result(other), read_result(one)
    assert scores.keys() == expected.keys() != set()
    for score in expected:
        assert scores[score].n == expected[score].n
        np.testing.assert_allclose(scores[score].value, expected[score].value, rtol=1e-3, err_msg=score)
    # sampling
    names = {path.name for path in (one / "samples").iterdir()}
    assert {path.name for path in (other / "samples").iterdir()} == names != set()
    for picture in (one / "samples").glob("*.png"):
        pictures = [np.asarray(Image.open(path / "samples" / picture.name), int) for path in (one, other)]
        assert np.mean(np.abs(pictures[0] - pictures[1])) < 1, picture.name  # of 255
    # checkpoints
    state, expected = _state(name, other), _state(name, one)
    assert state.keys() == expected.keys()
    for leaf, array in expected.items():
        if not np.issubdtype(array.dtype, np.floating):
            np.testing.assert_array_equal(state[leaf], array)
        elif not (name in _NOISE and _NOISE[name].search(leaf)):
            error, size = (np.linalg.norm(np.float64(each)) for each in (state[leaf] - array, array))
            assert error <= 1e-4 * size, f"{leaf}: {error} of {size}"


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The folder of the quick runs on eight devices, all in one process."""
    folder = tmp_path_factory.mktemp("eight")
    _elsewhere(folder, QUICK, devices=8)
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_eight_devices_do_what_one_does(alone, eight, name):
    assert json.loads((eight / name / "manifest.json").read_text())["device_count"] == 8
    _assert_same(name, eight / name, alone(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "names"),
    [(1, 8, SLOW), (2, 1, tuple(whole_runs.RUNS)), (4, 1, tuple(whole_runs.RUNS))],
)
def test_more_devices_and_processes_do_what_one_does(alone, tmp_path, processes, devices, names):
    _elsewhere(tmp_path, names, processes=processes, devices=devices)
    for name in names:
        _assert_same(name, tmp_path / name, alone(name))


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    status, _, stderr = run(
        "--config=experiments/ddpm.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.batch_size=18",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    assert status == 2
    assert "data.batch_size=18" in stderr
    assert "multiple of 4" in stderr
    assert not (tmp_path / "run" / "config.json").exists()
