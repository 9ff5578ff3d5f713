"""1,000-step sampling against diffusers and PyTorch: `python -m benchmarks.samplers [--quick] [--record]`.

Ancestral sampling of a DDPM, and annealed Langevin dynamics of 10 levels of 100 steps, with the same U-Net,
batch, schedule and number of network calls on either side: diffusers' `DDPMScheduler` and the loop of the
NCSN authors' code written for PyTorch. Ours is one compiled program each; its compilation is in the first
call, which the table shows apart. With --quick the chains have 100 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Case, compare
from jaxgen import memory
from jaxgen.denoising import denoised_from_eps, geometric_sigmas
from jaxgen.models.unet import UNet
from jaxgen.processes import linear_schedule
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.ddpm import ancestral_chain
from jaxgen.samplers.langevin import annealed_langevin_chain
from jaxgen.types import Array

GOAL = 1.5


class Setting(NamedTuple):
    """The U-Net, the batch and the steps of both sides; num_levels divides num_steps."""

    size: int = 8
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    num_groups: int = 8
    batch: int = 16
    num_steps: int = 1000
    num_levels: int = 10


def ours(setting: Setting) -> dict[str, Callable[[], object]]:
    """{case: call} of jaxgen's chains, with a network of random weights."""
    model = UNet(
        channels=setting.channels,
        channel_multipliers=setting.multipliers,
        num_res_blocks=setting.num_res_blocks,
        attention_resolutions=(),
        dropout=0.0,
        out_channels=1,
        num_groups=setting.num_groups,
    )
    shape = (setting.size, setting.size, 1)
    init = lambda key: model.init(key, jnp.zeros((1, *shape)), jnp.zeros(1), train=False)
    variables = jax.jit(init)(jax.random.key(0))
    sigmas = geometric_sigmas(1.0, 0.01, setting.num_levels)

    def predict(variables: Any, x: Array, t: Array) -> Any:
        return model.apply(variables, x, t, train=False)

    @jax.jit
    def ancestral(variables: Any, key: Array) -> Array:
        chain = ancestral_chain(
            lambda x, t: predict(variables, x, t), linear_schedule(setting.num_steps), clip=True
        )
        return run_chain(chain, key, jnp.arange(setting.batch), shape)

    @jax.jit
    def annealed(variables: Any, key: Array) -> Array:
        chain = annealed_langevin_chain(
            lambda x, sigma: denoised_from_eps(x, predict(variables, x, sigma), sigma),
            sigmas,
            steps_per_level=setting.num_steps // setting.num_levels,
            step_size=2e-5,
            denoise=False,
        )
        return run_chain(chain, key, jnp.arange(setting.batch), shape)

    key = jax.random.key(1)
    return {
        "ancestral": lambda: jax.block_until_ready(ancestral(variables, key)),
        "annealed_langevin": lambda: jax.block_until_ready(annealed(variables, key)),
    }


def peer(setting: Setting) -> dict[str, Callable[[], object]]:
    """{case: call} of the same in PyTorch, run eagerly on the CPU or, where there is one, the GPU."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() != "cpu" else "cpu"
    torch.manual_seed(0)
    levels = len(setting.multipliers)
    model = UNet2DModel(
        sample_size=setting.size,
        in_channels=1,
        out_channels=1,
        layers_per_block=setting.num_res_blocks,
        block_out_channels=tuple(setting.channels * m for m in setting.multipliers),
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        attention_head_dim=None,
        norm_num_groups=setting.num_groups,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    ).to(device)
    model.eval()
    scheduler = DDPMScheduler(num_train_timesteps=setting.num_steps, clip_sample=True)
    shape = (setting.batch, 1, setting.size, setting.size)
    sigmas = geometric_sigmas(1.0, 0.01, setting.num_levels)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def ancestral() -> None:
        with torch.no_grad():
            x = torch.randn(shape, device=device)
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t.to(device)).sample, t, x).prev_sample
        wait()

    def annealed() -> None:
        with torch.no_grad():
            x = sigmas[0] * torch.randn(shape, device=device)
            for sigma in sigmas:
                alpha = 2e-5 * (sigma / sigmas[-1]) ** 2
                level = torch.full((setting.batch,), float(sigma), device=device)
                for _ in range(setting.num_steps // setting.num_levels):
                    score = -model(x, level).sample / sigma
                    x = x + 0.5 * alpha * score + np.sqrt(alpha) * torch.randn_like(x)
        wait()

    return {"ancestral": ancestral, "annealed_langevin": annealed}


def cases(setting: Setting, rounds: int, seconds: float) -> list[Case]:
    """Both chains, ours against the peer's."""
    mine, theirs = ours(setting), peer(setting)
    return [
        compare(
            f"{name}_{setting.num_steps}_steps",
            mine[name],
            theirs[name],
            work=setting.batch,
            unit="images/s",
            goal=GOAL,
            rounds=rounds,
            seconds=seconds,
        )
        for name in mine
    ]


def main() -> None:
    """Run, print and record."""
    args = timing.parser(__doc__.splitlines()[0]).parse_args()
    timing.require("torch", "diffusers")
    setting = Setting(num_steps=100) if args.quick else Setting()
    rounds, seconds = (5, 40.0) if args.quick else (9, 120.0)
    timing.report("samplers", cases(setting, rounds, seconds), ("torch", "diffusers"), args.record)


if __name__ == "__main__":
    memory.keep_freed_memory()  # as jaxgen.run does; both sides gain
    main()
