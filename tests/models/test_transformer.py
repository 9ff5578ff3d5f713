"""The Transformer: the lectures' worked examples, masks, positions, caches at every position."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxgen.models.multihead import attend, attention_mask, attention_weights, weighted_values
from jaxgen.models.positions import rotate, sinusoidal_positions
from jaxgen.models.seq2seq import RecurrentSeq2Seq, bahdanau_scores, luong_scores
from jaxgen.models.transformer import (
    Block,
    EncoderDecoder,
    TransformerEncoder,
    TransformerLM,
    TransformerSpec,
)
from jaxgen.types import UserError

V, B, T = 11, 3, 6
LENGTHS = jnp.array([6, 1, 4])


def test_the_worked_example_of_self_attention():
    # W, a_1 … a_4, softmax replaced by the identity and no scaling. The step of the lecture that computes v_4
    # takes a_4 = [0, 0, 1] (the slide's list prints [0, 1, 1]).
    w = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 1]], np.float32)
    a = np.array([[1, 0, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]], np.float32)
    q = k = v = jnp.asarray(a @ w.T)
    scores = q[1] @ k.T
    np.testing.assert_array_equal(scores, [4, 5, 5, 3])
    b_2 = weighted_values(scores[None, None, None], v[None, None])[0, 0, 0]
    np.testing.assert_array_equal(b_2, [4, 27, 21])
    # With the softmax: its scores, through our function, from the same numbers.
    weights = attention_weights(q[None, None], k[None, None], None)[0, 0, 1]
    e = np.exp(np.array([4, 5, 5, 3]) / np.sqrt(3))
    np.testing.assert_allclose(weights, e / e.sum(), rtol=1e-6)


PRINTED = [  # "Your journey starts with one step": softmax(A) as printed
    [0.19, 0.16, 0.16, 0.15, 0.17, 0.15],
    [0.20, 0.16, 0.16, 0.14, 0.16, 0.14],
    [0.20, 0.16, 0.16, 0.14, 0.16, 0.14],
    [0.18, 0.16, 0.16, 0.15, 0.16, 0.15],
    [0.18, 0.16, 0.16, 0.15, 0.16, 0.15],
    [0.19, 0.16, 0.16, 0.15, 0.16, 0.15],
]
PRINTED_MASKED = [
    [1.0],
    [0.55, 0.44],
    [0.38, 0.30, 0.31],
    [0.27, 0.24, 0.24, 0.23],
    [0.21, 0.19, 0.19, 0.18, 0.19],
    [0.19, 0.16, 0.16, 0.15, 0.16, 0.15],
]


def test_the_printed_table_of_masked_attention():
    # Keys of the identity make the queries the scores: A = log of the printed weights.
    scores = jnp.log(jnp.asarray(PRINTED)) * 6**0.5
    mask = attention_mask(6, 6, causal=True, key_mask=None)
    weights = attention_weights(scores[None, None], jnp.eye(6)[None, None], mask)[0, 0]
    for n, row in enumerate(PRINTED_MASKED):
        # Both tables are cut to two digits: 0.01 of each entry here, and 0.005 / 0.36 of those divided by.
        np.testing.assert_allclose(weights[n, : n + 1], row, atol=0.015)
        np.testing.assert_array_equal(weights[n, n + 1 :], 0.0)
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_dividing_last_is_the_softmax_and_its_gradient(groups):
    parts = (jax.random.key(0), jax.random.key(1), jax.random.key(2), jax.random.key(3))
    q, k, v, g = (
        3 * jax.random.normal(key, (2, heads, 5, 8))
        for key, heads in zip(parts, (4, groups, groups, 4), strict=True)
    )
    key_mask = jnp.array([[True] * 5, [False] * 5])  # no key at all in the second row
    mask = attention_mask(5, 5, causal=True, key_mask=key_mask)
    plain = lambda q, k, v: weighted_values(attention_weights(q, k, mask), v)
    wanted, pull_wanted = jax.vjp(plain, q, k, v)
    given, pull_given = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    np.testing.assert_allclose(given, wanted, atol=2e-6)
    for given_gradient, gradient in zip(pull_given(g), pull_wanted(g), strict=True):
        np.testing.assert_allclose(given_gradient, gradient, atol=2e-5)  # gradients of up to 10


def test_sinusoidal_positions_are_the_formula_and_shifts_are_linear():
    dim = 8
    code = sinusoidal_positions(jnp.arange(50), dim)
    for position, i in [(0, 0), (3, 1), (49, 3)]:
        angle = position / 10_000 ** (2 * i / dim)
        np.testing.assert_allclose(code[position, 2 * i], np.sin(angle), atol=1e-5)
        np.testing.assert_allclose(code[position, 2 * i + 1], np.cos(angle), atol=1e-5)
    # PE(a + b) = M(b) PE(a) with M(b) the rotations by b, for every a.
    shift, turn = 7, np.zeros((dim, dim))
    for i in range(dim // 2):
        angle = shift / 10_000 ** (2 * i / dim)
        c, s = np.cos(angle), np.sin(angle)
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, s], [-s, c]]
    np.testing.assert_allclose(code[shift:], np.asarray(code[:-shift]) @ turn.T, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    score = lambda i, j: jnp.sum(rotate(q, jnp.array([[i]])) * rotate(k, jnp.array([[j]])))
    np.testing.assert_allclose(score(9, 4), score(105, 100), atol=1e-4)
    np.testing.assert_allclose(score(3, 3), jnp.sum(q * k), atol=1e-5)
    assert abs(float(score(9, 4) - score(9, 8))) > 1e-2


def test_grouped_queries_are_repeated_keys():
    key = jax.random.key(0)
    q = jax.random.normal(jax.random.fold_in(key, 0), (2, 4, 5, 3))
    k, v = jax.random.normal(jax.random.fold_in(key, 1), (2, 2, 2, 5, 3))
    mask = attention_mask(5, 5, causal=True, key_mask=jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool))
    expected = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), mask=(mask > -1)[:, None]
    )
    out = attend(q, k, v, mask)
    np.testing.assert_allclose(jnp.swapaxes(out, 1, 2)[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(jnp.swapaxes(out, 1, 2)[1, :, :], expected[1], atol=1e-5)


def test_dropout_of_weights_keeps_their_mean():
    q = k = jnp.zeros((1, 1, 1000, 2))
    v = jnp.ones((1, 1, 1000, 1))
    out = attend(q, k, v, None, 0.25, jax.random.key(0))
    # Each is a mean of 1000 Bernoulli(3/4) / (3/4): standard error sqrt(1/3 / 1e6) of all; 5 of them.
    assert abs(float(jnp.mean(out)) - 1.0) < 5 * (1 / 3e6) ** 0.5
    assert float(jnp.std(out)) == pytest.approx((1 / 3e3) ** 0.5, rel=0.2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swiglu"])
def test_gradients_in_bfloat16_are_those_of_float32_roundings_apart(activation, tied):
    spec = TransformerSpec(16, 2, 2, activation=activation, max_length=70, tied=tied)
    tokens = jax.random.randint(jax.random.key(0), (2, 70), 0, 30)
    variables = TransformerLM(30, spec).init(jax.random.key(1), tokens)

    def slope(dtype):
        logits = lambda v: TransformerLM(30, spec, dtype=dtype).apply(v, tokens)
        return jax.jit(jax.grad(lambda v: jnp.mean(jax.nn.logsumexp(logits(v), axis=-1) - logits(v)[..., 3])))

    wide, narrow = (ravel_pytree(slope(dtype)(variables))[0] for dtype in (jnp.float32, jnp.bfloat16))
    assert float(jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide)) < 0.02


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swiglu"])
def test_activations_are_float64s_rounded_once(activation, dtype):
    x = jnp.linspace(-6, 6, 64).astype(dtype)
    spec = TransformerSpec(16, 1, 2, activation=activation)
    given = Block(spec, cross=False, dtype=dtype).bind({}).activate(x)
    assert given.dtype == dtype
    z = np.asarray(x, np.float64)
    normal = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))
    formulas = {
        "relu": lambda z: np.maximum(z, 0),
        "gelu": lambda z: z * normal(z),
        "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "swiglu": lambda z: z[:32] / (1 + np.exp(-z[:32])) * z[32:],
    }
    tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(np.asarray(given, np.float64), formulas[activation](z), **tolerance)


SPECS = {
    "gpt2": TransformerSpec(16, 2, 4, max_length=12),
    "llama": TransformerSpec(
        16,
        2,
        4,
        2,
        positions="rotary",
        norm_kind="rms",
        activation="swiglu",
        use_bias=False,
        tied=False,
        remat=True,
    ),
    "vaswani": TransformerSpec(
        16, 2, 2, norm="post", positions="sinusoidal", scale_embedding=True, activation="relu", dropout=0.1
    ),
}


@pytest.fixture(scope="module", params=list(SPECS))
def spec(request):
    return SPECS[request.param]


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


def check_steps(prefill, step, tokens, expected, widths):
    """Prompts of each width, rows of several lengths, then steps to the end: the teacher-forced logits."""
    rows = jnp.arange(B)
    prefill, step = jax.jit(prefill), jax.jit(step)  # width 1 takes the steps through every position
    for width in widths:
        lengths = jnp.minimum(jnp.array([width, 1, max(1, width - 1)]), width)
        logits, cache = prefill(tokens[:, :width], lengths)
        np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=1e-5)
        for n in range(T - width):
            position = lengths + n
            logits, cache = step(cache, tokens[rows, position], position)
            np.testing.assert_allclose(logits, expected[rows, position], atol=1e-5)


def test_caches_of_the_language_model_at_every_position(spec, tokens):
    model = TransformerLM(V, spec)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    apply = lambda method, **fields: lambda *args: model.apply(variables, *args, method=method, **fields)
    expected = jax.jit(apply("__call__"))(tokens)
    assert float(jnp.std(expected)) > 0.01
    check_steps(apply("prefill", cache_length=T), apply("step"), tokens, expected, (1, 4, T))
    # Causal: what comes later changes no bit.
    changed = jax.jit(apply("__call__"))(tokens.at[:, 4:].set(0))
    np.testing.assert_array_equal(changed[:, :4], expected[:, :4])


def test_a_full_cache_gives_nan_and_a_long_prompt_one_sentence(tokens):
    model = TransformerLM(V, SPECS["gpt2"])
    variables = jax.jit(model.init)(jax.random.key(0), tokens)

    @jax.jit
    def one_too_many(tokens):
        _, cache = model.apply(variables, tokens, LENGTHS, cache_length=T, method="prefill")
        return model.apply(variables, cache, tokens[:, 0], LENGTHS, method="step")[0]

    logits = one_too_many(tokens)
    assert bool(jnp.all(jnp.isnan(logits)))
    for length, match in ((T - 1, "does not fit"), (13, "12 learned positions")):
        with pytest.raises(UserError, match=match):
            model.apply(variables, tokens, LENGTHS, cache_length=length, method="prefill")
    with pytest.raises(UserError, match="heads"):
        TransformerSpec(10, 1, 3)


def test_encoder_ignores_padding_and_gradients_are_finite(spec, tokens):
    model = TransformerEncoder(V, spec)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    encode = jax.jit(lambda tokens: model.apply(variables, tokens, LENGTHS))
    x, other = encode(tokens), encode(jnp.where(jnp.arange(T)[None] < LENGTHS[:, None], tokens, 3))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(x[row, :length], other[row, :length])
    alone = jax.jit(model.apply)(variables, tokens[1:2, :1])
    np.testing.assert_allclose(x[1, :1], alone[0], atol=1e-5)
    loss = lambda variables: jnp.sum(
        model.apply(
            variables, tokens, jnp.zeros(B, jnp.int32), train=True, rngs={"dropout": jax.random.key(1)}
        )
    )
    # Not even an empty sequence, where no key is real, gives NaN.
    grads = jax.jit(jax.grad(loss))(variables)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


SEQ2SEQ = {
    "transformer": EncoderDecoder(V, V, SPECS["vaswani"], shared_embedding=True),
    "pre_norm": EncoderDecoder(V + 1, V, SPECS["llama"]),
    "bahdanau": RecurrentSeq2Seq(V, V, 4, 5, 2, "gru", "bahdanau"),
    "luong": RecurrentSeq2Seq(V, V, 4, 5, 2, "lstm", "luong"),
}


@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_caches_and_masks_of_encoder_decoders(name, tokens):
    model = SEQ2SEQ[name]
    source, target = tokens, (tokens + 3) % V
    variables = jax.jit(model.init)(jax.random.key(0), source, LENGTHS, target)
    forced = jax.jit(lambda source: model.apply(variables, source, LENGTHS, target))
    expected = forced(source)
    # The source's padding changes no bit.
    padded = jnp.where(jnp.arange(T)[None] < LENGTHS[:, None], source, 9)
    np.testing.assert_array_equal(forced(padded), expected)
    memory = jax.jit(lambda source: model.apply(variables, source, LENGTHS, method="encode"))(source)
    check_steps(
        lambda tokens, lengths: model.apply(
            variables, memory, tokens, lengths, cache_length=T, method="prefill"
        ),
        lambda cache, token, position: model.apply(variables, memory, cache, token, position, method="step"),
        target,
        expected,
        (1, 3),
    )
    show = jax.jit(lambda source: model.apply(variables, source, LENGTHS, target, mutable="intermediates"))
    _, sown = show(source)
    maps = [leaf for leaf in jax.tree.leaves(sown) if leaf.shape[-2:] == (T, T)]
    assert len(maps) >= 1
    for weights in maps:  # of each map the rows sum to one, and no padding of the source is looked at
        np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1.0, atol=1e-5)
    alignment = (
        maps[0]
        if weights.ndim == 3
        else sown["intermediates"]["decoder"]["block_0"]["cross_attention"]["attention_weights"][0]
    )
    np.testing.assert_array_equal(alignment[1, ..., 1:], 0.0)


def test_scores_of_bahdanau_and_luong_are_the_printed_sums():
    rng = np.random.default_rng(0)
    query, keys, v = rng.normal(size=(2, 3)), rng.normal(size=(2, 4, 3)), rng.normal(size=3)
    h = rng.normal(size=(2, 5, 3))
    as_printed = [[v @ np.tanh(query[b] + key) for key in keys[b]] for b in range(2)]
    np.testing.assert_allclose(bahdanau_scores(*map(jnp.asarray, (query, keys, v))), as_printed, rtol=1e-5)
    as_printed = [[[state @ key for key in keys[b]] for state in h[b]] for b in range(2)]
    np.testing.assert_allclose(luong_scores(jnp.asarray(h), jnp.asarray(keys)), as_printed, rtol=1e-4)


@pytest.mark.parametrize(("positions", "heads"), [("rotary", 2), ("sinusoidal", 3)])
def test_positions_in_pairs_need_an_even_width(positions, heads):
    with pytest.raises(UserError, match="even width"):
        TransformerSpec(3 * heads, 1, heads, positions=positions)


def test_a_shared_embedding_needs_one_vocabulary(tokens):
    with pytest.raises(UserError, match="one vocabulary"):
        EncoderDecoder(V, V + 1, SPECS["gpt2"], shared_embedding=True).init(
            jax.random.key(0), tokens, LENGTHS, tokens
        )
