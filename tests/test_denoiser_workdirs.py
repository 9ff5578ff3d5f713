"""A run's folder as a denoiser: what each experiment gives, and restoration with it."""

import contextlib
import importlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ncsn, restoration
from experiments.common import restoring, trained_runs
from jaxgen import run as entry
from jaxgen import sharding
from jaxgen.types import UserError

GIVERS = ("ddpm", "dae", "ncsn", "score_sde", "restoration")


@pytest.mark.parametrize("name", GIVERS)
def test_a_trained_state_becomes_a_denoiser(name):
    """From the shapes of the smoke preset's parameters: images in, images of the same shape out."""
    module = importlib.import_module(f"experiments.{name}")
    config = module.get_config("smoke")
    if "classifier" in config.evaluation:
        config.evaluation.classifier = ""
    experiment = module.build(config, sharding.make_mesh())
    batch = experiment.train_batch(0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(experiment.system.init, key, batch).params
    x = jax.ShapeDtypeStruct(batch["image"].shape, jnp.float32)
    sigma = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    out = jax.eval_shape(lambda params, x, sigma: module.denoiser(config, params)(x, sigma), params, x, sigma)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)


def test_pixels_of_ncsn_are_turned_into_those_of_the_interface(monkeypatch):
    """Data N(m, s^2) in [0, 1] are N(2 m - 1, (2 s)^2) in [-1, 1], of which the exact denoiser is known."""
    mean, var = 0.25, 0.01
    gaussian = lambda params, x, sigma: -(x - mean) / (var + sigma[:, None, None, None] ** 2)
    monkeypatch.setattr(ncsn, "make_score", lambda *network: gaussian)
    x = np.random.default_rng(0).normal(size=(4, 2, 2, 1)).astype(np.float32)
    config = ncsn.get_config("smoke")
    least, greatest = ncsn.noise_range(config)
    # Three levels in pixels of [-1, 1], and a sigma between two of them, that is nearest to the second.
    sigma = np.array([greatest, np.sqrt(least * greatest), least, 0.25], np.float32)
    assert sigma[1] == pytest.approx(0.2828, abs=1e-4)
    found = ncsn.denoiser(config, {})(jnp.asarray(x), jnp.asarray(sigma))
    square = sigma[[0, 1, 2, 1], None, None, None] ** 2
    expected = (4 * var * x + square * (2 * mean - 1)) / (4 * var + square)
    np.testing.assert_allclose(found, expected, atol=3e-6)  # float32: sums of terms up to sigma^2


@pytest.mark.parametrize("num_levels", [17, 256])
def test_dequantised_pixels_of_ncsn_lie_around_their_level(num_levels):
    """Else the network learns another scale than that on which its samples are rounded and judged."""
    level = np.repeat(np.arange(num_levels), 4000).reshape(num_levels, 40, 100, 1)
    image = jnp.asarray(level / (num_levels - 1), jnp.float32)
    found = np.asarray(ncsn.dequantised(jax.random.key(0), image, num_levels), np.float64)
    inner = found * (num_levels - 1) - level  # uniform in [-1/2, 1/2): a mean over 4000 errs by 0.0046
    np.testing.assert_allclose(inner.mean(axis=(1, 2, 3)), 0.0, atol=5 * 0.0046)
    assert inner.min() >= -0.5001
    assert inner.max() <= 0.5001


def test_a_fresh_edm_network_is_the_denoiser_of_a_gaussian():
    """Its last convolution begins at 0, so that what is left is c_skip x: that of N(0, 1/4)."""
    module = importlib.import_module("experiments.score_sde")
    config = module.get_config("smoke")
    config.sde.name = "edm"
    config.evaluation.classifier = ""
    experiment = module.build(config, sharding.make_mesh())
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(experiment.system.init, key, experiment.train_batch(0)).params
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), shapes)
    params["conv_out"] = jax.tree.map(jnp.zeros_like, params["conv_out"])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)
    sigma = jnp.array([0.01, 0.5, 5.0])
    found = jax.jit(module.denoiser(config, params))(x, sigma)
    expected = 0.25 / (0.25 + sigma[:, None, None, None] ** 2) * x
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert module.noise_range(config) == pytest.approx((0.01, 20.0), rel=0.01)


@pytest.mark.parametrize(("name", "expected"), [("vp", np.e), ("sub_vp", np.e), ("ve", 20.0), ("edm", 20.0)])
def test_the_prior_of_the_likelihood_is_where_sampling_starts(name, expected):
    """N(0, 1) at t = 1 for both VP SDEs, whose scale there is exp(-1/2 int beta) = 1 / e with these betas."""
    module = importlib.import_module("experiments.score_sde")
    config = module.get_config("smoke")
    config.sde.update(name=name, beta_min=1.0, beta_max=3.0)
    assert module.prior_std(config) == pytest.approx(expected, rel=1e-6)


def test_a_conditional_ddpm_without_dropout_of_labels_refuses():
    module = importlib.import_module("experiments.ddpm")
    config = module.get_config("smoke")
    config.diffusion.conditional = True
    with pytest.raises(UserError, match="label_dropout"):
        module.denoiser(config, {})


# ---- restoration


def _here(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = entry.main(["jaxgen.run", "--config=experiments/restoration.py:smoke", *arguments])
    return status, err.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A smoke run of restoration, with a denoiser of its own."""
    workdir = tmp_path_factory.mktemp("runs") / "own"
    status, errors = _here(f"--workdir={workdir}")
    assert status == 0, errors
    return workdir


def test_the_denoiser_of_a_folder_restores_as_it_did_at_home(trained, tmp_path):
    status, errors = _here(f"--workdir={tmp_path / 'again'}", f"--config.denoiser={trained}")
    assert status == 0, errors
    own, again = (json.loads((w / "result.json").read_text()) for w in (trained, tmp_path / "again"))
    assert own.keys() == again.keys()
    for name in ("psnr_denoised_25", "psnr_dmsp", "psnr_wiener", "inpainting_psnr_langevin"):
        # The same program on the same numbers.
        assert again[name]["value"] == pytest.approx(own[name]["value"], rel=1e-6)
    assert {path.name for path in (tmp_path / "again" / "samples").iterdir()} == {
        "restored.png",
        "inpainting.png",
        "superresolution.png",
    }


def test_only_the_tasks_asked_for_are_judged_and_shown(trained, tmp_path):
    workdir = tmp_path / "few"
    status, errors = _here(
        f"--workdir={workdir}", f"--config.denoiser={trained}", "--config.evaluation.tasks=inpainting"
    )
    assert status == 0, errors
    assert all("inpainting" in name for name in json.loads((workdir / "result.json").read_text()))
    assert [path.name for path in (workdir / "samples").iterdir()] == ["inpainting.png"]


def _write(folder, content):
    folder.mkdir()
    (folder / "config.json").write_text(content)
    return folder


def _run(experiment, preset="smoke", config=()):
    about = {"experiment": f"experiments/{experiment}.py", "preset": preset, "config": dict(config)}
    return json.dumps(about)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no run"),
        ("{", "is damaged"),
        ('{"preset": "smoke"}', "is damaged"),
        (_run("elsewhere"), "none of these experiments"),
        (_run("classifier"), "gives no denoiser"),
        (_run("ddpm", "no_such"), "does not fit"),
        (_run("ddpm"), "8x8x1, and the test images are 24x24x1"),
    ],
)
def test_a_folder_that_gives_no_denoiser(content, words, tmp_path):
    config = restoration.get_config("smoke")
    config.denoiser = str(tmp_path / "missing" if content is None else _write(tmp_path / "run", content))
    with pytest.raises(UserError, match=words):
        restoration.build(config, sharding.make_mesh())


def test_a_denoiser_of_one_size_is_not_asked_for_a_part_of_it(tmp_path):
    """Before anything is judged: superresolution by 3 leaves 6x6 pixels of the 8x8 of digits."""
    config = restoration.get_config("smoke")
    config.denoiser = str(_write(tmp_path / "run", _run("ddpm")))
    config.data.source, config.evaluation.crop = "digits", 0
    assert config.evaluation.factor == 3
    with pytest.raises(UserError, match="to a divisor of both"):
        restoration.build(config, sharding.make_mesh())
    config.evaluation.factor = 4
    restoration.build(config, sharding.make_mesh())
    config.evaluation.factor, config.evaluation.tasks = 3, ("inpainting",)
    restoration.build(config, sharding.make_mesh())


def test_a_run_without_a_checkpoint(tmp_path):
    begun = restoration.get_config("smoke").to_dict()
    folder = _write(tmp_path / "begun", _run("restoration", config=begun))
    status, errors = _here(f"--workdir={tmp_path / 'run'}", f"--config.denoiser={folder}")
    assert status == 2
    assert "no checkpoint" in errors
    assert errors.count("\n") == 1 or "Traceback" not in errors


def test_lists_of_a_config_are_tuples_again(tmp_path):
    saved = _run("ddpm", config={"model": {"channel_multipliers": [1, 3]}, "seed": 5})
    run = trained_runs.read_run(str(_write(tmp_path / "run", saved)))
    assert run.config.model.channel_multipliers == (1, 3)
    assert run.config.seed == 5


# ---- holes


def test_psnr_in_the_hole_closed_form():
    mask = restoring.hole_mask("middle", 8, 8, 0)
    assert mask.sum() == 64 - 16
    truth = np.zeros((2, 8, 8, 1), np.float32)
    wrong = truth + np.array([0.2, 0.02], np.float32)[:, None, None, None]
    filled = np.where(mask > 0, 1.0, wrong).astype(np.float32)  # what is known does not count
    # 10 log10(4 / 0.04) and 20 dB more.
    np.testing.assert_allclose(restoring.hole_psnr(filled, truth, mask), [20.0, 40.0], atol=1e-5)
    half = restoring.hole_mask("pixels", 64, 64, 0)
    assert abs(half.mean() - 0.5) < 5 * 0.5 / 64  # standard error 0.5 / 64
