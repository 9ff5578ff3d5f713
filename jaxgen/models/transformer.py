"""The Transformer: encoder, decoder-only language model and encoder-decoder; the cache goes in and out."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.dense import Dense, embedding_logits
from jaxgen.models.dropout import Dropout
from jaxgen.models.multihead import MultiHeadAttention, attention_mask
from jaxgen.models.positions import sinusoidal_positions
from jaxgen.types import Array, UserError

KeyValue: TypeAlias = tuple[Array, Array]  # keys and values of a layer, [B, G, M, D] each


@dataclasses.dataclass(frozen=True)
class TransformerSpec:
    """What the blocks are made of; the defaults are GPT-2's but for the width.

    num_kv_heads: heads of keys and values (grouped queries); None is num_heads.
    mlp_width: None is 4 * width. "swiglu" has two matrices of it before its product (Shazeer 2020).
    activation: "gelu" is the exact one, "gelu_tanh" its approximation, as in GPT-2.
    norm: "post" normalises after each residual sum (Vaswani et al. 2017), "pre" before each branch.
    final_norm: None is after the last block of "pre" only.
    positions: "learned" and "sinusoidal" codes are added to embeddings, "rotary" ones turn the heads.
    max_length: rows of the table of learned positions; no other limits the length.
    scale_embedding: multiply embeddings by sqrt(width) (Vaswani et al. 2017, section 3.4).
    tied: the output matrix is the (target) embedding's transpose.
    dropout: of embeddings, attention weights and the results of all branches.
    remat: keep only the blocks' inputs for the backward pass.
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    mlp_width: int | None = None
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu_tanh"
    norm: Literal["pre", "post"] = "pre"
    norm_kind: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-5
    final_norm: bool | None = None
    positions: Literal["sinusoidal", "learned", "rotary", "none"] = "learned"
    max_length: int = 1024
    scale_embedding: bool = False
    use_bias: bool = True
    tied: bool = True
    dropout: float = 0.0
    remat: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.num_heads % (self.num_kv_heads or self.num_heads):
            raise UserError(
                f"the Transformer's heads must divide its width of {self.width} and its key/value heads its "
                f"heads, but they are {self.num_heads} and {self.num_kv_heads}."
            )
        if self.positions == "rotary" and self.width // self.num_heads % 2:
            raise UserError(
                f"rotary positions need heads of even width, not {self.width // self.num_heads}: take others."
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise UserError(f"sinusoidal positions need an even width, not {self.width}: take others.")


class Cache(NamedTuple):
    """What has been read: keys and values of each layer with room for more, and what of the room is taken.

    A prompt of width P fills the slots 0 … P-1 of every row, of which `lengths` are real, and later tokens
    those from P on: so one write serves all rows whatever their lengths.
    """

    layers: tuple[KeyValue, ...]  # [B, G, L, D]
    lengths: Array  # int32 [B]: of the prompts
    width: Array  # int32 scalar: P
    slot: Array  # int32 scalar: the next free slot


class Memory(NamedTuple):
    """The encoder's output as the decoder needs it: keys and values for each layer, and which are real."""

    layers: tuple[KeyValue, ...]  # [B, G, S, D]
    mask: Array  # bool [B, S]


class Block(nn.Module):
    """Self-attention, cross-attention where `cross`, and the MLP, each with its residual sum and norm."""

    spec: TransformerSpec
    cross: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        spec = self.spec
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Branches whose sum keeps its size at the start, whatever the depth (Radford et al. 2019).
        out_init = nn.initializers.variance_scaling(
            0.5 / spec.num_layers if spec.norm == "pre" else 1.0, "fan_avg", "uniform"
        )
        heads: dict[str, Any] = {
            "width": spec.width,
            "num_heads": spec.num_heads,
            "num_kv_heads": spec.num_kv_heads,
            "use_bias": spec.use_bias,
            "dropout": spec.dropout,
            "out_init": out_init,
        }
        dense = lambda features, init: Dense(features, spec.use_bias, kernel_init=init, **types)
        self.attention = MultiHeadAttention(**heads, rotary=spec.positions == "rotary", **types)
        self.norm_attention = make_norm(spec, self.param_dtype)
        if self.cross:
            self.cross_attention = MultiHeadAttention(**heads, cross=True, **types)
            self.norm_cross = make_norm(spec, self.param_dtype)
        mlp_width = spec.mlp_width or 4 * spec.width
        self.up = dense(
            mlp_width * (2 if spec.activation == "swiglu" else 1), nn.initializers.xavier_uniform()
        )
        self.down = dense(spec.width, out_init)
        self.norm_mlp = make_norm(spec, self.param_dtype)
        self.drop = Dropout(spec.dropout)

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array | None,
        memory: KeyValue | None,
        memory_mask: Array | None,
        cache: KeyValue | None,
        slot: Array | None,
        train: bool,
    ) -> tuple[Array, KeyValue]:
        """The block's result `[B, N, width]`, and the keys and values that its queries looked at.

        Args:
            x: `[B, N, width]`; positions: `[B or 1, N]`; mask: of self-attention (`attention_mask`).
            memory, memory_mask: for cross-attention.
            cache: keys and values of what came before, to which those of x are added at `slot`; None
                lets x look at itself alone.
        """

        def look_at_itself(x: Array) -> tuple[Array, KeyValue]:
            q, k, v = self.attention.project(x, positions)
            if cache is not None and slot is not None:
                k, v = (
                    jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=2)
                    for old, new in zip(cache, (k, v), strict=True)
                )
            return self.attention.mix(q, k, v, mask, train=train), (k, v)

        pre = self.spec.norm == "pre"
        join = lambda x, branch, norm: (
            x + self.drop(branch, deterministic=not train)
            if pre
            else norm(x + self.drop(branch, deterministic=not train)).astype(self.dtype)
        )
        enter = lambda x, norm: norm(x).astype(self.dtype) if pre else x
        branch, key_value = look_at_itself(enter(x, self.norm_attention))
        x = join(x, branch, self.norm_attention)
        if memory is not None:
            q = self.cross_attention.project_query(enter(x, self.norm_cross))
            x = join(x, self.cross_attention.mix(q, *memory, memory_mask, train=train), self.norm_cross)
        branch = self.down(self.activate(self.up(enter(x, self.norm_mlp))))
        return join(x, branch, self.norm_mlp), key_value

    def activate(self, x: Array) -> Array:
        """The MLP's non-linearity, of x's dtype; its arithmetic is float32.

        Its inner results are made again in the backward pass: to write them and read them back takes longer.
        """

        def non_linearity(x: Array) -> Array:
            match self.spec.activation:
                case "relu":
                    return jax.nn.relu(x)
                case "gelu":
                    return jax.nn.gelu(x, approximate=False)
                case "gelu_tanh":
                    return jax.nn.gelu(x, approximate=True)
                case "swiglu":
                    gate, value = jnp.split(x, 2, axis=-1)
                    return jax.nn.silu(gate) * value

        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jax.checkpoint(lambda x: non_linearity(x.astype(wide)).astype(x.dtype))(x)

    def memory_of(self, encoded: Array) -> KeyValue:
        """Cross-attention's keys and values of the encoder's output."""
        return self.cross_attention.project_memory(encoded)


class Stack(nn.Module):
    """Embeddings with positions, the blocks, and the last norm: what all three models are made of."""

    spec: TransformerSpec
    cross: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        spec = self.spec
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block = nn.remat(Block, static_argnums=(8,)) if spec.remat else Block
        self.blocks = [block(spec, self.cross, **types, name=f"block_{i}") for i in range(spec.num_layers)]
        if spec.positions == "learned":
            self.positions = nn.Embed(
                spec.max_length,
                spec.width,
                embedding_init=nn.initializers.normal(0.02),
                **types,
            )
        if spec.norm == "pre" if spec.final_norm is None else spec.final_norm:
            self.norm = make_norm(spec, self.param_dtype)
        self.drop = Dropout(spec.dropout)

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array | None,
        *,
        memory: Memory | None = None,
        cache: tuple[KeyValue, ...] | None = None,
        slot: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, tuple[KeyValue, ...]]:
        """From embedded tokens `[B, N, width]` to the last norm's output; see `Block`."""
        spec = self.spec
        if spec.scale_embedding:
            x = x * spec.width**0.5
        if spec.positions == "learned":
            if x.shape[1] > spec.max_length:
                raise UserError(
                    f"a sequence of {x.shape[1]} tokens is longer than the {spec.max_length} learned "
                    "positions: raise max_length or cut it."
                )
            x = x + self.positions(positions)
        elif spec.positions == "sinusoidal":
            x = x + sinusoidal_positions(positions, spec.width).astype(x.dtype)
        x = self.drop(x, deterministic=not train)
        memory_mask = None
        if memory is not None:
            memory_mask = attention_mask(x.shape[1], memory.mask.shape[1], causal=False, key_mask=memory.mask)
        key_values = []
        for i, block in enumerate(self.blocks):
            x, key_value = block(
                x,
                positions,
                mask,
                None if memory is None else memory.layers[i],
                memory_mask,
                None if cache is None else cache[i],
                slot,
                train,
            )
            key_values.append(key_value)
        if hasattr(self, "norm"):
            x = self.norm(x).astype(self.dtype)
        return x, tuple(key_values)

    def read(self, x: Array, *, memory: Memory | None = None, train: bool = False) -> Array:
        """Teacher forcing: every position sees itself and those before it."""
        mask = attention_mask(x.shape[1], x.shape[1], causal=True, key_mask=None)
        return self(x, _positions(x), mask, memory=memory, train=train)[0]

    def prefill(
        self, x: Array, lengths: Array, cache_length: int, memory: Memory | None = None
    ) -> tuple[Array, Cache]:
        """The output at each row's last real position, `[B, width]`, and a cache of `cache_length` slots."""
        width = x.shape[1]
        if width > cache_length:
            raise UserError(f"a prompt of {width} tokens does not fit a cache of {cache_length}: enlarge it.")
        if self.spec.positions == "learned" and cache_length > self.spec.max_length:
            raise UserError(
                f"a cache of {cache_length} tokens is longer than the {self.spec.max_length} learned "
                "positions: ask for fewer tokens."
            )
        mask = attention_mask(width, width, causal=True, key_mask=None)
        x, key_values = self(x, _positions(x), mask, memory=memory)
        room = ((0, 0), (0, 0), (0, cache_length - width), (0, 0))
        layers = jax.tree.map(lambda a: jnp.pad(a, room), key_values)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        at = jnp.asarray(width, jnp.int32)
        return last, Cache(layers, lengths.astype(jnp.int32), at, at)

    def step(
        self, x: Array, position: Array, cache: Cache, memory: Memory | None = None
    ) -> tuple[Array, Cache]:
        """The output `[B, width]` for one more token; NaN where the cache was full."""
        room = cache.layers[0][0].shape[2]
        slots = jnp.arange(room)[None, :]
        seen = (slots < cache.lengths[:, None]) | ((slots >= cache.width) & (slots <= cache.slot))
        mask = attention_mask(1, room, causal=False, key_mask=seen)
        x, layers = self(
            x[:, None], position[:, None], mask, memory=memory, cache=cache.layers, slot=cache.slot
        )
        x = jnp.where(cache.slot < room, x[:, 0], jnp.nan)
        return x, cache._replace(layers=layers, slot=cache.slot + 1)

    def memory_of(self, encoded: Array, mask: Array) -> Memory:
        """The decoder's keys and values of the encoder's output `[B, S, width]`."""
        return Memory(tuple(block.memory_of(encoded) for block in self.blocks), mask)


class TransformerLM(nn.Module):
    """A decoder alone: the logits of each next token given those up to it."""

    vocab_size: int
    spec: TransformerSpec
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = make_embedding(self.vocab_size, self.spec, **types)
        self.stack = Stack(self.spec, **types)
        if not self.spec.tied:
            self.head = Dense(self.vocab_size, use_bias=False, out_dtype=jnp.float32, **types)

    def __call__(self, tokens: Array, *, train: bool = False) -> Array:
        """Logits float32 `[B, T, V]` of tokens int32 `[B, T]`; right padding reaches no real position."""
        return self.logits(self.stack.read(self.embedding(tokens), train=train))

    def prefill(self, tokens: Array, lengths: Array, *, cache_length: int) -> tuple[Array, Cache]:
        """Logits `[B, V]` after the last real token of each row, and the cache."""
        x, cache = self.stack.prefill(self.embedding(tokens), lengths, cache_length)
        return self.logits(x), cache

    def step(self, cache: Cache, token: Array, position: Array) -> tuple[Array, Cache]:
        """Logits `[B, V]` after one more token `[B]`, `position` `[B]` in its sequence."""
        x, cache = self.stack.step(self.embedding(token), position, cache)
        return self.logits(x), cache

    def logits(self, x: Array) -> Array:
        """Scores of all tokens, float32."""
        return embedding_logits(self.embedding, x) if self.spec.tied else self.head(x)


class TransformerEncoder(nn.Module):
    """Tokens int32 `[B, T]` -> `[B, T, width]`; each position sees all real ones."""

    vocab_size: int
    spec: TransformerSpec
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = make_embedding(self.vocab_size, self.spec, **types)
        self.stack = Stack(self.spec, **types)

    def __call__(self, tokens: Array, lengths: Array | None = None, *, train: bool = False) -> Array:
        """lengths: int32 `[B]`, how many tokens are real; None is all."""
        x = self.embedding(tokens)
        mask = attention_mask(x.shape[1], x.shape[1], causal=False, key_mask=key_mask_of(tokens, lengths))
        return self.stack(x, _positions(x), mask, train=train)[0]


class EncoderDecoder(nn.Module):
    """The Transformer of Vaswani et al. 2017: an encoder, and a decoder that looks at its output.

    shared_embedding: one table for both languages, which must then have one vocabulary.
    """

    source_vocab: int
    target_vocab: int
    spec: TransformerSpec
    shared_embedding: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if self.shared_embedding and self.source_vocab != self.target_vocab:
            raise UserError(
                f"a shared embedding needs one vocabulary, but they have {self.source_vocab} and "
                f"{self.target_vocab} tokens."
            )
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.target_embedding = make_embedding(self.target_vocab, self.spec, **types)
        if not self.shared_embedding:
            self.source_embedding = make_embedding(self.source_vocab, self.spec, **types)
        self.encoder = Stack(self.spec, **types)
        self.decoder = Stack(self.spec, cross=True, **types)
        if not self.spec.tied:
            self.head = Dense(self.target_vocab, use_bias=False, out_dtype=jnp.float32, **types)

    def __call__(
        self, source: Array, source_lengths: Array | None, target_in: Array, *, train: bool = False
    ) -> Array:
        """Logits float32 `[B, T, V]` of what follows each of target_in `[B, T]` (teacher forcing)."""
        memory = self.encode(source, source_lengths, train=train)
        return self.logits(self.decoder.read(self.target_embedding(target_in), memory=memory, train=train))

    def encode(self, source: Array, source_lengths: Array | None, *, train: bool = False) -> Memory:
        """What the decoder needs of source int32 `[B, S]`, made once for a whole decoding."""
        table = self.target_embedding if self.shared_embedding else self.source_embedding
        x, mask = table(source), key_mask_of(source, source_lengths)
        bias = attention_mask(x.shape[1], x.shape[1], causal=False, key_mask=mask)
        encoded = self.encoder(x, _positions(x), bias, train=train)[0]
        return self.decoder.memory_of(encoded, jnp.ones(source.shape, bool) if mask is None else mask)

    def prefill(
        self, memory: Memory, tokens: Array, lengths: Array, *, cache_length: int
    ) -> tuple[Array, Cache]:
        """Logits `[B, V]` after the last real token of each target prefix, and the cache."""
        x, cache = self.decoder.prefill(self.target_embedding(tokens), lengths, cache_length, memory)
        return self.logits(x), cache

    def step(self, memory: Memory, cache: Cache, token: Array, position: Array) -> tuple[Array, Cache]:
        """Logits `[B, V]` after one more token `[B]`."""
        x, cache = self.decoder.step(self.target_embedding(token), position, cache, memory)
        return self.logits(x), cache

    def logits(self, x: Array) -> Array:
        """Scores of all tokens, float32."""
        return embedding_logits(self.target_embedding, x) if self.spec.tied else self.head(x)


def make_norm(spec: TransformerSpec, param_dtype: DTypeLike) -> nn.Module:
    """The norm that the spec asks for; its arithmetic is float32."""
    if spec.norm_kind == "rms":
        return nn.RMSNorm(spec.norm_epsilon, dtype=jnp.float32, param_dtype=param_dtype)
    return nn.LayerNorm(
        spec.norm_epsilon, dtype=jnp.float32, param_dtype=param_dtype, use_fast_variance=False
    )


def make_embedding(
    vocab_size: int, spec: TransformerSpec, *, dtype: DTypeLike, param_dtype: DTypeLike
) -> nn.Embed:
    """A table of tokens, of size 1 after scaling where the spec scales, else GPT-2's."""
    std = spec.width**-0.5 if spec.scale_embedding else 0.02
    init = nn.initializers.normal(std)
    return nn.Embed(vocab_size, spec.width, embedding_init=init, dtype=dtype, param_dtype=param_dtype)


def key_mask_of(tokens: Array, lengths: Array | None) -> Array | None:
    """bool `[B, T]`: which tokens are real; None where all are."""
    return None if lengths is None else jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]


def _positions(x: Array) -> Array:
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
