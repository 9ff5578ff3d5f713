"""Decoding one token at a time: prefill the prompt, then one `lax.scan` over a cache.

The network is two plain functions. `prefill(tokens [B, P], lengths [B])` reads right-padded prompts and gives
the logits `[B, V]` after the last real token of each, and a cache. `step(cache, token [B], position [B])`
takes one more token, whose place in its own sequence is `position`, from 0, to the next logits and cache.
A cache is any pytree whose leaves have the batch as first axis, or are scalars that all rows share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxgen.types import Array, Chain, Key, PyTree, UserError

Prefill: TypeAlias = Callable[[Array, Array], tuple[Array, PyTree]]
Step: TypeAlias = Callable[[PyTree, Array, Array], tuple[Array, PyTree]]
Choose: TypeAlias = Callable[[Key, Array], Array]


def apply_temperature(logits: Array, temperature: float) -> Array:
    """The logits of p^(1/temperature), renormalised: below 1 sharper, above 1 flatter."""
    return logits / temperature


def keep_top_k(logits: Array, k: int) -> Array:
    """-inf for all but the k most probable tokens (Fan et al. 2018), and those as probable as the kth.

    logits: `[..., V]`; k: at least 1, and V or more keeps all.
    """
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """-inf but for the fewest most probable tokens whose probabilities reach p (Holtzman et al. 2020, eq. 2).

    logits: `[..., V]`; p in (0, 1]. The most probable token is always kept; of equals the lower number goes
    first.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the probability of those ahead of each
    before = before.at[..., 0].set(0.0)  # exactly: rounding may leave more than a tiny p
    keep = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before < p, axis=-1, inplace=False)
    return jnp.where(keep, logits, -jnp.inf)


def keep_min_p(logits: Array, p: float) -> Array:
    """-inf for the tokens less probable than p times the most probable one (Nguyen et al. 2024)."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits < least, -jnp.inf, logits)


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """Logits of tokens seen before divided by `penalty` where positive, else multiplied (Keskar et al. 2019).

    logits: `[B, V]`; seen: bool `[B, V]`; penalty: 1 changes nothing, above 1 discourages.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def first_largest(x: Array) -> Array:
    """argmax over the last axis, int32: two plain reductions, a third of the time of XLA's argmax on CPU.

    A row with NaN gives its last place.
    """
    largest = jnp.max(x, axis=-1, keepdims=True)
    last = x.shape[-1] - 1
    places = jnp.arange(last + 1, dtype=jnp.int32).reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.min(jnp.where(x == largest, places, last), axis=-1)


def draw_token(key: Key, logits: Array) -> Array:
    """A draw from softmax(logits) `[V]`, int32: the largest of the logits, each with its own Gumbel noise."""
    return first_largest(logits + jax.random.gumbel(key, logits.shape, logits.dtype))


def greedy(keys: Key, logits: Array) -> Array:
    """The most probable token, int32 `[B]`, the lowest number of equals."""
    return first_largest(logits)


def chooser(*, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Choose:
    """How the next token is chosen: (keys `[B]`, logits `[B, V]`) -> int32 `[B]`.

    The temperature acts first, then top_k (0 is off), top_p (1 is off) and min_p (0 is off), each on what the
    one before has left. Temperature 0 is greedy, whatever the others.

    Raises UserError for a value out of range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise UserError(
            "temperature and top_k must be at least 0, top_p in (0, 1] and min_p in [0, 1], but they are "
            f"{temperature}, {top_k}, {top_p} and {min_p}."
        )
    if temperature == 0:
        return greedy

    def choose(keys: Key, logits: Array) -> Array:
        logits = apply_temperature(logits, temperature)
        if top_k:
            logits = keep_top_k(logits, top_k)
        if top_p < 1:
            logits = keep_top_p(logits, top_p)
        if min_p > 0:
            logits = keep_min_p(logits, min_p)
        return jax.vmap(draw_token)(keys, logits)

    return choose


def decode_chain(
    prefill: Prefill,
    step: Step,
    prompt: Array,
    lengths: Array,
    *,
    max_new_tokens: int,
    choose: Choose,
    eos: int | None = None,
    pad: int = 0,
    repetition_penalty: float = 1.0,
) -> Chain:
    """The chain whose samples are the tokens that follow the prompts, int32 `[B, max_new_tokens]`.

    A row that has made `eos` keeps it and is filled with `pad`; once all have, the network is called no more.
    A start that the tokens are to have (a constrained prefix) belongs into the prompt. Run it with
    `samplers.chain.run_chain(chain, key, sample_indices, (max_new_tokens,))`: sample i draws its token n from
    fold_in(fold_in(key, i), n), so it does not depend on the rest of its batch.

    Args:
        prefill, step: the network, called once and max_new_tokens - 1 times.
        prompt: int32 `[B, P]`, right-padded; lengths: int32 `[B]`, at least 1.
        choose: as made by `chooser`.
        repetition_penalty: see `penalize_repetition`; of tokens of the prompt and of those made.

    Raises UserError unless max_new_tokens is at least 1 and the penalty positive.
    """
    if max_new_tokens < 1 or repetition_penalty <= 0:
        raise UserError(
            "max_new_tokens must be at least 1 and the repetition penalty positive, but they are "
            f"{max_new_tokens} and {repetition_penalty}."
        )
    penalized = repetition_penalty != 1.0
    batch, width = prompt.shape
    rows = jnp.arange(batch)

    def pick(keys: Key, logits: Array, seen: Array | None) -> tuple[Array, Array | None]:
        if seen is not None:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        token = choose(keys, logits)
        return token, None if seen is None else seen.at[rows, token].set(True)

    def init(keys: Key, shape: tuple[int, ...]) -> PyTree:
        logits, cache = prefill(prompt, lengths)
        seen = None
        if penalized:
            real = jnp.arange(width)[None, :] < lengths[:, None]
            # Padding is written to a column that does not exist, and so dropped.
            column = jnp.where(real, prompt, logits.shape[-1])
            seen = jnp.zeros(logits.shape, bool).at[rows[:, None], column].set(True, mode="drop")
        token, seen = pick(keys, logits, seen)
        tokens = jnp.full((batch, max_new_tokens), pad, jnp.int32).at[:, 0].set(token)
        done = jnp.zeros(batch, bool) if eos is None else token == eos
        return cache, token, seen, done, tokens

    def advance(keys: Key, carry: PyTree, n: Array) -> PyTree:
        cache, token, seen, done, tokens = carry
        logits, cache = step(cache, token, lengths + n - 1)
        token, seen = pick(keys, logits, seen)
        if eos is not None:
            token = jnp.where(done, pad, token)
            done = done | (token == eos)
        return cache, token, seen, done, jax.lax.dynamic_update_index_in_dim(tokens, token, n, axis=1)

    def one_more(keys: Key, carry: PyTree, n: Array) -> PyTree:
        if eos is None:
            return advance(keys, carry, n)
        all_done = jnp.all(carry[3])
        return jax.lax.cond(all_done, lambda carry: carry, lambda carry: advance(keys, carry, n), carry)

    return Chain(
        init=init,
        step=one_more,
        xs=jnp.arange(1, max_new_tokens, dtype=jnp.int32),
        finish=lambda carry: carry[-1],
    )
