"""How far back networks remember: recall of the first symbol against the length of the sequence.

Each network is trained anew for each length on experiments/sequence_tasks.py's `recall` (8 symbols: a guess
is right one time in 8) and scored on held-out sequences. All have states 32 wide, one layer, equal updates.
Recurrent networks learn a length or do not, by the luck of their start: the curves are means over seeds.
Gates that start at one half forget half at every step, so that longer sequences give an LSTM or a GRU hardly
a gradient to begin with.

    python -m experiments.figures.sequence_recall --out=DIR      # 6 minutes on 2 CPU cores
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import sequence_tasks
from experiments.figures import command
from jaxgen import pictures, sharding

KINDS = ("rnn", "lstm", "gru", "transformer")
LENGTHS = (10, 20, 40, 80)


def accuracy(kind: str, length: int, *, num_steps: int, seed: int = 0) -> float:
    """The share of held-out sequences of this length that a network trained on such ones recalls."""
    config = sequence_tasks.get_config("recall")
    config.model.kind, config.data.length, config.seed = kind, length, seed
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = max(1, num_steps // 20)
    config.train.num_steps = num_steps
    experiment = sequence_tasks.build(config, sharding.make_mesh())
    state = jax.jit(experiment.system.init)(jax.random.key(seed), experiment.train_batch(0))
    run = jax.jit(lambda state, batches: jax.lax.scan(experiment.system.step, state, batches)[0])
    for start in range(0, num_steps, 50):
        rows = [experiment.train_batch(step) for step in range(start, min(start + 50, num_steps))]
        state = run(state, jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows))
    return float(experiment.validate(state)["accuracy"].value)


def draw(found: Mapping[str, Mapping[int, float]]) -> Figure:
    """Accuracy against length, a curve a network."""
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for colour, (kind, curve) in zip(pictures.PALETTE, found.items(), strict=False):
        axes.plot(list(curve), list(curve.values()), "o-", color=colour, label=kind, markersize=4)
    axes.axhline(1 / 8, color="0.6", linewidth=1, linestyle=":")
    axes.text(min(LENGTHS), 1 / 8 + 0.015, "guessing", color="0.4", fontsize=8)
    axes.set_xscale("log", base=2)
    lengths = sorted({length for curve in found.values() for length in curve})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("length of the sequence")
    axes.set_ylabel("first symbol recalled")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main(argv: Sequence[str]) -> int:
    """Trains, prints the accuracies and draws them; returns the exit status."""
    parser = command.parser("sequence_recall")
    parser.add_argument("--lengths", type=command.whole_numbers, default=LENGTHS, help="such as 10,20,40")
    parser.add_argument("--num_steps", type=int, default=2000, help="updates of each network")
    parser.add_argument("--seeds", type=int, default=3, help="how many of each network")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.num_steps < 1:
        parser.error("--seeds and --num_steps must be at least 1")
    found: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    for length in arguments.lengths:
        for kind in KINDS:
            of_seeds = [
                accuracy(kind, length, num_steps=arguments.num_steps, seed=seed)
                for seed in range(arguments.seeds)
            ]
            found[kind][length] = float(np.mean(of_seeds))
            each = " ".join(f"{value:.3f}" for value in of_seeds)
            print(f"{kind:<12} length {length:>4}: {found[kind][length]:.3f} ({each})", flush=True)
    command.print_table(
        ["length", *KINDS], [[n, *(found[kind][n] for kind in KINDS)] for n in arguments.lengths]
    )
    return command.write(draw(found), arguments.out, "sequence_recall")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
