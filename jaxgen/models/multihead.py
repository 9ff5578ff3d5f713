"""Multi-head attention for sequences: self-, masked and cross-attention, and grouped queries."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.dense import Dense
from jaxgen.models.dropout import drop
from jaxgen.models.positions import rotate
from jaxgen.models.products import inner_products, matmul
from jaxgen.types import Array, Key

# Where a score must not count. Finite, so that a row without any key is a mean and not NaN; exp of it is 0.
_MASKED = -1e30


def attention_mask(num_queries: int, num_keys: int, *, causal: bool, key_mask: Array | None) -> Array | None:
    """M of softmax(A + M): 0 where a query may look, a large negative number elsewhere; None for no mask.

    Args:
        causal: query n sees the keys up to its own place, the last query being at the last key.
        key_mask: bool `[B, M]`, which keys are real; None is all.

    Returns:
        float32 `[1 or B, 1 or N, M]`.
    """
    mask = None
    if key_mask is not None:
        mask = jnp.where(key_mask, 0.0, _MASKED)[:, None, :]
    if causal and num_queries > 1:
        places = jnp.arange(num_keys)
        seen = places[None, :] <= places[num_keys - num_queries :, None]
        triangle = jnp.where(seen, 0.0, _MASKED)[None]
        mask = triangle if mask is None else mask + triangle
    return mask


def attention_scores(q: Array, k: Array, mask: Array | None) -> Array:
    """A + M with A = q kᵀ / sqrt(D): what the softmax of attention is taken of, float32 `[B, H, N, M]`.

    Args:
        q: `[B, H, N, D]`; k: `[B, G, M, D]` with G dividing H: each group of H/G queries shares a key
            (Ainslie et al. 2023).
        mask: as made by `attention_mask`.
    """
    b, heads, n, d = q.shape
    groups, m = k.shape[1], k.shape[2]
    # Heads in the leading axis: see models.attention.
    folded = (q * d**-0.5).reshape(b * groups, heads // groups * n, d)
    scores = inner_products(folded, k.reshape(-1, m, d))
    scores = scores.reshape(b, heads, n, m)
    return scores if mask is None else scores + mask[:, None]


def attention_weights(q: Array, k: Array, mask: Array | None) -> Array:
    """softmax(q kᵀ / sqrt(D) + M) (Vaswani et al. 2017, eq. 1 and section 3.2.3).

    Arguments as of `attention_scores`. Returns float32 `[B, H, N, M]`, rows summing to 1.
    """
    return jax.nn.softmax(attention_scores(q, k, mask), axis=-1)


def weighted_values(weights: Array, v: Array) -> Array:
    """The sums of values `[B, G, M, D]` under weights `[B, H, N, M]`: float32 `[B, H, N, D]`."""
    b, heads, n, m = weights.shape
    groups, d = v.shape[1], v.shape[3]
    folded = weights.astype(v.dtype).reshape(b * groups, heads // groups * n, m)
    return matmul(folded, v.reshape(-1, m, d)).reshape(b, heads, n, d)


class MultiHeadAttention(nn.Module):
    """Concat(head_1 … head_H) W_O with head_i = attention(x W_i^Q, y W_i^K, y W_i^V) (Vaswani et al. 2017).

    In self-attention y is x and the three matrices lie side by side in one (`qkv`); in cross-attention
    (`cross`) keys and values come from a memory (`query`, `key_value`).

    width: of x and the result. num_kv_heads: heads of keys and values, dividing num_heads; None is num_heads.
    rotary: turn queries and keys by their positions. dropout: of the weights, in training.
    """

    width: int
    num_heads: int
    num_kv_heads: int | None = None
    cross: bool = False
    rotary: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    out_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        head, groups = self.width // self.num_heads, self.num_kv_heads or self.num_heads
        # Matrices side by side, each drawn as if alone.
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        dense = lambda features, init: Dense(
            features, self.use_bias, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype
        )
        if self.cross:
            self.query = dense(self.width, init)
            self.key_value = dense(2 * groups * head, init)
        else:
            self.qkv = dense(self.width + 2 * groups * head, init)
        self.out = dense(self.width, self.out_init)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Self-attention's queries `[B, H, N, D]`, keys and values `[B, G, N, D]`; positions: `[B, N]`."""
        groups = self.num_kv_heads or self.num_heads
        head = self.width // self.num_heads
        q, k, v = jnp.split(self.qkv(x), [self.width, self.width + groups * head], axis=-1)
        q, k, v = _heads(q, self.num_heads), _heads(k, groups), _heads(v, groups)
        if self.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        return q, k, v

    def project_query(self, x: Array) -> Array:
        """Queries `[B, H, N, D]` of cross-attention."""
        return _heads(self.query(x), self.num_heads)

    def project_memory(self, memory: Array) -> tuple[Array, Array]:
        """Keys and values `[B, G, M, D]` of cross-attention, made once for all that is decoded."""
        groups = self.num_kv_heads or self.num_heads
        k, v = jnp.split(self.key_value(memory), 2, axis=-1)
        return _heads(k, groups), _heads(v, groups)

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None, *, train: bool) -> Array:
        """The attention's result `[B, N, width]`; sows its weights where "intermediates" is mutable."""
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow("intermediates", "attention_weights", attention_weights(q, k, mask))
        key = self.make_rng("dropout") if train and self.dropout else None
        out = attend(q, k, v, mask, self.dropout, key)
        b, heads, n, d = out.shape
        return self.out(jnp.swapaxes(out, 1, 2).reshape(b, n, heads * d))


def attend(
    q: Array, k: Array, v: Array, mask: Array | None, dropout: float = 0.0, key: Key | None = None
) -> Array:
    """Attention `[B, H, N, D]` with dropout of the weights where a key is given.

    The softmax's division is made last, on `[N, D]` results, which saves passes over `[N, M]` weights.
    """
    scores = attention_scores(q, k, mask)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if key is not None:
        weights = drop(key, weights, dropout)
    return (weighted_values(weights, v) / total).astype(v.dtype)


def _heads(x: Array, num_heads: int) -> Array:
    b, n, width = x.shape
    return jnp.swapaxes(x.reshape(b, n, num_heads, width // num_heads), 1, 2)
