"""Weights of PyTorch's sequence layers as ours: `nn.RNN`, `nn.LSTM`, `nn.GRU`, `nn.MultiheadAttention`,
`nn.Transformer` with its encoder and decoder. PyTorch itself is not needed: tensors come as
`{name: NumPy array}` (a state dict) or from a safetensors file.

PyTorch's matrices are [out, in], ours [in, out]. Its two biases of a recurrent layer are our one, their sum.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxgen.interop.safetensors import read_tensors
from jaxgen.models.recurrent import Kind
from jaxgen.types import PyTree, UserError

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]

# Layers of PyTorch's blocks -> ours.
_ENCODER_LAYERS = {"norm1": "norm_attention", "norm2": "norm_mlp", "linear1": "up", "linear2": "down"}
_DECODER_LAYERS = {**_ENCODER_LAYERS, "norm2": "norm_cross", "norm3": "norm_mlp"}


class TensorSource:
    """Tensors by name, each taken once, so that what is missing, foreign or of another shape can be named."""

    def __init__(self, source: Source, prefix: str = "") -> None:
        self.where = "the given tensors" if isinstance(source, Mapping) else os.fspath(source)
        tensors = source if isinstance(source, Mapping) else read_tensors(source)
        self._left = {
            name.removeprefix(prefix): np.asarray(tensor)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        self._prefix = prefix

    def take(self, name: str) -> np.ndarray:
        """The tensor of this name; UserError where there is none."""
        if name not in self._left:
            raise UserError(f"{self.where} lacks {self._prefix}{name}: load it into the model it belongs to.")
        return self._left.pop(name)

    def has(self, start: str) -> bool:
        """Whether a name begins so among those not taken yet."""
        return any(name.startswith(start) for name in self._left)

    def drop(self, *endings: str) -> None:
        """Forget tensors that hold no weights of ours."""
        self._left = {name: tensor for name, tensor in self._left.items() if not name.endswith(endings)}

    def finish(self, params: PyTree, like: PyTree) -> PyTree:
        """`params` in the types of `like`, once all tensors are taken and all shapes agree."""
        if self._left:
            raise UserError(
                f"{self.where} has {self._prefix}{min(self._left)}, which this model has no place for."
            )
        flat = lambda tree: {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        given, wanted = flat(params), flat(like)
        for path in sorted(given.keys() | wanted.keys()):
            has = given[path].shape if path in given else "nothing"
            needs = wanted[path].shape if path in wanted else "nothing"
            if has != needs:
                raise UserError(f"{self.where} gives {has} for {path} where this model needs {needs}.")
        return jax.tree.map(lambda leaf, x: x.astype(leaf.dtype), like, params)


def load_recurrent(source: Source, kind: Kind, like: PyTree, *, prefix: str = "") -> PyTree:
    """`Recurrent`'s params from the tensors of PyTorch's `nn.RNN` (tanh), `nn.LSTM` or `nn.GRU`.

    PyTorch's GRU applies the reset gate after the recurrent product, so its weights have a meaning in
    "gru_reset_after" only, and its z is our 1 - z, so that gate's weights change sign.

    Args:
        kind: of our layers. like: their params or shapes (`jax.eval_shape(model.init, …)["params"]`).
        prefix: of the names, such as "lstm.".

    Raises:
        UserError: naming the first tensor that is missing, foreign or of another shape, or for kind "gru".
    """
    if kind == "gru":
        raise UserError(
            "PyTorch's GRU is of kind gru_reset_after: its weights mean another thing in the printed GRU."
        )
    tensors, layer = TensorSource(source, prefix), 0
    params: dict[str, np.ndarray] = {}
    while tensors.has(f"weight_ih_l{layer}"):
        for theirs, ours in (
            (f"l{layer}", f"layer_{layer}"),
            (f"l{layer}_reverse", f"layer_{layer}_reverse"),
        ):
            if not tensors.has(f"weight_ih_{theirs}"):
                continue
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w_x, w_h, b_x, b_h = (tensors.take(f"{name}_{theirs}") for name in names)
            if kind == "gru_reset_after":
                sign = np.repeat(np.array([1, -1, 1], w_x.dtype), len(w_x) // 3)
                w_x, w_h, b_x, b_h = sign[:, None] * w_x, sign[:, None] * w_h, sign * b_x, sign * b_h
                gates = 2 * len(b_h) // 3
                params[f"{ours}_candidate_bias"] = b_h[gates:]
                b_h = np.concatenate([b_h[:gates], np.zeros_like(b_h[gates:])])
            params[f"{ours}_input_kernel"] = w_x.T
            params[f"{ours}_recurrent_kernel"] = w_h.T
            params[f"{ours}_bias"] = b_x + b_h
        layer += 1
    return tensors.finish(params, like)


def load_attention(source: Source, like: PyTree, *, prefix: str = "") -> PyTree:
    """`MultiHeadAttention`'s params from `nn.MultiheadAttention`'s; self- or cross-attention as `like` is.

    Raises UserError as `load_recurrent`.
    """
    tensors = TensorSource(source, prefix)
    return tensors.finish(_attention(tensors, "", cross="query" in like), like)


def load_stack(source: Source, like: PyTree, *, prefix: str = "") -> PyTree:
    """`Stack`'s params from `nn.TransformerEncoder` or `nn.TransformerDecoder` (told apart by their names).

    `nn.Transformer` holds both, under "encoder." and "decoder."; it has no embeddings and no output. Its
    blocks are norm "post" (or "pre" where norm_first), final_norm True, activation "relu", norm_epsilon 1e-5.

    Raises UserError as `load_recurrent`.
    """
    tensors = TensorSource(source, prefix)
    params: dict[str, Any] = {}
    i = 0
    while tensors.has(f"layers.{i}."):
        name, cross = f"layers.{i}.", tensors.has(f"layers.{i}.multihead_attn.")
        block = {"attention": _attention(tensors, f"{name}self_attn.", cross=False)}
        if cross:
            block["cross_attention"] = _attention(tensors, f"{name}multihead_attn.", cross=True)
        for theirs, ours in (_DECODER_LAYERS if cross else _ENCODER_LAYERS).items():
            make = _norm if theirs.startswith("norm") else _dense
            block[ours] = make(tensors, f"{name}{theirs}.")
        params[f"block_{i}"] = block
        i += 1
    if tensors.has("norm."):
        params["norm"] = _norm(tensors, "norm.")
    return tensors.finish(params, like)


def _dense(tensors: TensorSource, name: str) -> dict[str, np.ndarray]:
    return {"kernel": tensors.take(f"{name}weight").T, "bias": tensors.take(f"{name}bias")}


def _norm(tensors: TensorSource, name: str) -> dict[str, np.ndarray]:
    return {"scale": tensors.take(f"{name}weight"), "bias": tensors.take(f"{name}bias")}


def _attention(tensors: TensorSource, name: str, *, cross: bool) -> dict[str, Any]:
    kernel, bias = tensors.take(f"{name}in_proj_weight").T, tensors.take(f"{name}in_proj_bias")
    out = _dense(tensors, f"{name}out_proj.")
    if not cross:
        return {"qkv": {"kernel": kernel, "bias": bias}, "out": out}
    width = len(bias) // 3
    return {
        "query": {"kernel": kernel[:, :width], "bias": bias[:width]},
        "key_value": {"kernel": kernel[:, width:], "bias": bias[width:]},
        "out": out,
    }
