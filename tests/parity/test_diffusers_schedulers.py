"""Our reverse steps against diffusers' schedulers, step by step, given the same network output and noise."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.processes import cosine_schedule, linear_schedule, q_sample, respace, v_target
from jaxgen.samplers.ddim import ddim_step
from jaxgen.samplers.ddpm import ancestral_step

torch = pytest.importorskip("torch", reason="parity needs PyTorch: install jaxgen[peers]")
with warnings.catch_warnings():
    # What diffusers itself imports, and how, is not ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: install jaxgen[peers]")
    from diffusers import DDIMScheduler, DDPMScheduler

SCHEDULES = {"linear": ("linear", linear_schedule), "cosine": ("squaredcos_cap_v2", cosine_schedule)}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
T = 1000
SHAPE = (2, 4, 4, 1)


def scheduler(cls, schedule, prediction, clip, **kwargs):
    """diffusers' scheduler, with its alpha_bar in float64.

    It multiplies alpha_bar up in float32 and takes 1 - alpha_bar from that, which keeps three or four digits
    of the first steps. The comparison is of formulas, so that is taken out of it; `test_schedules` compares
    its own numbers.
    """
    theirs = cls(
        num_train_timesteps=T,
        beta_schedule=SCHEDULES[schedule][0],
        prediction_type=PREDICTIONS[prediction],
        clip_sample=clip,
        **kwargs,
    )
    theirs.alphas_cumprod = torch.cumprod(1.0 - theirs.betas.double(), dim=0)
    return theirs


def trajectory(step, times, key):
    """Run both sides along our trajectory; the differences of each step from their result.

    The "network" is a function of x_t and t that keeps x_t of order 1. Of a thousand steps every 40th is
    taken, and the first and the last five.
    """
    chosen = sorted(
        {*range(0, len(times), max(1, len(times) // 25)), *range(5), *range(len(times) - 5, len(times))}
    )
    x = np.asarray(jax.random.normal(key, SHAPE))
    errors = []
    for i in chosen:
        t = times[i]
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).numpy()
        output = (0.5 * x + 0.3 * np.sin(0.01 * t)).astype(np.float32)
        ours, theirs = step(i, int(t), x, output, noise)
        errors.append(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))
        x = np.clip(np.asarray(ours), -3.0, 3.0)
    return np.array(errors)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    theirs = DDPMScheduler(num_train_timesteps=T, beta_schedule=SCHEDULES[name][0])
    ours = SCHEDULES[name][1](T)
    np.testing.assert_allclose(ours.beta, theirs.betas, rtol=2e-6)
    # Theirs is a product of a thousand float32 numbers, the last of cosine with 1 - beta = 0.001.
    np.testing.assert_allclose(ours.alpha_bar, theirs.alphas_cumprod, rtol=1e-4)
    x0, eps = (np.asarray(jax.random.normal(k, (T, 3))) for k in jax.random.split(jax.random.key(0)))
    t = jnp.arange(T)
    tensors = torch.tensor(x0), torch.tensor(eps), torch.arange(T)
    # 1 - alpha_bar in float32 is off by up to 6e-8 / 4e-5 of itself.
    np.testing.assert_allclose(q_sample(ours, x0, t, eps), theirs.add_noise(*tensors), atol=2e-5)
    np.testing.assert_allclose(v_target(ours, x0, t, eps), theirs.get_velocity(*tensors), atol=2e-5)


@pytest.mark.parametrize("num_steps", [T, 50])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_steps(schedule, prediction, variance, num_steps):
    theirs = scheduler(DDPMScheduler, schedule, prediction, clip=True, variance_type=variance)
    theirs.set_timesteps(num_steps)
    ours = respace(SCHEDULES[schedule][1](T), num_steps, "leading")
    np.testing.assert_array_equal(theirs.timesteps, ours.timestep[::-1])

    @jax.jit
    def our_step(x, t, output, noise):
        return ancestral_step(ours, x, t, output, noise, prediction=prediction, variance=variance, clip=True)

    def step(i, t, x, output, noise):
        times = jnp.full(2, num_steps - 1 - i)
        generator = torch.Generator().manual_seed(i)
        result = theirs.step(torch.tensor(output), t, torch.tensor(x), generator=generator)
        return our_step(x, times, output, noise), result.prev_sample.numpy()

    errors = trajectory(step, theirs.timesteps.numpy(), jax.random.key(0))
    assert errors.max() < 2e-6  # float32 rounding, measured below 3e-7


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_steps(schedule, prediction, eta, clip):
    num_steps = 50
    theirs = scheduler(DDIMScheduler, schedule, prediction, clip=clip, set_alpha_to_one=True)
    theirs.set_timesteps(num_steps)
    ours = respace(SCHEDULES[schedule][1](T), num_steps, "leading")
    np.testing.assert_array_equal(theirs.timesteps, ours.timestep[::-1])

    @jax.jit
    def our_step(x, t, output, noise):
        return ddim_step(ours, x, t, output, noise, eta=eta, prediction=prediction, clip=clip)

    def step(i, t, x, output, noise):
        result = theirs.step(
            torch.tensor(output),
            t,
            torch.tensor(x),
            eta=eta,
            use_clipped_model_output=True,  # eps made to agree with the clipped x0, as ours
            variance_noise=torch.tensor(noise),
        )
        return our_step(x, jnp.full(2, num_steps - 1 - i), output, noise), result.prev_sample.numpy()

    errors = trajectory(step, theirs.timesteps.numpy(), jax.random.key(0))
    assert errors.max() < 2e-6  # float32 rounding, measured below 3e-7
