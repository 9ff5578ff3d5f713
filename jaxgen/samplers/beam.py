"""Beam search: the most probable continuations, by keeping the best few at each step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.samplers.autoregressive import Prefill, Step
from jaxgen.types import Array, PyTree, UserError


class Beams(NamedTuple):
    """The n best continuations of each prompt, best first.

    tokens: int32 `[B, beam, N]`, padded after the end; lengths: int32 `[B, beam]`, the end counted.
    scores: float32 `[B, beam]`; -inf where fewer than `beam` continuations exist.
    """

    tokens: Array
    lengths: Array
    scores: Array


class _Search(NamedTuple):
    cache: PyTree  # of the live beams, rows [B * beam]
    live_tokens: Array  # [B, beam, N]
    live_log_p: Array  # [B, beam]
    done: Beams


def repeat_rows(tree: PyTree, times: int) -> PyTree:
    """Each row of each leaf `times` times in a row, `[B, ...]` -> `[B * times, ...]`; scalars stay."""
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else jnp.repeat(leaf, times, axis=0), tree)


def length_penalty_of(length: Array | int, alpha: float) -> Array:
    """((5 + length) / 6)^alpha, by which log-probabilities are divided (Wu et al. 2016, eq. 14)."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def beam_search(
    prefill: Prefill,
    step: Step,
    prompt: Array,
    lengths: Array,
    *,
    beam: int,
    max_new_tokens: int,
    eos: int,
    pad: int = 0,
    length_penalty: float = 0.0,
    early_stop: bool = True,
) -> Beams:
    """The `beam` best continuations by log p / length_penalty_of(length, length_penalty); call it under jit.

    Each step extends the live beams by every token; of the candidates that end with `eos` the best join the
    finished ones, and of the others the best live on. A continuation also ends, unfinished, at
    max_new_tokens. A start that all are to have (a constrained prefix) belongs into the prompt.

    Args:
        prefill: is called with the B prompts. step: with B * beam rows; a memory that it closes over, such as
            an encoder's output, has to be repeated for them (`repeat_rows`).
        prompt: int32 `[B, P]`, right-padded; lengths: int32 `[B]`.
        length_penalty: 0 compares plain log-probabilities, which favours the short.
        early_stop: stop once no live beam of any prompt can still beat its worst finished one. It changes no
            result: the bound is what a live beam would reach if the rest had probability 1.

    Raises UserError unless beam and max_new_tokens are at least 1 and length_penalty at least 0.
    """
    if beam < 1 or max_new_tokens < 1 or length_penalty < 0:
        raise UserError(
            "beam and max_new_tokens must be at least 1 and length_penalty at least 0, but they are "
            f"{beam}, {max_new_tokens} and {length_penalty}."
        )
    batch = prompt.shape[0]
    logits, cache = prefill(prompt, lengths)
    if not 0 <= eos < logits.shape[-1]:
        raise UserError(f"eos must be a token of the vocabulary of {logits.shape[-1]}, but it is {eos}.")
    tiled_lengths = jnp.repeat(lengths, beam)

    def extend(search: _Search, log_p: Array, n: Array | int) -> tuple[_Search, Array]:
        """Take token number n, given log_p `[B, beam, V]`; the second result is the parents' rows."""
        vocab = log_p.shape[-1]
        total = search.live_log_p[:, :, None] + log_p  # [B, beam, V]
        penalty = length_penalty_of(n + 1, length_penalty)
        # Each live beam may end here.
        ended = search.live_tokens.at[:, :, n].set(eos)
        done = _best(search.done, ended, n + 1, total[:, :, eos] / penalty, beam)
        # Or go on with another token.
        open_ended = total.at[:, :, eos].set(-jnp.inf).reshape(batch, beam * vocab)
        live_log_p, flat = jax.lax.top_k(open_ended, beam)
        parent, token = flat // vocab, flat % vocab
        live_tokens = jnp.take_along_axis(search.live_tokens, parent[:, :, None], axis=1)
        live_tokens = live_tokens.at[:, :, n].set(token)
        rows = (jnp.arange(batch)[:, None] * beam + parent).reshape(-1)
        return _Search(search.cache, live_tokens, live_log_p, done), rows

    def finished(search: _Search) -> Array:
        # A log-probability only falls, and is best divided by the largest penalty that it can get.
        reachable = jnp.max(search.live_log_p, axis=1) / length_penalty_of(max_new_tokens, length_penalty)
        return jnp.all(reachable <= jnp.min(search.done.scores, axis=1))

    def advance(search: _Search, n: Array) -> _Search:
        token = jax.lax.dynamic_index_in_dim(search.live_tokens, n - 1, axis=2, keepdims=False).reshape(-1)
        logits, cache = step(search.cache, token, tiled_lengths + n - 1)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beam, -1)
        search, rows = extend(search._replace(cache=cache), log_p, n)
        return search._replace(cache=_take_rows(cache, rows))

    def body(search: _Search, n: Array) -> tuple[_Search, None]:
        if not early_stop:
            return advance(search, n), None
        return jax.lax.cond(finished(search), lambda s: s, lambda s: advance(s, n), search), None

    empty = jnp.full((batch, beam, max_new_tokens), pad, jnp.int32)
    nothing = jnp.full((batch, beam), -jnp.inf)
    # One empty beam lives at the start; the others are there for the shapes.
    search = _Search(
        repeat_rows(cache, beam),
        empty,
        nothing.at[:, 0].set(0.0),
        Beams(empty, jnp.zeros((batch, beam), jnp.int32), nothing),
    )
    first = jax.nn.log_softmax(logits.astype(jnp.float32))[:, None]
    search, _ = extend(search, jnp.broadcast_to(first, (batch, beam, first.shape[-1])), 0)
    search, _ = jax.lax.scan(body, search, jnp.arange(1, max_new_tokens, dtype=jnp.int32))
    final_scores = search.live_log_p / length_penalty_of(max_new_tokens, length_penalty)
    best = _best(search.done, search.live_tokens, max_new_tokens, final_scores, beam)
    exists = best.scores > -jnp.inf
    return Beams(
        jnp.where(exists[:, :, None], best.tokens, pad), jnp.where(exists, best.lengths, 0), best.scores
    )


def _best(done: Beams, tokens: Array, length: Array | int, scores: Array, beam: int) -> Beams:
    """The `beam` best of the finished ones and of new ones, which all have the same length."""
    lengths = jnp.full(scores.shape, length, jnp.int32)
    every = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), done, Beams(tokens, lengths, scores))
    best_scores, order = jax.lax.top_k(every.scores, beam)
    take = lambda leaf, index: jnp.take_along_axis(leaf, index, axis=1)
    return Beams(take(every.tokens, order[:, :, None]), take(every.lengths, order), best_scores)


def _take_rows(cache: PyTree, rows: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else leaf[rows], cache)
