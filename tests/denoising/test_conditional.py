"""Inpainting and DPS on two-dimensional data, as images of 1x2 pixels, whose conditionals are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import mixtures, operators
from jaxgen.denoising import ddpm_from_denoiser, geometric_sigmas
from jaxgen.mixtures import gaussian_mixture
from jaxgen.processes import linear_schedule, respace
from jaxgen.samplers import conditional
from jaxgen.samplers.chain import run_chain
from jaxgen.types import UserError

COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])
GAUSSIAN = gaussian_mixture([1.0], [[0.0, 0.0]], COVARIANCE[None])
MODES = gaussian_mixture([0.5, 0.5], [[-1.5, 1.5], [1.5, -1.5]], 0.04 * np.stack([np.eye(2)] * 2))
MASK = jnp.array([[[[1.0], [0.0]]]])
N = 1500
SCHEDULE = linear_schedule(1000)
FEW = respace(SCHEDULE, 100)


def denoiser_of(mixture):
    return lambda x, sigma: mixtures.denoise(mixture, x, sigma)


def network_of(mixture):
    return ddpm_from_denoiser(denoiser_of(mixture), SCHEDULE, "eps")


def known(value):
    return jnp.full((N, 1, 2, 1), value)


def draw(chain, num=N):
    run = jax.jit(lambda: run_chain(chain, jax.random.key(0), jnp.arange(num), (1, 2, 1)))
    return np.asarray(run())[:, 0, :, 0]


def assert_conditional(samples, mean, std, bias):
    """The known pixel is kept, and the other has these moments within 4 standard errors and a bias."""
    np.testing.assert_array_equal(samples[:, 0], np.float32(1.0))
    assert abs(samples[:, 1].mean() - mean) < 4 * std / np.sqrt(N) + bias
    assert abs(samples[:, 1].std() - std) < 4 * std / np.sqrt(2 * N) + bias


def test_langevin_inpainting_draws_from_the_conditional():
    # x2 | x1 = 1 is N(0.8, 0.36). The last level's noise of 0.05 and step of 0.01 leave a small bias.
    chain = conditional.langevin_inpainting_chain(
        denoiser_of(GAUSSIAN),
        geometric_sigmas(3.0, 0.05, 8),
        known(1.0),
        MASK,
        steps_per_level=60,
        step_size=5e-4,
    )
    assert_conditional(draw(chain), 0.8, 0.6, bias=0.03)


def test_repaint_draws_from_the_conditional():
    chain = conditional.repaint_chain(
        network_of(GAUSSIAN), FEW, known(1.0), MASK, jump_length=10, num_resamples=10, clip=False
    )
    assert_conditional(draw(chain), 0.8, 0.6, bias=0.08)


@pytest.mark.parametrize("name", ["langevin", "repaint", "dps"])
def test_the_filling_fits_the_known_pixel(name):
    # The modes are (-1.5, 1.5) and (1.5, -1.5): a known 1.5 means that the other is -1.5.
    if name == "langevin":
        chain = conditional.langevin_inpainting_chain(
            denoiser_of(MODES),
            geometric_sigmas(5.0, 0.1, 8),
            known(1.5),
            MASK,
            steps_per_level=20,
            step_size=5e-3,
        )
    elif name == "repaint":
        chain = conditional.repaint_chain(
            network_of(MODES), FEW, known(1.5), MASK, num_resamples=5, clip=False
        )
    else:
        operator = operators.masking(MASK)
        y = operator.apply(known(1.5))
        chain = conditional.dps_chain(network_of(MODES), FEW, operator, y, scale=0.3, clip=False)
    samples = draw(chain)
    right = (np.abs(samples[:, 1] + 1.5) < 0.8) & (np.abs(samples[:, 0] - 1.5) < 0.8)
    assert right.mean() > 0.97


def test_dps_against_its_equation():
    """One step, the first: mean of the reverse step less 2 scale grad ||y - A x0_hat||."""
    operator, scale = operators.masking(MASK), 0.4
    y = operator.apply(jnp.array([[[[1.0], [0.0]]]]))
    predict = network_of(GAUSSIAN)
    chain = conditional.dps_chain(predict, FEW, operator, y, scale=scale, clip=False)
    plain = conditional.dps_chain(predict, FEW, operator, y, scale=1e-9, clip=False)
    x = jnp.array([[[[0.7], [-0.2]]]])

    def step(chain):
        keys = jax.vmap(jax.random.key)(jnp.arange(1))
        return np.asarray(chain.step(keys, x, jnp.int32(60)))

    moved, unmoved = step(chain), step(plain)
    # x0_hat = C sqrt(ab) (ab C + (1 - ab) I)^-1 x_t; its first row times the sign of the residual.
    ab = float(FEW.alpha_bar[60])
    gain = COVARIANCE * np.sqrt(ab) @ np.linalg.inv(ab * COVARIANCE + (1 - ab) * np.eye(2))
    residual = 1.0 - (gain @ [0.7, -0.2])[0]
    expected = 2 * scale * np.sign(residual) * gain[0]
    np.testing.assert_allclose((moved - unmoved).ravel(), expected, atol=2e-3)


def test_repaint_levels():
    # T = 6, jumps of 2, twice: down to 3, up to 5, and so on from 1.
    assert conditional.repaint_levels(6, 2, 2).tolist() == [6, 5, 4, 3, 4, 5, 4, 3, 2, 1, 2, 3, 2, 1, 0]
    assert conditional.repaint_levels(4, 1, 1).tolist() == [4, 3, 2, 1, 0]
    # As often as the paper's: 250 steps, jumps of 10, 10 times: 24 places, 9 jumps each, up and down by 10.
    assert len(conditional.repaint_levels(250, 10, 10)) - 1 == 250 + 24 * 9 * 20


@pytest.mark.parametrize(
    "call",
    [
        lambda: conditional.repaint_levels(10, 0, 1),
        lambda: conditional.repaint_levels(10, 11, 1),
        lambda: conditional.repaint_levels(10, 2, 0),
        lambda: conditional.dps_chain(network_of(MODES), FEW, operators.identity(), known(0.0), scale=0.0),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
