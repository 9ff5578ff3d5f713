"""Names and layouts of diffusers' U-Net weights, without diffusers (with it: tests/parity)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.interop.diffusers import export_unet, load_unet, unet_from_config
from jaxgen.interop.safetensors import write_tensors
from jaxgen.models.unet import UNet
from jaxgen.types import UserError

MODEL = UNet(
    channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_classes=2
)
LIKE = jax.eval_shape(
    lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), train=False)["params"]
)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), LIKE)


def test_export_and_load_are_inverse_through_a_file(params, tmp_path):
    path = tmp_path / "unet.safetensors"
    write_tensors(path, export_unet(params))
    loaded = load_unet(path, LIKE)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_layouts(params):
    tensors = export_unet(params)
    block = params["down_1_block_0"]
    theirs = "down_blocks.1.resnets.0"
    # [height, width, in, out] and [out, in, height, width]
    assert tensors[f"{theirs}.conv1.weight"][3, 2, 0, 1] == block["conv_1"]["kernel"][0, 1, 2, 3]
    assert tensors[f"{theirs}.time_emb_proj.weight"][3, 2] == block["time"]["kernel"][2, 3]
    assert tensors[f"{theirs}.conv_shortcut.weight"].shape == (16, 8, 1, 1)
    # The way up is numbered from the bottom.
    ours = params["up_0_block_1"]["norm_1"]["scale"]
    np.testing.assert_array_equal(tensors["up_blocks.1.resnets.1.norm1.weight"], ours)
    qkv = params["middle_attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(tensors["mid_block.attentions.0.to_k.weight"].T, qkv[:, 16:32])


def test_names_of_old_files_are_understood(params):
    new = export_unet(params)
    parts = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in new.items():
        for part, was in parts.items():
            name = name.replace(f".{part}.", f".{was}.")
        old[name] = tensor
    assert old.keys() != new.keys()
    jax.tree.map(np.testing.assert_array_equal, load_unet(old, LIKE), params)


def test_the_first_wrong_tensor_is_named(params):
    tensors = export_unet(params)
    name = "mid_block.resnets.1.conv2.weight"
    with pytest.raises(UserError, match=f"lacks {name}"):
        load_unet({k: v for k, v in tensors.items() if k != name}, LIKE)
    with pytest.raises(UserError, match=rf"{name} .* has shape \(16, 16, 1, 1\) .* needs \(16, 16, 3, 3\)"):
        load_unet(tensors | {name: np.zeros((16, 16, 1, 1), np.float32)}, LIKE)
    with pytest.raises(UserError, match=r"has vae\.weight, which"):
        load_unet(tensors | {"vae.weight": np.zeros(1)}, LIKE)
    with pytest.raises(UserError, match="no U-Net of jaxgen has"):
        export_unet({"Dense_0": {"kernel": np.zeros((2, 2))}})


CONFIG = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": None,
    "dropout": 0.1,
    "num_class_embeds": 3,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}


def test_config():
    assert unet_from_config(CONFIG) == MODEL
    assert unet_from_config(CONFIG, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos is True"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"block_out_channels": [8, 12]}, "not multiples of the first"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "not mirrored plain blocks"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "not mirrored plain blocks"),
    ],
)
def test_another_arithmetic_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        unet_from_config(CONFIG | changed)


def test_a_config_of_something_else_is_refused():
    with pytest.raises(UserError, match="lacks sample_size"):
        unet_from_config({name: value for name, value in CONFIG.items() if name != "sample_size"})
