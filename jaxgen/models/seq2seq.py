"""Recurrent encoder-decoder with attention over the encoder: Bahdanau's and Luong's."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.dense import Dense
from jaxgen.models.dropout import Dropout
from jaxgen.models.language_model import RecurrentEncoder, last_real
from jaxgen.models.products import inner_products
from jaxgen.models.recurrent import Kind, LSTMState, Recurrent
from jaxgen.types import Array, PyTree


class RecurrentMemory(NamedTuple):
    """What decoding needs of the source."""

    encoded: Array  # [B, S, 2H]
    keys: Array  # [B, S, H]: of attention
    mask: Array  # bool [B, S]: which tokens are real
    carry: tuple[PyTree, ...]  # the decoder's first state


def luong_scores(h: Array, keys: Array) -> Array:
    """score(h_t, h_s) = h_tᵀ W_a h_s (Luong et al. 2015, eq. 8, "general"), float32 `[B, T, S]`.

    h: `[B, T, H]`; keys: W_a h_s, `[B, S, H]`.
    """
    return inner_products(h, keys)


def bahdanau_scores(query: Array, keys: Array, v: Array) -> Array:
    """e_j = vᵀ tanh(W_a s_{i-1} + U_a h_j) (Bahdanau et al. 2015, A.1.2), float32 `[B, S]`.

    query: W_a s_{i-1}, `[B, H]`; keys: U_a h_j, `[B, S, H]`.
    """
    energy = jnp.tanh(query[:, None] + keys)
    return jnp.einsum("bsh,h->bs", energy, v, preferred_element_type=jnp.float32)


class RecurrentSeq2Seq(nn.Module):
    """A bidirectional encoder, and a decoder that attends to its states.

    attention: "bahdanau" looks with the state before the step and feeds what it sees to the step; "luong"
        looks with the state after it (global, general score), so that all but the recurrence runs at once in
        teacher forcing. Both read out tanh(W [h_t, context]) (Luong et al. 2015, eq. 5; Bahdanau's maxout
        and Luong's input feeding are left out).
    dropout: of embeddings, between layers and of the read-out.
    """

    source_vocab: int
    target_vocab: int
    embed: int
    hidden: int
    num_layers: int = 1
    kind: Kind = "gru"
    attention: Literal["bahdanau", "luong"] = "bahdanau"
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = lambda features, bias=True: Dense(features, bias, **types)
        self.encoder = RecurrentEncoder(
            self.source_vocab,
            self.embed,
            self.hidden,
            self.num_layers,
            self.kind,
            dropout=self.dropout,
            **types,
        )
        self.target_embedding = nn.Embed(self.target_vocab, self.embed, **types)
        self.decoder = Recurrent(self.kind, self.hidden, self.num_layers, dropout=self.dropout, **types)
        self.bridge = [dense(self.hidden) for _ in range(self.num_layers)]
        self.key = dense(self.hidden, bias=False)
        if self.attention == "bahdanau":
            self.query = dense(self.hidden)
            self.v = self.param(
                "v", nn.initializers.normal(self.hidden**-0.5), (self.hidden,), self.param_dtype
            )
        self.read_out = dense(self.hidden)
        self.head = Dense(self.target_vocab, out_dtype=jnp.float32, **types)
        self.drop = Dropout(self.dropout)

    def __call__(
        self, source: Array, source_lengths: Array | None, target_in: Array, *, train: bool = False
    ) -> Array:
        """Logits float32 `[B, T, V]` of what follows each of target_in `[B, T]` (teacher forcing).

        Sows "attention_weights" `[B, T, S]` where "intermediates" is mutable.
        """
        memory = self.encode(source, source_lengths, train=train)
        return self._read(memory, memory.carry, target_in, None, train)[0]

    def encode(self, source: Array, source_lengths: Array | None, *, train: bool = False) -> RecurrentMemory:
        """What the decoder needs of source int32 `[B, S]`, made once for a whole decoding."""
        encoded, states = self.encoder.states(source, source_lengths, train=train)
        mask = jnp.ones(source.shape, bool)
        if source_lengths is not None:
            mask = jnp.arange(source.shape[1])[None, :] < source_lengths[:, None]
        carry: list[PyTree] = []
        for layer, bridge in enumerate(self.bridge):
            forward, backward = states[2 * layer], states[2 * layer + 1]
            if self.kind == "lstm":
                h = jnp.tanh(bridge(jnp.concatenate([forward.h, backward.h], axis=-1))).astype(jnp.float32)
                carry.append(LSTMState(h, 0.5 * (forward.c + backward.c)))
            else:
                h = jnp.concatenate([forward, backward], axis=-1)
                carry.append(jnp.tanh(bridge(h)).astype(jnp.float32))
        return RecurrentMemory(encoded, self.key(encoded), mask, tuple(carry))

    def prefill(
        self, memory: RecurrentMemory, tokens: Array, lengths: Array, *, cache_length: int | None = None
    ) -> tuple[Array, tuple[PyTree, ...]]:
        """Logits `[B, V]` after the last real token of each target prefix, and the carry.

        cache_length: asked for as of the Transformer; a carry is as large for any length.
        """
        logits, carry = self._read(memory, memory.carry, tokens, lengths, False)
        return last_real(logits, lengths), carry

    def step(
        self, memory: RecurrentMemory, carry: tuple[PyTree, ...], token: Array, position: Array
    ) -> tuple[Array, tuple[PyTree, ...]]:
        """Logits `[B, V]` after one more token `[B]`; a recurrent network has no use for `position`."""
        logits, carry = self._read(memory, carry, token[:, None], None, False)
        return logits[:, 0], carry

    def _read(
        self,
        memory: RecurrentMemory,
        carry: tuple[PyTree, ...],
        tokens: Array,
        lengths: Array | None,
        train: bool,
    ) -> tuple[Array, tuple[PyTree, ...]]:
        x = self.drop(self.target_embedding(tokens), deterministic=not train)
        if self.attention == "luong":
            h, carry = self.decoder(x, lengths, carry, train=train)
            weights = _softmax(luong_scores(h, memory.keys), memory.mask[:, None])
            context = jnp.einsum("bts,bse->bte", weights.astype(self.dtype), memory.encoded)
        else:
            real = (
                jnp.arange(tokens.shape[1])[None, :]
                < (jnp.full(tokens.shape[:1], tokens.shape[1]) if lengths is None else lengths)[:, None]
            )
            scan = nn.scan(
                RecurrentSeq2Seq._bahdanau_step,
                variable_broadcast="params",
                split_rngs={"params": False, "dropout": True},
                in_axes=(1, 1, nn.broadcast, nn.broadcast),
                out_axes=1,
            )
            carry, (h, context, weights) = scan(self, carry, x, real, memory, train)
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow("intermediates", "attention_weights", weights)
        out = jnp.tanh(self.read_out(jnp.concatenate([h, context], axis=-1)))
        return self.head(self.drop(out, deterministic=not train)), carry

    def _bahdanau_step(
        self, carry: tuple[PyTree, ...], x: Array, real: Array, memory: RecurrentMemory, train: bool
    ) -> tuple[tuple[PyTree, ...], tuple[Array, Array, Array]]:
        top: Any = carry[-1]
        state = top.h if self.kind == "lstm" else top
        query = self.query(state)
        weights = _softmax(bahdanau_scores(query, memory.keys, self.v.astype(self.dtype)), memory.mask)
        context = jnp.einsum("bs,bse->be", weights.astype(self.dtype), memory.encoded)
        together = jnp.concatenate([x, context], axis=-1)
        h, new = self.decoder(together[:, None], real[:, None].sum(axis=1), carry, train=train)
        return new, (h[:, 0], context, weights)


def _softmax(scores: Array, mask: Array) -> Array:
    """Over the real tokens: float32, as scores."""
    return jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
