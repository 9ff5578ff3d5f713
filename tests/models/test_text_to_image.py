"""The text-to-image network: what a caption changes, and what must change nothing."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from experiments import text_to_image
from jaxgen import sharding
from jaxgen.models.text_to_image import TextToImage, depth_to_space, space_to_depth
from jaxgen.models.transformer import TransformerSpec
from jaxgen.models.unet import Context, UNet
from jaxgen.samplers.guidance import classifier_free_guidance
from jaxgen.samplers.negative_prompt import negative_prompt_guidance
from jaxgen.types import UserError

# One level whose only attention is that of the middle: what has to be compiled is as small as can be.
UNET = {
    "channels": 8,
    "channel_multipliers": (1,),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "num_groups": 4,
    "dropout": 0.0,
}
TOKENS = np.array([[1, 3, 4, 5], [1, 6, 0, 0]], np.int32)
LENGTHS = np.array([4, 2], np.int32)
X = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
T = np.array([3.0, 70.0], np.float32)


@pytest.fixture(scope="module")
def apply():
    """(tokens, lengths, x) -> the prediction, with parameters of which none is zero."""
    spec = TransformerSpec(width=8, num_layers=1, num_heads=2, max_length=6)
    model = TextToImage(8, spec, UNet(out_channels=4, **UNET), patch=2)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), X, T, TOKENS, LENGTHS, train=False)["params"]
    )
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)
    run = jax.jit(lambda *args: model.apply({"params": params}, *args, train=False))
    return lambda tokens, lengths, x=X: np.asarray(run(x, T, tokens, lengths))


def test_the_caption_changes_the_prediction_of_its_image_alone(apply):
    plain = apply(TOKENS, LENGTHS)
    assert plain.shape == X.shape
    other = TOKENS.copy()
    other[0, 2] = 7
    changed = apply(other, LENGTHS)
    assert np.abs(changed[0] - plain[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1], plain[1])


def test_padding_changes_nothing(apply):
    plain = apply(TOKENS, LENGTHS)
    other = TOKENS.copy()
    other[1, 2:] = [5, 7]
    np.testing.assert_array_equal(apply(other, LENGTHS), plain)


def test_a_hidden_caption_is_the_empty_one(apply):
    """Hiding cuts the length to 1, the beginning: the same for all captions, and another than being told."""
    hidden = apply(TOKENS, np.ones(2, np.int32))
    empty = np.array([[1, 0, 0, 0]] * 2, np.int32)
    np.testing.assert_array_equal(hidden, apply(empty, np.ones(2, np.int32)))
    assert np.abs(hidden - apply(TOKENS, LENGTHS)).max() > 1e-3


def test_the_order_of_words_matters(apply):
    turned = TOKENS.copy()
    turned[0, 1:] = TOKENS[0, 3:0:-1]
    assert np.abs(apply(turned, LENGTHS)[0] - apply(TOKENS, LENGTHS)[0]).max() > 1e-3


def _shapes(context, **fields):
    model = UNet(out_channels=1, **{**UNET, **fields})
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), X, T, None, context, train=False)["params"])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("remat", [False, True])
def test_without_context_the_unet_has_the_parameters_it_always_had(remat):
    context = Context(jnp.zeros((2, 3, 8)), jnp.ones((2, 3), bool))
    without, told = _shapes(None, remat=remat), _shapes(context, remat=remat)
    assert {name: shape for name, shape in told.items() if "context" not in name} == without
    assert not any("context" in name for name in without)
    added = {name.split("']['")[0] for name in told.keys() - without.keys()}
    assert added == {"['middle_attention_context", "['context"}
    # Counted by hand, for E = 8, time embedding 32: each norm 16, each 3x3 convolution 8 in 9 * 8 * 8 + 8 ...
    block, wide = 16 + 584 + 264 + 16 + 584, 32 + 1160 + 264 + 16 + 584 + 136
    attention = 16 + (8 * 24 + 24) + 72
    ends = (9 * 8 + 8) + (16 + 9 * 8 + 1) + (8 * 32 + 32) + (32 * 32 + 32)
    assert sum(np.prod(shape) for shape in without.values()) == 3 * block + 2 * wide + attention + ends


def test_patches_by_brute_force():
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 3)).astype(np.float32)
    y = np.asarray(space_to_depth(jnp.asarray(x), 2))
    assert y.shape == (2, 2, 3, 12)
    for i in range(2):
        for j in range(3):
            block = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_array_equal(y[:, i, j], block.reshape(2, 12))
    np.testing.assert_array_equal(depth_to_space(jnp.asarray(y), 2), x)


@pytest.mark.parametrize(("height", "width", "patch", "fits"), [(12, 9, 3, True), (24, 25, 5, False)])
def test_a_patch_divides_the_height_and_the_width_of_pictures(tmp_path, height, width, patch, fits):
    for i in range(30):
        PIL.Image.fromarray(np.full((height, width), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "captions.tsv").write_text("".join(f"{i}.png\tpicture {i}\n" for i in range(30)))
    config = text_to_image.get_config("smoke")
    config.data.source = f"folder:{tmp_path}"
    config.model.patch = patch
    config.evaluation.reader = ""
    refusal = pytest.raises(UserError, match=f"patch={patch} does not divide pictures of {height}x{width}")
    with contextlib.nullcontext() if fits else refusal:
        text_to_image.build(config, sharding.make_mesh())


def test_guidance_away_from_a_description():
    """A predictor that answers with the value of its description: away + scale (told - away) by hand."""
    values = jnp.array([1.0, 10.0, -4.0])

    def predict(x, t, numbers):
        return jnp.broadcast_to(values[numbers][:, None], x.shape) + x

    x, t = jnp.full((2, 3), 0.5), jnp.zeros(2, jnp.int32)
    told, away = jnp.array([0, 1]), jnp.array([2, 2])
    guided = negative_prompt_guidance(predict, told, away, jnp.array([1.0, 3.0]))(x, t)
    # Exact in float32: all numbers are small multiples of 1/2.
    np.testing.assert_array_equal(guided, [[1.5] * 3, [-4 + 3 * 14 + 0.5] * 3])
    same = negative_prompt_guidance(predict, told, away, jnp.full(2, 3.0))(x, t)
    np.testing.assert_array_equal(same, classifier_free_guidance(predict, told, 2, 3.0)(x, t))
