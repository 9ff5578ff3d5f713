"""Schedules, optimisers and the moving average, against their printed formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import optim
from jaxgen.types import UserError


def _rates(name, **kwargs):
    schedule = optim.make_schedule(name, learning_rate=0.5, num_steps=100, **kwargs)
    return np.asarray([schedule(jnp.int32(n)) for n in range(101)])


def test_warmup_rises_linearly_from_the_first_update():
    rates = _rates("constant", warmup_steps=10)
    np.testing.assert_allclose(rates[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:], 0.5, rtol=1e-6)


def test_cosine_ends_at_zero_and_is_half_way_down_in_the_middle():
    rates = _rates("cosine", warmup_steps=20)
    np.testing.assert_allclose(rates[60], 0.25, rtol=1e-5)
    np.testing.assert_allclose(rates[100], 0.0, atol=1e-7)
    p = (np.arange(20, 101) - 20) / 80
    np.testing.assert_allclose(rates[20:], 0.25 * (1 + np.cos(np.pi * p)), rtol=1e-4, atol=1e-7)


def test_rsqrt_is_the_transformer_schedule_up_to_its_factor():
    # Vaswani et al. 2017, eq. 3: d^-0.5 min(n^-0.5, n warmup^-1.5), here scaled to peak at the learning rate.
    n, warmup = np.arange(1, 102), 16
    expected = np.minimum(n**-0.5, n * warmup**-1.5) * np.sqrt(warmup) * 0.5
    np.testing.assert_allclose(_rates("rsqrt", warmup_steps=warmup), expected, rtol=1e-5)


def test_step_drops_at_the_given_updates():
    rates = _rates("step", decay_rate=0.1, decay_steps=(30, 60))
    np.testing.assert_allclose(rates[[29, 30, 59, 60]], [0.5, 0.05, 0.05, 0.005], rtol=1e-5)


def test_exponential_has_fallen_by_decay_rate_at_the_end():
    rates = _rates("exponential", decay_rate=0.01)
    np.testing.assert_allclose(rates[100] / rates[0], 0.01, rtol=1e-4)
    np.testing.assert_allclose(rates[1:] / rates[:-1], 0.01 ** (1 / 100), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cosin", {}),
        ("rsqrt", {}),
        ("step", {}),
        ("constant", {"warmup_steps": -1}),
        ("exponential", {"decay_rate": 0.0}),
    ],
)
def test_bad_schedules_are_refused(name, kwargs):
    with pytest.raises(UserError):
        optim.make_schedule(name, learning_rate=0.1, num_steps=10, **kwargs)


PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
GRADS = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, -1.0)}


def _update(name, **kwargs):
    optimizer = optim.make_optimizer(name, lambda count: 0.1, **kwargs)
    return optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0]


def test_adam_is_optax_adam():
    expected = optax.adam(0.1, b1=0.8, b2=0.9, eps=1e-6)
    chex.assert_trees_all_close(
        _update("adam", b1=0.8, b2=0.9, eps=1e-6), expected.update(GRADS, expected.init(PARAMS))[0]
    )


def test_weight_decay_spares_biases_and_is_decoupled_in_adam():
    plain, decayed = _update("adam"), _update("adam", weight_decay=0.5)
    np.testing.assert_allclose(decayed["kernel"], plain["kernel"] - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(decayed["bias"], plain["bias"])


def test_sgd_weight_decay_is_part_of_the_gradient():
    update = _update("sgd", b1=0.9, weight_decay=0.5)
    np.testing.assert_allclose(update["kernel"], -0.1 * (2.0 + 0.5), rtol=1e-6)
    np.testing.assert_allclose(update["bias"], 0.1, rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    update = _update("sgd", b1=0.0, clip_norm=0.3)
    np.testing.assert_allclose(optax.tree.norm(update), 0.1 * 0.3, rtol=1e-5)


def test_ema_warmup_and_update():
    decays = [float(optim.ema_decay_at(jnp.int32(n), 0.999, warmup=True)) for n in (0, 9, 10**6)]
    np.testing.assert_allclose(decays, [1 / 10, 10 / 19, 0.999], rtol=1e-6)
    assert float(optim.ema_decay_at(jnp.int32(0), 0.999, warmup=False)) == pytest.approx(0.999)
    ema = optim.ema_update({"w": jnp.float32(1.0)}, {"w": jnp.float32(3.0)}, jnp.float32(0.75))
    assert float(ema["w"]) == pytest.approx(0.75 * 1 + 0.25 * 3)
    half = optim.ema_update(
        {"w": jnp.ones((), jnp.bfloat16)}, {"w": jnp.zeros((), jnp.bfloat16)}, jnp.float32(0.5)
    )
    assert half["w"].dtype == jnp.bfloat16


def test_schedule_works_under_jit():
    schedule = optim.make_schedule("cosine", learning_rate=1.0, num_steps=10, warmup_steps=2)
    for n in range(11):
        np.testing.assert_allclose(jax.jit(schedule)(n), schedule(n), rtol=1e-6, atol=1e-7)
