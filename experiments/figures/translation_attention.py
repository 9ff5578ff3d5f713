"""What a trained translator looks at: its attention over the source for sentences it translates itself.

Shown for each sentence is the mean over the heads of each layer (an RNN with attention has one map): row t is
where the network looked as it wrote piece t.

    python -m experiments.figures.translation_attention --workdir=runs/dates --out=DIR \\
        [--sentence="domingo, 3 de abril de 2005" ...]      # else the first three test sentences; 20 seconds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments import translation
from experiments.common import sequences as shared
from experiments.figures import command
from experiments.figures.trained import restore, run_of
from jaxgen import sharding
from jaxgen.data import sequences as batches
from jaxgen.data.texts import Pairs
from jaxgen.types import UserError


def maps_of(workdir: Path, sentences: Sequence[str]) -> list[tuple[str, np.ndarray, list[str], list[str]]]:
    """(sentence -> translation and layer, weights [T, S], target pieces, source pieces) of each map.

    Raises UserError where the folder holds no trained run of experiments/translation.py.
    """
    config = run_of(translation, workdir).config
    pairs = translation.load(config, seed=config.seed)
    source, target = translation.make_tokenizers(config.data, pairs["train"])
    mesh = sharding.make_mesh()
    experiment = translation.build(config, mesh)
    state = restore(experiment, workdir, mesh)
    params, model = state.sampling_params, translation.make_model(config, len(source), len(target))
    translate = translation.make_translate(config.sampling, model, target, beam=config.sampling.beam)
    look = translation.make_look(model)
    sentences = tuple(sentences) or pairs["test"].source[:3]
    longest = {"max_length": config.data.max_length, "truncate": True}
    ids = {"bos": target.bos_id, "pad_id": target.pad_id}
    given = batches.encode_pairs(Pairs("given", "test", sentences, sentences), source, target, **longest)
    numbers = np.arange(len(given), dtype=np.int32)
    rows = batches.pair_batch(given, numbers, config.data.buckets[-1], **ids)
    found = translate(params, jax.random.key(0), numbers, rows["source"], rows["source_lengths"])
    written = tuple(translation.to_text(target, row) for row in np.asarray(found))
    both = as_written(given, np.asarray(found), target.eos_id)
    rows = batches.pair_batch(both, numbers, max(config.data.buckets[-1], int(both.lengths.max())), **ids)
    shown = []
    layers = [np.asarray(weights) for weights in look(params, rows)]
    for i, (sentence, text) in enumerate(zip(sentences, written, strict=True)):
        num, width = int(rows["lengths"][i]), int(rows["source_lengths"][i])
        labels = [translation.piece(target, n) for n in rows["targets"][i, :num]]
        columns = [translation.piece(source, n) for n in rows["source"][i, :width]]
        print(f"{sentence}  ->  {text}")
        for number, weights in enumerate(layers, 1):
            mean = weights[i].mean(axis=0)[:num, :width]
            sharpest = ", ".join(
                f"{label!r}: {columns[place]!r} {row[place]:.2f}"
                for label, row, place in zip(labels, mean, mean.argmax(axis=1), strict=True)
            )
            print(f"  layer {number}: {sharpest}")
            shown.append((f"{text}, layer {number}", mean, labels, columns))
    return shown


def as_written(given: batches.EncodedPairs, found: np.ndarray, eos: int) -> batches.EncodedPairs:
    """The sources with what was written for them, ids `[B, T]`, up to the first `<eos>`.

    Their text would not do: tokenised again it need not give the same pieces.
    """
    num = [int(np.argmax(row == eos)) + 1 if eos in row else len(row) for row in found]
    return batches.EncodedPairs(given.source, tuple(row[:n] for row, n in zip(found, num, strict=True)))


def main(argv: Sequence[str]) -> int:
    """Translates, prints where the network looked and draws it; returns the exit status."""
    parser = command.parser("translation_attention")
    parser.add_argument("--workdir", type=Path, required=True, help="a run of experiments/translation.py")
    parser.add_argument("--sentence", action="append", default=[], help="to be translated; may be repeated")
    arguments = parser.parse_args(argv)
    path = arguments.out.expanduser() / "translation_attention.png"
    try:
        shared.save_attention_picture(path, maps_of(arguments.workdir.expanduser(), arguments.sentence))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
