"""The gradient system on a linear regression whose gradient is known in closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import systems
from jaxgen.types import Mean, UserError

X = jax.random.normal(jax.random.key(0), (12, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])
BATCH = {"x": X, "y": Y}


def _init(key, batch):
    return {"w": jax.random.normal(key, (batch["x"].shape[1],))}, {"seen": jnp.zeros((), jnp.int32)}


def _loss(params, model_state, batch, key):
    error = jnp.square(batch["x"] @ params["w"] - batch["y"])
    mean = Mean.of(error, batch.get("mask"))
    return mean.total / mean.count, ({"loss": mean}, {"seen": model_state["seen"] + 1})


def _system(**kwargs):
    return systems.gradient_system(_init, _loss, optax.sgd(0.1), **kwargs)


def test_one_step_is_gradient_descent_by_hand():
    system = _system()
    state = system.init(jax.random.key(1), BATCH)
    new, metrics = jax.jit(system.step)(state, BATCH)
    gradient = 2 * X.T @ (X @ state.params["w"] - Y) / 12
    np.testing.assert_allclose(new.params["w"], state.params["w"] - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"].value, jnp.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"].value, 0.1 * jnp.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["parameter_norm"].value, jnp.linalg.norm(new.params["w"]), rtol=1e-5)
    assert int(new.step) == 1
    assert int(new.model_state["seen"]) == 1
    assert new.ema is None


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulation_equals_one_pass_even_where_parts_are_masked_unevenly(parts):
    batch = {**BATCH, "mask": jnp.array([1.0] * 5 + [0.0] * 4 + [1.0] * 3)}
    whole, in_parts = _system(), _system(accumulate=parts)
    state = whole.init(jax.random.key(1), batch)
    expected, metrics = jax.jit(whole.step)(state, batch)
    found, metrics_parts = jax.jit(in_parts.step)(state, batch)
    # With 12 parts some are masked whole, and their own mean is 0 / 0.
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5)
    chex.assert_trees_all_close(metrics_parts["loss"], metrics["loss"], rtol=1e-5)
    assert int(found.model_state["seen"]) == parts


def test_ema_is_the_hand_average_and_is_what_samples():
    system = _system(ema_decay=0.5, ema_warmup=False)
    state = system.init(jax.random.key(1), BATCH)
    average = state.params["w"]
    for _ in range(3):
        state, _ = jax.jit(system.step)(state, BATCH)
        average = 0.5 * average + 0.5 * state.params["w"]
    np.testing.assert_allclose(state.ema["w"], average, rtol=1e-6)
    assert state.sampling_params is state.ema
    assert float(jnp.abs(state.ema["w"] - state.params["w"]).max()) > 1e-4


def test_the_key_of_a_step_is_folded_with_its_number_and_never_moves():
    drawn = []

    def noisy_loss(params, model_state, batch, key):
        jax.debug.callback(lambda value: drawn.append(float(value)), jax.random.uniform(key))
        return _loss(params, model_state, batch, key)

    system = systems.gradient_system(_init, noisy_loss, optax.sgd(0.1))
    state = system.init(jax.random.key(1), BATCH)
    step = jax.jit(system.step)
    after, _ = step(state, BATCH)
    after, _ = step(after, BATCH)
    step(state, BATCH)
    jax.effects_barrier()
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]
    chex.assert_trees_all_equal(jax.random.key_data(after.key), jax.random.key_data(state.key))


@pytest.mark.parametrize("kwargs", [{"ema_decay": 1.0}, {"accumulate": 0}])
def test_bad_settings_are_refused(kwargs):
    with pytest.raises(UserError):
        _system(**kwargs)


def test_a_batch_that_does_not_split_is_refused():
    system = _system(accumulate=5)
    with pytest.raises(UserError, match="accumulate=5"):
        jax.eval_shape(system.step, system.init(jax.random.key(0), BATCH), BATCH)


def test_update_system_adds_up_what_it_is_told():
    system = systems.update_system(
        lambda key, batch: {"sum": jnp.zeros(3)},
        lambda params, batch, key: (
            {"sum": params["sum"] + batch["x"].sum(axis=0)},
            {"loss": Mean.of(jax.random.uniform(key, (1,)))},
        ),
    )
    batch = {"x": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    state = system.init(jax.random.key(0), batch)
    losses = []
    for _ in range(2):
        state, metrics = jax.jit(system.step)(state, batch)
        losses.append(float(metrics["loss"].value))
    np.testing.assert_array_equal(state.params["sum"], [6, 10, 14])
    assert int(state.step) == 2
    assert losses[0] != losses[1]  # the step's key is its own
