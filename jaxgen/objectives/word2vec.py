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

    inside: `[..., T, H]`, 1 where word h is in the window of place t, else 0
    around: the words' input vectors `[..., H, D]`
    kind: `mean`; `sum`; or `word2vec`, the mean whose gradient is that of the sum: the C program and gensim
        pass the whole error on to each word around, which trains faster at the same rate.
    Returns `[..., T, D]`, zero where no word is around.
    """
    total = jnp.einsum("...th,...hd->...td", inside, around)
    if kind == "sum":
        return total
    mean = total / jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1.0)
    return mean if kind == "mean" else total + jax.lax.stop_gradient(mean - total)


# ---- on pieces of running text: T places, and H = T + 2 window words around and among them


def window_mask(left: Array, right: Array, window: int) -> Array:
    """Which of the H words are around each of the T places, float32 `[..., T, H]`.

    left, right: `[..., T]` whole numbers in [0, window], how many words on each side belong; 0 and 0 for a
    place that does not count. Word h stands h - window places from the first place.
    """
    places = left.shape[-1]
    offset = jnp.arange(places + 2 * window)[None, :] - jnp.arange(places)[:, None] - window
    offset = offset.reshape((1,) * (left.ndim - 1) + offset.shape)
    near = (offset >= -left[..., None]) & (offset <= right[..., None]) & (offset != 0)
    return near.astype(jnp.float32)


def _repelled(h: Array, negatives: Array, weight: Array) -> Array:
    """sum_k log(1 + exp(u_k . h_t)) of K negatives that the T places share, times weight_t: `[...]`."""
    scores = jnp.einsum("...td,...kd->...tk", h, negatives)
    return jnp.sum(jax.nn.softplus(scores) * weight[..., None], axis=(-2, -1))


def skip_gram_piece_loss(
    inside: Array, centre: Array, around: Array, negatives: Array, num_negatives: int
) -> Array:
    """The sum of `negative_sampling_loss` over all (centre, neighbour) pairs of a piece, nats `[...]`.

    The K negatives are shared by the piece: each stands for num_negatives / K of the `num_negatives` that
    every pair would have drawn, so the expectation is the same.

    inside: `window_mask` `[..., T, H]`; centre: v `[..., T, D]`; around: u `[..., H, D]`;
    negatives: u_k `[..., K, D]`
    """
    scores = jnp.einsum("...td,...hd->...th", centre, around)
    attracted = jnp.sum(inside * jax.nn.softplus(-scores), axis=(-2, -1))
    pairs = jnp.sum(inside, axis=-1)
    return attracted + _repelled(centre, negatives, pairs * (num_negatives / negatives.shape[-2]))


def cbow_piece_loss(
    inside: Array,
    centre: Array,
    around: Array,
    negatives: Array,
    num_negatives: int,
    kind: ContextKind,
) -> Array:
    """The sum of `negative_sampling_loss` over the places of a piece, each predicted from around it, `[...]`.

    As `skip_gram_piece_loss`, but centre: u `[..., T, D]` and around: v `[..., H, D]`.
    """
    h = cbow_context(inside, around, kind)
    counts = (jnp.sum(inside, axis=-1) > 0).astype(h.dtype)
    attracted = jnp.sum(counts * jax.nn.softplus(-jnp.sum(h * centre, axis=-1)), axis=-1)
    return attracted + _repelled(h, negatives, counts * (num_negatives / negatives.shape[-2]))


def skip_gram_piece_softmax_loss(inside: Array, centre: Array, output: Array, targets: Array) -> Array:
    """The sum of `softmax_loss` over all (centre, neighbour) pairs of a piece, nats `[...]`.

    inside: `[..., T, H]`; centre: v `[..., T, D]`; output: U `[V, D]`; targets: the H words `[..., H]`
    """
    log_p = jax.nn.log_softmax(centre @ output.T, axis=-1)
    shape = inside.shape
    wanted = jnp.broadcast_to(targets[..., None, :], shape)
    return -jnp.sum(inside * jnp.take_along_axis(log_p, wanted, axis=-1), axis=(-2, -1))


def skip_gram_piece_hierarchical_loss(inside: Array, centre: Array, nodes: Array, turns: Array) -> Array:
    """The sum of `hierarchical_softmax_loss` over all (centre, neighbour) pairs of a piece, nats `[...]`.

    inside: `[..., T, H]`; centre: v `[..., T, D]`; nodes: `[..., H, L, D]`; turns: `[..., H, L]`
    """
    turns = turns[..., None, :, :]
    scores = turns * jnp.einsum("...td,...hld->...thl", centre, nodes)
    terms = jnp.where(turns != 0, jax.nn.softplus(-scores), 0.0)
    return jnp.sum(inside * jnp.sum(terms, axis=-1), axis=(-2, -1))
