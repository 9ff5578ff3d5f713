"""DDPM against diffusers and PyTorch: `python -m benchmarks.ddpm [--quick] [--record] [--peak_tflops=X]`.

One training step (noise, network, gradient, Adam) and a DDIM chain of 50 network calls, both with the same
architecture, parameter count, batch and device on either side.

On CPU the network is a U-Net of 1.7M parameters on 32x32x1 images (widths 32, 64, 64; attention with 8 heads
of 8 at 16 and 8), float32. The peer runs eagerly and, without --quick, through `torch.compile` too; a table
of operations says where the time goes. On a GPU it is the paper's CIFAR-10 model in bfloat16 against
diffusers with `torch.compile` and autocast to bfloat16, and the share of the device's peak is printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.timing import Case, compare
from jaxgen import memory
from jaxgen.models.attention import scaled_dot_product_attention
from jaxgen.models.convolution import conv2d
from jaxgen.models.normalization import group_norm
from jaxgen.models.unet import UNet
from jaxgen.objectives.ddpm import make_loss
from jaxgen.processes import linear_schedule
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.ddim import ddim_chain
from jaxgen.systems import gradient_system
from jaxgen.types import System

TIMES = 1000
LEARNING_RATE = 2e-4

# Dense bfloat16 peaks in TFLOP/s from the makers' data sheets, by what the device calls itself.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "A100": 312.0}


class Setting(NamedTuple):
    """What both sides run. A call is `train_steps` updates, or one chain of `sample_steps` network calls."""

    size: int = 32
    image_channels: int = 1
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    attention: tuple[int, ...] = (16, 8)
    head_dim: int | None = 8
    num_groups: int = 16  # at least two channels a group in every layer, so that both sides can have it
    dropout: float = 0.0
    bfloat16: bool = False
    train_batch: int = 32
    train_steps: int = 1
    sample_batch: int = 8
    sample_steps: int = 50

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, self.image_channels)


CPU = Setting()
GPU = Setting(
    image_channels=3,
    channels=128,
    multipliers=(1, 2, 2, 2),
    attention=(16,),
    head_dim=None,
    num_groups=32,
    dropout=0.1,
    bfloat16=True,
    train_batch=128,
    train_steps=10,  # one wait for the device per ten updates, as in training
    sample_batch=256,
)


class Side(NamedTuple):
    """One side's two calls, and its number of parameters."""

    train: Callable[[], object]
    sample: Callable[[], object]
    num_params: int


def ours(setting: Setting) -> Side:
    """jaxgen: the training step and the chain that its experiments run."""
    model = _unet(setting)
    schedule = linear_schedule(TIMES)
    system = _system(model)
    batch = {"image": jnp.asarray(_images(setting, setting.train_batch))}
    state = jax.jit(system.init)(jax.random.key(0), batch)
    # A copy: the training state is donated.
    params = jax.tree.map(jnp.copy, state.params)
    step = jax.jit(system.step, donate_argnums=0)

    def train() -> None:
        nonlocal state
        for _ in range(setting.train_steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    @jax.jit
    def chain(params: Any, key: jax.Array) -> jax.Array:
        def predict(x: jax.Array, t: jax.Array) -> Any:
            return model.apply({"params": params}, x, t, train=False)

        ddim = ddim_chain(predict, schedule, num_steps=setting.sample_steps)
        return run_chain(ddim, key, jnp.arange(setting.sample_batch), setting.shape)

    sample_key = jax.random.key(1)
    return Side(
        train,
        lambda: jax.block_until_ready(chain(params, sample_key)),
        sum(leaf.size for leaf in jax.tree.leaves(params)),
    )


def peer(setting: Setting, device: str, compiled: bool) -> Side:
    """diffusers: its U-Net with its schedulers, PyTorch's Adam, and `torch.compile` where `compiled`."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    levels = len(setting.multipliers)
    attends = [setting.size >> level in setting.attention for level in range(levels)]
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=setting.size,
        in_channels=setting.image_channels,
        out_channels=setting.image_channels,
        layers_per_block=2,
        block_out_channels=tuple(setting.channels * m for m in setting.multipliers),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=setting.head_dim,
        norm_num_groups=setting.num_groups,
        norm_eps=1e-6,
        dropout=setting.dropout,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    ).to(device)
    on_gpu = device == "cuda"
    if on_gpu:
        # PyTorch's advice for convolutions in bfloat16 on tensor cores.
        model = model.to(memory_format=torch.channels_last)
    network = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=on_gpu)
    noising = DDPMScheduler(num_train_timesteps=TIMES)
    ddim = DDIMScheduler(num_train_timesteps=TIMES)
    ddim.set_timesteps(setting.sample_steps)
    images = torch.tensor(_images(setting, setting.train_batch)).permute(0, 3, 1, 2).contiguous().to(device)

    def predict(x: Any, t: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=setting.bfloat16):
            return network(x, t).sample.float()

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def train() -> None:
        model.train()
        for _ in range(setting.train_steps):
            eps = torch.randn_like(images)
            t = torch.randint(0, TIMES, (len(images),), device=device)
            output = predict(noising.add_noise(images, eps, t), t)
            loss = torch.nn.functional.mse_loss(output, eps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait()

    def sample() -> None:
        model.eval()
        with torch.no_grad():
            x = torch.randn(setting.sample_batch, *images.shape[1:], device=device)
            for t in ddim.timesteps:
                x = ddim.step(predict(x, t.to(device)), t, x).prev_sample
        wait()

    return Side(train, sample, sum(p.numel() for p in model.parameters()))


def network_cases(
    setting: Setting, device: str, compiled: bool, goals: tuple[float, float], rounds: int, seconds: float
) -> list[Case]:
    """The training step and the chain, ours against the peer's."""
    us, them = ours(setting), peer(setting, device, compiled)
    if us.num_params != them.num_params:
        raise AssertionError(f"unequal networks: {us.num_params} parameters against {them.num_params}")
    print(f"{us.num_params:,} parameters on either side", flush=True)
    suffix = " (torch.compile)" if compiled else ""
    limits: dict[str, Any] = {"unit": "images/s", "rounds": rounds, "seconds": seconds}
    images = setting.train_batch * setting.train_steps
    return [
        compare(f"train_step{suffix}", us.train, them.train, work=images, goal=goals[0], **limits),
        compare(
            f"sample_{setting.sample_steps}_steps{suffix}",
            us.sample,
            them.sample,
            work=setting.sample_batch,
            goal=goals[1],
            **limits,
        ),
    ]


class Operation(NamedTuple):
    """One operation in JAX and in PyTorch, on the same arrays, with what a forward pass amounts to."""

    name: str
    jax: Callable[..., jax.Array]
    torch: Callable[..., Any]
    arrays: Sequence[np.ndarray]
    layouts: Sequence[tuple[int, ...]]  # PyTorch's order of each array's axes
    flops: float | None  # None: counted in calls


def operations(batch: int, shapes: Sequence[tuple[int, int]]) -> list[Operation]:
    """The network's operations at `shapes` = (size, channels), and its attention at the smallest size."""
    import torch.nn.functional as F

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    image = (0, 3, 1, 2)
    listed = []
    for size, channels in shapes:
        x = normal(batch, size, size, channels)
        listed += [
            Operation(
                f"conv 3x3 {channels} at {size}",
                lambda x, k: conv2d(x, k, 1, ((1, 1), (1, 1))),
                lambda x, k: F.conv2d(x, k, padding=1),
                [x, normal(3, 3, channels, channels)],
                [image, (3, 2, 0, 1)],
                2.0 * 9 * x.size * channels,
            ),
            Operation(
                f"norm, swish {channels} at {size}",
                lambda x, scale, bias: jax.nn.swish(group_norm(x, scale, bias, 16, 1e-6)),
                lambda x, scale, bias: F.silu(F.group_norm(x, 16, scale, bias, 1e-6)),
                [x, normal(channels), normal(channels)],
                [image, (0,), (0,)],
                None,
            ),
        ]
    size = min(size for size, _ in shapes)
    attention = Operation(
        f"attention 8 heads of 8 at {size}",
        scaled_dot_product_attention,
        lambda *qkv: F.scaled_dot_product_attention(*(x.reshape(batch, 8, size * size, 8) for x in qkv)),
        [normal(batch * 8, size * size, 8) for _ in range(3)],
        [(0, 1, 2)] * 3,
        4.0 * batch * 8 * size**4 * 8,
    )
    return [*listed, attention]


def operation_cases(op: Operation, rounds: int, seconds: float) -> list[Case]:
    """One operation alone, forward and with its gradient, in float32."""
    import torch

    ours = [jnp.asarray(a) for a in op.arrays]
    theirs = [
        torch.tensor(a).permute(*layout).contiguous() for a, layout in zip(op.arrays, op.layouts, strict=True)
    ]
    cotangent = jnp.ones(jax.eval_shape(op.jax, *ours).shape)

    @jax.jit
    def both(*xs: jax.Array) -> Any:
        y, pull = jax.vjp(op.jax, *xs)
        return y, pull(cotangent)

    forward = jax.jit(op.jax)

    def torch_forward() -> None:
        with torch.no_grad():
            op.torch(*theirs)

    def torch_both() -> None:
        xs = [t.detach().requires_grad_() for t in theirs]
        y = op.torch(*xs)
        torch.autograd.grad(y, xs, torch.ones_like(y))

    def case(what: str, mine: Callable[..., Any], peers: Callable[[], None], passes: int) -> Case:
        unit, work = ("calls/s", 1.0) if op.flops is None else ("GFLOP/s", passes * op.flops / 1e9)
        call = lambda: jax.block_until_ready(mine(*ours))
        return compare(f"{op.name} {what}", call, peers, work=work, unit=unit, rounds=rounds, seconds=seconds)

    # The gradient of a product is a product for each of its operands: with it, three times the work.
    return [case("forward", forward, torch_forward, 1), case("with gradient", both, torch_both, 3)]


def flops_per_image(setting: Setting) -> float:
    """Floating-point operations of a training step for one image.

    From XLA's cost analysis of the program before it is compiled: afterwards, on a GPU, convolutions are
    calls into cuDNN, which it counts as nothing.
    """
    system = _system(_unet(setting))
    batch = {"image": jax.ShapeDtypeStruct((setting.train_batch, *setting.shape), jnp.float32)}
    state = jax.eval_shape(system.init, jax.random.key(0), batch)
    cost: Any = jax.jit(system.step).lower(state, batch).cost_analysis()
    return cost["flops"] / setting.train_batch


def main() -> None:
    """Run, print and record."""
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--peak_tflops", type=float, help="the device's dense bfloat16 peak, where it is not known"
    )
    args = parser.parse_args()
    timing.require("torch", "diffusers")
    import torch

    notes: dict[str, Any] = {}
    if jax.default_backend() == "cpu":
        rounds, seconds = (5, 25.0) if args.quick else (15, 150.0)
        cases = network_cases(CPU, "cpu", False, (0.7, 1.0), rounds, seconds)
        if not args.quick:
            cases += network_cases(CPU, "cpu", True, (0.7, 1.0), rounds, seconds)
        for op in operations(CPU.train_batch, ((32, 32), (16, 64))):
            cases += operation_cases(op, rounds, 4.0 if args.quick else 20.0)
    else:
        if not torch.cuda.is_available():
            print(
                "JAX runs on a GPU here but PyTorch does not: install a CUDA build of torch.", file=sys.stderr
            )
            raise SystemExit(2)
        rounds, seconds = (5, 40.0) if args.quick else (15, 150.0)
        cases = network_cases(GPU, "cuda", True, (1.2, 1.2), rounds, seconds)
        kind = jax.devices()[0].device_kind
        peak = args.peak_tflops or next((p for name, p in PEAK_TFLOPS.items() if name in kind), None)
        gflops = flops_per_image(GPU) / 1e9
        notes["training GFLOP per image"] = round(gflops, 2)
        if peak is None:
            print(f"the peak of {kind} is not known: give --peak_tflops for the share of it.")
        else:
            trained = cases[0].summary()
            shares = {side: gflops * trained[side] / (peak * 1e3) for side in ("ours", "peer")}
            notes["share of peak"] = {side: round(share, 4) for side, share in shares.items()}
            print(
                f"training is {gflops:.2f} GFLOP an image; the peak of {kind} is {peak:g} TFLOP/s, of which"
            )
            print(f"ours reaches {shares['ours']:.1%} and the peer {shares['peer']:.1%}")
    timing.report("ddpm", cases, ("torch", "diffusers"), args.record, notes)


def _unet(setting: Setting) -> UNet:
    return UNet(
        channels=setting.channels,
        channel_multipliers=setting.multipliers,
        attention_resolutions=setting.attention,
        head_dim=setting.head_dim,
        dropout=setting.dropout,
        out_channels=setting.image_channels,
        num_groups=setting.num_groups,
        dtype=jnp.bfloat16 if setting.bfloat16 else jnp.float32,
    )


def _system(model: UNet) -> System:
    def apply(params: Any, x: jax.Array, t: jax.Array, label: Any, key: Any) -> Any:
        return model.apply({"params": params}, x, t, label, train=True, rngs={"dropout": key})

    def init(key: jax.Array, batch: Any) -> tuple[Any, Any]:
        return model.init(key, batch["image"], jnp.zeros(len(batch["image"])), train=False)["params"], {}

    return gradient_system(init, make_loss(apply, linear_schedule(TIMES)), optax.adam(LEARNING_RATE))


def _images(setting: Setting, num: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (num, *setting.shape)).astype(np.float32)


if __name__ == "__main__":
    memory.keep_freed_memory()  # as jaxgen.run does; both sides gain
    # JAX would take three quarters of a GPU's memory at once and leave too little for the peer.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    main()
