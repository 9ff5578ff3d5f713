"""Residual networks: published parameter counts, PyTorch's numbers with the same weights, deleted blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models.resnet import ResNet, cifar_stages, pad_shortcut


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _shapes(model, size):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))


# He et al. 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73)])
def test_parameters_of_the_cifar_networks(depth, millions):
    model = ResNet(cifar_stages(depth), 16, 10)
    variables = _shapes(model, 32)
    assert _count(variables["params"]) / 1e6 == pytest.approx(millions, abs=0.006)
    plain = _shapes(model.clone(residual=False), 32)
    assert _count(plain["params"]) == _count(variables["params"])  # option A: shortcuts have none
    convolutions = [
        path
        for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])
        if "kernel" in jax.tree_util.keystr(path)
    ]
    assert len(convolutions) == depth


# torchvision's resnet18 has 11,689,512 parameters and resnet50 25,557,032 (its documentation).
@pytest.mark.parametrize(
    ("stages", "bottleneck", "parameters"),
    [((2, 2, 2, 2), False, 11_689_512), ((3, 4, 6, 3), True, 25_557_032)],
)
def test_parameters_of_the_large_networks(stages, bottleneck, parameters):
    model = ResNet(stages, 64, 1000, bottleneck=bottleneck, stem="large", project=True)
    assert _count(_shapes(model, 224)["params"]) == parameters


@pytest.mark.parametrize("depth", [19, 2, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="6 n"):
        cifar_stages(depth)


def test_pad_shortcut_takes_every_second_pixel_and_pads_with_zeros():
    x = jnp.arange(2 * 3 * 3 * 2.0).reshape(2, 3, 3, 2)
    y = pad_shortcut(x, 5, 2)
    assert y.shape == (2, 2, 2, 5)
    np.testing.assert_array_equal(y[..., :2], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 2:], 0)


@pytest.fixture(scope="module")
def tiny():
    """A network of 14 layers with random norms, its variables, and images."""
    model = ResNet(cifar_stages(14), 4, 3)
    image = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = model.init(jax.random.key(0), image, train=False)
    rng = np.random.default_rng(0)

    def shake(leaf):  # norms that do something; kernels are random as they are
        return leaf if leaf.ndim > 1 else jnp.asarray(leaf + 0.3 * rng.uniform(size=leaf.shape), jnp.float32)

    return model, jax.tree.map(shake, variables), image


def test_zero_initialised_branches_make_the_blocks_their_shortcuts(tiny):
    model, _, image = tiny
    model = model.clone(zero_init=True)
    variables = model.init(jax.random.key(0), image, train=False)
    without = model.clone(deleted=tuple(range(6)))
    np.testing.assert_array_equal(
        model.apply(variables, image, train=False), without.apply(variables, image, train=False)
    )


def test_a_deleted_block_is_its_shortcut(tiny):
    model, variables, image = tiny
    whole, without = (
        model.clone(deleted=deleted).apply(variables, image, train=False) for deleted in ((), (1,))
    )
    assert np.abs(np.asarray(whole - without)).max() > 1e-3
    # With the last scale and shift of the block at zero its branch is zero too.
    params = dict(variables["params"])
    params["stage0_block1"] = {
        **params["stage0_block1"],
        "norm2": jax.tree.map(jnp.zeros_like, params["stage0_block1"]["norm2"]),
    }
    np.testing.assert_array_equal(model.apply({**variables, "params": params}, image, train=False), without)


@pytest.mark.parametrize("residual", [True, False])
def test_the_deleted_block_may_be_traced(tiny, residual):
    model, variables, image = tiny
    model = model.clone(residual=residual)
    chosen = jax.jit(lambda block: model.clone(deleted=(block,)).apply(variables, image, train=False))
    for block, deleted in ((-1, ()), (0, (0,)), (2, (2,))):  # block 2 halves the image
        fixed = model.clone(deleted=deleted).apply(variables, image, train=False)
        np.testing.assert_allclose(chosen(block), fixed, atol=1e-5)


def test_running_statistics_move_in_training_alone(tiny):
    model, variables, image = tiny
    _, changed = model.apply(variables, image, train=True, mutable=["batch_stats"])
    before, after = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(v["batch_stats"])]) for v in (variables, changed)
    )
    assert np.all(before != after)


class TestAgainstPyTorch:
    """The published network, written anew in PyTorch, with our weights."""

    def _twin(self, torch, variables, depth, residual):
        nn = torch.nn
        params, stats = variables["params"], variables["batch_stats"]

        def conv(p, stride):
            kernel = np.asarray(p["kernel"]).transpose(3, 2, 0, 1)
            layer = nn.Conv2d(
                kernel.shape[1], kernel.shape[0], kernel.shape[2], stride, kernel.shape[2] // 2, bias=False
            )
            layer.weight.data = torch.tensor(kernel)
            return layer

        def norm(p, s):
            layer = nn.BatchNorm2d(len(p["scale"]))
            layer.weight.data, layer.bias.data = (torch.tensor(np.asarray(p[n])) for n in ("scale", "bias"))
            layer.running_mean.data = torch.tensor(np.asarray(s["mean"]))
            layer.running_var.data = torch.tensor(np.asarray(s["var"]))
            return layer

        head = nn.Linear(*params["head"]["kernel"].shape)
        head.weight.data = torch.tensor(np.asarray(params["head"]["kernel"]).T.copy())
        head.bias.data = torch.tensor(np.asarray(params["head"]["bias"]))
        stem = nn.Sequential(
            conv(params["stem"], 1), norm(params["stem_norm"], stats["stem_norm"]), nn.ReLU()
        )
        blocks = []
        for stage in range(3):
            for index in range((depth - 2) // 6):
                name = f"stage{stage}_block{index}"
                p, s, stride = params[name], stats[name], 2 if stage and not index else 1
                branch = nn.Sequential(
                    conv(p["conv1"], stride), norm(p["norm1"], s["norm1"]), nn.ReLU(),
                    conv(p["conv2"], 1), norm(p["norm2"], s["norm2"]),
                )  # fmt: skip
                blocks.append((branch, stride))
        modules = nn.ModuleList([stem, head, *(branch for branch, _ in blocks)])

        def forward(x):
            x = stem(x)
            for branch, stride in blocks:
                y = branch(x)
                if residual:
                    short = x[:, :, ::stride, ::stride]
                    y = y + nn.functional.pad(short, (0, 0, 0, 0, 0, y.shape[1] - short.shape[1]))
                x = torch.relu(y)
            return head(x.mean(dim=(2, 3)))

        return modules, forward

    @pytest.mark.parametrize("residual", [True, False])
    def test_logits_and_running_statistics(self, tiny, residual):
        torch = pytest.importorskip("torch", reason="parity needs PyTorch: install jaxgen[peers]")
        model, variables, image = tiny
        model = model.clone(residual=residual)
        modules, forward = self._twin(torch, variables, 14, residual)
        theirs = torch.tensor(np.asarray(image).transpose(0, 3, 1, 2))
        for train in (False, True):
            modules.train(train)
            with torch.no_grad():
                expected = forward(theirs).numpy()
            logits, changed = model.apply(variables, image, train=train, mutable=["batch_stats"])
            np.testing.assert_allclose(logits, expected, atol=1e-4)  # float32 through 14 layers
        stem = changed["batch_stats"]["stem_norm"]
        np.testing.assert_allclose(stem["mean"], modules[0][1].running_mean.numpy(), atol=1e-5)
        # PyTorch's running variance is the unbiased one, Flax's (and the paper's training one) the biased.
        count = 2 * 8 * 8
        old, biased = np.asarray(variables["batch_stats"]["stem_norm"]["var"]), np.asarray(stem["var"])
        unbiased = 0.9 * old + (biased - 0.9 * old) * count / (count - 1)
        np.testing.assert_allclose(unbiased, modules[0][1].running_var.numpy(), atol=1e-5)
