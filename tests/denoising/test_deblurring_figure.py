"""The picture of deblurring: what it computes, and what it refuses."""

import numpy as np

from experiments import restoration
from experiments.figures import deblurring
from jaxgen.metrics.images import psnr


def test_every_method_restores_each_image_with_its_own_kernel():
    rng = np.random.default_rng(0)
    truth = np.clip(np.cumsum(rng.normal(size=(2, 14, 14, 1)), axis=2) * 0.2, -1, 1).astype(np.float32)
    kernels = np.zeros((2, 3, 3))
    kernels[0, 1, 1] = 1.0  # nothing but noise
    kernels[1] = 1 / 9
    config = restoration.get_config("smoke")
    config.restoration.num_steps = 30
    smooth = lambda x, sigma: x / (1.0 + sigma[:, None, None, None] ** 2)  # of N(0, 1)
    images, found = deblurring.restored_images(config, smooth, truth, kernels, blind_steps=3)
    assert list(images) == [*deblurring.SHOWN.values(), deblurring.BLIND]
    inside = lambda x: x[:, 1:-1, 1:-1]
    observed = psnr(inside(images["observed"]), inside(truth), 2.0)
    # Noise of 2.55 / 255 is 40 dB, here of 144 pixels; the blur of the second costs it more.
    assert abs(observed[0] - 40.0) < 1.5
    assert observed[1] < 30.0
    better = psnr(inside(images["total variation"]), inside(truth), 2.0)
    assert better[1] > observed[1] + 0.5
    np.testing.assert_allclose(found.sum((1, 2)), 1.0, atol=1e-5)
    figure = deblurring.draw(truth, images, kernels, found)
    assert figure.axes[1].get_title() == f"observed\n{observed[0]:.1f} dB"


def test_other_runs_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        '{"experiment": "experiments/ddpm.py", "preset": "smoke", "config": {}}'
    )
    assert deblurring.main([f"--workdir={tmp_path}", f"--out={tmp_path}"]) == 2
    assert "take one of experiments/restoration.py" in capsys.readouterr().err
