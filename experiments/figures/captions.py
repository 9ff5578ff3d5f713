"""Captions x samples of a trained text-to-image run: a row of samples for each caption.

    python -m experiments.figures.captions --workdir=runs/text_to_image_digits --out=DIR \\
        [--caption="two small 5s side by side" ...] [--num=8] [--guidance=2] [--negative=""] [--seed=0]

Without --caption, captions of combinations that the run was never trained on. Where the run has its reader
beside it, the share of the samples that are as the caption says is printed; a minute on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments import text_to_image
from experiments.figures import command
from experiments.figures.trained import restore, run_of
from jaxgen import data, sharding
from jaxgen.data.captioned_scenes import Scenes
from jaxgen.types import TrainState, UserError


def obeyed_shares(
    state: TrainState,
    preset: str,
    mesh: jax.sharding.Mesh,
    captions: Sequence[str],
    images: np.ndarray,
    known: Scenes,
) -> dict[str, float]:
    """For each caption that is one of a `known` scene, the share of its images [R, K, ...] read as that."""
    num = images.shape[1]
    judge = text_to_image.SceneJudge(state, preset, mesh, batch_size=num)
    shares = {}
    for caption, row in zip(captions, images, strict=True):
        if caption in known.captions:
            place = known.captions.index(caption)
            digits, sizes = (np.repeat(x[place : place + 1], num, axis=0) for x in known[2:])
            same = Scenes(known.images[:0], (caption,) * num, digits, sizes)
            shares[caption] = float(judge.obeyed(data.from_unit_range(row, 256), same)[0].mean())
    return shares


def draw(given: argparse.Namespace, workdir: Path, out: Path) -> None:
    """Samples, prints what of them is as it should be, and writes the picture."""
    config = run_of(text_to_image, workdir).config
    with config.unlocked():
        if given.guidance is not None:
            config.sampling.guidance = given.guidance
        if given.negative is not None:
            config.sampling.negative = given.negative
        if given.caption:
            config.sampling.captions = ";".join(given.caption)
    mesh = sharding.make_mesh()
    experiment = text_to_image.build(config, mesh)
    params = restore(experiment, workdir, mesh).sampling_params
    captioned = text_to_image.load(config)
    captions, num = text_to_image.shown_captions(config, captioned), given.num
    sample = text_to_image.make_draw(config, text_to_image.make_model(config, captioned), captioned, mesh)
    each = [caption for caption in captions for _ in range(num)]
    images = sample(params, jax.random.key(given.seed), each, config.sampling.guidance)
    images = images.reshape(len(captions), num, *images.shape[1:])
    reader = workdir / "needs" / "reader"
    if captioned.held_out is not None and (reader / "config.json").is_file():
        state = restore(experiment.needs["reader"].experiment, reader, mesh)
        shares = obeyed_shares(state, config.evaluation.reader, mesh, captions, images, captioned.held_out)
        command.print_table(["caption", "as it says"], list(shares.items()))
    text_to_image.save_caption_grid(out / "captions.png", captions, images)
    print(f"wrote {out / 'captions.png'}")


def main(argv: Sequence[str]) -> int:
    """Draws the picture; returns the exit status."""
    parser = command.parser("captions")
    parser.add_argument("--workdir", type=Path, required=True, help="a run of experiments/text_to_image.py")
    parser.add_argument("--caption", action="append", default=[], help="may be repeated")
    parser.add_argument("--num", type=int, default=8, help="samples of each caption")
    parser.add_argument("--guidance", type=float, help="else that of the run")
    parser.add_argument("--negative", help="a caption to keep away from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.num < 1:
        parser.error("--num must be at least 1")
    try:
        draw(arguments, arguments.workdir.expanduser(), arguments.out.expanduser())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the picture cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
