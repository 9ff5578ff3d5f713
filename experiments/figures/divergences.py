"""Forward against reverse Kullback-Leibler: one Gaussian q fitted to a density p of two modes, by each.

argmin KL(p || q), the forward one, which is also what maximum likelihood does, has the mean and the variance
of p and covers both modes; argmin KL(q || p) sits on one of them. The divergences are sums over a fine grid;
the reverse one is minimised from each mode.

    python -m experiments.figures.divergences --out=DIR      # 10 seconds
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.figures import command
from jaxgen import pictures
from jaxgen.types import Array

# p: weights, means and standard deviations of its two Gaussians.
WEIGHT, MEAN, STD = (0.6, 0.4), (-2.5, 3.0), (0.7, 0.9)
GRID = np.linspace(-12.0, 12.0, 4801)
_WIDTH = float(GRID[1] - GRID[0])


class Fit(NamedTuple):
    """q = N(mean, std^2) and both divergences, in nats."""

    mean: float
    std: float
    forward: float  # KL(p || q)
    reverse: float  # KL(q || p)


def normal_log_prob(mean: Array | float, std: Array | float) -> Array:
    """log N(x; mean, std^2) on the grid."""
    return -0.5 * jnp.square((GRID - mean) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)


def target_log_prob() -> Array:
    """log p on the grid."""
    parts = [jnp.log(w) + normal_log_prob(m, s) for w, m, s in zip(WEIGHT, MEAN, STD, strict=True)]
    return jnp.logaddexp(*parts)


def divergence(log_q: Array, log_p: Array) -> Array:
    """KL(q || p) = integral of q log(q / p), nats, of log densities on the grid."""
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p)) * _WIDTH


def described(mean: Array, std: Array) -> Fit:
    """A Gaussian with its divergences."""
    log_p, log_q = target_log_prob(), normal_log_prob(mean, std)
    values = (mean, std, divergence(log_p, log_q), divergence(log_q, log_p))
    return Fit(*map(float, values))


def fit_forward() -> Fit:
    """The minimum of KL(p || q): the moments of p."""
    weight, mean, std = (jnp.asarray(values) for values in (WEIGHT, MEAN, STD))
    centre = jnp.sum(weight * mean)
    variance = jnp.sum(weight * (jnp.square(std) + jnp.square(mean - centre)))
    return described(centre, jnp.sqrt(variance))


@functools.partial(jax.jit, static_argnames="num_steps")
def _minimise_reverse(mean: Array, num_steps: int = 100) -> Array:
    """(mean, log std) of a local minimum of KL(q || p), by L-BFGS from N(mean, 1)."""
    log_p, optimizer = target_log_prob(), optax.lbfgs()
    objective = lambda q: divergence(normal_log_prob(q[0], jnp.exp(q[1])), log_p)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        q, state = carry
        value, grad = optax.value_and_grad_from_state(objective)(q, state=state)
        move, state = optimizer.update(grad, state, q, value=value, grad=grad, value_fn=objective)
        return (q + move, state), None

    start = jnp.stack([mean, jnp.zeros(())])
    return jax.lax.scan(step, (start, optimizer.init(start)), None, length=num_steps)[0][0]


def fit_reverse(start: float) -> Fit:
    """The local minimum of KL(q || p) next to a start."""
    mean, log_std = _minimise_reverse(jnp.asarray(start, jnp.float32))
    return described(mean, jnp.exp(log_std))


def compute() -> dict[str, Fit]:
    """{how it was fitted: q}."""
    found = {"forward, KL(p || q)": fit_forward()}
    for mode, start in zip(("left", "right"), MEAN, strict=True):
        found[f"reverse, KL(q || p), {mode} mode"] = fit_reverse(start)
    return found


def draw(found: dict[str, Fit]) -> Figure:
    """p and the fits."""
    figure = Figure(figsize=(6.8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(GRID, np.exp(np.asarray(target_log_prob())), color="0.88", label="p")
    for colour, (name, fit) in zip(pictures.PALETTE, found.items(), strict=False):
        axes.plot(GRID, np.exp(np.asarray(normal_log_prob(fit.mean, fit.std))), color=colour, label=name)
    axes.set(xlim=(-7, 7), ylim=(0, None), xlabel="x", ylabel="density")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the fits and draws them; returns the exit status."""
    arguments = command.parser("divergences").parse_args(argv)
    found = compute()
    command.print_table(
        ["q fitted by", "mean", "std", "KL(p || q)", "KL(q || p)"],
        [[name, *fit] for name, fit in found.items()],
    )
    return command.write(draw(found), arguments.out, "divergences")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
