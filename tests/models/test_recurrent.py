"""Recurrent layers against NumPy loops of the printed equations; carries, masks, dropout and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.language_model import RecurrentEncoder, RecurrentLM, SequenceClassifier
from jaxgen.models.recurrent import Recurrent, initial_carry
from jaxgen.types import UserError

B, T, D, H = 2, 5, 3, 4
KINDS = ["rnn", "lstm", "gru", "gru_reset_after"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_layer(kind, params, x):
    """The equations of the lectures, one sequence [T, D] and one step at a time, in float64."""
    p = {name.removeprefix("layer_0_"): np.asarray(leaf, np.float64) for name, leaf in params.items()}
    w_x, w_h, b = (np.split(p[n], max(1, p[n].shape[-1] // H), -1) for n in KERNELS)
    h, c, ys = np.zeros(H), np.zeros(H), []
    for x_t in x:
        gate = lambda n: x_t @ w_x[n] + h @ w_h[n] + b[n]
        if kind == "rnn":
            h = np.tanh(gate(0))
        elif kind == "lstm":
            c = sigmoid(gate(1)) * c + sigmoid(gate(0)) * np.tanh(gate(2))
            h = sigmoid(gate(3)) * np.tanh(c)
        else:
            r, z = sigmoid(gate(0)), sigmoid(gate(1))
            if kind == "gru":
                candidate = np.tanh(x_t @ w_x[2] + (r * h) @ w_h[2] + b[2])
            else:
                candidate = np.tanh(x_t @ w_x[2] + b[2] + r * (h @ w_h[2] + p["candidate_bias"]))
            h = (1 - z) * h + z * candidate
        ys.append(h)
    return np.stack(ys)


KERNELS = ("input_kernel", "recurrent_kernel", "bias")


@pytest.fixture(scope="module", params=KINDS)
def layer(request):
    model = Recurrent(request.param, H)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    params = model.init(jax.random.key(1), x)["params"]
    return request.param, model, params, x, jax.jit(model.apply)


def test_a_layer_is_the_printed_loop(layer):
    kind, _, params, x, apply = layer
    y, _ = apply({"params": params}, x)
    expected = np.stack([numpy_layer(kind, params, row) for row in np.asarray(x, np.float64)])
    np.testing.assert_allclose(y, expected, atol=1e-6)  # float32, values below 1


def test_padding_changes_no_bit_and_the_carry_is_the_last_real_state(layer):
    _, _, params, x, apply = layer
    lengths = jnp.array([T, 2])
    y, carry = apply({"params": params}, x, lengths)
    y_other, carry_other = apply({"params": params}, x.at[1, 2:].set(jnp.nan), lengths)
    np.testing.assert_array_equal(y, y_other)
    jax.tree.map(np.testing.assert_array_equal, carry, carry_other)
    np.testing.assert_array_equal(y[1, 2:], 0)
    h = carry[0][0] if isinstance(carry[0], tuple) else carry[0]
    # XLA may compute the state twice, once with a fused multiply-add.
    np.testing.assert_allclose(h, jnp.stack([y[0, T - 1], y[1, 1]]), atol=1e-7)


def test_a_text_read_in_pieces_is_the_text_read_at_once(layer):
    _, model, params, x, apply = layer
    whole, end = apply({"params": params}, x)
    first, carry = apply({"params": params}, x[:, :3])
    second, carry = apply({"params": params}, x[:, 3:4], None, carry)  # length 1
    third, carry = model.apply({"params": params}, carry, x[:, 4], method="step")
    # The products have other shapes, so sums may be in another order.
    np.testing.assert_allclose(jnp.concatenate([first, second, third[:, None]], 1), whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), carry, end)


def test_the_hoisted_gradient_is_the_numerical_one(layer):
    _, _, params, x, apply = layer
    lengths = jnp.array([T, 2])
    loss = jax.jit(lambda params: jnp.sum(jnp.sin(apply({"params": params}, x, lengths)[0])))
    grads = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(3)
    for name, leaf in params.items():
        direction = rng.normal(size=leaf.shape).astype(np.float32)
        at = lambda step, name=name, d=direction: loss({**params, name: params[name] + step * d})
        slope = (at(1e-2) - at(-1e-2)) / 2e-2
        # Central differences in float32: an error of order step^2 and rounding / step.
        np.testing.assert_allclose(jnp.sum(grads[name] * direction), slope, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_give_the_gradient_of_float32_within_their_rounding(kind):
    width, x = 64, jax.random.normal(jax.random.key(0), (8, 12, 48))
    model = Recurrent(kind, width, num_layers=2)
    params = model.init(jax.random.key(1), x)
    loss = lambda dtype: (
        lambda params: jnp.sum(jnp.sin(model.clone(dtype=dtype).apply(params, x)[0].astype(jnp.float32)))
    )
    half, whole = (jax.jit(jax.grad(loss(dtype)))(params) for dtype in (jnp.bfloat16, jnp.float32))
    chex.assert_trees_all_equal_dtypes(half, whole)
    for given, wanted in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
        difference = jnp.linalg.norm(given - wanted) / jnp.linalg.norm(wanted)
        assert 0 < difference < 0.02  # bfloat16 keeps 8 bits: 0.4 % an operation, and not float32 in disguise


def test_reversed_direction_reads_the_real_tokens_backwards():
    model = Recurrent("lstm", H, 1, bidirectional=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, D)), jnp.float32)
    params = model.init(jax.random.key(1), x)["params"]
    y, _ = model.apply({"params": params}, x, jnp.array([3]))
    one_way = {k.replace("_reverse", ""): v for k, v in params.items() if "_reverse" in k}
    expected, _ = Recurrent("lstm", H).apply({"params": one_way}, x[:, :3][:, ::-1])
    np.testing.assert_allclose(y[:, :3, H:], expected[:, ::-1], atol=1e-6)


def test_variational_masks_are_the_same_at_all_steps_and_ordinary_ones_are_not():
    x = jnp.ones((1, T, 40))
    for variational in (True, False):
        model = Recurrent("rnn", 40, 2, dropout=0.5, variational=variational, init_scale=0.0)
        params = model.init(jax.random.key(0), x)["params"]
        # The first layer gives tanh(1) everywhere; the second the sign of what dropout has left of it.
        params = {**params, "layer_0_bias": jnp.ones(40), "layer_1_input_kernel": jnp.eye(40)}
        y, _ = model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(1)})
        same = bool(jnp.all((y > 0) == (y[:, :1] > 0)))
        assert same == variational
        assert 0 < float(jnp.mean(y > 0)) < 1


@pytest.mark.parametrize("tied", [False, True])
def test_language_model_steps_give_teacher_forced_logits(tied):
    model = RecurrentLM(7, H, H, 2, "lstm", tied=tied, init_scale=0.5)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (B, T)))
    variables = model.init(jax.random.key(0), tokens)
    expected, _ = model.apply(variables, tokens)
    lengths = jnp.array([3, 1])
    logits, carry = model.apply(variables, tokens[:, :3], lengths, method="prefill")
    rows = jnp.arange(B)
    step = jax.jit(lambda *args: model.apply(variables, *args, method="step"))
    np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=1e-6)
    for n in range(2):
        position = lengths + n
        logits, carry = step(carry, tokens[rows, position], position)
        np.testing.assert_allclose(logits, expected[rows, position], atol=1e-6)
    zeros = model.apply(variables, tokens, model.initial_carry(B))[0]
    np.testing.assert_array_equal(zeros, expected)
    assert jax.tree.map(jnp.shape, initial_carry("lstm", H, 2, B)) == jax.tree.map(jnp.shape, carry)


def test_tied_embeddings_of_another_width_are_refused():
    with pytest.raises(UserError, match="tied"):
        RecurrentLM(7, 3, 4, tied=True).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_classifier_ignores_padding(pooling):
    model = SequenceClassifier(RecurrentEncoder(7, 3, H), 2, pooling)
    tokens, lengths = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]]), jnp.array([4, 2])
    variables = model.init(jax.random.key(0), tokens, lengths)
    apply = jax.jit(model.apply)
    logits = apply(variables, tokens, lengths)
    other = apply(variables, tokens.at[1, 2:].set(6), lengths)
    alone = model.apply(variables, tokens[1:, :2])
    real = (slice(1, 2), slice(0, 2)) if pooling == "none" else slice(1, 2)
    np.testing.assert_array_equal(logits[real], other[real])
    np.testing.assert_allclose(logits[real], alone, atol=1e-6)
