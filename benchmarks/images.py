"""Generators of images against PyTorch: `python -m benchmarks.images [--quick] [--record]`.

A training step of a VAE (the layers of Burda et al. 2016, one draw of the code), of a GAN (DCGAN with
spectral norm, one update of either player) and of a gated PixelCNN, and sampling from the PixelCNN: ours
keeps what a new pixel does not touch, the peer runs the network on the whole image for every pixel, which is
how the published PyTorch code samples. Either side has the same layers, the same number of parameters,
batch, optimiser and float32; the peer runs eagerly. Last, the same sampler without what it keeps, compiled by
XLA too, which draws the same images.

On CPUs the training steps of the GAN and the PixelCNN are behind the peer (0.71 and 0.85 when recorded), as
XLA's convolutions are behind PyTorch's: of 64 x 14 x 14 x 64 to as many by 3 x 3, forwards 184 GFLOP/s and
the kernel's gradient 98 on two cores, PyTorch 340 and 357 (see also the operations of benchmarks/ddpm.py).
Tried without gain: a strided convolution as one of blocks of pixels, twice as long forwards and backwards;
patches copied side by side and one matrix product, as long at 14 x 14 x 64 and four times as long at
28 x 28 x 32; XLA's flags for oneDNN, for YNNPACK's convolutions, for the order of concurrent operations and
for vectors of 512 bits; forwards and for the gradient of x, three shifts side by side, one product and three
shifted sums: at most a third faster with 64 channels or more, slower with 32. With gain: convolutions of
1 x 1 and linear layers as products of two matrices, and freed memory kept (PixelCNN 96 to 153 images/s, GAN
167 to 232; the peer gains as much); the kernel's gradient as a product of shifts of x and shifts of the
result's gradient, for a few images at a time (alone 195 to 235 GFLOP/s instead of 98; whole batches leave the
cache and gain nothing): in turn in one process the GAN's update 0.257 to 0.211 s, the U-Net's of
benchmarks/ddpm.py 0.82 to 0.77 s. The PixelCNN's kernels, 2 x 3 and 1 x 2, gained nothing: XLA's there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.timing import Case, compare
from jaxgen import memory
from jaxgen.models import gan as players
from jaxgen.models.autoencoder import MlpDecoder, MlpEncoder
from jaxgen.models.pixelcnn import PixelCNN, cached_functions
from jaxgen.models.vae import VAE
from jaxgen.objectives import gan, pixelcnn, vae
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.pixels import PixelNetwork, pixel_chain, whole_image_network
from jaxgen.systems import alternating_system, gradient_system
from jaxgen.types import System

LEARNING_RATE = 2e-4


class Setting(NamedTuple):
    """What both sides run, on random black and white images of one channel."""

    size: int = 28
    vae_widths: tuple[int, ...] = (200, 200)
    codes: int = 50
    vae_batch: int = 100
    batch: int = 64
    gan_channels: int = 32
    gan_levels: int = 2
    latents: int = 64
    spectral: bool = True
    pixel_features: int = 32
    pixel_layers: int = 7
    pixel_batch: int = 32
    sample_size: int = 12  # the network takes any size, and the peer's time grows with its fourth power
    sample_batch: int = 16


class Pair(NamedTuple):
    """The two sides of a case; a call does `work`, in `unit` times seconds, and waits until it is done."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    work: float
    unit: str = "images/s"
    goal: float = 1.0


def images(num: int, size: int) -> np.ndarray:
    """Random black and white images, float32 `[num, size, size, 1]` of -1 and 1."""
    return (np.random.default_rng(0).integers(0, 2, (num, size, size, 1)) * 2.0 - 1.0).astype(np.float32)


def stepper(system: System, batch: Any, num_steps: int = 1) -> tuple[Callable[[], object], int]:
    """(a call that makes num_steps updates in one `lax.scan`, as the loop does, the number of parameters)."""
    state = jax.jit(system.init)(jax.random.key(0), batch)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    batches = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_steps, *leaf.shape)), batch)
    steps = jax.jit(lambda state, batches: jax.lax.scan(system.step, state, batches), donate_argnums=0)

    def train() -> None:
        nonlocal state
        state, metrics = steps(state, batches)
        jax.block_until_ready(metrics)

    return train, count


def check_equal(ours: int, *modules: Any) -> None:
    """AssertionError unless the peer's modules have as many parameters as ours."""
    theirs = sum(p.numel() for module in modules for p in module.parameters())
    if ours != theirs:
        raise AssertionError(f"unequal networks: {ours} parameters against {theirs}")
    print(f"{ours:,} parameters on either side", flush=True)


# ---- VAE


def make_vae(setting: Setting) -> VAE:
    """Our encoder and decoder."""
    size = (setting.size, setting.size)
    return VAE(
        encoder=MlpEncoder(setting.vae_widths, 2 * setting.codes, "tanh"),
        decoder=MlpDecoder(setting.vae_widths[::-1], size, 1, "tanh"),
    )


def torch_vae(setting: Setting) -> Any:
    """The same in PyTorch: `encoder` gives mean and log variance `[B, 2K]`, `decoder` logits `[B, H * W]`."""
    from torch import nn

    class Mlp(nn.Module):
        def __init__(self, widths: tuple[int, ...]) -> None:
            super().__init__()
            self.mlp = nn.Module()
            names = [f"dense_{number}" for number in range(len(widths) - 2)] + ["out"]
            for name, inputs, outputs in zip(names, widths[:-1], widths[1:], strict=True):
                setattr(self.mlp, name, nn.Linear(inputs, outputs))

        def forward(self, h: Any) -> Any:
            *hidden, out = self.mlp.children()
            for layer in hidden:
                h = layer(h).tanh()
            return out(h)

    pixels, widths = setting.size**2, setting.vae_widths
    network = nn.Module()
    network.encoder = Mlp((pixels, *widths, 2 * setting.codes))
    network.decoder = Mlp((setting.codes, *widths[::-1], pixels))
    return network


def vae_training(setting: Setting) -> Pair:
    """Updates on the ELBO of binary images, ten a call: each is so short that a call would count."""
    import torch
    from torch.nn.functional import softplus

    model = make_vae(setting)

    def encode(params: Any, x: jax.Array, label: Any) -> vae.Gaussian:
        return vae.Gaussian(*cast(Any, model.apply({"params": params}, x, method="encode")))

    def decode(params: Any, z: jax.Array, label: Any) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, z, method="decode"))

    loss = vae.make_loss(vae.Networks(encode, decode, (setting.codes,)), vae.bernoulli_likelihood(1))
    system = gradient_system(
        lambda key, batch: (model.init(key, batch["image"])["params"], {}), loss, optax.adam(LEARNING_RATE)
    )
    real = images(setting.vae_batch, setting.size)
    num_steps = 10
    ours, count = stepper(system, {"image": jnp.asarray(real)}, num_steps)

    torch.manual_seed(0)
    network = torch_vae(setting)
    check_equal(count, network)
    adam = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    there = torch.tensor(real).flatten(1)

    def peer() -> None:
        for _ in range(num_steps):
            mean, log_var = network.encoder(there).chunk(2, dim=1)
            z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
            distortion = softplus(-there * network.decoder(z)).sum(dim=1)
            rate = 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum(dim=1)
            loss = (distortion + rate).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

    return Pair("vae_train_step", ours, peer, work=num_steps * setting.vae_batch)


# ---- GAN


def make_gan(setting: Setting) -> tuple[players.Generator, players.Discriminator]:
    """Our generator and discriminator."""
    shape = (setting.size, setting.size, 1)
    return (
        players.DCGANGenerator(shape, setting.gan_channels, setting.gan_levels),
        players.DCGANDiscriminator(setting.gan_channels, setting.gan_levels, setting.spectral),
    )


def torch_gan(setting: Setting) -> tuple[Any, Any]:
    """The same in PyTorch."""
    from torch import nn
    from torch.nn.functional import interpolate, leaky_relu, relu
    from torch.nn.utils.parametrizations import spectral_norm

    channels, levels = setting.gan_channels, setting.gan_levels
    low, wide = setting.size >> levels, channels << levels
    normed = spectral_norm if setting.spectral else lambda module: module

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.start_norm = nn.Linear(setting.latents, low * low * wide), nn.BatchNorm2d(wide)
            for level in range(levels):
                conv = nn.Conv2d(channels << (level + 1), channels << level, 3, padding=1)
                setattr(self, f"conv{level}", conv)
                setattr(self, f"norm{level}", nn.BatchNorm2d(channels << level))
            self.image = nn.Conv2d(channels, 1, 3, padding=1)

        def forward(self, z: Any) -> Any:
            x = self.start(z).view(-1, low, low, wide).permute(0, 3, 1, 2)
            x = relu(self.start_norm(x))
            for level in reversed(range(levels)):
                x = getattr(self, f"conv{level}")(interpolate(x, scale_factor=2))
                x = relu(getattr(self, f"norm{level}")(x))
            return self.image(x).tanh()

    class Discriminator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for level in range(levels):
                width, inputs = channels << level, channels << level if level else 1
                setattr(self, f"conv{level}", normed(nn.Conv2d(inputs, width, 3, padding=1)))
                setattr(self, f"down{level}", normed(nn.Conv2d(width, 2 * width, 4, 2, padding=1)))
            self.last = normed(nn.Conv2d(wide, wide, 3, padding=1))
            self.head = normed(nn.Linear(low * low * wide, 1))

        def forward(self, x: Any) -> Any:
            for level in range(levels):
                x = leaky_relu(getattr(self, f"conv{level}")(x), 0.1)
                x = leaky_relu(getattr(self, f"down{level}")(x), 0.1)
            return self.head(leaky_relu(self.last(x), 0.1).permute(0, 2, 3, 1).flatten(1))[:, 0]

    return Generator(), Discriminator()


def gan_training(setting: Setting) -> Pair:
    """One update of the discriminator and one of the generator, hinge losses."""
    import torch

    generator, discriminator = make_gan(setting)

    def generate(params: Any, key: jax.Array, label: Any, num: int) -> jax.Array:
        z = jax.random.normal(key, (num, setting.latents))
        return players.generate_in_training(generator, params, z, label)

    def judge(params: Any, state: Any, x: jax.Array, label: Any, train: bool) -> Any:
        return players.discriminate(discriminator, params, state, x, label, train)

    optimizer = optax.adam(LEARNING_RATE, b1=0.0, b2=0.9)
    system = alternating_system(
        lambda key, batch: players.init_players(
            generator, discriminator, key, batch["image"], setting.latents
        ),
        *gan.make_losses(generate, judge, "hinge"),
        discriminator_optimizer=optimizer,
        generator_optimizer=optimizer,
    )
    real = images(setting.batch, setting.size)
    ours, count = stepper(system, {"image": jnp.asarray(real)})

    torch.manual_seed(0)
    maker, critic = torch_gan(setting)
    check_equal(count, maker, critic)
    adams = [
        torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.9))
        for module in (critic, maker)
    ]
    there = torch.tensor(real).permute(0, 3, 1, 2).contiguous()

    def peer() -> None:
        with torch.no_grad():
            fake = maker(torch.randn(setting.batch, setting.latents))
        of_real, of_fake = critic(torch.cat([there, fake])).chunk(2)
        loss = torch.relu(1 - of_real).mean() + torch.relu(1 + of_fake).mean()
        adams[0].zero_grad()
        loss.backward()
        adams[0].step()
        critic.requires_grad_(False)
        loss = -critic(maker(torch.randn(setting.batch, setting.latents))).mean()
        adams[1].zero_grad()
        loss.backward()
        adams[1].step()
        critic.requires_grad_(True)

    return Pair("gan_train_step", ours, peer, work=setting.batch)


# ---- PixelCNN


def make_pixelcnn(setting: Setting) -> PixelCNN:
    """Our gated PixelCNN for binary images."""
    return PixelCNN("gated", setting.pixel_features, setting.pixel_layers, num_outputs=1, channels=1)


def torch_pixelcnn(setting: Setting) -> Any:
    """The same in PyTorch: images `[B, 1, H, W]` -> logits `[B, 1, H, W]`."""
    import torch
    from torch import nn
    from torch.nn.functional import pad, relu

    features, wide = setting.pixel_features, 2 * setting.pixel_features

    class CausalConv(nn.Conv2d):
        """Sees the rows above and its own, and of the columns those around or those up to it."""

        def __init__(self, inputs: int, outputs: int, size: tuple[int, int], centred: bool) -> None:
            super().__init__(inputs, outputs, size)
            width = size[1]
            self.sides = (width // 2, width // 2) if centred else (width - 1, 0)

        def forward(self, x: Any) -> Any:
            return super().forward(pad(x, (*self.sides, self.kernel_size[0] - 1, 0)))

    def gate(x: Any) -> Any:
        a, b = x.chunk(2, dim=1)
        return a.tanh() * b.sigmoid()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vertical_conv = CausalConv(features, wide, (2, 3), True)
            self.horizontal_conv = CausalConv(features, wide, (1, 2), False)
            self.to_horizontal, self.mix = nn.Conv2d(wide, wide, 1), nn.Conv2d(features, features, 1)

        def forward(self, v: Any, h: Any) -> tuple[Any, Any]:
            x = self.vertical_conv(v)
            return gate(x), h + self.mix(gate(self.horizontal_conv(h) + self.to_horizontal(x)))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first_vertical = CausalConv(2, features, (4, 7), True)
            self.first_horizontal = CausalConv(2, features, (1, 4), False)
            self.first_context = nn.Conv2d(features, features, 1)
            for number in range(setting.pixel_layers):
                setattr(self, f"layers_{number}", Layer())
            self.hidden, self.output = nn.Conv2d(features, features, 1), nn.Conv2d(features, 1, 1)

        def forward(self, x: Any) -> Any:
            x = torch.cat([x, torch.ones_like(x)], dim=1)
            v = self.first_vertical(pad(x, (0, 0, 1, 0))[:, :, :-1])
            h = self.first_horizontal(pad(x, (1, 0))[:, :, :, :-1]) + self.first_context(v)
            for number in range(setting.pixel_layers):
                v, h = getattr(self, f"layers_{number}")(v, h)
            return self.output(relu(self.hidden(relu(h))))

    return Network()


def pixelcnn_training(setting: Setting) -> Pair:
    """An update on binary images."""
    import torch
    from torch.nn.functional import softplus

    model = make_pixelcnn(setting)
    loss = pixelcnn.make_loss(
        lambda params, x, label, _: cast(jax.Array, model.apply({"params": params}, x, label)),
        pixelcnn.bernoulli_likelihood(1),
    )
    system = gradient_system(
        lambda key, batch: (model.init(key, batch["image"])["params"], {}), loss, optax.adam(LEARNING_RATE)
    )
    real = images(setting.pixel_batch, setting.size)
    ours, count = stepper(system, {"image": jnp.asarray(real)})

    torch.manual_seed(0)
    network = torch_pixelcnn(setting)
    check_equal(count, network)
    adam = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    there = torch.tensor(real).permute(0, 3, 1, 2).contiguous()

    def peer() -> None:
        loss = softplus(-there * network(there)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()

    return Pair("pixelcnn_train_step", ours, peer, work=setting.pixel_batch)


def make_sampler(setting: Setting, *, cached: bool) -> tuple[Callable[[], jax.Array], int]:
    """(a call that draws images pixel by pixel, the number of the network's parameters)."""
    size, num = setting.sample_size, setting.sample_batch
    model = make_pixelcnn(setting)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 1)))["params"]

    @jax.jit
    def draw(params: Any, key: jax.Array) -> jax.Array:
        if cached:
            network = PixelNetwork(*cached_functions(model, params, None))
        else:
            network = whole_image_network(lambda x: cast(jax.Array, model.apply({"params": params}, x)))
        chain = pixel_chain(network, pixelcnn.bernoulli_likelihood(1).draw, size)
        return run_chain(chain, key, jnp.arange(num), (size, size, 1))

    key = jax.random.key(1)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return lambda: jax.block_until_ready(draw(params, key)), count


def pixelcnn_sampling(setting: Setting) -> Pair:
    """Images drawn pixel by pixel: our cached sampler against whole passes in PyTorch."""
    import torch

    size, num = setting.sample_size, setting.sample_batch
    ours, count = make_sampler(setting, cached=True)
    torch.manual_seed(0)
    network = torch_pixelcnn(setting)
    check_equal(count, network)

    @torch.no_grad()
    def peer() -> Any:
        x = torch.zeros(num, 1, size, size)
        for row in range(size):
            for column in range(size):
                logits = network(x)[:, 0, row, column]
                x[:, 0, row, column] = torch.bernoulli(logits.sigmoid()) * 2 - 1
        return x

    return Pair(f"pixelcnn_sample_{size}x{size}", ours, peer, work=num)


def cached_sampling(setting: Setting) -> Pair:
    """The same images drawn by our sampler with and without what it keeps from pixel to pixel."""
    cached, whole = (make_sampler(setting, cached=cached)[0] for cached in (True, False))
    np.testing.assert_array_equal(cached(), whole())
    name = f"pixelcnn_cached_{setting.sample_size}x{setting.sample_size}"
    return Pair(name, cached, whole, work=setting.sample_batch)


PAIRS: tuple[Callable[[Setting], Pair], ...] = (
    vae_training,
    gan_training,
    pixelcnn_training,
    pixelcnn_sampling,
    cached_sampling,
)


def cases(setting: Setting, rounds: int, seconds: float) -> list[Case]:
    """All pairs, timed."""
    timed = []
    for make in PAIRS:
        name, ours, peer, work, unit, goal = make(setting)
        timed.append(
            compare(name, ours, peer, work=work, unit=unit, goal=goal, rounds=rounds, seconds=seconds)
        )
    return timed


def main() -> None:
    """Run, print and record."""
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args()
    timing.require("torch")
    rounds, seconds, setting = 15, 150.0, Setting()
    if arguments.quick:
        rounds, seconds, setting = 5, 20.0, setting._replace(sample_size=8)
    timing.report("images", cases(setting, rounds, seconds), ("torch",), arguments.record)


if __name__ == "__main__":
    memory.keep_freed_memory()  # as jaxgen.run does; both sides gain
    main()
