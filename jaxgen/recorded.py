"""Recorded runs: the small file that keeps what a run showed, and another run set beside it."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.types import Score, UserError
from jaxgen.workdir import (
    Curve,
    parse_scores,
    plain,
    read_json,
    read_metrics,
    read_result,
    thin,
    to_json,
    write_bytes,
    writing,
)

_MAX_POINTS = 200
_MAX_RECORD_BYTES = 200_000


# ---- text for people


def number(value: float) -> str:
    """A value for people: four significant digits, and thousands set apart where it is that large."""
    if not math.isfinite(value):
        return str(plain(value))
    if value == round(value) and abs(value) < 1e15:
        return f"{round(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: str = "") -> str:
    """Rows of text in aligned columns, the columns listed in `right` flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(indent + line.rstrip() for line in lines)


def score_table(scores: Mapping[str, Score]) -> str:
    """The scores as an aligned table in plain text; better: ↑ where higher is better, ↓ where lower is."""
    rows = [("metric", "value", "unit", "n", "better", "reference", "source")]
    for name, score in scores.items():
        reference = "–" if score.reference is None else number(score.reference)
        arrow = "↑" if score.higher_is_better else "↓"
        rows.append(
            (name, number(score.value), score.unit, f"{score.n:,}", arrow, reference, score.reference_source)
        )
    return table(rows, right=(1, 3, 5))


# ---- recorded runs


def record_run(
    workdir: str | os.PathLike[str],
    results_dir: str | os.PathLike[str],
    *,
    name: str,
    tag: str = "",
    picture: str = "samples.png",
) -> Path:
    """Records a finished run as `<results_dir>/<name>[_<tag>].json`, under 200 KB, and returns that path.

    The file holds `config`, `manifest`, `curve` (thinned to 200 points or fewer, six digits) and `scores`;
    paths of this machine are taken out of it. `samples/<picture>`, where it exists, is copied beside it.
    Raises UserError where the run has no config, manifest or result yet.
    """
    workdir = Path(workdir)
    stem = f"{name}_{tag}" if tag else name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", stem):
        raise UserError(
            f"{stem!r} cannot name a recorded run: use letters, digits, dots, dashes and underscores."
        )
    public = _Public(workdir)
    content = {
        "config": public(read_json(workdir / "config.json")),
        "manifest": public(read_json(workdir / "manifest.json")),
        "scores": read_result(workdir),
    }
    curves = read_metrics(workdir)
    path = Path(results_dir) / f"{stem}.json"
    limit = _MAX_POINTS
    while True:
        thinned = {
            label: [[step, float(f"{value:.6g}")] for step, value in thin(curve, limit)]
            for label, curve in curves.items()
        }
        text = to_json({**content, "curve": thinned})
        if len(text) < _MAX_RECORD_BYTES:
            break
        limit //= 2
        if limit < 5:
            raise UserError(
                f"{workdir} holds too much to record in {_MAX_RECORD_BYTES // 1000} KB "
                f"({len(curves)} curves): log fewer metrics."
            )
    write_bytes(path, text)
    source, beside = workdir / "samples" / picture, path.with_suffix(".png")
    with writing(beside):
        if source.exists():
            write_bytes(beside, source.read_bytes())
        else:
            beside.unlink(missing_ok=True)  # not a picture of this run
    return path


class _Public:
    """Takes what is private to a machine out of JSON values: where the workdir, home and other files are."""

    def __init__(self, workdir: Path) -> None:
        folders = {
            Path(tempfile.gettempdir()): "<tmp>",
            Path(os.path.expanduser("~")): "~",
            workdir: "<workdir>",
            Path.cwd(): ".",
        }
        names = {
            str(path): name
            for folder, name in folders.items()
            for path in (Path(os.path.abspath(folder)), folder.resolve())
            if len(path.parts) > 1
        }
        self._folders = sorted(names.items(), key=lambda item: -len(item[0]))

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self(name): self(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self(item) for item in value]
        if not isinstance(value, str):
            return value
        for folder, name in self._folders:
            value = re.sub(rf"(?<![\w.~]){re.escape(folder)}(?![\w.-])", name, value)
        # Any other absolute path of two parts or more keeps its last one; addresses (https://…) stay.
        return re.sub(r"(?<![\w./~>])/(?:[^\s/'\",;]+/)+([^\s/'\",;]*)", r"…/\1", value)


# ---- comparison

_SAME = 0.02  # scores this near, relative to the recorded one, are called the same
_IN_LINE = 0.05  # curves are noisier
_SHOWN_STEPS = 5
# What in a unit may differ: how many questions a run's vocabulary does not know. The rest says what was
# measured, such as the network in whose features a distance is taken.
_OF_THE_RUN = re.compile(r"[\d,]+ (?=(?:pairs |words )?out of|of the pairs)")
_OF_THE_MACHINE = re.compile(r"(_per_second|seconds)$")  # curves that another machine need not repeat


def compare(workdir: str | os.PathLike[str], recorded: str | os.PathLike[str]) -> str:
    """A run set beside a recorded one, in words: config differences, curves at matching steps, scores.

    A recorded curve is interpolated linearly at the run's own steps, so a run that is shorter than the
    recorded one, or logs at other steps, is compared over the steps that both have. A curve is called in line
    where, over the second half of those steps, the mean difference is within 5 % or within three standard
    errors of nought.
    Raises UserError where either side cannot be read.
    """
    workdir, recorded = Path(workdir), Path(recorded)
    record, theirs = _read_record(recorded)
    public = _Public(workdir)
    mine = {name: public(read_json(workdir / f"{name}.json")) for name in ("config", "manifest")}
    curves = read_metrics(workdir)
    parts = [
        _compare_headers(mine["manifest"], curves, record["manifest"], theirs, recorded),
        _compare_configs(
            _as_evaluated(mine["config"], mine["manifest"]),
            _as_evaluated(record["config"], record["manifest"]),
        ),
    ]
    curve_texts, in_line = _compare_curves(curves, theirs)
    parts += curve_texts
    scores = read_result(workdir) if (workdir / "result.json").exists() else {}
    score_text, same = _compare_scores(scores, parse_scores(record["scores"], recorded))
    parts.append(score_text)
    parts.append(
        f"In all: {sum(in_line)} of {len(in_line)} curves in line, "
        f"{sum(same)} of {len(same)} scores the same or better."
    )
    return "\n\n".join(parts) + "\n"


def _read_record(path: Path) -> tuple[dict[str, Any], dict[str, Curve]]:
    """The content of a recorded run, and its curves."""
    record = read_json(path)
    try:
        curves = {
            name: [(int(step), float(value)) for step, value in curve]
            for name, curve in record["curve"].items()
        }
        if not all(isinstance(record[name], dict) for name in ("config", "manifest", "scores")):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a recorded run: give a file that --record wrote.") from error
    return record, curves


def _last_step(curves: Mapping[str, Curve]) -> int:
    return max((curve[-1][0] for curve in curves.values() if curve), default=0)


def _compare_headers(
    mine: Any, curves: dict[str, Curve], theirs: Any, recorded: dict[str, Curve], path: Path
) -> str:
    def row(label: str, facts: dict[str, Any], steps: int) -> tuple[str, ...]:
        packages = facts.get("packages", {})
        device = f"{facts.get('device_count', '?')} × {facts.get('device_kind', '?')}"
        run = f"{facts.get('experiment', '?')}:{facts.get('preset', '?')}"
        return (
            label,
            run,
            f"{steps:,}",
            str(facts.get("seed", "?")),
            device,
            f"jax {packages.get('jax', '?')}",
        )

    steps = _last_step(curves), _last_step(recorded)
    rows = [
        ("", "run", "steps", "seed", "device", "software"),
        row("yours", mine, steps[0]),
        row(f"recorded ({path.name})", theirs, steps[1]),
    ]
    text = table(rows, right=(2, 3))
    if steps[0] < steps[1]:
        text += (
            f"\nYour run has reached step {steps[0]:,} of the recorded {steps[1]:,}: curves are compared up "
            "to there, and scores are of models trained for different times."
        )
    return text


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict's leaves by dotted name."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def _as_evaluated(config: Any, manifest: Any) -> dict[str, Any]:
    """The fields of config.json with those that the scores were measured with in their place."""
    evaluated = manifest.get("evaluated", {})
    changed = {f"config.{name}": value for name, value in evaluated.get("config", {}).items()}
    # Runs from before this was noted were as a rule scored at their end.
    return {
        **flatten(config),
        **changed,
        "evaluated.checkpoint": evaluated.get("checkpoint", "newest"),
    }


def _compare_configs(mine: Any, theirs: Any) -> str:
    ours, other = flatten(mine), flatten(theirs)
    rows = [
        (name, *("(absent)" if name not in side else json.dumps(side[name]) for side in (ours, other)))
        for name in sorted(ours.keys() | other.keys())
        if name not in ours or name not in other or ours[name] != other[name]
    ]
    if not rows:
        return "Config: no differences."
    return "Config differences:\n" + table([("field", "yours", "recorded"), *rows], indent="  ")


def relative_difference(mine: float, theirs: float) -> str:
    """How far `mine` is from `theirs`, in per cent of it; absolute where it is nought, – where not finite."""
    if theirs == 0 or not math.isfinite(theirs) or not math.isfinite(mine):
        return "–" if not math.isfinite(mine - theirs) else f"{mine - theirs:+.3g}"
    return f"{100 * (mine - theirs) / abs(theirs):+.1f} %"


def _compare_curves(mine: dict[str, Curve], theirs: dict[str, Curve]) -> tuple[list[str], list[bool]]:
    """The texts, one a curve, and for each curve that could be compared whether it is in line."""
    texts, in_line = [], []
    for name in sorted(mine.keys() & theirs.keys()):
        text, verdict = _compare_curve(name, mine[name], theirs[name])
        texts.append(text)
        if verdict is not None:
            in_line.append(verdict)
    for label, names in (
        ("your run", mine.keys() - theirs.keys()),
        ("the recorded run", theirs.keys() - mine.keys()),
    ):
        if names:
            texts.append(f"Curves of {label} only: {', '.join(sorted(names))}.")
    return texts, in_line


def _compare_curve(name: str, mine: Curve, theirs: Curve) -> tuple[str, bool | None]:
    broken = next((step for step, value in mine if not math.isfinite(value)), None)
    if broken is not None:
        return f"{name}: yours is not finite at step {broken:,}.", False
    known = [(step, value) for step, value in theirs if math.isfinite(value)]
    matched = [(step, value) for step, value in mine if known and known[0][0] <= step <= known[-1][0]]
    if not matched:
        return f"{name}: no steps in common.", None
    steps = np.array([step for step, _ in matched])
    ours = np.array([value for _, value in matched])
    other = np.interp(steps, *np.array(known).T)

    half = slice(len(steps) // 2, None)
    gaps = (ours - other)[half]
    gap, level = float(gaps.mean()), float(np.abs(other[half]).mean())
    # Successive differences see the noise and not the trend.
    error = float(np.sqrt(np.mean(np.diff(gaps) ** 2) / 2 / gaps.size)) if gaps.size >= 4 else 0.0
    verdict = abs(gap) <= max(_IN_LINE * level, 3 * error)
    relative = f"{100 * abs(gap) / level:.1f} %" if level else f"{abs(gap):.3g}"
    where = f"step {steps[-1]:,}" if gaps.size == 1 else f"steps {steps[half][0]:,} to {steps[-1]:,}"
    direction = "higher than" if gap > 0 else "lower than" if gap < 0 else "different from"
    machine = bool(_OF_THE_MACHINE.search(name))
    judged = "not judged, being the machine's speed" if machine else "in line" if verdict else "NOT in line"
    words = f"{name}: {judged}; {relative} {direction} recorded over {where}."
    shown = sorted(set(np.linspace(0, len(steps) - 1, _SHOWN_STEPS).round().astype(int).tolist()))
    rows = [
        ["step", *(f"{steps[index]:,}" for index in shown)],
        ["yours", *(number(float(ours[index])) for index in shown)],
        ["recorded", *(number(float(other[index])) for index in shown)],
        ["difference", *(relative_difference(float(ours[index]), float(other[index])) for index in shown)],
    ]
    text = words + "\n" + table(rows, right=range(1, len(shown) + 1), indent="  ")
    return text, None if machine else verdict


def _compare_scores(mine: dict[str, Score], theirs: dict[str, Score]) -> tuple[str, list[bool]]:
    """A sentence a score, and for each that can be compared whether yours is the same or better."""
    lines, same = ["Scores:"], []
    for name, score in theirs.items():
        if name not in mine:
            lines.append(f"  {name}: not measured in your run (recorded {number(score.value)} {score.unit}).")
            continue
        words, verdict = _compare_score(mine[name], score)
        if verdict is not None:
            same.append(verdict)
        lines.append(f"  {name}: {words}")
    extra = mine.keys() - theirs.keys()
    if extra:
        lines.append(f"  Of your run only: {', '.join(sorted(extra))}.")
    if len(lines) == 1:
        lines.append("  none on either side.")
    return "\n".join(lines), same


def _compare_score(mine: Score, theirs: Score) -> tuple[str, bool | None]:
    if _OF_THE_RUN.sub("", mine.unit) != _OF_THE_RUN.sub("", theirs.unit):
        pair = f"{number(mine.value)} {mine.unit} against {number(theirs.value)} {theirs.unit} recorded"
        return f"{pair}: other units, not comparable.", None
    pair = f"{number(mine.value)} against {number(theirs.value)} {theirs.unit} recorded"
    counts = "" if mine.n == theirs.n else f" (yours from {mine.n:,} items, recorded from {theirs.n:,})"
    gap = mine.value - theirs.value
    if not math.isfinite(gap):
        return f"{pair}: cannot be compared{counts}.", False
    if abs(gap) <= _SAME * abs(theirs.value):
        difference = relative_difference(mine.value, theirs.value)
        return f"{pair}: the same to within {100 * _SAME:.0f} % ({difference}){counts}.", True
    better = (gap > 0) == theirs.higher_is_better
    amount = relative_difference(mine.value, theirs.value).lstrip("+-")
    direction = "higher" if gap > 0 else "lower"
    return f"{pair}: {amount} {direction}, which is {'better' if better else 'WORSE'}{counts}.", better
