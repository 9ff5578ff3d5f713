"""Naive Bayes against logistic regression: held-out error against the number of training examples.

Ng & Jordan 2002: the generative twin comes to its (higher) error with few examples, the discriminative one
needs more and ends lower. Two data sets that ship with scikit-learn, each with the pair of classifiers that
assume the same kind of feature: the 30 standardised numbers of breast cancer with Gaussian naive Bayes, and
the pixels of digits, on or off, with Bernoulli naive Bayes. Curves are means over random draws of the
training examples, which hold at least one of each class.

    python -m experiments.figures.naive_bayes_against_logistic --out=DIR      # a minute
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn import datasets

from experiments.figures import command
from jaxgen import pictures
from jaxgen.estimators import families, logistic, naive_bayes
from jaxgen.estimators.families import Family
from jaxgen.types import Array

NUM_DRAWS = 10
L2 = 0.1
CLASSIFIERS = ("naive Bayes", "logistic regression")


class Task(NamedTuple):
    """Features [N, D] and labels [N] to learn from and to test on, and naive Bayes' family and smoothing."""

    x: np.ndarray
    label: np.ndarray
    test_x: np.ndarray
    test_label: np.ndarray
    family: Family
    smoothing: float
    sizes: tuple[int, ...]


def tasks() -> dict[str, Task]:
    """Both data sets, in an order drawn once; 189 tumours and 1,197 digits are for tests."""
    x, label = datasets.load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, label = x[order], label[order]
    x = (x - x[:380].mean(0)) / x[:380].std(0)
    digits, digit = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    digits, digit = (digits > 8).astype(float)[order], digit[order]
    return {
        "breast cancer, Gaussian": Task(
            x[:380],
            label[:380],
            x[380:],
            label[380:],
            families.GAUSSIAN_DIAGONAL,
            0.1,
            (4, 8, 16, 32, 64, 128, 256),
        ),
        "digits, Bernoulli": Task(
            digits[:600],
            digit[:600],
            digits[600:],
            digit[600:],
            families.BERNOULLI,
            0.3,
            (10, 20, 40, 80, 160, 320, 600),
        ),
    }


def draws(label: np.ndarray, size: int, num: int) -> np.ndarray:
    """Masks [num, N] of `size` examples each, one of each class and the others at random."""
    masks = np.zeros((num, len(label)), np.float32)
    for i in range(num):
        order = np.random.default_rng([size, i]).permutation(len(label))
        _, first = np.unique(label[order], return_index=True)
        rest = np.setdiff1d(np.arange(len(label)), first)
        masks[i, order[np.concatenate([first, rest])[:size]]] = 1.0
    return masks


@functools.partial(jax.jit, static_argnames=("family", "num_classes"))
def errors(
    family: Family,
    num_classes: int,
    arrays: tuple[Array, Array, Array, Array],
    smoothing: float,
    masks: Array,
) -> Array:
    """The share of test examples that each classifier gets wrong, [2, R], for each mask [R, N]."""
    x, label, test_x, test_label = arrays

    def one(mask: Array) -> Array:
        generative = naive_bayes.fit(
            family, x, label, num_classes, mask, smoothing=smoothing, prior_smoothing=1.0
        )
        discriminative = logistic.fit(x, label, num_classes, mask, l2=L2, max_steps=100).params
        predicted = naive_bayes.predict(family, generative, test_x), logistic.predict(discriminative, test_x)
        return jnp.stack([jnp.mean(found != test_label) for found in predicted])

    return jax.vmap(one, out_axes=1)(masks)


def compute(task: Task, sizes: Sequence[int], num_draws: int) -> dict[int, np.ndarray]:
    """{size: errors [2, R]}."""
    arrays = tuple(map(jnp.asarray, (task.x, task.label, task.test_x, task.test_label)))
    num_classes = int(task.label.max()) + 1
    # All sizes are one program.
    masks = np.concatenate([draws(task.label, size, num_draws) for size in sizes])
    found = np.asarray(errors(task.family, num_classes, arrays, task.smoothing, jnp.asarray(masks)))
    return dict(zip(sizes, np.split(found, len(sizes), axis=1), strict=True))


def draw(found: Mapping[str, Mapping[int, np.ndarray]]) -> Figure:
    """A panel for each data set; the bands are two standard errors of the means."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, curves) in zip(panels, found.items(), strict=True):
        sizes, values = list(curves), np.stack(list(curves.values()))
        mean = 100 * values.mean(axis=2)
        error = 100 * values.std(axis=2, ddof=1) / np.sqrt(values.shape[2])
        for k, (label, colour) in enumerate(zip(CLASSIFIERS, pictures.PALETTE, strict=False)):
            axes.plot(sizes, mean[:, k], "o-", color=colour, label=label, markersize=3.5)
            low, high = mean[:, k] - 2 * error[:, k], mean[:, k] + 2 * error[:, k]
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.set(title=name, xlabel="training examples", ylabel="test error, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def main(argv: Sequence[str]) -> int:
    """Prints the errors and draws them; returns the exit status."""
    parser = command.parser("naive_bayes_against_logistic")
    parser.add_argument(
        "--num_draws", type=int, default=NUM_DRAWS, help="of the training examples; at least 2"
    )
    arguments = parser.parse_args(argv)
    if arguments.num_draws < 2:
        parser.error("--num_draws must be at least 2")
    found = {name: compute(task, task.sizes, arguments.num_draws) for name, task in tasks().items()}
    for name, curves in found.items():
        print(f"{name}: test error in %, mean of {arguments.num_draws} draws")
        rows = [[size, *(float(100 * row.mean()) for row in values)] for size, values in curves.items()]
        command.print_table(["examples", *CLASSIFIERS], rows)
    return command.write(draw(found), arguments.out, "naive_bayes_against_logistic")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
