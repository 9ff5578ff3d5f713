"""The benchmark of image generators at toy size: with the same weights both sides compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import images  # noqa: E402

TOY = images.Setting(
    size=8,
    vae_widths=(5, 4),
    codes=3,
    vae_batch=2,
    batch=2,
    gan_channels=2,
    gan_levels=1,
    latents=3,
    pixel_features=3,
    pixel_layers=1,
    pixel_batch=2,
    sample_size=4,
    sample_batch=2,
)
# What one of our layers holds apart is one tensor there.
_INNER = ("weight", "norm", "linear")


def _copy_into(module, params):
    """Our parameters, by their names, in the PyTorch module of the same names."""
    theirs = dict(module.named_parameters())
    with torch.no_grad():
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            *layers, kind = [entry.key for entry in path]
            layers = [layer for layer in layers if layer not in _INNER]
            name = ".".join([*layers, "bias" if kind == "bias" else "weight"])
            value = np.asarray(leaf)
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
            target = theirs.pop(name)
            target.copy_(torch.tensor(value.reshape(target.shape)))
    assert not theirs
    return module


def _nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def _random(shapes):
    """Values for all leaves; an init's zeros and ones would hide a mix-up."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_the_vaes_compute_the_same():
    model, x = images.make_vae(TOY), images.images(2, 8)
    params = _random(jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))["params"])
    network = _copy_into(images.torch_vae(TOY), params)
    codes = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    encode = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode"))
    decode = jax.jit(lambda params, z: model.apply({"params": params}, z, method="decode"))
    with torch.no_grad():
        theirs = network.encoder(torch.tensor(x).flatten(1)).chunk(2, dim=1)
        for ours, peer in zip(encode(params, x), theirs, strict=True):
            np.testing.assert_allclose(ours, peer, atol=1e-5)
        theirs = network.decoder(torch.tensor(codes)).reshape(4, 8, 8, 1)
    np.testing.assert_allclose(decode(params, codes), theirs, atol=1e-5)


def test_the_gans_compute_the_same():
    setting = TOY._replace(spectral=False)
    x = images.images(2, 8)
    generator, discriminator = images.make_gan(setting)
    init = lambda key: images.players.init_players(generator, discriminator, key, jnp.asarray(x), 3)[0]
    players = _random(jax.eval_shape(init, jax.random.key(0)))
    maker, critic = images.torch_gan(setting)
    _copy_into(maker, players["generator"])
    _copy_into(critic, players["discriminator"])
    z = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    generate = lambda params, z: images.players.generate_in_training(generator, params, z, None)
    made = jax.jit(generate)(players["generator"], z)
    with torch.no_grad():
        # Float32 sums in another order.
        np.testing.assert_allclose(made, maker(torch.tensor(z)).permute(0, 2, 3, 1), atol=1e-4)
        judge = lambda params, x: images.players.discriminate(discriminator, params, {}, x, None, False)[0]
        logits = jax.jit(judge)(players["discriminator"], x)
        np.testing.assert_allclose(logits, critic(_nchw(x)), rtol=1e-4, atol=1e-4)


def test_the_pixelcnns_compute_the_same():
    model, x = images.make_pixelcnn(TOY), images.images(2, 8)
    params = _random(jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))["params"])
    network = _copy_into(images.torch_pixelcnn(TOY), params)
    with torch.no_grad():
        theirs = network(_nchw(x)).permute(0, 2, 3, 1)
    ours = jax.jit(lambda params, x: model.apply({"params": params}, x))(params, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_every_case_runs_on_both_sides():
    cases = images.cases(TOY, rounds=1, seconds=0.0)
    assert [case.name for case in cases] == [
        *("vae_train_step", "gan_train_step", "pixelcnn_train_step", "pixelcnn_sample_4x4"),
        "pixelcnn_cached_4x4",
    ]
    assert all(case.summary()["ratio"] > 0 for case in cases)


def test_unequal_networks_are_refused():
    with pytest.raises(AssertionError, match="unequal networks"):
        images.check_equal(1, torch.nn.Linear(1, 1))
