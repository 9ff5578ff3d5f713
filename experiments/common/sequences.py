"""What experiments on sequences share: networks from configs, choosing tokens, and pictures of text."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import common
from experiments.common import checks
from jaxgen.data.tokenizers import Kind as TokenizerKind
from jaxgen.models.transformer import TransformerSpec
from jaxgen.samplers.autoregressive import Choose, chooser
from jaxgen.types import Array, PyTree

RECURRENT = ("rnn", "lstm", "gru", "gru_reset_after")
KINDS = ("transformer", *RECURRENT)
TOKENIZERS: tuple[str, ...] = TokenizerKind.__args__  # type: ignore[attr-defined]
_LSTM = {"model.kind": "lstm"}
# See common.FIELD_CHECKS: of the groups that the functions below make and check.
FIELD_CHECKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.kind": ("lstm", {}),
    "model.width": (24, {}),
    "model.num_heads": (1, {}),
    "model.num_kv_heads": (1, {}),
    "model.mlp_width": (20, {}),
    "model.activation": ("relu", {}),
    "model.norm": ("post", {}),
    "model.norm_kind": ("rms", {}),
    "model.positions": ("learned", {}),
    "model.dropout": (0.3, {}),
    "model.dtype": ("bfloat16", {}),
    "objective.label_smoothing": (0.1, {}),
    "objective.z_weight": (0.1, {}),
}
CHOICE_FIELD_CHECKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sampling.temperature": (0.7, {}),
    "sampling.top_k": (2, {"sampling.temperature": 1.0}),
    "sampling.top_p": (0.5, {"sampling.temperature": 1.0}),
    "sampling.min_p": (0.1, {"sampling.temperature": 1.0}),
    "sampling.repetition_penalty": (1.5, {}),
}


def base_config(*, num_steps: int) -> ConfigDict:
    """`common.base_config` for tokens: no images to augment, gradients clipped, Transformers' Adam."""
    config = common.base_config(num_steps=num_steps)
    del config.data.augment
    config.optim.b2 = 0.98
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.objective = ConfigDict({"label_smoothing": 0.0, "z_weight": 0.0})
    return config


def transformer_fields() -> dict[str, Any]:
    """The group `model` of a Transformer."""
    return {
        "kind": "transformer",  # or rnn, lstm, gru, gru_reset_after
        "width": 128,  # of embeddings and states
        "num_layers": 2,
        "num_heads": 4,  # transformer
        "num_kv_heads": 0,  # transformer; 0: num_heads
        "mlp_width": 0,  # transformer; 0: 4 * width
        "activation": "gelu",  # transformer: gelu, gelu_tanh, relu, swiglu
        "norm": "pre",  # transformer: pre, post
        "norm_kind": "layer",  # transformer: layer, rms
        "positions": "rotary",  # transformer: sinusoidal, learned, rotary, none
        "dropout": 0.0,
        "remat": False,  # transformer
        "dtype": "float32",
    }


def choice_fields(temperature: float) -> dict[str, Any]:
    """How a token is chosen, for the group `sampling`."""
    return {
        "temperature": temperature,  # 0: the most probable
        "top_k": 0,  # 0: all
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def check(config: ConfigDict) -> None:
    """The groups that the functions above make."""
    checks.check_base(config)
    checks.one_of(config, KINDS, "model.kind")
    checks.at_least(config, 1, "model.width", "model.num_layers", "model.num_heads")
    checks.at_least(config, 0, "model.num_kv_heads", "model.mlp_width")
    checks.one_of(config, ("gelu", "gelu_tanh", "relu", "swiglu"), "model.activation")
    checks.one_of(config, ("pre", "post"), "model.norm")
    checks.one_of(config, ("layer", "rms"), "model.norm_kind")
    checks.one_of(config, ("sinusoidal", "learned", "rotary", "none"), "model.positions")
    checks.in_range(config, 0, 1, "model.dropout", "objective.label_smoothing")
    checks.at_least(config, 0, "objective.z_weight")
    checks.one_of(config, common.DTYPES, "model.dtype")


def check_choice(config: ConfigDict) -> None:
    """The fields of `choice_fields`."""
    checks.at_least(config, 0, "sampling.temperature", "sampling.top_k")
    checks.in_range(config, 0, 1, "sampling.min_p")
    checks.in_range(config, 1e-6, 1, "sampling.top_p", closed=True)
    checks.at_least(config, 1e-6, "sampling.repetition_penalty")


def make_choose(config: ConfigDict) -> Choose:
    """How config.sampling chooses a token."""
    return chooser(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)


def transformer_spec(model: ConfigDict, *, max_length: int, **settings: Any) -> TransformerSpec:
    """The Transformer that config.model describes."""
    return TransformerSpec(
        width=model.width,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads or None,
        mlp_width=model.mlp_width or None,
        activation=model.activation,
        norm=model.norm,
        norm_kind=model.norm_kind,
        positions=model.positions,
        # Sinusoids are of size 1, next to which embeddings of 0.02 would be lost.
        scale_embedding=model.positions == "sinusoidal",
        max_length=max_length,
        dropout=model.dropout,
        remat=model.remat,
        **settings,
    )


def dropout_arguments(key: Any) -> dict[str, Any]:
    """`train` and `rngs` for a network: key None means evaluation."""
    return {"train": key is not None, "rngs": None if key is None else {"dropout": key}}


def attention_maps(intermediates: Mapping[str, Any], *, cross: bool) -> list[tuple[str, Array]]:
    """The attention weights that a network sowed, as (where, `[B, H, N, M]`), in order of the layers.

    cross: only those over an encoder's output; else only those within a sequence.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(intermediates):
        names = [str(getattr(entry, "key", "")) for entry in path]
        if "attention_weights" in names and ("cross_attention" in names or len(names) == 2) == cross:
            weights = leaf if leaf.ndim == 4 else leaf[:, None]
            found.append(("/".join(name for name in names[:-1] if name), weights))
    # Numbers by value: block_10 comes after block_2.
    in_order = lambda item: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", item[0])]
    return sorted(found, key=in_order)


# ---- pictures


@functools.cache
def _font() -> Any:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))


def drawable(text: str) -> str:
    """The text with □ for what the drawing font lacks."""
    return "".join(c if c == "\n" or _font().get_char_index(ord(c)) else "□" for c in text)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def save_text_picture(path: Path, blocks: Sequence[str], *, width: int = 88, lines: int = 12) -> None:
    """A PNG of texts one below the other, each wrapped at `width` characters and cut after `lines` lines."""
    shown = []
    for block in blocks:
        wrapped = []
        for line in drawable(block).expandtabs(4).split("\n"):
            wrapped += [line[i : i + width] for i in range(0, max(len(line), 1), width)]
        shown.append("\n".join(wrapped[:lines]))
    text = ("\n" + "─" * width + "\n").join(shown)
    height = 0.17 * (text.count("\n") + 3)
    with matplotlib.rc_context({"font.family": "DejaVu Sans Mono"}):
        figure = Figure(figsize=(0.082 * width + 0.4, height))
        drawn = figure.text(0.2 / (0.082 * width + 0.4), 1 - 0.17 / height, text, va="top", fontsize=9)
        drawn.set_parse_math(False)
        _save(figure, path)


_MOST_CELLS = 60


def save_attention_picture(
    path: Path, maps: Sequence[tuple[str, np.ndarray, Sequence[str], Sequence[str]]], *, columns: int = 2
) -> None:
    """A PNG of attention maps: (title, weights [N, M] in [0, 1], the N row labels, the M column labels).

    Of longer maps the first 60 rows and columns: a cell takes 0.2 inch.
    """
    maps = [
        (title, weights[:_MOST_CELLS, :_MOST_CELLS], row_labels[:_MOST_CELLS], column_labels[:_MOST_CELLS])
        for title, weights, row_labels, column_labels in maps
    ]
    rows = -(-len(maps) // columns)
    tallest = max(len(labels) for _, _, labels, _ in maps)
    widest = max(len(labels) for *_, labels in maps)
    cell = 0.2
    size = (columns * (cell * widest + 1.2), rows * (cell * tallest + 1.4))
    with matplotlib.rc_context({"font.family": "DejaVu Sans Mono", "font.size": 8.0}):
        figure = Figure(figsize=(max(size[0], 3.0), max(size[1], 2.0)), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes[len(maps) :]:
            axis.set_axis_off()
        for axis, (title, weights, row_labels, column_labels) in zip(axes, maps, strict=False):
            axis.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="equal")
            turned = 90 if max(map(len, column_labels)) > 1 else 0
            axis.set_xticks(range(len(column_labels)), map(drawable, column_labels), rotation=turned)
            axis.set_yticks(range(len(row_labels)), map(drawable, row_labels))
            axis.xaxis.tick_top()
            axis.tick_params(length=0)
            axis.set_title(drawable(title))
            for text in [*axis.get_xticklabels(), *axis.get_yticklabels(), axis.title]:
                text.set_parse_math(False)
        _save(figure, path)


def count_parameters(params: PyTree) -> int:
    """How many numbers are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
