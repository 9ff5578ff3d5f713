"""The table of denoisers: likelihoods in closed form, and what cannot be put into it."""

import json
import math

import numpy as np
import pytest

from experiments.figures import denoiser_table
from jaxgen import mixtures

SETTINGS = denoiser_table.Settings(num_images=5, num_steps=40, num_probes=1, batch_size=3)


def test_the_bits_of_gaussian_data_are_those_of_the_gaussian():
    """The exact denoiser of N(mean, diag): its divergence is the same everywhere, and one probe finds it."""
    rng = np.random.default_rng(0)
    levels = 256
    std = np.array([0.3, 0.5, 0.2, 0.4])
    data = 0.1 + std * rng.normal(size=(4000, 4))
    flat = data - data.mean(axis=0)
    # Images whose covariance is exactly diagonal.
    white = flat @ np.linalg.inv(np.linalg.cholesky(flat.T @ flat / len(flat))).T
    train = (0.1 + std * white).reshape(-1, 2, 2, 1)
    prior = denoiser_table.gaussian_of(train)
    images = train[:5].astype(np.float32)
    denoiser = lambda x, sigma: mixtures.denoise(prior, x, sigma)
    bits = denoiser_table.ode_bits_per_dim(denoiser, prior, images, levels, (0.02, 5.0), SETTINGS)
    variance = std**2 + 0.02**2
    nats = 0.5 * ((images.reshape(5, 4) - 0.1) ** 2 / variance + np.log(2 * math.pi * variance)).sum(axis=1)
    expected = (nats / 4 - math.log(2 / (levels - 1))) / math.log(2)
    # The noise between two levels, at most 1/255, moves the density by up to 0.1 bits; 40 steps by 1e-3.
    np.testing.assert_allclose(bits, expected, atol=0.1)
    assert np.ptp(expected) > 0.5


@pytest.mark.parametrize("name", ["restoration", "dae", "classifier"])
def test_other_runs_are_refused(name, tmp_path, capsys):
    about = {"experiment": f"experiments/{name}.py", "preset": "smoke", "config": {}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    status = denoiser_table.main([f"--workdir={tmp_path}", f"--out={tmp_path}"])
    assert status == 2
    assert "take one of experiments/ddpm.py, ncsn.py or score_sde.py." in capsys.readouterr().err


def test_scores_are_read_where_they_are(tmp_path):
    assert denoiser_table.saved_scores(tmp_path) == {}
    (tmp_path / "result.json").write_text(json.dumps({"frechet_distance": {"value": 2.5}}))
    assert denoiser_table.saved_scores(tmp_path)["frechet_distance"]["value"] == 2.5


def test_the_markdown():
    text = denoiser_table.markdown(("run", "bits"), [("a:b", 1.23456), ("c:d", "-")])
    assert text == "| run | bits |\n| --- | --- |\n| a:b | 1.235 |\n| c:d | - |\n"
