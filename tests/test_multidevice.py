"""The same command on one device and on four: the same training, scores and samples."""

import json

import numpy as np
from command import run
from PIL import Image

FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=1"}


def _curve(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_four_devices_do_what_one_does(tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    for workdir, environment in ((one, {}), (four, FOUR)):
        status, _, stderr = run("--config=experiments/ddpm.py:smoke", f"--workdir={workdir}", **environment)
        assert status == 0, stderr
    assert json.loads((four / "manifest.json").read_text())["device_count"] == 4
    # Sums over the batch are added in another order, one rounding (6e-8) each; Adam divides by the root of
    # tiny second moments, which magnifies that in the first updates.
    for name in ("train/loss", "validation/loss", "train/parameter_norm"):
        np.testing.assert_allclose(_curve(four, name), _curve(one, name), rtol=2e-3)
    scores = [json.loads((workdir / "result.json").read_text()) for workdir in (one, four)]
    np.testing.assert_allclose(
        scores[1]["bits_per_dim"]["value"], scores[0]["bits_per_dim"]["value"], rtol=5e-3
    )
    assert [score["n"] for score in scores[0].values()] == [score["n"] for score in scores[1].values()]
    pictures = [np.asarray(Image.open(workdir / "samples" / "samples.png"), int) for workdir in (one, four)]
    assert np.mean(np.abs(pictures[0] - pictures[1])) < 2  # of 255


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    status, _, stderr = run(
        "--config=experiments/ddpm.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.batch_size=18",
        **FOUR,
    )
    assert status == 2
    assert "data.batch_size=18" in stderr
    assert "multiple of 4" in stderr
    assert not (tmp_path / "run" / "config.json").exists()
