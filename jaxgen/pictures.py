"""Pictures of samples and of curves: grids, strips over time, and line charts, all as deterministic bytes.

Images are float [N, H, W, C] in [-1, 1] with C of 1 or 3; values outside, as samplers overshoot, are clipped.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image

from jaxgen.types import UserError
from jaxgen.workdir import thin, write_bytes

_GAP = 128  # the grey between images: tells black from black and white from white
_READABLE = 48  # pixels; smaller images are enlarged to at least this height where no scale is given
_MAX_POINTS = 600  # of a curve; a chart is hardly more pixels wide
_LOG_RANGE = 30.0  # a positive curve that spans more than this ratio is drawn on a log scale

PALETTE = ("#2f6fb5", "#d1662a", "#2e8b63", "#9a55b8", "#b8860b", "#c2475a")


def to_uint8(images: Any) -> np.ndarray:
    """Floats in [-1, 1], of any shape, as uint8 in [0, 255]: round(127.5 (x + 1)), clipped.

    Raises UserError where values are not finite and ValueError where `images` are no floats.
    """
    array = np.asarray(images)
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
        raise ValueError(f"images are floats in [-1, 1], not {array.dtype}")
    array = array.astype(np.float32)
    bad = int(np.sum(~np.isfinite(array)))
    if bad:
        raise UserError(
            f"{bad:,} of {array.size:,} pixels are not finite: the model has probably diverged, so go back "
            "to an earlier checkpoint or train with a lower learning rate."
        )
    return np.clip(np.rint((array + 1.0) * 127.5), 0, 255).astype(np.uint8)


def image_grid(images: Any, columns: int | None = None, padding: int = 1, scale: int = 1) -> np.ndarray:
    """Images [N, H, W, C] side by side, row by row, as one picture uint8 [H', W', C].

    columns: images in a row; the smallest whole number at or above sqrt(N) where none is given.
    padding: grey pixels between images and around them, counted before enlarging.
    scale: how many times each pixel is repeated in both directions (nearest neighbour).
    """
    pixels = to_uint8(images)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or not pixels.size:
        raise ValueError(f"images have shape [N, H, W, 1 or 3] and N >= 1, not {pixels.shape}")
    if padding < 0 or scale < 1 or (columns is not None and columns < 1):
        raise ValueError(f"need columns >= 1, padding >= 0, scale >= 1, not {columns}, {padding}, {scale}")
    num, height, width, channels = pixels.shape
    columns = min(columns or math.isqrt(num - 1) + 1, num)
    rows = -(-num // columns)
    cells = np.full((rows * columns, height + padding, width + padding, channels), _GAP, np.uint8)
    cells[:num, :height, :width] = pixels
    cells = cells.reshape(rows, columns, height + padding, width + padding, channels).swapaxes(1, 2)
    grid = cells.reshape(rows * (height + padding), columns * (width + padding), channels)
    grid = np.pad(grid, ((padding, 0), (padding, 0), (0, 0)), constant_values=_GAP)
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def encode_png(picture: np.ndarray) -> bytes:
    """The PNG file of a picture, uint8 [H, W, C] with C of 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_image_grid(
    path: str | os.PathLike[str],
    images: Any,
    *,
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = None,
) -> None:
    """Writes `image_grid(images)` as a PNG; with no `scale`, images below 48 pixels are enlarged to that."""
    scale = scale or -(-_READABLE // np.shape(images)[1])
    write_bytes(path, encode_png(image_grid(images, columns, padding, scale)))


def save_strip(
    path: str | os.PathLike[str], frames: Any, *, padding: int = 1, scale: int | None = None
) -> None:
    """Writes frames [T, N, H, W, C] as a PNG: a row for each of the N samples, time from left to right."""
    frames = np.asarray(frames)
    if frames.ndim != 5:
        raise ValueError(f"frames have shape [T, N, H, W, C], not {frames.shape}")
    by_sample = frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:])
    save_image_grid(path, by_sample, columns=frames.shape[0], padding=padding, scale=scale)


def save_curves(
    target: str | os.PathLike[str] | BinaryIO,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    xlabel: str = "step",
    ylabel: str = "",
    title: str = "",
    log_y: bool | None = None,
    legend: bool = True,
    format: str = "png",
    size: tuple[float, float] = (6.0, 3.6),
    ink: str = "#222222",
    grid: str = "#d8d8d8",
    palette: Sequence[str] = PALETTE,
) -> None:
    """Draws curves, {name: [(x, y), …]}, into one chart and writes it, as PNG or SVG, to a file or a buffer.

    A noisy curve of 60 points or more is drawn faintly under its running mean over a thirtieth of them.
    Points that are not finite leave a gap. A short curve has its points marked.
    log_y: a log scale; chosen by the data where None (all positive, and more than 30-fold in range).
    size: inches, at 150 dots an inch for PNG and 72 for SVG.
    """
    # Read when text is made and when it is written, so both happen inside.
    with matplotlib.rc_context({"svg.hashsalt": "jaxgen", "svg.fonttype": "none", "font.size": 10.0}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for index, (name, curve) in enumerate(curves.items()):
            line = _draw_curve(axes, name, curve, palette[index % len(palette)])
            line.set_gid(f"curve{index}")  # its id in an SVG
        _dress(axes, curves, log_y, ink, grid)
        texts = [
            axes.set_xlabel(xlabel, color=ink),
            axes.set_ylabel(ylabel + (" (log scale)" if axes.get_yscale() == "log" else ""), color=ink),
            axes.set_title(title, color=ink, loc="left"),
        ]
        if legend and len(curves) > 1:
            texts += axes.legend(frameon=False, labelcolor=ink).get_texts()
        for text in texts:
            text.set_parse_math(False)  # a name may hold a dollar sign
        figure.patch.set_alpha(0.0 if format == "svg" else 1.0)
        axes.patch.set_alpha(0.0)
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
        figure.savefig(buffer, format=format, dpi=72 if format == "svg" else 150, metadata=metadata)
    if isinstance(target, (str, os.PathLike)):
        write_bytes(target, buffer.getvalue())
    else:
        target.write(buffer.getvalue())


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of each value and its neighbours, `window` (odd) in all; at the ends, of those that there are.

    Values that are not finite are left out of the means and stay not finite themselves.
    """
    array = np.asarray(values, np.float64)
    finite = np.isfinite(array)
    ones = np.ones(window)
    # np.convolve(mode="same") is as long as the longer of the two, hence the cut from mode="full".
    half = window // 2
    total = np.convolve(np.where(finite, array, 0.0), ones)[half : half + array.size]
    count = np.convolve(finite.astype(np.float64), ones)[half : half + array.size]
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def smoothed(values: Sequence[float]) -> np.ndarray | None:
    """The running mean to draw over a noisy curve, or None where the curve is short or smooth already.

    Noisy: it goes up and down, in all, over three times as far as its running mean does.
    """
    if len(values) < 60:
        return None
    mean = running_mean(values, len(values) // 30 // 2 * 2 + 1)
    array = np.where(np.isfinite(values), values, np.nan)
    travelled, smooth = (np.nansum(np.abs(np.diff(path))) for path in (array, mean))
    return mean if travelled > 3 * smooth else None


def _draw_curve(axes: Axes, name: str, curve: Sequence[tuple[int, float]], colour: str) -> Line2D:
    values = [value if math.isfinite(value) else math.nan for _, value in curve]
    mean = smoothed(values)
    label = name if not name.startswith("_") else " " + name  # Matplotlib hides labels like _x
    if mean is not None:
        axes.plot(*_points(curve, values), color=colour, alpha=0.3, linewidth=0.8, label="_hidden")
    drawn = _points(curve, values if mean is None else mean)
    marker = "o" if len(values) <= 12 else None
    [line] = axes.plot(*drawn, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)
    return line


def _points(curve: Sequence[tuple[int, float]], values: Iterable[float]) -> tuple[list[int], list[float]]:
    """Steps and values, thinned to what a chart can show."""
    points = thin([(step, value) for (step, _), value in zip(curve, values, strict=True)], _MAX_POINTS)
    return [step for step, _ in points], [value for _, value in points]


def _dress(axes: Axes, curves: Mapping[str, Any], log_y: bool | None, ink: str, grid: str) -> None:
    values = [value for curve in curves.values() for _, value in curve if math.isfinite(value)]
    positive = bool(values) and min(values) > 0
    if log_y is None:
        log_y = positive and max(values) / min(values) > _LOG_RANGE
    if log_y and positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    axes.tick_params(colors=ink, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color=grid, linewidth=0.6, which="major")
    axes.set_axisbelow(True)
