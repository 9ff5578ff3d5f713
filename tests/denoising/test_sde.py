import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import network_calls
from sampler_checks import (
    MEAN,
    STD,
    assert_moments,
    assert_samples_do_not_depend_on_the_batch,
    assert_the_modes_are_right,
    calls_of,
    draw,
    gaussian_denoiser,
    num_traces,
    two_modes_denoiser,
)

from jaxgen.denoising import sub_vp_sde, ve_sde, vp_sde
from jaxgen.samplers.sde import reverse_sde_chain, reverse_sde_step
from jaxgen.types import UserError

SDES = {"ve": ve_sde(0.05, 50.0), "vp": vp_sde(), "sub_vp": sub_vp_sde()}


def moments_of_the_recursion(sde, num_steps, t_end, corrector_steps, snr):
    """Mean and standard deviation at the end for Gaussian data, in float64: all steps are affine in x."""
    mean, variance = 0.0, sde.prior_std**2
    dt = (1.0 - t_end) / num_steps
    t = 1.0 - dt * jnp.arange(num_steps)
    coefficients = [f(t).tolist() for f in (sde.scale, sde.std, sde.drift, sde.diffusion)]
    for i, (scale, std, drift, diffusion) in enumerate(zip(*coefficients, strict=True)):
        precision = 1.0 / ((scale * STD) ** 2 + std**2)  # the score is precision (scale MEAN - x)
        alpha = 4.0 * (snr * std) ** 2
        for _ in range(corrector_steps):
            keep = 1.0 - 0.5 * alpha * precision
            mean, variance = keep * mean + (1.0 - keep) * scale * MEAN, keep**2 * variance + alpha
        pull = diffusion**2 * precision * dt
        keep = 1.0 - drift * dt - pull
        mean = keep * mean + pull * scale * MEAN
        variance = keep**2 * variance + (diffusion**2 * dt if i < num_steps - 1 else 0.0)
    return mean, np.sqrt(variance)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("corrector_steps", [0, 2])
def test_samples_have_the_moments_of_the_recursion(name, corrector_steps):
    kwargs = {"num_steps": 60, "t_end": 0.01, "corrector_steps": corrector_steps, "snr": 0.2}
    samples = draw(reverse_sde_chain(gaussian_denoiser, SDES[name], **kwargs), 3000)
    assert_moments(samples, *moments_of_the_recursion(SDES[name], **kwargs))


@pytest.mark.parametrize("name", SDES)
def test_the_recursion_goes_to_the_data_as_steps_shrink(name):
    errors = []
    for num_steps in (30, 1000):
        mean, std = moments_of_the_recursion(SDES[name], num_steps, 1e-3, 0, 0.1)
        errors.append(abs(mean - MEAN) + abs(std - STD))
    # What is left for the VE SDE is the noise of sigma_min = 0.05, with which it ends.
    assert errors[1] < 0.003
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(("name", "num_steps", "corrector_steps"), [("ve", 300, 0), ("vp", 150, 1)])
def test_the_modes_of_a_mixture_are_right(name, num_steps, corrector_steps):
    chain = reverse_sde_chain(
        two_modes_denoiser, SDES[name], num_steps=num_steps, corrector_steps=corrector_steps
    )
    # The bias of the steps, of order 1 / num_steps.
    assert_the_modes_are_right(draw(chain, 2000), bias=0.06)


def test_a_step_by_hand():
    # VP at t = 0.5: beta = 10.05, drift -5.025.
    x, score, noise = (jnp.full((1, 2), value) for value in (2.0, -1.0, 0.5))
    expected = 2.0 + (5.025 * 2.0 - 10.05) * 0.01 + np.sqrt(10.05 * 0.01) * 0.5
    step = reverse_sde_step(SDES["vp"], x, score, jnp.full(1, 0.5), 0.01, noise)
    np.testing.assert_allclose(step, np.full((1, 2), expected), rtol=1e-6)


@pytest.mark.parametrize("corrector_steps", [0, 2])
def test_the_network_calls_and_their_noise_levels(corrector_steps):
    sde = SDES["sub_vp"]
    counted, calls = network_calls(gaussian_denoiser)
    chain = reverse_sde_chain(counted, sde, num_steps=4, t_end=0.2, corrector_steps=corrector_steps)
    t = jnp.repeat(jnp.array([1.0, 0.8, 0.6, 0.4]), 1 + corrector_steps)
    np.testing.assert_allclose(calls_of(chain, calls), sde.std(t) / sde.scale(t), rtol=1e-5)


@pytest.mark.parametrize("corrector_steps", [0, 2])
def test_batches_and_traces(corrector_steps):
    def make(network, num_steps):
        return reverse_sde_chain(network, SDES["vp"], num_steps=num_steps, corrector_steps=corrector_steps)

    assert_samples_do_not_depend_on_the_batch(make(gaussian_denoiser, 6))
    counts = [num_traces(lambda network: make(network, n), gaussian_denoiser) for n in (3, 40)]
    assert counts == ([1, 1] if corrector_steps == 0 else [2, 2])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "at least 1 step"),
        ({"num_steps": 5, "corrector_steps": -1}, "0 corrector steps"),
        ({"num_steps": 5, "t_end": 0.0}, "0 < t_end < 1"),
        ({"num_steps": 5, "snr": 0.0}, "snr > 0"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(UserError, match=message):
        reverse_sde_chain(gaussian_denoiser, SDES["vp"], **kwargs)
