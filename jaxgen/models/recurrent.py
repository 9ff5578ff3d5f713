"""Recurrent networks: the vanilla RNN, the LSTM and the GRU, stacked, bidirectional, with either dropout.

A cell is a pure function of its state, of `projected` (the input times its matrix, plus the bias) and of the
recurrent matrix. The input's product is made for all steps at once, so that only the recurrent one is left in
the `lax.scan`; its weight gradient too is one product after the backward scan, where JAX would add one up
each step. Both rest on one property of every cell here: each recurrent product is added to columns of its own
of `projected`, so that the gradient of those columns is that of the product.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxgen.models.dropout import Dropout
from jaxgen.models.products import affine, transposed_matmul
from jaxgen.types import Array, PyTree

Kind: TypeAlias = Literal["rnn", "lstm", "gru", "gru_reset_after"]


class LSTMState(NamedTuple):
    """The hidden state and the memory, float32 `[B, H]` each."""

    h: Array
    c: Array


def rnn_cell(h: Array, projected: Array, kernel: Array) -> tuple[Array, Array]:
    """h_t = tanh(W_x x_t + W_h h_{t-1} + b) (Elman 1990).

    Args:
        h: `[B, H]`; projected: W_x x_t + b, `[B, H]`; kernel: W_h, `[H, H]`.

    Returns:
        h_t, and what was multiplied by the kernel.
    """
    return jnp.tanh(projected + _product(h, kernel)), h


def lstm_cell(state: LSTMState, projected: Array, kernel: Array, h: Array) -> tuple[LSTMState, Array]:
    """C_t = f_t * C_{t-1} + i_t * C~_t, h_t = o_t * tanh(C_t) (Hochreiter and Schmidhuber 1997; Gers 2000).

    i, f, o = sigmoid(W [h_{t-1}, x_t] + b) and C~ = tanh(W [h_{t-1}, x_t] + b); columns in the order
    i, f, C~, o, which is PyTorch's.

    Args:
        state: h_{t-1} and C_{t-1}; projected: `[B, 4H]`; kernel: `[H, 4H]`.
        h: h_{t-1} as the gates see it, with dropout where there is any.

    Returns:
        The new state, and what was multiplied by the kernel.
    """
    i, f, candidate, o = jnp.split(projected + _product(h, kernel), 4, axis=-1)
    c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(candidate)
    return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c), h


def gru_cell(state: Array, projected: Array, kernel: Array, h: Array) -> tuple[Array, tuple[Array, Array]]:
    """h_t = (1 - z_t) * h_{t-1} + z_t * h~_t, h~_t = tanh(W_h [r_t * h_{t-1}, x_t] + b) (Cho et al. 2014).

    r and z are sigmoids; columns in the order r, z, h~. Cho et al. print z and 1 - z the other way round.

    Args:
        state: `[B, H]`; projected: `[B, 3H]`; kernel: `[H, 3H]`; h: the state as the gates see it.

    Returns:
        The new state, and what was multiplied by the kernel's gate columns and by its candidate columns.
    """
    hidden = state.shape[-1]
    gates = projected[:, : 2 * hidden] + _product(h, kernel[:, : 2 * hidden])
    r, z = jnp.split(jax.nn.sigmoid(gates), 2, axis=-1)
    candidate = jnp.tanh(projected[:, 2 * hidden :] + _product(r * h, kernel[:, 2 * hidden :]))
    return (1 - z) * state + z * candidate, (h, r * h)


def gru_reset_after_cell(state: Array, projected: Array, kernel: Array, h: Array) -> tuple[Array, Array]:
    """The GRU of cuDNN and PyTorch: h~_t = tanh(W_x x_t + b + r_t * (W_h h_{t-1} + b_h)).

    The reset gate acts after the recurrent product, which is therefore one for all three gates. z as in
    `gru_cell`: PyTorch's is 1 - z.

    Args:
        state: `[B, H]`; projected: `[B, 4H]`, in the order r, z, b_h, h~; kernel: `[H, 3H]`, as the first 3.
        h: the state as the gates see it.
    """
    hidden = state.shape[-1]
    r, z, recurrent = jnp.split(projected[:, : 3 * hidden] + _product(h, kernel), 3, axis=-1)
    z = jax.nn.sigmoid(z)
    candidate = jnp.tanh(projected[:, 3 * hidden :] + jax.nn.sigmoid(r) * recurrent)
    return (1 - z) * state + z * candidate, h


def initial_carry(
    kind: Kind, hidden: int, num_layers: int, batch: int, bidirectional: bool = False
) -> tuple[PyTree, ...]:
    """Zeros: a tuple with the state of each layer (each direction of it, forward first), float32 `[B, H]`."""
    zeros = jnp.zeros((batch, hidden), jnp.float32)
    state = LSTMState(zeros, zeros) if kind == "lstm" else zeros
    return (state,) * (num_layers * (1 + bidirectional))


class Recurrent(nn.Module):
    """`num_layers` recurrent layers, each on the outputs of the one before.

    kind: "gru" is the printed GRU, "gru_reset_after" PyTorch's.
    dropout: the rate between layers (Zaremba et al. 2014). With `variational` one mask serves all steps and
        the recurrent state has one too (Gal and Ghahramani 2016).
    init_scale: weights are uniform in ±init_scale; None is ±1/sqrt(hidden).
    """

    kind: Kind = "lstm"
    hidden: int = 200
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    variational: bool = False
    init_scale: float | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        lengths: Array | None = None,
        carry: tuple[PyTree, ...] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Array, tuple[PyTree, ...]]:
        """The outputs of the last layer and the state of every layer after the last real step.

        Args:
            x: `[B, T, D]`.
            lengths: int32 `[B]`, how many steps are real (None: all); what comes after changes no number.
            carry: the states to begin with, as returned by the call before; None is zeros.

        Returns:
            `[B, T, H]` (where bidirectional `[B, T, 2H]`, forward first), zero beyond `lengths`; the carry.
        """
        batch, time, _ = x.shape
        if carry is None:
            carry = initial_carry(self.kind, self.hidden, self.num_layers, batch, self.bidirectional)
        mask = None if lengths is None else jnp.arange(time)[:, None] < lengths[None, :]
        x, states = jnp.swapaxes(x, 0, 1), list(carry)
        directions = 1 + self.bidirectional
        drop = partial(Dropout, deterministic=not train, broadcast_dims=(0,) if self.variational else ())
        for layer in range(self.num_layers):
            if layer:
                x = drop(self.dropout)(x)
            outputs = []
            for direction in range(directions):
                name = f"layer_{layer}" + ("_reverse" if direction else "")
                index = layer * directions + direction
                projected, kernel = self._weights(x, name)
                keep = None
                if self.variational and self.dropout and train:
                    keep = drop(self.dropout)(jnp.ones((1, batch, self.hidden)))[0]
                y, states[index] = _scan(
                    self.kind, bool(direction), self.dtype, kernel, projected, states[index], mask, keep
                )
                outputs.append(y.astype(self.dtype))
            x = jnp.concatenate(outputs, axis=-1) if self.bidirectional else outputs[0]
        return jnp.swapaxes(x, 0, 1), tuple(states)

    def step(self, carry: tuple[PyTree, ...], x: Array) -> tuple[Array, tuple[PyTree, ...]]:
        """One step: x `[B, D]` -> (`[B, H]`, the new carry). For one direction only."""
        y, carry = self(x[:, None], None, carry)
        return y[:, 0], carry

    def _weights(self, x: Array, name: str) -> tuple[Array, Array]:
        """`projected`, float32 `[T, B, columns]`, and the recurrent kernel, of the layer `name`."""
        scale = self.hidden**-0.5 if self.init_scale is None else self.init_scale
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -scale, scale)
        gates = {"rnn": 1, "lstm": 4, "gru": 3, "gru_reset_after": 3}[self.kind]
        param = lambda what, *shape: self.param(f"{name}_{what}", init, shape, self.param_dtype)
        kernel = param("recurrent_kernel", self.hidden, gates * self.hidden)
        input_kernel = param("input_kernel", x.shape[-1], gates * self.hidden)
        projected = affine(x.astype(self.dtype), input_kernel, param("bias", gates * self.hidden))
        if self.kind == "gru_reset_after":
            inner = param("candidate_bias", self.hidden).astype(jnp.float32)
            inner = jnp.broadcast_to(inner, (*x.shape[:-1], self.hidden))
            gates_part, candidate = jnp.split(projected, [2 * self.hidden], axis=-1)
            projected = jnp.concatenate([gates_part, inner, candidate], axis=-1)
        return projected, kernel


def _product(h: Array, kernel: Array) -> Array:
    return affine(h.astype(kernel.dtype), kernel)


def _cell(kind: Kind, state: Any, projected: Array, kernel: Array, keep: Array | None) -> tuple[Any, Any]:
    h = state.h if kind == "lstm" else state
    seen = h if keep is None else h * keep
    match kind:
        case "rnn":
            return rnn_cell(seen, projected, kernel)
        case "lstm":
            return lstm_cell(state, projected, kernel, seen)
        case "gru":
            return gru_cell(state, projected, kernel, seen)
        case "gru_reset_after":
            return gru_reset_after_cell(state, projected, kernel, seen)


def _forward(
    kind: Kind,
    reverse: bool,
    dtype: DTypeLike,
    kernel: Array,
    projected: Array,
    state: PyTree,
    mask: Array | None,
    keep: Array | None,
) -> tuple[tuple[Array, PyTree], PyTree]:
    """((outputs `[T, B, H]`, last state), what was multiplied by the kernel at each step)."""
    kernel = kernel.astype(dtype)

    def body(state: PyTree, step: tuple[Array, Array | None]) -> tuple[PyTree, tuple[Array, PyTree]]:
        projected, real = step
        new, multiplied = _cell(kind, state, projected, kernel, keep)
        y = new.h if kind == "lstm" else new
        if real is not None:
            new = jax.tree.map(lambda new, old: jnp.where(real[:, None], new, old), new, state)
            y = jnp.where(real[:, None], y, 0.0)
        return new, (y, multiplied)

    if projected.shape[0] == 1:  # a step of decoding: no loop
        state, (y, multiplied) = body(state, (projected[0], None if mask is None else mask[0]))
        return (y[None], state), jax.tree.map(lambda a: a[None], multiplied)
    state, (ys, multiplied) = jax.lax.scan(body, state, (projected, mask), reverse=reverse)
    return (ys, state), multiplied


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(
    kind: Kind,
    reverse: bool,
    dtype: DTypeLike,
    kernel: Array,
    projected: Array,
    state: PyTree,
    mask: Array | None,
    keep: Array | None,
) -> tuple[Array, PyTree]:
    return _forward(kind, reverse, dtype, kernel, projected, state, mask, keep)[0]


def _scan_forward(
    kind: Kind,
    reverse: bool,
    dtype: DTypeLike,
    kernel: Array,
    projected: Array,
    state: PyTree,
    mask: Array | None,
    keep: Array | None,
) -> tuple[Any, Any]:
    run = lambda projected, state: _forward(kind, reverse, dtype, kernel, projected, state, mask, keep)
    out, pull, multiplied = jax.vjp(run, projected, state, has_aux=True)
    return out, (pull, multiplied, kernel)


def _scan_backward(
    kind: Kind, reverse: bool, dtype: DTypeLike, residuals: Any, cotangent: Any
) -> tuple[Any, ...]:
    pull, multiplied, kernel = residuals
    projected_bar, state_bar = pull(cotangent)
    flat = lambda a: a.astype(dtype).reshape(-1, a.shape[-1])
    contract = lambda a, b: transposed_matmul(flat(a), flat(b))
    if kind == "gru":
        before, after = multiplied
        split = 2 * before.shape[-1]
        parts = [contract(before, projected_bar[..., :split]), contract(after, projected_bar[..., split:])]
        kernel_bar = jnp.concatenate(parts, axis=-1)
    else:
        kernel_bar = contract(multiplied, projected_bar[..., : kernel.shape[-1]])
    return kernel_bar.astype(kernel.dtype), projected_bar, state_bar, None, None


_scan.defvjp(_scan_forward, _scan_backward)
