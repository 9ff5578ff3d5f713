"""PyTorch's recurrent and Transformer layers, and transformers' GPT-2, with the same weights as ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.interop.gpt2 import gpt2_from_config, load_gpt2
from jaxgen.interop.safetensors import write_tensors
from jaxgen.interop.torch_sequences import load_attention, load_recurrent, load_stack
from jaxgen.models.multihead import MultiHeadAttention, attention_mask
from jaxgen.models.recurrent import LSTMState, Recurrent
from jaxgen.models.transformer import Stack, TransformerSpec
from jaxgen.samplers.autoregressive import keep_top_p
from jaxgen.types import UserError

torch = pytest.importorskip("torch")

B, T, D, H = 3, 7, 5, 6
LENGTHS = np.array([7, 1, 4])


def tensors_of(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def shapes(model, *args, **kwargs):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))["params"]


def noisy(module, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():  # norms off one, biases off zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru_reset_after"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_outputs_states_and_gradients(kind, bidirectional):
    peer = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru_reset_after": torch.nn.GRU}[kind]
    theirs = noisy(peer(D, H, num_layers=2, batch_first=True, bidirectional=bidirectional))
    ours = Recurrent(kind, H, 2, bidirectional)
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    params = load_recurrent(tensors_of(theirs), kind, shapes(ours, x))

    x_torch = torch.tensor(x, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        x_torch, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
    )
    y_torch, state = theirs(packed)
    y_torch, _ = torch.nn.utils.rnn.pad_packed_sequence(y_torch, batch_first=True)
    y_torch.square().sum().backward()

    def loss(params, x):
        y, carry = ours.apply({"params": params}, x, jnp.asarray(LENGTHS))
        return jnp.sum(y**2), (y, carry)

    grads, (y, carry) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, jnp.asarray(x))
    # float32, outputs of order one.
    np.testing.assert_allclose(y, y_torch.detach().numpy(), atol=1e-5)
    h = state[0] if kind == "lstm" else state
    np.testing.assert_allclose(
        np.stack([s.h if isinstance(s, LSTMState) else s for s in carry]), h.detach().numpy(), atol=1e-5
    )
    if kind == "lstm":
        np.testing.assert_allclose(np.stack([s.c for s in carry]), state[1].detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(grads[1], x_torch.grad.numpy(), atol=1e-5)
    # The recurrent kernel's gradient goes a way of its own (hoisted out of the scan).
    expected = dict(theirs.named_parameters())["weight_hh_l0"].grad.numpy().T
    if kind == "gru_reset_after":
        expected = expected * np.repeat([1, -1, 1], H)[None].astype(np.float32)
    np.testing.assert_allclose(grads[0]["layer_0_recurrent_kernel"], expected, atol=2e-5)


def test_the_printed_gru_does_not_take_pytorchs_weights():
    theirs = torch.nn.GRU(D, H)
    with pytest.raises(UserError, match="gru_reset_after"):
        load_recurrent(tensors_of(theirs), "gru", {})


def test_multihead_attention_self_and_cross_with_padding():
    width, heads = 12, 3
    theirs = noisy(torch.nn.MultiheadAttention(width, heads, batch_first=True))
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(B, n, width)).astype(np.float32) for n in (4, T))
    padding = np.arange(T)[None] >= LENGTHS[:, None]
    for cross in (False, True):
        ours = MultiHeadAttention(width, heads, cross=cross)

        def ours_of(module, x, y, cross=cross):
            mask = attention_mask(x.shape[1], T, causal=not cross, key_mask=jnp.asarray(~padding))
            if cross:
                q, (k, v) = module.project_query(x), module.project_memory(y)
            else:
                q, k, v = module.project(x, jnp.arange(T)[None])
            return module.mix(q, k, v, mask, train=False)

        query = x if cross else y
        like = jax.eval_shape(lambda: ours.init(jax.random.key(0), query, y, method=ours_of))["params"]
        params = load_attention(tensors_of(theirs), like)
        out = ours.apply({"params": params}, query, y, method=ours_of)
        masks = {} if cross else {"attn_mask": torch.ones(T, T, dtype=torch.bool).triu(1)}
        expected, _ = theirs(
            torch.tensor(query),
            torch.tensor(y),
            torch.tensor(y),
            key_padding_mask=torch.tensor(padding),
            **masks,
        )
        np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)


# What PyTorch says of a fast path of its own that it does not take.
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("norm", "activation"), [("post", "relu"), ("pre", "gelu")])
def test_transformer_encoder_and_decoder(norm, activation):
    width, heads = 12, 3
    theirs = noisy(
        torch.nn.Transformer(
            width,
            heads,
            2,
            2,
            20,
            dropout=0.0,
            activation=activation,
            norm_first=norm == "pre",
            batch_first=True,
        )
    )
    spec = TransformerSpec(
        width,
        2,
        heads,
        mlp_width=20,
        activation=activation,
        norm=norm,
        final_norm=True,
        positions="none",
        tied=False,
    )
    rng = np.random.default_rng(2)
    source, target = (rng.normal(size=(B, n, width)).astype(np.float32) for n in (T, 4))
    real = jnp.asarray(np.arange(T)[None] < LENGTHS[:, None])
    encoder, decoder = Stack(spec), Stack(spec, cross=True)
    positions = jnp.arange(T)[None]

    def decode(module, target, encoded):
        return module.read(target, memory=module.memory_of(encoded, real))

    tensors = tensors_of(theirs)
    params = {
        "encoder": load_stack(tensors, shapes(encoder, source, positions, None), prefix="encoder."),
        "decoder": load_stack(
            tensors,
            jax.eval_shape(lambda: decoder.init(jax.random.key(0), target, source, method=decode))["params"],
            prefix="decoder.",
        ),
    }
    mask = attention_mask(T, T, causal=False, key_mask=real)
    encoded, _ = encoder.apply({"params": params["encoder"]}, source, positions, mask)
    out = decoder.apply({"params": params["decoder"]}, target, encoded, method=decode)
    padding = torch.tensor(~np.asarray(real))
    expected = theirs(
        torch.tensor(source),
        torch.tensor(target),
        tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(4),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
        tgt_is_causal=True,
    )
    # float32 through two encoder and two decoder layers; outputs are of order one.
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-4)


CONFIG = {"vocab_size": 31, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 16}


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(**CONFIG, attn_implementation="eager", use_cache=False)
    return noisy(transformers.GPT2LMHeadModel(config))


@pytest.mark.parametrize("published", [False, True])
def test_gpt2_from_a_safetensors_file(gpt2, published, tmp_path):
    tensors = tensors_of(gpt2)
    if published:  # as in the published files: no prefix, no output matrix, the masks' buffers
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items() if k != "lm_head.weight"}
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    write_tensors(tmp_path / "model.safetensors", tensors)
    ours = gpt2_from_config(gpt2.config.to_dict())
    tokens = np.random.default_rng(3).integers(0, 31, (2, 16)).astype(np.int32)
    params = load_gpt2(tmp_path / "model.safetensors", shapes(ours, tokens))
    logits = ours.apply({"params": params}, tokens)
    with torch.no_grad():
        expected = gpt2(torch.tensor(tokens).long()).logits.numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_top_p_keeps_as_many_tokens_as_that_of_transformers():
    """Halves, so that many tokens are alike; which of them are kept is left open there."""
    transformers = pytest.importorskip("transformers")
    logits = np.round(np.random.default_rng(4).normal(size=(8, 30)) * 2).astype(np.float32) / 2
    for p in (0.001, 0.03, 0.3, 0.77, 0.95):
        expected = transformers.TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy()
        found = np.asarray(keep_top_p(jnp.asarray(logits), p))
        np.testing.assert_array_equal(np.sort(found), np.sort(expected))


def test_what_is_wrong_with_the_tensors_is_named(gpt2):
    tensors = tensors_of(gpt2)
    ours = gpt2_from_config(CONFIG)
    like = shapes(ours, np.zeros((1, 2), np.int32))
    for change, match in [
        ({"transformer.ln_f.weight": None}, "lacks transformer.ln_f.weight"),
        ({"transformer.extra": np.zeros(2)}, "transformer.extra"),
        ({"transformer.wpe.weight": np.zeros((3, 24))}, "positions"),
    ]:
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises(UserError, match=match):
            load_gpt2(changed, like)
    with pytest.raises(UserError, match="activation_function"):
        gpt2_from_config(CONFIG | {"activation_function": "silu"})
    with pytest.raises(UserError, match="lacks n_head"):
        gpt2_from_config({k: v for k, v in CONFIG.items() if k != "n_head"})
    with pytest.raises(UserError, match="scale_attn"):
        gpt2_from_config(CONFIG | {"scale_attn_weights": False})
