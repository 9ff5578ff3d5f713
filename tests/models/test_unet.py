"""The U-Net and its parts: closed forms, brute force, and what its fields promise.

That the whole is the published network is shown against diffusers in tests/parity/test_diffusers_unet.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models import attention
from jaxgen.models.attention import scaled_dot_product_attention
from jaxgen.models.convolution import conv2d
from jaxgen.models.embeddings import sinusoidal_embedding
from jaxgen.models.normalization import group_norm, num_groups_for
from jaxgen.models.unet import UNet
from jaxgen.types import UserError

# One level: what has to be compiled is half of the smallest U-Net that halves its images.
TINY = {"channels": 8, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": (4,)}


def tiny(shape=(2, 4, 4, 1), **fields):
    """A small model, parameters of which none is zero, an image and times."""
    model = UNet(**(TINY | {"out_channels": shape[-1], "dropout": 0.0} | fields))
    x = jax.random.normal(jax.random.key(1), shape)
    t = jnp.arange(shape[0]) * 300
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(2), x, t, train=False)["params"])
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)
    return model, params, x, t


def test_sinusoidal_embedding_closed_form():
    t = np.array([0.0, 1.0, 999.0])
    code = sinusoidal_embedding(jnp.asarray(t), 6)
    angles = t[:, None] * np.array([1.0, 1e-2, 1e-4])  # the slowest is exactly 1 / max_period
    # float32 rounds an angle of 999 by 3e-5.
    np.testing.assert_allclose(code, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-4)
    np.testing.assert_array_equal(
        sinusoidal_embedding(jnp.array([5]), 7),
        np.pad(sinusoidal_embedding(jnp.array([5.0]), 6), ((0, 0), (0, 1))),
    )


def test_group_norm_closed_form_and_far_from_zero():
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(size=(2, 3, 5, 6)) * 2 + 100, rng.normal(size=6), rng.normal(size=6)
    groups = x.reshape(2, 15, 3, 2)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * scale + bias
    f32 = lambda a: jnp.asarray(a, jnp.float32)
    # With a mean of 50 standard deviations: E[x^2] - E[x]^2 in float32 would be off by 1e-3.
    y = group_norm(f32(x), f32(scale), f32(bias), 3, 1e-6)
    np.testing.assert_allclose(y, expected, atol=5e-5)
    assert group_norm(jnp.bfloat16(x), f32(scale), f32(bias), 3, 1e-6).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(128, 32), (256, 32), (96, 32), (64, 32), (32, 8), (48, 12), (8, 2), (6, 1), (3, 1), (1, 1)],
)
def test_every_group_has_at_least_two_channels(channels, expected):
    assert num_groups_for(channels, 32) == expected
    assert channels % expected == 0


def test_convolution_brute_force():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 6, 4, 3)), rng.normal(size=(3, 3, 3, 5))
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = np.zeros((2, 3, 2, 5))
    for i in range(3):
        for j in range(2):
            window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    y = conv2d(jnp.float32(x), jnp.float32(kernel), 2, ((0, 1), (0, 1)))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def attention_closed_form(q, k, v):
    scores = np.einsum("bnd,bmd->bnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnm,bmd->bnd", weights / weights.sum(-1, keepdims=True), v)


# 7 heads at once of 10: chunks and a remainder. All at once is the path of other devices.
@pytest.mark.parametrize("at_once", [7, 10], ids=["in chunks", "at once"])
def test_attention_closed_form_and_derivatives(at_once, monkeypatch):
    monkeypatch.setattr(attention, "_CPU_SCORES", at_once * 36)
    rng = np.random.default_rng(2)
    # Scores up to about 300: an exponential without the maximum taken off would overflow.
    q, k, v = (10 * rng.normal(size=(10, 6, 4)) for _ in range(3))
    arrays = tuple(jnp.float32(a) for a in (q, k, v))
    # A function of its own, or jit would reuse the trace of the other setting.
    attend = jax.jit(lambda q, k, v: scaled_dot_product_attention(q, k, v))
    np.testing.assert_allclose(attend(*arrays), attention_closed_form(q, k, v), atol=2e-3)

    def plain(q, k, v):
        scores = jnp.einsum("bnd,bmd->bnm", q, k) / jnp.sqrt(q.shape[-1])
        return jax.nn.softmax(scores, axis=-1) @ v

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(attend, arrays, tangents):
        loss = lambda arrays: jnp.sum(attend(*arrays) ** 2)
        # Forward mode and forward over reverse: a custom rule for the gradient would forbid them.
        return (
            jax.jvp(lambda arrays: attend(*arrays), (arrays,), (tangents,)),
            jax.jvp(jax.grad(loss), (arrays,), (tangents,)),
            jax.vmap(attend)(*(a[None] for a in arrays)),
        )

    small = tuple(0.1 * a for a in arrays)
    tangents = tuple(jnp.float32(rng.normal(size=a.shape)) for a in arrays)
    ours, expected = (derivatives(f, small, tangents) for f in (scaled_dot_product_attention, plain))
    # float32 in another order, of values of order ten.
    chex.assert_trees_all_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_attention_in_bfloat16_keeps_the_softmax_in_float32(monkeypatch):
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 64, 8)), jnp.bfloat16) for _ in range(3))
    expected = attention_closed_form(*(np.float64(a) for a in (q, k, v)))
    for scores in (1 << 20, 64 * 64):
        monkeypatch.setattr(attention, "_CPU_SCORES", scores)
        out = scaled_dot_product_attention(q, k, v)
        assert out.dtype == jnp.bfloat16
        # The weights and the result are rounded to 8 bits: an error of 2^-8 of values of order one.
        np.testing.assert_allclose(np.float64(out), expected, atol=1e-2)


def test_the_defaults_are_the_paper_s_cifar10_model():
    def init():
        return UNet().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), train=False)

    # 35.7M in Ho et al. 2020, section 4; to the unit the count of google/ddpm-cifar10-32.
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init))) == 35_746_307


@pytest.mark.parametrize(
    ("shape", "multipliers", "attention_resolutions"),
    [((2, 8, 8, 1), (1, 2), (4,)), ((2, 28, 28, 1), (1, 2, 2), (14, 7)), ((1, 32, 16, 3), (1, 1, 2, 2), ())],
)
def test_sizes(shape, multipliers, attention_resolutions):
    model, params, x, t = tiny(
        shape, channel_multipliers=multipliers, attention_resolutions=attention_resolutions
    )
    y = jax.jit(lambda: model.apply({"params": params}, x, t, train=False))()
    assert y.shape == shape
    assert y.dtype == jnp.float32
    assert np.std(y) > 0.01
    for resolution in attention_resolutions:
        level = [shape[1] >> i for i in range(len(multipliers))].index(resolution)
        assert f"down_{level}_attention_0" in params
        assert f"up_{level}_attention_1" in params


def test_blocks_start_as_their_shortcut_and_the_network_at_zero():
    # As in the paper's code: the last layer of each block and of the network starts at zero.
    @jax.jit
    def init():
        x, t = jnp.zeros((1, 4, 4, 3)), jnp.zeros(1)
        return UNet(**TINY).init(jax.random.key(0), x, t, train=False)["params"]

    params = init()
    block, attend = params["middle_block_0"], params["middle_attention"]
    for layer in (block["conv_2"], attend["projection"], params["conv_out"]):
        np.testing.assert_array_equal(layer["kernel"], np.zeros(layer["kernel"].shape))
    # The others are uniform with variance 2 / (fan in + fan out), here of 3 standard errors:
    # kurtosis 1.8, so the variance of n draws is off by sqrt(0.8 / n) of itself.
    for kernel, fans in ((block["conv_1"]["kernel"], 2 * 72), (attend["qkv"]["kernel"], 2 * 8)):
        error = np.var(kernel) / (2 / fans) - 1
        assert abs(error) < 3 * np.sqrt(0.8 / kernel.size)


def test_examples_are_independent_and_time_matters_in_narrow_layers():
    model, params, x, t = tiny()
    traced = chex.assert_max_traces(lambda x, t: model.apply({"params": params}, x, t, train=False), n=2)
    apply = jax.jit(traced)
    y = apply(x, t)
    np.testing.assert_allclose(apply(x[::-1], t[::-1])[::-1], y, atol=1e-5)
    np.testing.assert_array_equal(apply(x, t.astype(jnp.float32)), y)
    # With one channel a group, the norm after the time embedding would subtract it again.
    assert np.abs(apply(x, t + 100) - y).max() > 1e-2


def test_labels_change_the_result_and_none_is_the_null_label():
    model, params, x, t = tiny(num_classes=3)
    assert params["label"]["embedding"].shape == (4, 32)
    apply = jax.jit(lambda label: model.apply({"params": params}, x, t, label, train=False))
    null, other = apply(jnp.array([3, 3])), apply(jnp.array([0, 3]))
    np.testing.assert_array_equal(apply(None), null)
    assert np.abs(other[0] - null[0]).max() > 1e-3
    np.testing.assert_array_equal(other[1], null[1])


def test_dropout_is_on_only_in_training():
    model, params, x, t = tiny(dropout=0.5)
    apply = jax.jit(
        lambda seed, train: model.apply(
            {"params": params}, x, t, train=train, rngs={"dropout": jax.random.key(seed)}
        ),
        static_argnums=1,
    )
    np.testing.assert_array_equal(apply(0, False), apply(1, False))
    np.testing.assert_array_equal(apply(0, True), apply(0, True))
    assert np.abs(apply(0, True) - apply(1, True)).max() > 1e-2


def test_remat_changes_neither_parameters_nor_gradients():
    plain, params, x, t = tiny()
    remat = plain.clone(remat=True)
    chex.assert_trees_all_equal_shapes(
        params, jax.eval_shape(lambda: remat.init(jax.random.key(0), x, t, train=False)["params"])
    )

    def gradient(model):
        loss = lambda params: jnp.mean(model.apply({"params": params}, x, t, train=False) ** 2)
        return jax.jit(jax.grad(loss))(params)

    # Recomputed values may be fused otherwise and so be rounded otherwise.
    chex.assert_trees_all_close(gradient(remat), gradient(plain), rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_with_float32_parameters():
    model, params, x, t = tiny()
    half = model.clone(dtype=jnp.bfloat16)
    fresh = jax.eval_shape(lambda: half.init(jax.random.key(0), x, t, train=False)["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}
    y, y_half = (jax.jit(lambda: m.apply({"params": params}, x, t, train=False))() for m in (model, half))
    assert y_half.dtype == jnp.float32
    error = np.abs(y_half - y).max() / np.std(y)
    # bfloat16 keeps 8 bits: 0.4 % an operation, some ten layers deep; and it is not float32 in disguise.
    assert 1e-4 < error < 0.15


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channel_multipliers": ()}, "channel_multipliers is ()"),
        ({"channel_multipliers": (1, 0)}, "one positive integer per level"),
        ({"channel_multipliers": (1, 1.5)}, "one positive integer per level"),
        ({"channel_multipliers": (1, 1, 1, 1)}, "cannot be halved 3 times"),
        ({"channels": 2}, "channels is 2"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"attention_resolutions": (16,)}, "attention_resolutions has 16"),
        ({"head_dim": 5}, "head_dim 5 does not divide the width 8"),
        ({"head_dim": 0}, "head_dim 0"),
    ],
)
def test_contradictory_fields_end_in_one_sentence(fields, message):
    model = UNet(**(TINY | fields))
    with pytest.raises(UserError) as error:
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), train=False)
        )
    assert message in str(error.value)
    assert str(error.value).endswith(".")


def test_labels_for_an_unconditional_model_and_flat_images_are_refused():
    model, params, x, t = tiny()
    with pytest.raises(UserError, match="set num_classes"):
        model.apply({"params": params}, x, t, jnp.array([0, 1]), train=False)
    with pytest.raises(UserError, match="height, width, channels"):
        model.apply({"params": params}, x[..., 0], t, train=False)
