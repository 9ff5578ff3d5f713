"""The U-Net against diffusers' `UNet2DModel` with the same weights, carried by a safetensors file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.interop.diffusers import export_unet, load_unet, unet_from_config
from jaxgen.interop.safetensors import write_tensors
from jaxgen.models.unet import UNet

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# The config of google/ddpm-cifar10-32.
CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
# Several heads, grey images of 28 (28 -> 14 -> 7), one block a level, labels, widths that are no power of 2.
SMALL = CIFAR10 | {
    "attention_head_dim": 8,
    "block_out_channels": [24, 48, 48],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "in_channels": 1,
    "out_channels": 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 28,
    "num_class_embeds": 11,
}


def their_model(config, seed):
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms off one, biases off zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def our_params_like(model, config):
    size, channels = config["sample_size"], config["in_channels"]
    image = jnp.zeros((1, size, size, channels))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image, jnp.zeros(1), train=False))["params"]


@pytest.mark.parametrize(
    ("config", "time_type"), [(CIFAR10, np.int32), (SMALL, np.float32)], ids=["cifar10", "small"]
)
def test_same_output_and_gradient_from_a_safetensors_file(config, time_type, tmp_path):
    theirs = their_model(config, seed=1)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    with open(tmp_path / "config.json") as file:
        ours = unet_from_config(json.load(file))
    like = our_params_like(ours, config)
    params = load_unet(tmp_path / "diffusion_pytorch_model.safetensors", like)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in theirs.parameters())

    rng = np.random.default_rng(2)
    size = config["sample_size"]
    x = rng.normal(size=(2, size, size, config["in_channels"])).astype(np.float32)
    t = np.array([7, 802], time_type)
    label = np.array([3, 10], np.int32) if "num_class_embeds" in config else None

    x_torch = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    y_torch = theirs(x_torch, torch.tensor(t), None if label is None else torch.tensor(label)).sample
    y_torch.square().sum().backward()
    expected = y_torch.detach().permute(0, 2, 3, 1).numpy()
    expected_gradient = x_torch.grad.permute(0, 2, 3, 1).numpy()

    apply = lambda x: ours.apply({"params": params}, x, t, label, train=False)
    y, pull = jax.vjp(jax.jit(apply), jnp.asarray(x))
    (gradient,) = pull(2 * y)
    # float32, sums of up to 4608 terms in another order through some forty layers; outputs are of order one.
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(y, expected, atol=1e-4, rtol=0)
    scale = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient / scale, expected_gradient / scale, atol=1e-4, rtol=0)


def test_our_weights_load_into_theirs(tmp_path):
    ours = unet_from_config(SMALL)
    key = jax.random.key(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape)) * 0.05,
        our_params_like(ours, SMALL),
    )
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    write_tensors(path, export_unet(params), {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | SMALL))
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path).eval()
    x = np.random.default_rng(3).normal(size=(1, 28, 28, 1)).astype(np.float32)
    y = ours.apply({"params": params}, x, jnp.array([5]), jnp.array([1]), train=False)
    with torch.no_grad():
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor([5]), torch.tensor([1])).sample
    assert expected.std() > 0.01
    np.testing.assert_allclose(y, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_the_config_is_the_paper_s_model():
    assert unet_from_config(CIFAR10) == UNet(dropout=0.0)
