"""What turns a loss into something trainable: a `System`, a pair of pure functions (init, step)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from jaxgen import optim
from jaxgen.types import Batch, Key, LossFn, Mean, Metrics, PyTree, System, TrainState, UserError


def _once(value: jax.Array) -> Mean:
    return Mean(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))


def _merge(a: Metrics, b: Metrics) -> Metrics:
    return jax.tree.map(jnp.add, a, b)


def _split_batch(batch: Batch, parts: int) -> Batch:
    """Every field [B, ...] -> [parts, B / parts, ...].

    Rows are dealt out in turn, so that a batch laid over devices in blocks gives every device its share of
    every part and nothing moves between devices.
    """

    def split(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] % parts:
            raise UserError(f"optim.accumulate={parts} does not divide the batch of {leaf.shape[0]}.")
        return jnp.moveaxis(leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def _accumulated_gradient(
    loss_fn: LossFn, params: PyTree, model_state: PyTree, batch: Batch, key: Key, parts: int
) -> tuple[PyTree, Metrics, PyTree]:
    """The gradient of the mean loss over the whole batch, from `parts` passes over a part each.

    Parts are weighted by the count of their loss, so that masked items weigh nothing.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def add_part(carry, part_and_index):
        grad_sum, metrics_sum, model_state = carry
        part, index = part_and_index
        (_, (metrics, model_state)), grad = value_and_grad(
            params, model_state, part, jax.random.fold_in(key, index)
        )
        weight = metrics["loss"].count
        # where, not a product alone: a part that is masked whole may have the gradient 0 / 0.
        grad_sum = jax.tree.map(lambda s, g: s + jnp.where(weight > 0, weight * g, 0.0), grad_sum, grad)
        return (grad_sum, _merge(metrics_sum, metrics), model_state), None

    parts_batch = _split_batch(batch, parts)
    first = jax.tree.map(lambda leaf: leaf[0], parts_batch)
    _, (metrics_shape, _) = jax.eval_shape(loss_fn, params, model_state, first, key)
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
    carry = (zeros(params), zeros(metrics_shape), model_state)
    (grad_sum, metrics, model_state), _ = jax.lax.scan(add_part, carry, (parts_batch, jnp.arange(parts)))
    count = metrics["loss"].count
    return jax.tree.map(lambda g: g / count, grad_sum), metrics, model_state


def _descend(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    model_state: PyTree,
    batch: Batch,
    key: Key,
    accumulate: int,
) -> tuple[PyTree, PyTree, PyTree, Metrics]:
    """(params, opt_state, model_state) after one update along the gradient, and the loss's metrics.

    Added to these are the global norms of the gradient (before clipping), the update and the parameters
    after it.
    """
    if accumulate == 1:
        (_, (metrics, model_state)), grad = jax.value_and_grad(loss_fn, has_aux=True)(
            params, model_state, batch, key
        )
    else:
        grad, metrics, model_state = _accumulated_gradient(
            loss_fn, params, model_state, batch, key, accumulate
        )
    updates, opt_state = optimizer.update(grad, opt_state, params)
    params = optax.apply_updates(params, updates)
    norms = {
        "gradient_norm": _once(optax.tree.norm(grad)),
        "update_norm": _once(optax.tree.norm(updates)),
        "parameter_norm": _once(optax.tree.norm(params)),
    }
    return params, opt_state, model_state, {**metrics, **norms}


def gradient_system(
    init_variables: Callable[[Key, Batch], tuple[PyTree, PyTree]],
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.0,
    ema_warmup: bool = True,
    accumulate: int = 1,
) -> System:
    """Gradient descent on one loss.

    init_variables: (key, batch) -> (params, model_state)
    ema_decay: 0 keeps no average of the weights.
    accumulate: the batch is worked through in this many parts, for batches larger than memory.

    Each step reports, besides the loss's own metrics, the global norms of the gradient (before clipping),
    the update and the parameters after it: the first of them to stop being finite names the culprit.
    """
    if not 0 <= ema_decay < 1:
        raise UserError(f"optim.ema_decay must be in [0, 1), not {ema_decay}.")
    if accumulate < 1:
        raise UserError(f"optim.accumulate must be at least 1, not {accumulate}.")

    def init(key: Key, batch: Batch) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params, model_state = init_variables(init_key, batch)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema_decay else None,
            key=run_key,
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        params, opt_state, model_state, metrics = _descend(
            loss_fn, optimizer, state.params, state.opt_state, state.model_state, batch, key, accumulate
        )
        ema = state.ema
        if ema is not None:
            decay = optim.ema_decay_at(state.step, ema_decay, warmup=ema_warmup)
            ema = optim.ema_update(ema, params, decay)
        return TrainState(state.step + 1, params, model_state, opt_state, ema, state.key), metrics

    return System(init, step)


def alternating_system(
    init_variables: Callable[[Key, Batch], tuple[PyTree, PyTree]],
    discriminator_loss: LossFn,
    generator_loss: LossFn,
    *,
    discriminator_optimizer: optax.GradientTransformation,
    generator_optimizer: optax.GradientTransformation,
    num_critic: int = 1,
    ema_decay: float = 0.0,
    ema_warmup: bool = True,
    accumulate: int = 1,
) -> System:
    """Two players in turn: a step is `num_critic` updates of the discriminator, then one of the generator.

    init_variables: (key, batch) -> (params, model_state), both {"discriminator": ..., "generator": ...}
    discriminator_loss, generator_loss: of all params; each player moves along the gradient in its own part
        and the other's are constants. The model_state that a loss returns goes on to the next update.
    num_critic: the batch is dealt out in this many parts, and each update of the discriminator sees one of
        its own; the generator's loss gets the last of them.
    ema_decay: 0 keeps no average; else `ema` is {"generator": average}, as `params` is for sampling.
    accumulate: each update works through its part in this many smaller ones, for parts larger than memory.

    Update number i of step n has the key fold_in(fold_in(key, n), i), the generator's being number
    `num_critic`. Reported are the discriminator's loss as "loss", the generator's as "generator_loss", what
    else a player's loss reports with the player's name before it, and for either player the norms of
    `gradient_system`; the discriminator's are means over its updates.
    """
    if not 0 <= ema_decay < 1:
        raise UserError(f"optim.ema_decay must be in [0, 1), not {ema_decay}.")
    if accumulate < 1 or num_critic < 1:
        raise UserError(
            f"optim.accumulate and num_critic must be at least 1, not {accumulate} and {num_critic}."
        )
    losses = {"discriminator": discriminator_loss, "generator": generator_loss}
    optimizers = {"discriminator": discriminator_optimizer, "generator": generator_optimizer}

    def init(key: Key, batch: Batch) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params, model_state = init_variables(init_key, batch)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state={player: optimizer.init(params[player]) for player, optimizer in optimizers.items()},
            ema={"generator": jax.tree.map(jnp.copy, params["generator"])} if ema_decay else None,
            key=run_key,
        )

    def update(player: str, state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        def loss_of_own(own: PyTree, model_state: PyTree, batch: Batch, key: Key):
            return losses[player]({**state.params, player: own}, model_state, batch, key)

        own, opt_state, model_state, metrics = _descend(
            loss_of_own,
            optimizers[player],
            state.params[player],
            state.opt_state[player],
            state.model_state,
            batch,
            key,
            accumulate,
        )
        moved = state._replace(
            params={**state.params, player: own},
            model_state=model_state,
            opt_state={**state.opt_state, player: opt_state},
        )
        named = {f"{player}_{name}": mean for name, mean in metrics.items()}
        return moved, named

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % num_critic:
            raise UserError(f"The {rows} rows of a step do not divide among {num_critic} updates.")
        key = jax.random.fold_in(state.key, state.step)
        parts = _split_batch(batch, num_critic)

        def criticise(state: TrainState, part_and_index: tuple[Batch, jax.Array]):
            part, index = part_and_index
            return update("discriminator", state, part, jax.random.fold_in(key, index))

        state, stacked = jax.lax.scan(criticise, state, (parts, jnp.arange(num_critic)))
        metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)
        last = jax.tree.map(lambda leaf: leaf[-1], parts)
        state, of_generator = update("generator", state, last, jax.random.fold_in(key, num_critic))
        ema = state.ema
        if ema is not None:
            decay = optim.ema_decay_at(state.step, ema_decay, warmup=ema_warmup)
            ema = optim.ema_update(ema, {"generator": state.params["generator"]}, decay)
        metrics = {**metrics, **of_generator}
        metrics["loss"] = metrics.pop("discriminator_loss")
        return state._replace(step=state.step + 1, ema=ema), metrics

    return System(init, step)


def update_system(
    init_params: Callable[[Key, Batch], PyTree],
    update: Callable[[PyTree, Batch, Key], tuple[PyTree, Metrics]],
) -> System:
    """What moves its parameters by a rule of its own: EM iterations, sums of statistics, updates of rows.

    init_params: (key, batch) -> params
    update: (params, batch, key) -> (the params after it, metrics); the key is that of the step
    """

    def init(key: Key, batch: Batch) -> TrainState:
        init_key, run_key = jax.random.split(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=init_params(init_key, batch),
            model_state={},
            opt_state=(),
            ema=None,
            key=run_key,
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        params, metrics = update(state.params, batch, key)
        return state._replace(step=state.step + 1, params=params), metrics

    return System(init, step)


def row_descent(
    parts: Sequence[
        tuple[Callable[[Mapping[str, jax.Array]], jax.Array], Mapping[str, tuple[str, jax.Array]]]
    ],
    tables: Mapping[str, jax.Array],
    rate: jax.Array,
    longest: float = 0.0,
) -> dict[str, jax.Array]:
    """One step of gradient descent on a sum of losses, touching only the rows that they look at.

    parts: of each loss (loss, look_ups), where loss: {name: rows [..., D]} -> scalar and look_ups: {name:
        (table, row numbers [...])}; a row looked up several times gets the sum of its gradients. Parts do not
        wait for each other, so that XLA on CPU works several out at once.
    tables: {table: [V, D]}
    rate: scalar
    longest: a look-up moves its row by a step of this length at most; 0: of any

    All of a table's rows are written by a single scatter: with two in turn XLA on CPU copies the table.
    """
    numbers: dict[str, list[jax.Array]] = {table: [] for table in tables}
    steps: dict[str, list[jax.Array]] = {table: [] for table in tables}
    for loss, look_ups in parts:
        rows = {name: tables[table][where] for name, (table, where) in look_ups.items()}
        # Times the rate from the start, where the arrays are small.
        gradient = jax.grad(lambda rows, loss=loss: -rate * loss(rows))(rows)
        for name, (table, where) in look_ups.items():
            step = gradient[name].reshape(-1, gradient[name].shape[-1])
            numbers[table].append(where.reshape(-1))
            steps[table].append(_shortened(step, longest) if longest else step)
    return {
        name: table.at[jnp.concatenate(numbers[name])].add(jnp.concatenate(steps[name]))
        if numbers[name]
        else table
        for name, table in tables.items()
    }


def _shortened(steps: jax.Array, longest: float) -> jax.Array:
    """Steps `[N, D]`, those of more than a length scaled down to it."""
    length = jnp.sqrt(jnp.sum(jnp.square(steps), axis=-1, keepdims=True))
    return steps * jnp.minimum(1.0, longest / jnp.maximum(length, jnp.finfo(steps.dtype).tiny))
