import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import exact_denoiser, network_calls

from jaxgen.processes import linear_schedule
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.ddim import ddim_chain, ddim_inversion_chain

MEAN, STD = 0.3, 0.5
SCHEDULE = linear_schedule(1000)
X0 = MEAN + STD * jax.random.normal(jax.random.key(0), (6, 2))


def run(chain):
    return jax.jit(lambda: run_chain(chain, jax.random.key(1), jnp.arange(6), (2,)))()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_latent_of_gaussian_data_is_its_standardised_value(prediction):
    # The flow of a Gaussian is affine: x_T = sqrt(ab) mean + std_T (x0 - mean) / STD, at the exact marginal.
    predict = exact_denoiser(SCHEDULE, prediction, MEAN, STD)
    latent = run(ddim_inversion_chain(predict, SCHEDULE, X0, num_steps=500, prediction=prediction))
    ab = float(SCHEDULE.alpha_bar[998])  # the last of 500 leading times
    expected = np.sqrt(ab) * MEAN + np.sqrt(ab * STD**2 + 1 - ab) * (np.asarray(X0) - MEAN) / STD
    np.testing.assert_allclose(latent, expected, atol=0.02)  # first order: 500 steps


def test_there_and_back_again_converges():
    predict = exact_denoiser(SCHEDULE, "eps", MEAN, STD)
    errors = []
    for num_steps in (20, 40, 80):
        latent = run(ddim_inversion_chain(predict, SCHEDULE, X0, num_steps=num_steps))
        back = ddim_chain(predict, SCHEDULE, num_steps=num_steps, clip=False)
        errors.append(float(jnp.abs(run(back._replace(init=lambda keys, shape: latent)) - X0).max()))
    # First order: half the step, half the error.
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]
    assert errors[2] < 0.1


def test_one_call_a_step_at_the_times_of_the_steps():
    predict, calls = network_calls(exact_denoiser(SCHEDULE, "eps", MEAN, STD))
    run(ddim_inversion_chain(predict, SCHEDULE, X0, num_steps=5))
    jax.effects_barrier()
    assert [times[0] for times in calls] == [0, 0, 200, 400, 600]
