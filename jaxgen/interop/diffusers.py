"""The weights of diffusers' `UNet2DModel` to and from `jaxgen.models.unet.UNet`, without diffusers itself.

One table says which of their tensors is which of our parameters; reading and writing both follow it. Layouts
differ by a transposition: their convolutions are [out, in, height, width] and their matrices [out, in]. Their
three matrices of attention are our one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from jaxgen.interop.safetensors import read_tensors
from jaxgen.models.unet import UNet
from jaxgen.types import PyTree, UserError


class _Tensor(NamedTuple):
    """One of our parameters in diffusers' terms: the `names` of its tensors, and the layout both ways."""

    names: tuple[str, ...]
    to_ours: Callable[..., np.ndarray]
    to_theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]


_MODULES = {
    "conv_in": "conv_in",
    "time_1": "time_embedding.linear_1",
    "time_2": "time_embedding.linear_2",
    "label": "class_embedding",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "middle_attention": "mid_block.attentions.0",
}
_BLOCKS = {
    "block": "resnets",
    "attention": "attentions",
    "downsample": "downsamplers",
    "upsample": "upsamplers",
}
_LAYERS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "projection": "to_out.0",
}
# Names in files written before diffusers 0.15, google/ddpm-cifar10-32 among them.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_unet(source: str | os.PathLike[str] | Mapping[str, Any], like: PyTree) -> PyTree:
    """Our parameters from diffusers' tensors.

    Args:
        source: a safetensors file (`diffusion_pytorch_model.safetensors`), or its tensors by name.
        like: the network's parameters, arrays or shapes: `jax.eval_shape(model.init, …)["params"]`.

    Returns:
        A tree like `like` of NumPy arrays of its types.

    Raises:
        UserError: naming the first tensor that is missing, foreign or of another shape.
    """
    tensors = dict(source) if isinstance(source, Mapping) else read_tensors(source)
    tensors = {_new_name(name): np.asarray(tensor) for name, tensor in tensors.items()}
    where = "the given tensors" if isinstance(source, Mapping) else os.fspath(source)
    params = {}
    for path, leaf in traverse_util.flatten_dict(like).items():
        tensor = _tensor(path, _num_levels(like))
        for name, expected in zip(tensor.names, _their_shapes(tensor, leaf.shape), strict=True):
            if name not in tensors:
                raise UserError(
                    f"{where} lacks {name}, which this U-Net needs: give it the U-Net's own config."
                )
            if tensors[name].shape != expected:
                raise UserError(
                    f"{name} in {where} has shape {tensors[name].shape} where this U-Net needs {expected}: "
                    "give it the U-Net's own config."
                )
        params[path] = tensor.to_ours(*(tensors.pop(name) for name in tensor.names)).astype(leaf.dtype)
    if tensors:
        raise UserError(
            f"{where} has {min(tensors)}, which this U-Net has no place for: give it the U-Net's own config."
        )
    return traverse_util.unflatten_dict(params)


def export_unet(params: PyTree) -> dict[str, np.ndarray]:
    """Our parameters as diffusers' tensors by name, for `write_tensors`; the inverse of `load_unet`."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        tensor = _tensor(path, _num_levels(params))
        tensors.update(zip(tensor.names, tensor.to_theirs(np.asarray(leaf)), strict=True))
    return tensors


def unet_from_config(config: Mapping[str, Any], **fields: Any) -> UNet:
    """The U-Net that a `config.json` of diffusers describes; `fields` (dtype, remat …) go to `UNet`.

    Only the arithmetic of Ho et al. 2020 is taken, as in google/ddpm-cifar10-32. A file says nothing of the
    settings checked here, so that weights of another arithmetic would load and give wrong images.

    Raises:
        UserError: naming the first setting that this U-Net does not have.
    """
    # Where a config does not give a setting, diffusers takes these.
    defaults: dict[str, Any] = {
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "out_channels": 3,
        "num_class_embeds": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "norm_eps": 1e-5,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "downsample_type": "conv",
        "upsample_type": "conv",
        "act_fn": "silu",
        "resnet_time_scale_shift": "default",
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2D",
        "add_attention": True,
        "class_embed_type": None,
        "attn_norm_num_groups": None,
        "time_embedding_dim": None,
    }
    given = defaults | dict(config)
    ours = {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        **{name: defaults[name] for name in list(defaults)[10:]},
    }
    for name, value in ours.items():
        if given[name] != value:
            raise UserError(f"the config's {name} is {given[name]!r}, but this U-Net has {value!r} only.")
    for name in ("sample_size", "block_out_channels", "down_block_types", "up_block_types"):
        if name not in given:
            raise UserError(f"the config lacks {name}: give a config.json of a UNet2DModel.")
    widths, down = given["block_out_channels"], given["down_block_types"]
    up = [name.replace("Up", "Down") for name in reversed(given["up_block_types"])]
    if set(down) - {"DownBlock2D", "AttnDownBlock2D"} or list(down) != up:
        raise UserError(
            f"the config's blocks {down}, {given['up_block_types']} are not mirrored plain blocks."
        )
    if any(width % widths[0] for width in widths):
        raise UserError(f"the config's block_out_channels {widths} are not multiples of the first.")
    classes = given["num_class_embeds"]
    return UNet(
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=given["layers_per_block"],
        attention_resolutions=tuple(
            given["sample_size"] >> level for level, name in enumerate(down) if name == "AttnDownBlock2D"
        ),
        head_dim=given["attention_head_dim"],
        dropout=given["dropout"],
        out_channels=given["out_channels"],
        num_classes=None if classes is None else classes - 1,
        num_groups=given["norm_num_groups"],
        **fields,
    )


def _num_levels(params: PyTree) -> int:
    return sum(name.endswith("_downsample") for name in params) + 1


def _new_name(name: str) -> str:
    old = re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{old[1]}.{_OLD_NAMES[old[2]]}.{old[3]}" if old else name


def _module_name(ours: str, num_levels: int) -> str:
    """diffusers' name of one of the U-Net's direct submodules."""
    if ours in _MODULES:
        return _MODULES[ours]
    if middle := re.fullmatch(r"middle_block_(\d)", ours):
        return f"mid_block.resnets.{middle[1]}"
    way = re.fullmatch(r"(down|up)_(\d+)_([a-z]+)(?:_(\d+))?", ours)
    if way is None or way[3] not in _BLOCKS:
        raise UserError(f"the parameters have {ours}, which no U-Net of jaxgen has: give a U-Net's params.")
    level = int(way[2])
    index = level if way[1] == "down" else num_levels - 1 - level  # theirs count along the way
    suffix = ".0.conv" if way[4] is None else f".{way[4]}"
    return f"{way[1]}_blocks.{index}.{_BLOCKS[way[3]]}{suffix}"


def _tensor(path: tuple[str, ...], num_levels: int) -> _Tensor:
    """What diffusers calls the parameter at `path` of our tree, and how it lies there."""
    *modules, kind = path
    prefix = _module_name(modules[0], num_levels)
    layer = modules[1] if len(modules) > 1 else ""
    if layer == "qkv":
        names = tuple(f"{prefix}.to_{x}.{'weight' if kind == 'kernel' else 'bias'}" for x in "qkv")
        return _Tensor(
            names,
            lambda *parts: np.concatenate([part.T for part in parts], axis=-1),
            lambda array: tuple(part.T for part in np.split(array, 3, axis=-1)),
        )
    name = ".".join(filter(None, (prefix, _LAYERS.get(layer, layer), "bias" if kind == "bias" else "weight")))
    if kind != "kernel":  # scale, bias, embedding
        return _Tensor((name,), lambda a: a, lambda a: (a,))
    if layer == "shortcut":  # theirs is a 1x1 convolution
        return _Tensor((name,), lambda a: a[:, :, 0, 0].T, lambda a: (a.T[:, :, None, None],))
    # [out, in, height, width] <-> [height, width, in, out], and [out, in] <-> [in, out].
    return _Tensor(
        (name,), lambda a: np.moveaxis(a, (0, 1), (-1, -2)), lambda a: (np.moveaxis(a, (-1, -2), (0, 1)),)
    )


def _their_shapes(tensor: _Tensor, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that the tensors of a parameter of `shape` have in diffusers."""
    # A stride of zero: an array of any shape for four bytes.
    return [part.shape for part in tensor.to_theirs(np.broadcast_to(np.float32(0), shape))]
