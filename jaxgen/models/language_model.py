"""Recurrent language model, sentence encoder and classifier of sequences."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.dense import Dense, embedding_logits
from jaxgen.models.dropout import Dropout
from jaxgen.models.recurrent import Kind, Recurrent, initial_carry
from jaxgen.types import Array, PyTree, UserError


class RecurrentLM(nn.Module):
    """Embedding, recurrent layers and softmax, with dropout at the joints between them (Zaremba et al. 2014).

    tied: the output matrix is the embedding's transpose (Press and Wolf 2017), which needs embed == hidden.
    init_scale: all weights and biases, embedding and softmax included, uniform in ±init_scale; None: each
        layer's own.
    dropout, variational: see `Recurrent`; also of the embeddings and of the last layer's outputs.
    """

    vocab_size: int
    embed: int
    hidden: int
    num_layers: int = 2
    kind: Kind = "lstm"
    dropout: float = 0.0
    variational: bool = False
    tied: bool = False
    init_scale: float | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if self.tied and self.embed != self.hidden:
            raise UserError(
                f"tied embeddings need an embedding as wide as the state, but they have {self.embed} and "
                f"{self.hidden}."
            )
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = embedding_init(self.init_scale)
        self.embedding = nn.Embed(self.vocab_size, self.embed, embedding_init=init, **types)
        self.recurrent = Recurrent(
            kind=self.kind,
            hidden=self.hidden,
            num_layers=self.num_layers,
            dropout=self.dropout,
            variational=self.variational,
            init_scale=self.init_scale,
            **types,
        )
        # One mask a sequence where variational, one a step else; axis 1 is time.
        self.drop = Dropout(self.dropout, broadcast_dims=(1,) if self.variational else ())
        if not self.tied:
            kernel_init, bias_init = (
                (nn.initializers.lecun_normal(), nn.initializers.zeros_init())
                if self.init_scale is None
                else (init, init)
            )
            self.head = Dense(
                self.vocab_size, kernel_init=kernel_init, bias_init=bias_init, out_dtype=jnp.float32, **types
            )

    def __call__(
        self,
        tokens: Array,
        carry: tuple[PyTree, ...] | None = None,
        *,
        lengths: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, tuple[PyTree, ...]]:
        """Logits float32 `[B, T, V]` of what follows each token, and the carry after the last real one.

        tokens: int32 `[B, T]`; carry: of the call before, where a text is read in pieces; None is zeros.
        """
        y, carry = self.recurrent(
            self.drop(self.embedding(tokens), deterministic=not train), lengths, carry, train=train
        )
        return self.logits(self.drop(y, deterministic=not train)), carry

    def initial_carry(self, batch: int) -> tuple[PyTree, ...]:
        """The state before any token."""
        return initial_carry(self.kind, self.hidden, self.num_layers, batch)

    def prefill(self, tokens: Array, lengths: Array) -> tuple[Array, tuple[PyTree, ...]]:
        """Logits `[B, V]` after the last real token of each row, and the carry, which is the whole cache."""
        y, carry = self.recurrent(self.embedding(tokens), lengths)
        return self.logits(last_real(y, lengths)), carry

    def step(
        self, carry: tuple[PyTree, ...], token: Array, position: Array
    ) -> tuple[Array, tuple[PyTree, ...]]:
        """Logits `[B, V]` after one more token `[B]`; a recurrent network has no use for `position`."""
        y, carry = self.recurrent.step(carry, self.embedding(token))
        return self.logits(y), carry

    def logits(self, y: Array) -> Array:
        """Scores of all tokens, float32."""
        return embedding_logits(self.embedding, y) if self.tied else self.head(y)


class RecurrentEncoder(nn.Module):
    """Tokens int32 `[B, T]` -> the last layer's states `[B, T, H]` (`[B, T, 2H]` where bidirectional)."""

    vocab_size: int
    embed: int
    hidden: int
    num_layers: int = 1
    kind: Kind = "lstm"
    bidirectional: bool = True
    dropout: float = 0.0
    variational: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = nn.Embed(self.vocab_size, self.embed, **types)
        self.drop = Dropout(self.dropout, broadcast_dims=(1,) if self.variational else ())
        self.recurrent = Recurrent(
            self.kind,
            self.hidden,
            self.num_layers,
            self.bidirectional,
            self.dropout,
            self.variational,
            **types,
        )

    def __call__(self, tokens: Array, lengths: Array | None = None, *, train: bool = False) -> Array:
        """lengths: int32 `[B]`, how many tokens are real; None is all."""
        return self.states(tokens, lengths, train=train)[0]

    def states(
        self, tokens: Array, lengths: Array | None, *, train: bool
    ) -> tuple[Array, tuple[PyTree, ...]]:
        """As `__call__`, and the carry of every layer and direction."""
        x = self.drop(self.embedding(tokens), deterministic=not train)
        return self.recurrent(x, lengths, train=train)


class SequenceClassifier(nn.Module):
    """A label for each sequence, or for each token where pooling is "none".

    encoder: (tokens, lengths, train=) -> `[B, T, E]`: a `RecurrentEncoder` or a `TransformerEncoder`.
    pooling: "mean" over the real tokens; "last" takes the last real one.
    """

    encoder: nn.Module
    num_classes: int
    pooling: Literal["mean", "last", "none"] = "mean"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, lengths: Array | None = None, *, train: bool = False) -> Array:
        """Logits float32 `[B, K]`, or `[B, T, K]` where pooling is "none", of tokens int32 `[B, T]`."""
        x = self.encoder(tokens, lengths, train=train)
        lengths = jnp.full(tokens.shape[0], tokens.shape[1]) if lengths is None else lengths
        if self.pooling == "mean":
            real = jnp.arange(tokens.shape[1])[None, :, None] < lengths[:, None, None]
            x = jnp.sum(jnp.where(real, x, 0.0), axis=1) / jnp.maximum(lengths, 1)[:, None].astype(x.dtype)
        elif self.pooling == "last":
            x = last_real(x, lengths)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(self.num_classes, out_dtype=jnp.float32, **types, name="head")(x)


def last_real(x: Array, lengths: Array) -> Array:
    """The entries of x `[B, T, E]` at lengths - 1: `[B, E]`."""
    return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def embedding_init(scale: float | None) -> nn.initializers.Initializer:
    """Uniform in ±scale; None is Linen's own for embeddings."""
    if scale is None:
        return nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -scale, scale)
