"""The report: one self-contained HTML page about a run, written from the files of its workdir alone.

The same files give the same bytes. The page loads nothing: pictures are base64, charts inline SVG, and its
Content-Security-Policy forbids scripts and the network.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.resources
import io
import json
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image, UnidentifiedImageError

from jaxgen import __version__
from jaxgen.pictures import save_curves
from jaxgen.recorded import flatten, number, relative_difference
from jaxgen.types import Score, UserError
from jaxgen.workdir import Curve, read_json, read_metrics, read_result, write_bytes

_MAX_PICTURES = 16
_MAX_SERIES = 6  # pictures shown of one kind that a run writes again and again
_MAX_PICTURE_BYTES = 8_000_000

# Stand for the page's colours, which follow its light or dark scheme, until the SVG is written.
_INK, _GRID = "#010101", "#020202"
_SERIES = tuple(f"#0300{index:02d}" for index in range(6))

_HOLDS = {
    "config.json": "the configuration, resolved",
    "manifest.json": "code, packages, machine, seed, data, command",
    "metrics.jsonl": "the curves: one JSON object a line",
    "result.json": "the scores",
    "tensorboard": "the curves and pictures as TensorBoard event files",
    "checkpoints": "the state of training: parameters, optimiser, averages, step, key",
    "samples": "pictures of samples",
    "profile": "a trace of a few updates",
}

# What a curve is measured in, by how its name ends; a score of the same name knows better.
_UNITS = (
    (r"bits_per_dim|bpd", "bits/dim"),
    (r"nats", "nats"),
    (r"(\w+)_per_second", r"\1 per second"),
    (r"seconds", "s"),
    (r"psnr", "dB"),
    (r"perplexity", "perplexity"),
    (r"accuracy|share|recognised|probability|precision|recall", "share, 0 to 1"),
    (r"(?:\w+_)?norm", "Euclidean norm"),
    (r"learning_rate", "learning rate"),
    (r"(?:\w+_)?loss", "loss, mean per item"),
)


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `<workdir>/report.html` and returns its path; what is not there yet the page calls missing.

    Raises UserError where a file of the workdir is damaged or the page cannot be written.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} does not exist: give the workdir of a run.")
    config, manifest = (_optional_json(workdir / f"{name}.json") for name in ("config", "manifest"))
    scores = read_result(workdir) if (workdir / "result.json").exists() else {}
    curves = read_metrics(workdir)
    experiment = str(manifest.get("experiment") or workdir.resolve().name)
    preset = str(manifest.get("preset") or "")
    pictures, series, picture_notes = _pictures(workdir / "samples")
    page = _template().render(
        title=f"{experiment}:{preset}" if preset else experiment,
        experiment=experiment,
        preset=preset,
        headline=_headline(manifest, scores, curves),
        scores=_score_rows(scores),
        pictures=pictures,
        series=series,
        picture_notes=picture_notes,
        charts=_charts(curves, scores),
        command=shlex.join(manifest.get("command", [])),
        code=_code_sentence(manifest),
        blocks=[
            {
                "id": "config",
                "title": "Configuration",
                "note": _count(config, "field"),
                "rows": _rows(config),
            },
            {"id": "manifest", "title": "Manifest", "note": _machine(manifest), "rows": _rows(manifest)},
        ],
        files=_files(workdir),
        version=__version__,
    )
    path = workdir / "report.html"
    write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return path


def _template() -> jinja2.Template:
    source = importlib.resources.files("jaxgen").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object of names and values: restore it, or run the command again.")
    return content


# ---- words


def _label(name: str) -> str:
    return name.rsplit("/", 1)[-1].replace("_", " ").strip() or name


def _count(items: Mapping[str, Any], noun: str) -> str:
    num = len(flatten(items))
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def _machine(manifest: Mapping[str, Any]) -> str:
    if "device_kind" not in manifest:
        return ""
    jax_version = manifest.get("packages", {}).get("jax", "?")
    return f"{_devices(manifest)}, jax {jax_version}, started {str(manifest.get('started', '?'))[:10]}"


def _devices(manifest: Mapping[str, Any]) -> str:
    if manifest["device_kind"] == "cpu":
        return f"CPU ({manifest.get('cpu', '?')}, {manifest.get('cpu_count', '?')} cores)"
    return f"{manifest.get('device_count', '?')} × {manifest['device_kind']}"


def _headline(manifest: Mapping[str, Any], scores: Mapping[str, Score], curves: Mapping[str, Curve]) -> str:
    """The first score and how it came about, in one sentence."""
    result = "No scores yet"
    for name, score in list(scores.items())[:1]:
        result = f"{_label(name).capitalize()} {number(score.value)}"
        if score.reference is not None:
            result += f" against {number(score.reference)} for reference"
        result += f" ({'higher' if score.higher_is_better else 'lower'} is better)"
    last = max((curve[-1][0] for curve in curves.values()), default=0)
    evaluated = manifest.get("evaluated", {}) if scores else {}
    last = evaluated.get("step", last)
    facts = [f"after {last:,} updates" if last else "before the first update is logged"]
    if evaluated.get("checkpoint") == "best":
        facts.append("(the best checkpoint)")
    if "seed" in manifest:
        facts.append(f"with seed {manifest['seed']}")
    if "device_kind" in manifest:
        facts.append(f"on {_devices(manifest)}")
    changed = [f"{name}={value}" for name, value in evaluated.get("config", {}).items()]
    if changed:
        facts[-1] += f", evaluated with {', '.join(changed)}"
    return f"{result}, {' '.join(facts)}."


def _code_sentence(manifest: Mapping[str, Any]) -> str:
    git = manifest.get("git") or {}
    if not git.get("revision"):
        return f"Code: jaxgen {manifest.get('jaxgen', __version__)}, no git revision known."
    changed = ", with changes that are not committed" if git.get("dirty") else ""
    return f"Code: git revision {git['revision']}{changed}."


def _rows(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in flatten(tree).items()
    ]


def _score_rows(scores: Mapping[str, Score]) -> list[dict[str, str]]:
    """A row a score; the spread over seeds (see `replicas.summary`) stands beside the mean, not below it."""
    spreads = {name: _spread_name(name) for name in scores if _spread_name(name) in scores}
    return [
        _score_row(name, score, scores[spreads[name]] if name in spreads else None)
        for name, score in scores.items()
        if name not in spreads.values()
    ]


def _spread_name(name: str) -> str:
    base, at, replica = name.partition("@")
    return f"{base}_spread{at}{replica}"


def _score_row(name: str, score: Score, spread: Score | None) -> dict[str, str]:
    reference = score.reference
    return {
        "label": _label(name),
        "value": number(score.value) + (f" ± {number(spread.value)}" if spread else ""),
        "unit": score.unit,
        "n": f"{score.n:,}",
        "arrow": "↑" if score.higher_is_better else "↓",
        "direction": "higher" if score.higher_is_better else "lower",
        "reference": "" if reference is None else number(reference),
        "difference": "–" if reference is None else relative_difference(score.value, reference),
        "source": "" if reference is None else score.reference_source,
    }


# ---- pictures


def _pictures(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """The pictures to show singly, those to show as series, and remarks on what is not shown."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for path in folder.rglob("*.png"):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        kinds[re.sub(r"\d+", "#", stem)].append(stem)
    single: list[str] = []
    series: dict[str, list[str]] = {}
    for kind, stems in sorted(kinds.items(), key=lambda item: (item[0] != "samples", item[0])):
        stems.sort(key=_natural)
        if len(stems) < 3:
            single += stems
        else:
            steps = (len(stems) - 1) / (min(len(stems), _MAX_SERIES) - 1)
            series[kind] = [stems[round(index * steps)] for index in range(min(len(stems), _MAX_SERIES))]
    notes = []
    total = sum(map(len, kinds.values()))

    def load(stems: list[str]) -> list[dict[str, Any]]:
        found = []
        for stem in stems:
            picture, problem = _picture(folder / f"{stem}.png", stem)
            if picture:
                found.append(picture)
            else:
                notes.append(problem)
        return found

    pictures = load(single[:_MAX_PICTURES])
    groups = [{"title": _series_title(kind), "pictures": load(stems)} for kind, stems in series.items()]
    left = total - len(single[:_MAX_PICTURES]) - sum(map(len, series.values()))
    if left:
        notes.append(f"{left:,} more in samples/, not shown here.")
    return pictures, groups, notes


def _series_title(kind: str) -> str:
    return kind.replace("#", "…") + ("" if "=" in kind else " over training")


def _natural(text: str) -> list[Any]:
    """Sorts step_500 before step_1000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _picture(path: Path, caption: str) -> tuple[dict[str, Any] | None, str]:
    content = path.read_bytes()
    if len(content) > _MAX_PICTURE_BYTES:
        return None, f"{path.name} is too large to show here ({_size(len(content))})."
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None, f"{caption}.png is damaged and is not shown."
    except Image.DecompressionBombError:
        return None, f"{caption}.png has too many pixels to show here."
    encoded = base64.b64encode(content).decode()
    return {"base64": encoded, "width": width, "height": height, "caption": caption}, ""


# ---- charts


def _charts(curves: Mapping[str, Curve], scores: Mapping[str, Score]) -> list[dict[str, Any]]:
    """One chart a quantity, train/loss and validation/loss in one; losses first, then what was evaluated."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(curves):
        quantity, at, _ = name.split("/", 1)[-1].partition("@")
        # Replicas' own curves go apart from their mean: one chart for those of training, one of validation.
        groups[f"{quantity}{at}{name.partition('/')[0] if at else ''}"].append(name)

    def order(quantity: str) -> tuple[bool, bool, str]:
        only_train = all(name.startswith("train/") for name in groups[quantity])
        return ("loss" not in quantity, only_train, quantity)

    return [
        {
            "title": _chart_title(quantity),
            "names": groups[quantity],
            "svg": _chart(
                index,
                _chart_title(quantity),
                {name: curves[name] for name in groups[quantity]},
                _unit(quantity, scores),
            ),
        }
        for index, quantity in enumerate(sorted(groups, key=order))
    ]


def _chart_title(quantity: str) -> str:
    name, at, split = quantity.partition("@")
    return _label(name) + (f" of each replica, {split}" if at else "")


def _unit(quantity: str, scores: Mapping[str, Score]) -> str:
    quantity = quantity.partition("@")[0]
    if quantity in scores:
        return scores[quantity].unit
    leaf = quantity.rsplit("/", 1)[-1]
    for pattern, unit in _UNITS:
        found = re.fullmatch(pattern, leaf) or re.fullmatch(rf"\w*_(?:{pattern})", leaf)
        if found:
            return found.expand(unit).replace("_", " ")
    return leaf.replace("_", " ")


def _chart(index: int, title: str, curves: Mapping[str, Curve], unit: str) -> Markup:
    """An inline SVG whose colours are the page's own."""
    buffer = io.BytesIO()
    save_curves(
        buffer,
        curves,
        xlabel="step",
        ylabel=unit,
        legend=False,
        format="svg",
        size=(5.4, 2.9),
        ink=_INK,
        grid=_GRID,
        palette=_SERIES,
    )
    svg = buffer.getvalue().decode()
    # Metadata names addresses, and a <style> in an inline SVG would hold for the whole page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    for colour, name in (
        (_INK, "ink"),
        (_GRID, "grid"),
        *((c, f"series-{i}") for i, c in enumerate(_SERIES)),
    ):
        svg = svg.replace(colour, f"var(--{name})")
    # Every chart numbers its parts from one; on one page their names must differ.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>chart{index}-", svg)
    return Markup(svg)


# ---- files


def _size(num_bytes: int) -> str:
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _sizes(folder: Path) -> list[int]:
    sizes = []
    for parent, _, names in os.walk(folder):  # passes over folders that vanish, as rglob does not
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a training that goes on deletes old checkpoints
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return sizes


def _files(workdir: Path) -> list[dict[str, str]]:
    """The workdir's entries with their sizes; this page itself and half-written files are left out."""
    rows = []
    for path in sorted(workdir.iterdir()):
        if path.name == "report.html" or path.name.startswith("."):
            continue
        holds = _HOLDS.get(path.name, "")
        if path.is_dir():
            sizes = _sizes(path)
            count = f"{len(sizes):,} file{'' if len(sizes) == 1 else 's'}"
            rows.append({"name": f"{path.name}/", "holds": holds, "size": f"{count}, {_size(sum(sizes))}"})
        else:
            rows.append({"name": path.name, "holds": holds, "size": _size(path.stat().st_size)})
    return rows
