"""The players: spectral norms against SVD, published sizes, and images that do not see their batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models import gan

LATENTS, NUM = 5, 6


def test_power_iteration_finds_the_largest_singular_value_and_its_gradient():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)), jnp.float32)
    u = jnp.ones(5) / jnp.sqrt(5.0)
    iterate = jax.jit(gan.power_iteration)
    for _ in range(200):
        sigma, u = iterate(matrix, u)
    left, singular, right = np.linalg.svd(np.asarray(matrix, np.float64))
    np.testing.assert_allclose(sigma, singular[0], rtol=1e-5)
    np.testing.assert_allclose(np.abs(u), np.abs(right[0]), atol=1e-4)
    gradient = jax.grad(lambda matrix: gan.power_iteration(matrix, u)[0])(matrix)
    np.testing.assert_allclose(gradient, np.outer(left[:, 0], right[0]), atol=1e-3)


def _discriminator(**options):
    return gan.DCGANDiscriminator(channels=3, num_levels=1, **{"spectral": True, **options})


IMAGES = jax.random.uniform(jax.random.key(1), (NUM, 8, 8, 1), minval=-1.0)


@pytest.fixture(scope="module")
def judge():
    """(discriminator, its params, its state after 60 training calls)."""
    model = _discriminator(num_classes=3)
    label = jnp.zeros(NUM, jnp.int32)
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(0), IMAGES, label)
    params, state = variables["params"], variables["spectral"]

    @jax.jit
    def iterate(state):
        call = lambda _, state: gan.discriminate(model, params, state, IMAGES, label, True)[1]
        return jax.lax.fori_loop(0, 60, call, state)

    return model, params, iterate(state)


def test_the_weights_that_are_used_have_spectral_norm_1(judge):
    _, params, state = judge
    kernels = [
        (params[layer][name]["kernel"], vectors["u"])
        for layer, names in state.items()
        for name, vectors in names.items()
    ]
    assert len(kernels) == 5  # three convolutions, the linear form and the projection
    for kernel, u in kernels:
        matrix = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
        sigma, _ = gan.power_iteration(jnp.asarray(matrix, jnp.float32), u)
        # 60 iterations leave (s2/s1)^120 of the second singular value.
        np.testing.assert_allclose(np.linalg.norm(matrix / float(sigma), 2), 1.0, rtol=2e-2)


def test_only_training_moves_the_vectors_and_every_image_is_judged_on_its_own(judge):
    model, params, state = judge
    label = jnp.arange(NUM) % 3
    call = jax.jit(functools.partial(gan.discriminate, model), static_argnums=4)
    logits, same = call(params, state, IMAGES, label, False)
    chex.assert_trees_all_equal(same, state)
    # In another order the logits are the same but for the order of sums.
    turned, _ = call(params, state, IMAGES[::-1], label[::-1], False)
    np.testing.assert_allclose(turned[::-1], logits, rtol=1e-4, atol=1e-5)
    start = jax.tree.map(lambda u: jnp.ones_like(u) / jnp.sqrt(u.size), state)
    _, moved = call(params, start, IMAGES, label, True)
    changes = jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, moved))
    # The linear form has one output, and a vector of length 1 in one dimension cannot turn.
    assert sum(change > 1e-3 for change in changes) == len(changes) - 1


def test_the_projection_is_an_inner_product_with_the_class(judge):
    model, params, state = judge
    judge = jax.jit(lambda label: gan.discriminate(model, params, state, IMAGES, label, False)[0])
    call = lambda label: judge(jnp.full(NUM, label))
    plain = judge(None)
    projection = params["head"]["projection"]["kernel"]
    sigma, _ = gan.power_iteration(projection, state["head"]["projection"]["u"])
    terms = np.stack([call(label) - plain for label in range(3)])
    # <V_y, h> with the same h `[NUM, C]` for all y: as a matrix in y it lies in the span of V's rows.
    features, *_ = np.linalg.lstsq(np.asarray(projection / sigma), terms, rcond=None)
    assert features.shape == (projection.shape[1], NUM)
    expected = np.asarray(projection / sigma) @ features
    np.testing.assert_allclose(expected, terms, atol=1e-4)
    assert np.abs(terms).max() > 1e-3


def test_without_the_spectral_norm_there_is_no_state():
    model = _discriminator(spectral=False)

    def begin_and_judge(key):
        generator = gan.DCGANGenerator((8, 8, 1), 2, 1)
        params, state = gan.init_players(generator, model, key, IMAGES, LATENTS)
        return state, gan.discriminate(model, params["discriminator"], {}, IMAGES, None, True)

    state, (logits, after) = jax.eval_shape(begin_and_judge, jax.random.key(0))
    assert state == {"generator": {}, "discriminator": {}}
    assert (logits.shape, after) == ((NUM,), {})


@pytest.fixture(scope="module", params=[None, 3])
def maker(request):
    generator = gan.DCGANGenerator((8, 8, 1), 3, 1, request.param)
    label = None if request.param is None else jnp.arange(NUM) % 3
    z = jax.random.normal(jax.random.key(2), (NUM, LATENTS))
    init = jax.jit(functools.partial(generator.init, train=True))
    params = init(jax.random.key(3), z, label)["params"]
    return generator, params, z, label


def test_with_standing_statistics_an_image_depends_on_its_latent_alone(maker):
    generator, params, z, label = maker
    key = jax.random.key(4)
    statistics = gan.standing_statistics(generator, params, key, NUM, LATENTS)
    draw = jax.jit(
        lambda z, label: generator.apply({"params": params, "batch_stats": statistics}, z, label, train=False)
    )
    images = draw(z, label)
    assert images.shape == (NUM, 8, 8, 1)
    assert float(jnp.abs(images).max()) < 1
    swapped = draw(z.at[1:].set(0.0), label)
    np.testing.assert_allclose(swapped[0], images[0], atol=1e-5)
    assert float(jnp.abs(swapped[1] - images[1]).max()) > 1e-4
    # They are the statistics of the very latents they were measured on: there both ways agree.
    z = jax.random.normal(jax.random.key(4), (NUM, LATENTS))
    np.testing.assert_allclose(
        draw(z, label), gan.generate_in_training(generator, params, z, label), atol=1e-4
    )


def test_a_class_has_a_scale_and_a_shift_of_its_own(maker):
    generator, params, z, label = maker
    if label is None:
        assert "scale" not in params["start_norm"]
        return
    scale, shift = (params["norm0"][name]["embedding"] for name in ("scale", "shift"))
    np.testing.assert_array_equal(scale, np.ones((3, 3)))
    np.testing.assert_array_equal(shift, np.zeros((3, 3)))
    changed = {**params, "norm0": {**params["norm0"], "shift": {"embedding": shift.at[1].set(1.0)}}}
    draw = jax.jit(functools.partial(gan.generate_in_training, generator))
    before, after = (draw(p, z, label) for p in (params, changed))
    moved = np.abs(after - before).max(axis=(1, 2, 3)) > 1e-6
    np.testing.assert_array_equal(moved, np.asarray(label) == 1)


def test_doubling_and_halving():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    twice = gan.double(x)
    np.testing.assert_array_equal(twice[0, :, :, 0], np.kron(np.arange(4.0).reshape(2, 2), np.ones((2, 2))))
    np.testing.assert_array_equal(gan.halve(twice), x)
    np.testing.assert_allclose(gan.halve(x)[0, 0, 0, 0], 1.5)


@pytest.mark.parametrize(("shape", "levels"), [((8, 8, 1), 1), ((28, 28, 1), 2), ((32, 32, 3), 3)])
def test_shapes_of_both_kinds(shape, levels):
    z, images = jnp.zeros((2, LATENTS)), jnp.zeros((2, *shape))
    pairs = [
        (gan.DCGANGenerator(shape, 4, levels), gan.DCGANDiscriminator(4, levels, spectral=True)),
        (gan.ResNetGenerator(shape, 4, levels), gan.ResNetDiscriminator(4, spectral=True)),
    ]
    for generator, discriminator in pairs:
        made, _ = jax.eval_shape(
            lambda k, g=generator: g.init_with_output(k, z, train=True), jax.random.key(0)
        )
        logits, _ = jax.eval_shape(
            lambda k, d=discriminator: d.init_with_output(k, images, train=True), jax.random.key(0)
        )
        assert (made.shape, logits.shape) == ((2, *shape), (2,))


def test_the_residual_nets_have_the_published_size():
    """Table 4 of Miyato et al. 2018, counted layer by layer."""
    norm, conv = 2 * 256, 9 * 256 * 256 + 256
    block = 2 * norm + 2 * conv + 256 * 256 + 256
    generator = 128 * 16 * 256 + 16 * 256 + 3 * block + norm + 9 * 256 * 3 + 3
    conv = 9 * 128 * 128 + 128
    first, second = 9 * 3 * 128 + 128 + conv + 3 * 128 + 128, 2 * conv + 128 * 128 + 128
    discriminator = first + second + 2 * 2 * conv + 128 + 1
    assert (generator, discriminator) == (4_276_739, 1_053_825)
    params, state = jax.eval_shape(
        lambda key: gan.init_players(
            gan.ResNetGenerator((32, 32, 3), 256, 3),
            gan.ResNetDiscriminator(128, spectral=True),
            key,
            jnp.zeros((1, 32, 32, 3)),
            128,
        ),
        jax.random.key(0),
    )
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert (count(params["generator"]), count(params["discriminator"])) == (generator, discriminator)
    assert len(jax.tree.leaves(state)) == 11  # a vector for each convolution and for the linear form
