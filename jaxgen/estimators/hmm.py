"""Hidden Markov models in log space: forward-backward, Viterbi and Baum-Welch (Rabiner 1989).

Observations come from any family of `estimators.families`: `categorical(V)`, `GAUSSIAN_DIAGONAL`,
`GAUSSIAN_FULL` and the others. Sequences are a batch `x` `[B, T, ...]` (`[B, T]` for categories), padded at
the end; `mask` `[B, T]` is 1 where a step counts. A sequence may have length 1, or 0 (log-probability 0).
With `parallel=True` the chain is run by `lax.associative_scan` over K x K matrices, in O(log T) steps and K
times the work: for long sequences on an accelerator (Hassan, Sarkka & Garcia-Fernandez 2021, section 3).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from jaxgen.estimators.common import as_float, as_mask, index_keys, log_normalize, masked
from jaxgen.estimators.em import EMFit, run_em
from jaxgen.estimators.families import Family
from jaxgen.types import Array, Key, PyTree, UserError


class HMM(NamedTuple):
    """log_initial: log pi `[K]`; log_transition: log A `[K, K]`, row to column; emissions: K densities."""

    log_initial: Array
    log_transition: Array
    emissions: PyTree


class Posterior(NamedTuple):
    """log_gamma: log p(state_t = k given x) `[B, T, K]`, nats (past a sequence's end: as at its end).

    transitions: expected number of each transition `[B, K, K]`
    log_prob: log p(x) `[B]`, nats
    """

    log_gamma: Array
    transitions: Array
    log_prob: Array


def _sequences(x: ArrayLike, mask: ArrayLike | None) -> tuple[Array, Array]:
    """(x without what is padded, mask `[B, T]`)."""
    x = as_float(x)
    if x.ndim < 2 or 0 in x.shape:
        raise UserError(f"x has shape {x.shape}; give sequences as [B, T, ...], none of them 0.")
    mask = as_mask(x, mask, 2)
    return masked(x, mask), mask


def _log_likelihood(family: Family, hmm: HMM, x: Array, mask: Array) -> Array:
    """log p(x_t given state k) `[B, T, K]`, zero where padded."""
    flat = family.log_likelihood(hmm.emissions, x.reshape(-1, *x.shape[2:]))
    return masked(flat.reshape(*x.shape[:2], -1), mask)


def forward(log_initial: Array, log_transition: Array, likelihood: Array, mask: Array) -> tuple[Array, Array]:
    """(log p(state_t = k given x_1..x_t) `[T, K]`, log p(x), nats) of one sequence (Rabiner 1989, eq. 19-21).

    likelihood: log p(x_t given k) `[T, K]`, 0 where padded; mask: `[T]`. Past the end the state stays as it
    is. Normalised at each step (Rabiner's scaling, eq. 91-103): in float32 the log of a long sequence's joint
    has too few digits left for the differences between states.
    """

    def step(log_filtered: Array, step: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        likelihood, counts = step
        moved = logsumexp(log_filtered[:, None] + log_transition, axis=0) + likelihood
        gain = logsumexp(moved)
        log_filtered = jnp.where(counts > 0, moved - gain, log_filtered)
        return log_filtered, (log_filtered, masked(gain, counts))

    first = log_initial + likelihood[0]
    gain = logsumexp(first)
    _, (rest, gains) = jax.lax.scan(step, first - gain, (likelihood[1:], mask[1:]))
    return jnp.concatenate([(first - gain)[None, :], rest]), gain + jnp.sum(gains)


def backward(log_transition: Array, likelihood: Array, mask: Array) -> Array:
    """log p(x_t+1..x_T given state_t = k) + c_t `[T, K]` of one sequence (Rabiner 1989, eq. 24-25).

    c_t is such that the probabilities sum to 1 over k, for the sake of float32 as in `forward`; 0 at the end.
    """

    def step(log_beta: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        likelihood, counts = step
        moved = jax.nn.log_softmax(logsumexp(log_transition + (likelihood + log_beta)[None, :], axis=1))
        log_beta = jnp.where(counts > 0, moved, log_beta)
        return log_beta, log_beta

    last = jnp.zeros_like(likelihood[0])
    _, rest = jax.lax.scan(step, last, (likelihood[1:], mask[1:]), reverse=True)
    return jnp.concatenate([rest, last[None, :]])


def _largest(x: Array, axis: tuple[int, ...] | None = None) -> Array:
    """The largest entry, 0 where all are -inf: less that, they stay -inf and do not become NaN."""
    largest = jnp.max(x, axis=axis)
    return jnp.where(largest > -jnp.inf, largest, 0.0)


def _log_matmul(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The product of matrices exp(log_scale) exp(m), each the pair of m `[..., K, K]` and log_scale `[...]`.

    Its largest entry goes to its scale, for the sake of float32 as in `forward`. By logsumexp: products of
    matrices underflow, scaled ones too.
    """
    product = logsumexp(a[0][..., :, :, None] + b[0][..., None, :, :], axis=-2)
    largest = _largest(product, axis=(-2, -1))
    return product - largest[..., None, None], a[1] + b[1] + largest


def _step_matrices(log_transition: Array, likelihood: Array, mask: Array) -> Array:
    """log p(state_t = j, x_t given state_t-1 = i) `[T - 1, K, K]`, steps 2..T; the identity where padded."""
    identity = jnp.where(jnp.eye(likelihood.shape[1], dtype=bool), 0.0, -jnp.inf).astype(likelihood.dtype)
    steps = log_transition[None] + likelihood[1:, None, :]
    return jnp.where(mask[1:, None, None] > 0, steps, identity[None])


def forward_parallel(
    log_initial: Array, log_transition: Array, likelihood: Array, mask: Array
) -> tuple[Array, Array]:
    """`forward` by an associative scan of K x K matrices (Hassan et al. 2021, section 3)."""
    first = jnp.broadcast_to((log_initial + likelihood[0])[None, None, :], (1, *log_transition.shape))
    matrices = jnp.concatenate([first, _step_matrices(log_transition, likelihood, mask)])
    unscaled = (matrices, jnp.zeros_like(matrices[:, 0, 0]))
    prefix, log_scale = jax.lax.associative_scan(_log_matmul, unscaled)
    alpha = prefix[:, 0]
    return jax.nn.log_softmax(alpha, axis=1), log_scale[-1] + logsumexp(alpha[-1])


def backward_parallel(log_transition: Array, likelihood: Array, mask: Array) -> Array:
    """`backward` by an associative scan of K x K matrices (Hassan et al. 2021, section 3)."""
    matrices = _step_matrices(log_transition, likelihood, mask)
    last = jnp.zeros_like(likelihood[:1])
    if not len(matrices):
        return last
    unscaled = (matrices, jnp.zeros_like(matrices[:, 0, 0]))
    suffix, _ = jax.lax.associative_scan(lambda late, early: _log_matmul(early, late), unscaled, reverse=True)
    return jnp.concatenate([jax.nn.log_softmax(logsumexp(suffix, axis=2), axis=1), last])


@partial(jax.jit, static_argnames=("family", "parallel"))
def log_prob(
    family: Family, hmm: HMM, x: ArrayLike, mask: ArrayLike | None = None, *, parallel: bool = False
) -> Array:
    """log p(x) `[B]`, nats, all paths summed out (Rabiner 1989, eq. 21); of `x` `[B, T, ...]`, `mask` `[B,
    T]`.

    Raises:
        UserError: `x` is no batch of sequences, or the mask does not fit.
    """
    x, mask = _sequences(x, mask)
    run = partial(forward_parallel if parallel else forward, hmm.log_initial, hmm.log_transition)
    return jax.vmap(run)(_log_likelihood(family, hmm, x, mask), mask)[1]


@partial(jax.jit, static_argnames=("family", "parallel"))
def posterior(
    family: Family, hmm: HMM, x: ArrayLike, mask: ArrayLike | None = None, *, parallel: bool = False
) -> Posterior:
    """Forward-backward: states and transitions given all of `x` `[B, T, ...]` (Rabiner 1989, eq. 27 and
    37-38).

    Raises:
        UserError: `x` is no batch of sequences, or the mask does not fit.
    """
    x, mask = _sequences(x, mask)
    run_forward, run_backward = (forward_parallel, backward_parallel) if parallel else (forward, backward)

    def one(likelihood: Array, mask: Array) -> Posterior:
        filtered, log_prob = run_forward(hmm.log_initial, hmm.log_transition, likelihood, mask)
        beta = run_backward(hmm.log_transition, likelihood, mask)
        log_xi = filtered[:-1, :, None] + hmm.log_transition[None] + (likelihood + beta)[1:, None, :]
        transitions = jnp.sum(masked(jax.nn.softmax(log_xi, axis=(1, 2)), mask[1:]), axis=0)
        return Posterior(jax.nn.log_softmax(filtered + beta, axis=1), transitions, log_prob)

    return jax.vmap(one)(_log_likelihood(family, hmm, x, mask), mask)


@partial(jax.jit, static_argnames="family")
def predict(family: Family, hmm: HMM, x: ArrayLike, mask: ArrayLike | None = None) -> tuple[Array, Array]:
    """The likeliest path `[B, T]`, int32, and its log p(path, x) `[B]`, nats: Viterbi (Rabiner 1989, eq.
    32-35).

    Past the end of a sequence the path repeats its last state. Less its largest entry at each step, for the
    sake of float32 as in `forward`.

    Raises:
        UserError: `x` is no batch of sequences, or the mask does not fit.
    """
    x, mask = _sequences(x, mask)
    stay = jnp.arange(hmm.log_initial.shape[0])

    def step(best: Array, step: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        likelihood, counts = step
        arrivals = best[:, None] + hmm.log_transition
        moved = jnp.max(arrivals, axis=0) + likelihood
        gain = _largest(moved)
        came_from = jnp.where(counts > 0, jnp.argmax(arrivals, axis=0), stay)
        return jnp.where(counts > 0, moved - gain, best), (came_from, masked(gain, counts))

    def one(likelihood: Array, mask: Array) -> tuple[Array, Array]:
        first = hmm.log_initial + likelihood[0]
        gain = _largest(first)
        best, (came_from, gains) = jax.lax.scan(step, first - gain, (likelihood[1:], mask[1:]))
        last = jnp.argmax(best)
        back = lambda state, came_from: (came_from[state], came_from[state])
        path = jax.lax.scan(back, last, came_from, reverse=True)[1]
        return jnp.append(path, last).astype(jnp.int32), masked(
            jnp.max(best) + gain + jnp.sum(gains), mask[0]
        )

    return jax.vmap(one)(_log_likelihood(family, hmm, x, mask), mask)


@partial(jax.jit, static_argnames="family")
def log_joint(
    family: Family, hmm: HMM, state: ArrayLike, x: ArrayLike, mask: ArrayLike | None = None
) -> Array:
    """log p(path, x) `[B]`, nats, of paths `state` `[B, T]` in 0..K-1 (Rabiner 1989, eq. 13a-15).

    Raises:
        UserError: `x` is no batch of sequences, or the mask does not fit.
    """
    x, mask = _sequences(x, mask)
    state = jnp.asarray(state)
    likelihood = _log_likelihood(family, hmm, x, mask)
    emitted = jnp.sum(jnp.take_along_axis(likelihood, state[:, :, None], axis=2), axis=(1, 2))
    moves = masked(hmm.log_transition[state[:, :-1], state[:, 1:]], mask[:, 1:])
    return masked(hmm.log_initial[state[:, 0]], mask[:, 0]) + jnp.sum(moves, axis=1) + emitted


@partial(jax.jit, static_argnames=("family", "num", "length"))
def sample(family: Family, hmm: HMM, key: Key, num: int, length: int) -> tuple[Array, Array]:
    """Ancestral draws (states `[num, length]`, x `[num, length, ...]`); sequence i depends on (key, i) alone.

    Rabiner 1989, section II.C: a state from pi, then in turn an observation and the next state.
    """

    def draw(key: Key) -> tuple[Array, Array]:
        def step(log_state: Array, t: Array) -> tuple[Array, tuple[Array, Array]]:
            for_state, for_x = jax.random.split(jax.random.fold_in(key, t))
            state = jax.random.categorical(for_state, log_state)
            return hmm.log_transition[state], (state, family.sample(hmm.emissions, state, for_x))

        return jax.lax.scan(step, hmm.log_initial, jnp.arange(length))[1]

    return jax.vmap(draw)(index_keys(key, num))


def _estimate(
    family: Family,
    x: Array,
    gamma: Array,
    transitions: Array,
    smoothing: ArrayLike,
    state_smoothing: ArrayLike,
) -> HMM:
    """The M-step (Rabiner 1989, eq. 40a-40c) from expected states `[B, T, K]`, 0 where padded, and moves `[K,
    K]`.
    """
    return HMM(
        log_normalize(jnp.sum(gamma[:, 0], axis=0) + state_smoothing),
        log_normalize(transitions + state_smoothing),
        family.estimate(x.reshape(-1, *x.shape[2:]), gamma.reshape(-1, gamma.shape[2]), smoothing),
    )


@partial(jax.jit, static_argnames=("family", "num_states"))
def fit(
    family: Family,
    x: ArrayLike,
    state: ArrayLike,
    num_states: int,
    mask: ArrayLike | None = None,
    *,
    smoothing: ArrayLike,
    state_smoothing: ArrayLike = 0.0,
) -> HMM:
    """The likeliest model of sequences whose states are known, by counting; or a start for `fit_em`.

    Manning & Schutze 1999, section 9.3.3. `x` is `[B, T, ...]`, `state` `[B, T]` in 0..K-1, `mask` `[B, T]`.
    smoothing: the emissions' pseudo-count, or for Gaussians the least variance
    state_smoothing: pseudo-count of each first state and each transition

    Raises:
        UserError: `x` is no batch of sequences, or the shapes of `state` and `mask` do not fit.
    """
    x, mask = _sequences(x, mask)
    state = jnp.asarray(state)
    if state.shape != x.shape[:2]:
        raise UserError(f"state has shape {state.shape}; give one for each step, {x.shape[:2]}.")
    one_hot = jax.nn.one_hot(state, num_states, dtype=x.dtype) * mask[:, :, None]
    transitions = jnp.einsum("bti,btj->ij", one_hot[:, :-1], one_hot[:, 1:], precision="highest")
    return _estimate(family, x, one_hot, transitions, smoothing, state_smoothing)


@partial(jax.jit, static_argnames=("family", "max_steps", "parallel"))
def fit_em(
    family: Family,
    initial: HMM,
    x: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    smoothing: ArrayLike,
    state_smoothing: ArrayLike = 0.0,
    max_steps: int = 100,
    tolerance: ArrayLike = 1e-5,
    parallel: bool = False,
) -> EMFit:
    """Baum-Welch from a given model (Rabiner 1989, section III.C): the `EMFit`'s `params` is the HMM.

    Its objective is log p(x) plus the log priors that the smoothings stand for, over the number of steps that
    count, in nats; it never falls. Arguments as for `fit`; ends when it gains at most `tolerance`.

    Raises:
        UserError: `x` is no batch of sequences, the mask does not fit, or `max_steps` is negative.
    """
    x, mask = _sequences(x, mask)
    total = jnp.maximum(jnp.sum(mask), 1.0)

    def step(hmm: HMM) -> tuple[HMM, Array]:
        expected = posterior(family, hmm, x, mask, parallel=parallel)
        gamma = jnp.exp(expected.log_gamma) * mask[:, :, None]
        log_prior = family.log_prior(hmm.emissions, smoothing)
        log_prior += state_smoothing * (jnp.sum(hmm.log_initial) + jnp.sum(hmm.log_transition))
        transitions = jnp.sum(expected.transitions, axis=0)
        moved = _estimate(family, x, gamma, transitions, smoothing, state_smoothing)
        return moved, (jnp.sum(expected.log_prob) + log_prior) / total

    return run_em(step, initial, max_steps, tolerance)
