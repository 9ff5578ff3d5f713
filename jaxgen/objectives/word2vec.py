"""The losses of word2vec (Mikolov et al. 2013a, 2013b), on rows already looked up.

A word has two vectors, v as input and u as output. `h` is what predicts: the vector of the centre word
(skip-gram), or what the words around are together (CBOW, `cbow_context`). The last part has the same losses
on pieces of running text, where a word's neighbours are the piece itself, so that all pairs are one banded
matrix product instead of a look-up each.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.types import Array, UserError

ContextKind = Literal["mean", "sum", "word2vec"]


def softmax_loss(h: Array, output: Array, target: Array) -> Array:
    """-log softmax(U h)_target, nats (Mikolov et al. 2013b, eq. 2).

    h: `[..., D]`; output: U `[V, D]`; target: `[...]` in [0, V). Returns `[...]`, >= 0.
    """
    log_p = jax.nn.log_softmax(h @ output.T, axis=-1)
    return -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]


def negative_sampling_loss(h: Array, positive: Array, negatives: Array) -> Array:
    """-log sigma(u_o . h) - sum_k log sigma(-u_k . h), nats (Mikolov et al. 2013b, eq. 4).

    h: `[..., D]`; positive: u_o `[..., D]`; negatives: u_k `[..., K, D]`. Returns `[...]`, >= 0.
    """
    attracted = jax.nn.softplus(-jnp.sum(h * positive, axis=-1))
    repelled = jax.nn.softplus(jnp.einsum("...d,...kd->...k", h, negatives))
    return attracted + jnp.sum(repelled, axis=-1)


def hierarchical_softmax_loss(h: Array, nodes: Array, turn: Array) -> Array:
    """-sum_j log sigma(turn_j u_j . h) over the inner nodes on a word's path, nats.

    Mikolov et al. 2013b, eq. 3, after Morin & Bengio 2005.

    h: `[..., D]`; nodes: u_j `[..., L, D]`; turn: `[..., L]`, 1 where the path goes left, -1 right, 0 beyond
    its end. The probabilities exp(-loss) of all words sum to one. Returns `[...]`, >= 0.
    """
    score = turn * jnp.einsum("...d,...ld->...l", h, nodes)
    return jnp.sum(jnp.where(turn != 0, jax.nn.softplus(-score), 0.0), axis=-1)


def noise_distribution(counts: np.ndarray, exponent: float) -> np.ndarray:
    """P_n(w) = count(w)^exponent / Z, float64 `[V]`; Mikolov et al. 2013b take the exponent 3/4."""
    weight = np.asarray(counts, np.float64) ** exponent
    if not np.isfinite(weight).all() or weight.sum() <= 0:
        raise UserError(f"counts to the power {exponent} are no distribution: choose another ns_exponent.")
    return weight / weight.sum()


def cbow_context(inside: Array, around: Array, kind: ContextKind) -> Array:
    """What the words around a place are together: the h of CBOW (Mikolov et al. 2013a, section 3.1).

    inside: `window_mask` `[..., T, N]`
    around: the words' input vectors `[..., H, D]`
    kind: `mean`; `sum`; or `word2vec`, the mean whose gradient is that of the sum: the C program and gensim
        pass the whole error on to each word around, which trains faster at the same rate.
    Returns `[..., T, D]`, zero where no word is around.
    """
    total = neighbour_sums(inside, around)
    if kind == "sum":
        return total
    mean = total / jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1.0)
    return mean if kind == "mean" else total + jax.lax.stop_gradient(mean - total)


# ---- on pieces of running text: T places, the H = T + 2 window words around and among them, and each place's
# N = 2 window + 1 neighbours, itself in the middle: neighbour j of place t is word t + j


def window_mask(left: Array, right: Array, window: int) -> Array:
    """Which of its N neighbours belong to each of the T places, float32 `[..., T, N]`; never itself.

    left, right: `[..., T]` whole numbers in [0, window], how many words on each side belong; 0 and 0 for a
    place that does not count.
    """
    offset = jnp.arange(-window, window + 1).reshape((1,) * left.ndim + (-1,))
    near = (offset >= -left[..., None]) & (offset <= right[..., None]) & (offset != 0)
    return near.astype(jnp.float32)


def neighbours(words: Array, num: int) -> Array:
    """Of H words `[..., H]` the num = N neighbours of each place, `[..., T, N]`."""
    places = words.shape[-1] - num + 1
    return jnp.stack([words[..., j : j + places] for j in range(num)], axis=-1)


def _to_band(full: Array) -> Array:
    """`[..., T, H]` -> `[..., T, N]`: what each place has with its neighbours, the others left out."""
    *lead, places, words = full.shape
    flat = jnp.pad(full.reshape(*lead, places * words), [(0, 0)] * len(lead) + [(0, places)])
    return flat.reshape(*lead, places, words + 1)[..., : words - places + 1]  # each row one place on


def _from_band(band: Array) -> Array:
    """`[..., T, N]` -> `[..., T, H]`: the inverse of `_to_band`, zero for the others."""
    *lead, places, num = band.shape
    words = places + num - 1
    flat = jnp.pad(band, [(0, 0)] * (band.ndim - 1) + [(0, words + 1 - num)])
    return flat.reshape(*lead, places * (words + 1))[..., : places * words].reshape(*lead, places, words)


def _shifted_sums(weights: Array, around: Array) -> Array:
    """sum_j weights_tj around_(t + j), as N shifted products; shapes as in `neighbour_sums`."""
    places, num = weights.shape[-2:]
    return sum(weights[..., j, None] * around[..., j : j + places, :] for j in range(num))  # type: ignore[return-value]


def _spread(weights: Array, centre: Array) -> Array:
    """The transpose of `_shifted_sums` in its second argument: `[..., T, D]` -> `[..., H, D]`."""
    places, num = weights.shape[-2:]
    words = places + num - 1
    room = [(0, 0)] * (centre.ndim - 2) + [(num - 1, num - 1), (0, 0)]
    weights, centre = jnp.pad(weights, room), jnp.pad(centre, room)
    terms = (
        weights[..., i : i + words, num - 1 - i, None] * centre[..., i : i + words, :] for i in range(num)
    )
    return sum(terms)  # type: ignore[return-value]


@jax.custom_vjp
def neighbour_products(centre: Array, around: Array) -> Array:
    """The products of each place with its N neighbours: centre `[..., T, D]`, around `[..., H, D]` ->
    `[..., T, N]`.

    One banded matrix product; its gradients are sums of N shifted copies, of which XLA makes one loop. On CPU
    that takes a third of the time of a matrix product whose entries off the band are zero.
    """
    return _to_band(jnp.einsum("...td,...hd->...th", centre, around))


def _products_forward(centre: Array, around: Array) -> tuple[Array, tuple[Array, Array]]:
    return neighbour_products(centre, around), (centre, around)


def _products_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    centre, around = saved
    return _shifted_sums(g, around), _spread(g, centre)


neighbour_products.defvjp(_products_forward, _products_backward)


@jax.custom_vjp
def neighbour_sums(weights: Array, around: Array) -> Array:
    """sum_j weights_tj around_(t + j): `[..., T, N]`, `[..., H, D]` -> `[..., T, D]`.

    A matrix product forwards: as shifted copies XLA would look each row up N times over.
    """
    return jnp.einsum("...th,...hd->...td", _from_band(weights), around)


def _sums_forward(weights: Array, around: Array) -> tuple[Array, tuple[Array, Array]]:
    return neighbour_sums(weights, around), (weights, around)


def _sums_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    weights, around = saved
    return neighbour_products(g, around), _spread(weights, g)


neighbour_sums.defvjp(_sums_forward, _sums_backward)


def _repelled(h: Array, negatives: Array, weight: Array) -> Array:
    """sum_k log(1 + exp(u_k . h_t)) of the K negatives that a group's places share, times weight_t: `[B]`.

    h: `[B, T, D]`; negatives: `[G, K, D]`, those of B / G pieces each; weight: `[B, T]`
    """
    groups, num = negatives.shape[:2]
    scores = jnp.einsum("gtd,gkd->gtk", h.reshape(groups, -1, h.shape[-1]), negatives)
    return jnp.sum(jax.nn.softplus(scores).reshape(*weight.shape, num) * weight[..., None], axis=(-2, -1))


def skip_gram_piece_loss(
    inside: Array, centre: Array, around: Array, negatives: Array, num_negatives: int
) -> Array:
    """The sum of `negative_sampling_loss` over all (centre, neighbour) pairs of each of B pieces, nats `[B]`.

    K negatives are shared by all pairs of B / G pieces: each stands for num_negatives / K of the
    `num_negatives` that every pair would have drawn, so the expectation is the same.

    inside: `window_mask` `[B, T, N]`; centre: v `[B, T, D]`; around: u `[B, H, D]`;
    negatives: u_k `[G, K, D]`
    """
    attracted = inside * jax.nn.softplus(-neighbour_products(centre, around))
    pairs = jnp.sum(inside, axis=-1)
    repelled = _repelled(centre, negatives, pairs * (num_negatives / negatives.shape[-2]))
    return jnp.sum(attracted, axis=(-2, -1)) + repelled


def cbow_piece_loss(
    inside: Array,
    centre: Array,
    around: Array,
    negatives: Array,
    num_negatives: int,
    kind: ContextKind,
) -> Array:
    """The sum of `negative_sampling_loss` over the places of a piece, each predicted from around it, `[B]`.

    As `skip_gram_piece_loss`, but centre: u `[B, T, D]` and around: v `[B, H, D]`.
    """
    h = cbow_context(inside, around, kind)
    counts = (jnp.sum(inside, axis=-1) > 0).astype(h.dtype)
    attracted = jnp.sum(counts * jax.nn.softplus(-jnp.sum(h * centre, axis=-1)), axis=-1)
    return attracted + _repelled(h, negatives, counts * (num_negatives / negatives.shape[-2]))


def skip_gram_piece_softmax_loss(inside: Array, centre: Array, output: Array, targets: Array) -> Array:
    """The sum of `softmax_loss` over all (centre, neighbour) pairs of a piece, nats `[...]`.

    inside: `[..., T, N]`; centre: v `[..., T, D]`; output: U `[V, D]`; targets: the H words `[..., H]`
    """
    log_p = jax.nn.log_softmax(centre @ output.T, axis=-1)
    wanted = neighbours(targets, inside.shape[-1])
    return -jnp.sum(inside * jnp.take_along_axis(log_p, wanted, axis=-1), axis=(-2, -1))


def skip_gram_piece_hierarchical_loss(inside: Array, centre: Array, nodes: Array, turns: Array) -> Array:
    """The sum of `hierarchical_softmax_loss` over all (centre, neighbour) pairs of a piece, nats `[...]`.

    inside: `[..., T, N]`; centre: v `[..., T, D]`; nodes: `[..., H, L, D]`; turns: `[..., H, L]`
    """
    turns = turns[..., None, :, :]
    scores = turns * jnp.einsum("...td,...hld->...thl", centre, nodes)
    terms = jnp.where(turns != 0, jax.nn.softplus(-scores), 0.0)
    return jnp.sum(inside * _to_band(jnp.sum(terms, axis=-1)), axis=(-2, -1))
