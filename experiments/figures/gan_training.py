"""A generator through training, and what the discriminator says of real and generated data.

In one dimension, where everything can be seen: data of two normal modes, small networks, the non-saturating
game. Above: at several steps, the data's density, the generator's histogram, the discriminator, and the best
answer to that generator, D* = p_data / (p_data + p_g), from the densities (Goodfellow et al. 2014,
proposition 1). Below: the discriminator's mean output on real and generated data, which meet at 1/2 where the
generator has become the data, and the distance between the two (Wasserstein-1, from sorted draws).

    python -m experiments.figures.gan_training --out=DIR      # 15 seconds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.figures import command
from jaxgen import pictures, systems
from jaxgen.objectives import gan
from jaxgen.types import Array, Batch, Key, PyTree, TrainState

MODES, DEVIATION = (-1.5, 1.0), 0.4
WIDTH, LATENTS, BATCH, NUM_DRAWN = 32, 2, 256, 4000
GRID = np.linspace(-4.0, 4.0, 161, dtype=np.float32)


class Snapshot(NamedTuple):
    """After `step` updates: draws `[NUM_DRAWN]`, D on the grid, the mean D on either kind, and W1."""

    step: int
    drawn: np.ndarray
    on_grid: np.ndarray
    on_real: float
    on_fake: float
    distance: float


def p_data(x: np.ndarray) -> np.ndarray:
    """The data's density: two modes of equal weight."""
    parts = [np.exp(-0.5 * ((x - m) / DEVIATION) ** 2) / (DEVIATION * np.sqrt(2 * np.pi)) for m in MODES]
    return np.mean(parts, axis=0)


def draw_data(key: Key, num: int) -> Array:
    """Draws of `p_data`, `[num, 1]`."""
    mode_key, noise_key = jax.random.split(key)
    mode = jnp.asarray(MODES)[jax.random.randint(mode_key, (num,), 0, len(MODES))]
    return (mode + DEVIATION * jax.random.normal(noise_key, (num,)))[:, None]


def init_network(key: Key, inputs: int) -> PyTree:
    """Two hidden layers and one output, as [(kernel, bias), ...]."""
    sizes = (inputs, WIDTH, WIDTH, 1)
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (m, n)) * (2.0 / m) ** 0.5, jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def network(params: PyTree, x: Array) -> Array:
    """`[N, inputs]` -> `[N, 1]`."""
    for number, (kernel, bias) in enumerate(params):
        x = x @ kernel + bias[None]
        x = jax.nn.leaky_relu(x, 0.1) if number + 1 < len(params) else x
    return x


def make_system(penalty_weight: float) -> systems.System:
    """Both players, with R1 on the discriminator."""

    def init(key: Key, batch: Batch) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(key)
        params = {"generator": init_network(keys[0], LATENTS), "discriminator": init_network(keys[1], 1)}
        return params, {"generator": {}, "discriminator": {}}

    losses = gan.make_losses(
        lambda params, key, _, num: network(params, jax.random.normal(key, (num, LATENTS))),
        lambda params, state, x, _label, _train: (network(params, x)[:, 0], state),
        "non_saturating",
        penalty="r1",
        penalty_weight=penalty_weight,
    )
    # The discriminator is the faster, to stay near its best answer to the generator of the moment.
    return systems.alternating_system(
        init,
        *losses,
        discriminator_optimizer=optax.adam(5e-3, b1=0.0, b2=0.99),
        generator_optimizer=optax.adam(1e-3, b1=0.0, b2=0.99),
        ema_decay=0.99,
    )


def train(steps: Sequence[int], *, seed: int = 0, penalty_weight: float = 0.03) -> list[Snapshot]:
    """A snapshot after each number of updates in `steps`, ascending."""
    system = make_system(penalty_weight)
    key, data_key, z_key, real_key = jax.random.split(jax.random.key(seed), 4)
    real = jnp.sort(draw_data(real_key, NUM_DRAWN), axis=0)
    z = jax.random.normal(z_key, (NUM_DRAWN, LATENTS))

    @jax.jit
    def advance(state: TrainState, num: Array) -> TrainState:
        def one(_: Array, state: TrainState) -> TrainState:
            batch = {"image": draw_data(jax.random.fold_in(data_key, state.step), BATCH)}
            return system.step(state, batch)[0]

        return jax.lax.fori_loop(0, num, one, state)

    @jax.jit
    def look(state: TrainState) -> tuple[Array, ...]:
        drawn = network(state.sampling_params["generator"], z)
        judge = lambda x: jax.nn.sigmoid(network(state.params["discriminator"], x)[:, 0])
        distance = jnp.mean(jnp.abs(jnp.sort(drawn, axis=0) - real))
        means = [jnp.mean(judge(x)) for x in (real, drawn)]
        return drawn[:, 0], judge(jnp.asarray(GRID)[:, None]), *means, distance

    state = jax.jit(system.init)(key, {"image": real[:BATCH]})
    found, done = [], 0
    for step in steps:
        state = advance(state, step - done)
        done = step
        drawn, on_grid, on_real, on_fake, distance = look(state)
        found.append(
            Snapshot(
                step, np.asarray(drawn), np.asarray(on_grid), float(on_real), float(on_fake), float(distance)
            )
        )
    return found


def p_generator(drawn: np.ndarray) -> np.ndarray:
    """The generator's density on the grid, by a normal kernel of 3 grid steps' deviation."""
    width = 3 * (GRID[1] - GRID[0])
    return np.mean(np.exp(-0.5 * ((GRID[:, None] - drawn[None]) / width) ** 2), axis=1) / (
        width * np.sqrt(2 * np.pi)
    )


def best_answer(drawn: np.ndarray) -> np.ndarray:
    """D* on the grid; nan where there is too little of either density to tell."""
    real, fake = p_data(GRID), p_generator(drawn)
    star = np.asarray(gan.optimal_discriminator(jnp.asarray(real), jnp.asarray(fake)))
    return np.where(real + fake > 0.02, star, np.nan)


def draw(shown: Sequence[Snapshot], curve: Sequence[Snapshot]) -> Figure:
    """The snapshots `shown` side by side, and the means of `curve` below them."""
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, len(shown))
    real, fake, judge, best = pictures.PALETTE[:4]
    for column, snapshot in enumerate(shown):
        axes = figure.add_subplot(grid[0, column])
        axes.fill_between(GRID, p_data(GRID), color=real, alpha=0.25, label="data")
        axes.hist(
            snapshot.drawn, bins=80, range=(-4, 4), density=True, color=fake, alpha=0.5, label="generator"
        )
        axes.plot(GRID, snapshot.on_grid, color=judge, label="D")
        axes.plot(GRID, best_answer(snapshot.drawn), ":", color=best, label="D*")
        axes.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
        axes.set(title=f"step {snapshot.step}", ylim=(0, 1.3), xlim=(-4, 4))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    axes = figure.add_subplot(grid[1, :])
    steps = [snapshot.step for snapshot in curve]
    axes.plot(steps, [s.on_real for s in curve], color=real, label="D on real")
    axes.plot(steps, [s.on_fake for s in curve], color=fake, label="D on generated")
    axes.plot(steps, [s.distance for s in curve], ":", color=best, label="distance of generator from data")
    axes.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="updates", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints what is drawn below and draws all of it; returns the exit status."""
    parser = command.parser("gan_training")
    parser.add_argument(
        "--steps", type=command.whole_numbers, default=(100, 400, 3000), help="where the generator is shown"
    )
    arguments = parser.parse_args(argv)
    shown = (0, *sorted(set(arguments.steps)))
    every = max(1, shown[-1] // 60)
    snapshots = train(sorted({*range(0, shown[-1], every), *shown}))
    command.print_table(
        ["step", "D on real", "D on generated", "distance"],
        [[s.step, s.on_real, s.on_fake, s.distance] for s in snapshots if s.step in shown],
    )
    figure = draw([s for s in snapshots if s.step in shown], snapshots)
    return command.write(figure, arguments.out, "gan_training")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
