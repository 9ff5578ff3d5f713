"""The system of two players against a loop written by hand, on players of a few numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import systems
from jaxgen.types import Mean, UserError

BATCH = {"x": jax.random.normal(jax.random.key(0), (12, 2))}
RATES = {"discriminator": 0.1, "generator": 0.05}


def _init(key, batch):
    params = {
        player: {"w": jax.random.normal(jax.random.fold_in(key, number), (2,))}
        for number, player in enumerate(("discriminator", "generator"))
    }
    return params, {"discriminator": {"updates": jnp.zeros((), jnp.int32)}, "generator": {}}


def _discriminator_loss(params, model_state, batch, key):
    """Its own noise, its rows, and the other player all matter."""
    target = params["generator"]["w"][None] + 0.1 * jax.random.normal(key, (1, 2))
    error = jnp.sum(jnp.square(params["discriminator"]["w"][None] * batch["x"] - target), axis=1)
    mean = Mean.of(error)
    seen = {"updates": model_state["discriminator"]["updates"] + 1}
    metrics = {"loss": mean, "first_row": Mean.of(batch["x"][:1, 0])}
    return mean.value, (metrics, {**model_state, "discriminator": seen})


def _generator_loss(params, model_state, batch, key):
    error = jnp.square(params["generator"]["w"] * params["discriminator"]["w"] - jax.random.uniform(key))
    mean = Mean.of(jnp.sum(error)[None] * jnp.ones(batch["x"].shape[0]))
    return mean.value, ({"loss": mean}, model_state)


def _optimizer(player):
    """With momentum, so that a mixed-up opt_state shows."""
    return optax.sgd(RATES[player], momentum=0.9)


def _system(**options):
    optimizers = {f"{player}_optimizer": _optimizer(player) for player in RATES}
    return systems.alternating_system(_init, _discriminator_loss, _generator_loss, **optimizers, **options)


def _by_hand(state, num_critic, decay):
    """A step: each player's own optimiser, each update's own rows and key."""
    params, opt_state, model_state = dict(state.params), dict(state.opt_state), state.model_state
    key = jax.random.fold_in(state.key, state.step)
    drawn = []
    for number in range(num_critic + 1):
        player = "discriminator" if number < num_critic else "generator"
        loss = _discriminator_loss if number < num_critic else _generator_loss
        part = {"x": BATCH["x"][min(number, num_critic - 1) :: num_critic]}  # rows dealt out in turn

        def of_own(own, player=player, loss=loss, part=part, number=number, params=params, state=model_state):
            return loss({**params, player: own}, state, part, jax.random.fold_in(key, number))

        (value, (_, model_state)), grad = jax.value_and_grad(of_own, has_aux=True)(params[player])
        drawn.append((value, optax.tree.norm(grad)))
        updates, opt_state[player] = _optimizer(player).update(grad, opt_state[player])
        params[player] = optax.apply_updates(params[player], updates)
    average = None
    if state.ema is not None:
        average = {
            "generator": {"w": decay * state.ema["generator"]["w"] + (1 - decay) * params["generator"]["w"]}
        }
    return state._replace(
        step=state.step + 1, params=params, opt_state=opt_state, model_state=model_state, ema=average
    ), drawn


@pytest.mark.parametrize("num_critic", [1, 3])
def test_steps_equal_a_loop_by_hand_and_the_average_is_the_generators(num_critic):
    system = _system(num_critic=num_critic, ema_decay=0.5, ema_warmup=False)
    state = by_hand = jax.jit(system.init)(jax.random.key(1), BATCH)
    step = jax.jit(system.step)
    loop = jax.jit(_by_hand, static_argnums=(1, 2))
    for _ in range(2):
        state, metrics = step(state, BATCH)
        by_hand, drawn = loop(by_hand, num_critic, 0.5)
        # Float32 sums in another order.
        chex.assert_trees_all_close(state._replace(key=0), by_hand._replace(key=0), rtol=1e-5, atol=1e-7)
        of_critic, (generator_loss, generator_norm) = np.asarray(drawn[:-1]), drawn[-1]
        np.testing.assert_allclose(metrics["loss"].value, of_critic[:, 0].mean(), rtol=1e-5)
        np.testing.assert_allclose(
            metrics["discriminator_gradient_norm"].value, of_critic[:, 1].mean(), rtol=1e-5
        )
        np.testing.assert_allclose(metrics["generator_loss"].value, generator_loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["generator_gradient_norm"].value, generator_norm, rtol=1e-5)
        # Each update saw rows of its own: its first row is the row of its number.
        first_rows = BATCH["x"][:num_critic, 0]
        np.testing.assert_allclose(
            metrics["discriminator_first_row"].value, first_rows.mean(), rtol=1e-5, atol=1e-7
        )
    assert int(state.step) == 2
    assert int(state.model_state["discriminator"]["updates"]) == 2 * num_critic
    assert set(state.ema) == {"generator"}
    assert state.sampling_params is state.ema
    chex.assert_trees_all_equal(jax.random.key_data(state.key), jax.random.key_data(by_hand.key))
    assert not np.allclose(state.ema["generator"]["w"], state.params["generator"]["w"])


def test_without_jit_and_in_a_scan_a_step_is_the_same_and_nothing_is_averaged_unasked():
    system = _system(num_critic=2)
    start = jax.jit(system.init)(jax.random.key(1), BATCH)
    assert start.ema is None
    step = jax.jit(system.step)
    once, _ = step(start, BATCH)
    twice, _ = step(once, BATCH)
    with jax.disable_jit():
        plain, _ = system.step(start, BATCH)
    chex.assert_trees_all_close(plain._replace(key=0), once._replace(key=0), rtol=1e-5, atol=1e-7)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), BATCH)
    scanned, _ = jax.jit(lambda state, batches: jax.lax.scan(system.step, state, batches))(start, stacked)
    chex.assert_trees_all_close(scanned._replace(key=0), twice._replace(key=0), rtol=1e-6, atol=1e-7)
    assert "generator" in twice.sampling_params


def _noiseless(params, model_state, batch, key):
    return _discriminator_loss(params, model_state, batch, jax.random.key(9))


def test_accumulation_is_the_gradient_of_the_whole_part():
    optimizers = {f"{player}_optimizer": optax.sgd(rate) for player, rate in RATES.items()}
    of_generator = lambda params, state, batch, key: _generator_loss(params, state, batch, jax.random.key(8))
    whole, in_parts = (
        systems.alternating_system(
            _init, _noiseless, of_generator, **optimizers, num_critic=2, accumulate=accumulate
        )
        for accumulate in (1, 3)
    )
    state = whole.init(jax.random.key(1), BATCH)
    (expected, metrics), (found, metrics_parts) = (jax.jit(s.step)(state, BATCH) for s in (whole, in_parts))
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5)
    np.testing.assert_allclose(metrics_parts["loss"].value, metrics["loss"].value, rtol=1e-5)
    assert int(found.model_state["discriminator"]["updates"]) == 6


@pytest.mark.parametrize("options", [{"ema_decay": 1.0}, {"num_critic": 0}, {"accumulate": 0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(UserError):
        _system(**options)


def test_a_batch_that_does_not_divide_among_the_updates_is_refused():
    system = _system(num_critic=5)
    state = system.init(jax.random.key(0), BATCH)
    with pytest.raises(UserError, match="12 rows"):
        jax.eval_shape(system.step, state, BATCH)
