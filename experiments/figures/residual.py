"""Plain against residual networks of two depths: held-out error while training, and error without one block.

He et al. 2016, figure 6: the deeper plain network is worse than the shallower one, the deeper residual one is
not. Veit et al. 2016, figure 3: a residual network barely misses a block, a plain one fails.

    python -m experiments.figures.residual --out=DIR      # trains 20 and 56 layers on digits, 5 minutes
    python -m experiments.figures.residual --out=DIR --workdir=runs/resnet20 --workdir=runs/plain20 ...

Trained on the spot are networks of the preset `digits` of experiments/resnet.py, with fewer channels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import common, resnet
from experiments.common import classifying
from experiments.figures import command
from experiments.figures.trained import restore, run_of
from jaxgen import pictures, sharding
from jaxgen.models.resnet import cifar_stages
from jaxgen.types import Array, Key, Mean, Metrics, PyTree, TrainState, UserError
from jaxgen.workdir import read_metrics

DEPTHS = (20, 56)


class Trained(NamedTuple):
    """curve: (step, held-out error) while training; whole: that of the network; without: of it without each
    of its blocks. Errors are in percent."""

    curve: list[tuple[int, float]]
    whole: float
    without: list[float]


def name_of(config: ConfigDict) -> str:
    """What the legend says."""
    return f"{'residual' if config.model.residual else 'plain'} {config.model.depth}"


def deletions(config: ConfigDict, state: TrainState) -> tuple[float, list[float]]:
    """Held-out error in percent of the whole network, and without each block."""
    _, test = common.load_images(config.data.source)
    model = resnet.make_model(config.model, classifying.num_classes(test))

    def accuracy(given: tuple[PyTree, PyTree, Array], batch: Mapping[str, Array], _: Key) -> Metrics:
        params, model_state, block = given  # the block's number is traced: one program serves for all
        variables = {"params": params, **model_state}
        logits = cast(Array, model.clone(deleted=(block,)).apply(variables, batch["image"], train=False))
        return {"accuracy": Mean.of(logits.argmax(axis=-1) == batch["label"], batch["mask"])}

    settings = {"batch_size": config.evaluation.batch_size, "seed": config.seed}
    evaluation = common.make_evaluation(accuracy, test, sharding.make_mesh(), **settings)
    whole, *without = (
        100 * (1 - float(evaluation((state.sampling_params, state.model_state, block))["accuracy"].value))
        for block in range(-1, sum(cifar_stages(config.model.depth)))
    )
    return whole, without


def spot_config(*, depth: int, residual: bool, channels: int, num_steps: int, seed: int) -> ConfigDict:
    """The preset `digits` at a smaller size."""
    config = resnet.get_config("digits")
    config.seed = seed
    config.model.depth, config.model.residual, config.model.channels = depth, residual, channels
    config.train.num_steps = num_steps
    config.optim.decay_steps = (num_steps * 5 // 8, num_steps * 7 // 8)
    return config


def train(config: ConfigDict, *, num_points: int) -> Trained:
    """Trains on the spot; the curve has `num_points` points."""
    experiment, num_steps = resnet.build(config, sharding.make_mesh()), config.train.num_steps
    state = jax.jit(experiment.system.init)(jax.random.key(config.seed), experiment.train_batch(0))
    run = jax.jit(lambda state, batches: jax.lax.scan(experiment.system.step, state, batches)[0])
    curve, chunk = [], num_steps // num_points
    for start in range(0, chunk * num_points, chunk):
        rows = [experiment.train_batch(step) for step in range(start, start + chunk)]
        state = run(state, jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows))
        accuracy = float(experiment.validate(state)["accuracy"].value)
        curve.append((start + chunk, 100 * (1 - accuracy)))
    return Trained(curve, *deletions(config, state))


def read(workdir: Path) -> tuple[ConfigDict, Trained]:
    """The config, the curve and the newest checkpoint's errors of a run of experiments/resnet.py.

    Raises UserError where the folder holds no such run.
    """
    config = run_of(resnet, workdir).config
    mesh = sharding.make_mesh()
    experiment = resnet.build(config, mesh)
    state = restore(experiment, workdir, mesh)
    accuracy = read_metrics(workdir).get("validation/accuracy", [])
    curve = [(step, 100 * (1 - value)) for step, value in accuracy]
    return config, Trained(curve, *deletions(config, state))


def draw(found: Mapping[str, Trained]) -> Figure:
    """Error against updates, and against the deleted block's place."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    curves, blocks = figure.subplots(1, 2)
    for colour, (name, trained) in zip(pictures.PALETTE, found.items(), strict=False):
        style = "-" if name.startswith("residual") else "--"
        curves.plot(*np.asarray(trained.curve).T, style, color=colour, label=name)
        place = (np.arange(len(trained.without)) + 0.5) / len(trained.without)
        blocks.plot(place, trained.without, style, marker="o", markersize=3, color=colour, label=name)
        blocks.axhline(trained.whole, color=colour, linewidth=0.8, linestyle=":")
    curves.set(xlabel="updates", ylabel="test error, %", title="while training")
    curves.set_yscale("symlog", linthresh=5)
    blocks.set(xlabel="place of the deleted block in the network", title="without one block (dotted: whole)")
    for axes in (curves, blocks):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str]) -> int:
    """Trains or reads, prints the errors and draws them; returns the exit status."""
    parser = command.parser("residual")
    parser.add_argument(
        "--workdir", type=Path, action="append", default=[], help="a run of resnet.py; repeat"
    )
    parser.add_argument("--depths", type=command.whole_numbers, default=DEPTHS, help="such as 20,56")
    parser.add_argument("--num_steps", type=int, default=400, help="updates of each, at least 10")
    parser.add_argument("--channels", type=int, default=8, help="of the first stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.num_steps < 10 or arguments.channels < 1:
        parser.error("--num_steps must be at least 10 and --channels at least 1")
    found: dict[str, Trained] = {}
    try:
        for workdir in arguments.workdir:
            config, trained = read(workdir.expanduser())
            name = name_of(config)
            found[name if name not in found else f"{name}, {workdir.name}"] = trained
        for depth in () if arguments.workdir else arguments.depths:
            for residual in (False, True):
                config = spot_config(
                    depth=depth,
                    residual=residual,
                    channels=arguments.channels,
                    num_steps=arguments.num_steps,
                    seed=arguments.seed,
                )
                resnet.check(config)
                found[name_of(config)] = train(config, num_points=10)
                print(f"{name_of(config)}: test error {found[name_of(config)].whole:.2f} %", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command.print_table(
        ["network", "test error %", "without a block: median", "least", "most"],
        [
            [name, trained.whole, *(float(f(trained.without)) for f in (np.median, np.min, np.max))]
            for name, trained in found.items()
        ],
    )
    return command.write(draw(found), arguments.out, "residual")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
