"""GPT-2's weights, as transformers' `GPT2LMHeadModel` lays them out, as those of our `TransformerLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxgen.interop.torch_sequences import Source, TensorSource
from jaxgen.models.transformer import TransformerLM, TransformerSpec
from jaxgen.types import PyTree, UserError

_LAYERS = {"attn.c_attn": "qkv", "attn.c_proj": "out", "mlp.c_fc": "up", "mlp.c_proj": "down"}
# transformers' names of GPT-2's non-linearity, and what they are.
_ACTIVATIONS: dict[str, Any] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def gpt2_from_config(config: Mapping[str, Any], **fields: Any) -> TransformerLM:
    """The model that a `config.json` of GPT-2 describes; `fields` (dtype …) go to `TransformerLM`.

    Dropout is left at zero: the published weights are there to be read.

    Raises:
        UserError: naming the first setting that this model does not have.
    """
    ours = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for name, value in ours.items():
        if config.get(name, value) != value:
            raise UserError(f"the config's {name} is {config[name]!r}, but this GPT-2 has {value!r} only.")
    activation: Any = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"the config's activation_function is {activation!r}: use one of {sorted(_ACTIVATIONS)}."
        )
    for name in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"):
        if name not in config:
            raise UserError(f"the config lacks {name}: give a config.json of a GPT2LMHeadModel.")
    spec = TransformerSpec(
        width=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        mlp_width=config.get("n_inner"),
        activation=_ACTIVATIONS[activation],
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        max_length=config["n_positions"],
    )
    return TransformerLM(config["vocab_size"], spec, **fields)


def load_gpt2(source: Source, like: PyTree) -> PyTree:
    """`TransformerLM`'s params from GPT-2's tensors, by name or in a safetensors file (`model.safetensors`).

    Args:
        like: the model's params, arrays or shapes: `jax.eval_shape(model.init, …)["params"]`.

    Raises:
        UserError: naming the first tensor that is missing, foreign or of another shape.
    """
    tensors = TensorSource(source)
    prefix = "transformer." if tensors.has("transformer.") else ""  # the published files have none
    # The causal mask's buffers, and the output matrix, which is the embedding.
    tensors.drop(".attn.bias", ".attn.masked_bias", "lm_head.weight")
    take = lambda name: tensors.take(prefix + name)
    norm = lambda name: {"scale": take(f"{name}.weight"), "bias": take(f"{name}.bias")}
    stack: dict[str, Any] = {"positions": {"embedding": take("wpe.weight")}, "norm": norm("ln_f")}
    i = 0
    while tensors.has(f"{prefix}h.{i}."):
        # Theirs are written as convolutions of width one: [in, out], as ours.
        dense = {
            ours: {"kernel": take(f"h.{i}.{theirs}.weight"), "bias": take(f"h.{i}.{theirs}.bias")}
            for theirs, ours in _LAYERS.items()
        }
        stack[f"block_{i}"] = {
            "norm_attention": norm(f"h.{i}.ln_1"),
            "attention": {"qkv": dense["qkv"], "out": dense["out"]},
            "norm_mlp": norm(f"h.{i}.ln_2"),
            "up": dense["up"],
            "down": dense["down"],
        }
        i += 1
    params = {"embedding": {"embedding": take("wte.weight")}, "stack": stack}
    return tensors.finish(params, like)
