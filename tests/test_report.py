"""The report page: what it says, and that a real browser shows it without a network."""

import contextlib
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser

from jaxgen import pictures, record, report
from jaxgen import workdir as files
from jaxgen.report import write_report
from jaxgen.types import Score, UserError

HOSTILE = "<script>document.title='owned'</script><img src=https://example.org/x.png onerror=alert(1)>\"'&"


def make_run(workdir):
    rng = np.random.default_rng(0)
    config = {"optim": {"learning_rate": 1e-3}, "note": HOSTILE, HOSTILE: [1, None]}
    files.write_json(workdir / "config.json", config)
    command = ["python", "-m", "jaxgen.run", "--config=experiments/ddpm.py:digits", f"--note={HOSTILE}"]
    facts = record.manifest(
        config=config,
        experiment="ddpm",
        preset="digits",
        seed=7,
        data_fingerprints={"digits": "ab"},
        command=command,
    )
    files.write_json(workdir / "manifest.json", {**facts, "started": "2026-01-02T03:04:05+00:00"})
    with record.Recorder(workdir, start_step=0, num_steps=300, show_progress=False) as r:
        for step in range(1, 301):
            loss = math.exp(-step / 60) + 0.01 + 0.002 * rng.random()
            r.log(
                step, {"loss": loss, "grad_norm": 1 + rng.random(), "steps_per_second": 40.0}, prefix="train/"
            )
        r.log(100, {"loss": 0.2, "bits_per_dim": 3.1}, prefix="validation/")
        r.log(300, {"loss": math.nan, HOSTILE: 1.0}, prefix="validation/")
    images = rng.uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    pictures.save_image_grid(workdir / "samples" / "samples.png", images)
    pictures.save_strip(workdir / "samples" / "reverse.png", np.stack([images] * 3))
    for step in range(100, 1100, 100):
        pictures.save_image_grid(workdir / "samples" / f"step_{step}" / "samples.png", images, scale=1)
    (workdir / "samples" / "broken.png").write_bytes(b"not a picture")
    files.write_result(
        workdir,
        {
            "frechet_distance": Score(
                5.25, "squared distance", 1797, False, 4.2, "Heusel et al. 2017, https://x.org"
            ),
            "recognised": Score(0.94, HOSTILE, 360, True),
        },
    )
    return workdir


class Page(HTMLParser):
    """The tags with their attributes, the text, and whether every element was closed."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def read(workdir):
    return Page(write_report(workdir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run):
    return read(run)


def test_the_same_files_give_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert len(first) < 1_000_000


def test_sections_and_headline(page):
    words = " ".join(page.text.split())
    assert "ddpm:digits · jaxgen run" in words
    assert (
        "Frechet distance 5.25 against 4.2 for reference (lower is better), after 300 updates with seed 7 on"
        in words
    )
    for heading in (
        "Scores",
        "Samples",
        "Curves",
        "How to run again",
        "Details",
        "Configuration",
        "Manifest",
        "Files",
    ):
        assert heading in page.text
    assert "python -m jaxgen.run --config=experiments/ddpm.py:digits '--note=" in words


def test_the_headline_says_what_was_evaluated():
    scores = {"error": Score(1.0, "u", 1, False)}
    evaluated = {"checkpoint": "best", "step": 200, "config": {"sampling.num_steps": 20}}
    words = report._headline({"seed": 7, "evaluated": evaluated}, scores, {"loss": [(300, 1.0)]})
    assert (
        "after 200 updates (the best checkpoint) with seed 7, evaluated with sampling.num_steps=20." in words
    )


def cells(workdir, section):
    """The text of the cells of a table, row by row."""
    source = write_report(workdir).read_text(encoding="utf-8")
    table = re.search(rf'id="{section}"(.*?)</table>', source, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [
        [re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows
    ]


def test_scores_have_unit_count_direction_reference_and_source(run):
    rows = cells(run, "scores")
    columns = "Metric, Value, Unit, Items (n), Better, Reference, Difference, Source of the reference"
    assert rows[0] == columns.split(", ")
    assert rows[1][:4] == ["frechet distance", "5.25", "squared distance", "1,797"]
    assert rows[1][4:] == ["↓ lower", "4.2", "+25.0 %", "Heusel et al. 2017, https://x.org"]
    assert rows[2][:2] + rows[2][3:] == ["recognised", "0.94", "360", "↑ higher", "–", "–", "–"]


def test_user_text_is_escaped_and_nothing_is_loaded(page):
    assert page.all("script") == []
    assert page.text.count("document.title='owned'") >= 4  # config key and value, unit, command: as text
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert value.startswith(("data:", "#"))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_pictures_have_captions_and_long_series_are_thinned(page):
    captions = [image["alt"] for image in page.all("img")]
    assert captions == [
        *("samples", "reverse"),
        *(f"step_{step}/samples" for step in (100, 300, 500, 600, 800, 1000)),
    ]
    assert "broken.png is damaged" in page.text
    assert "4 more in samples/" in page.text


def test_charts_share_axes_by_quantity_and_name_their_units(page):
    titles = [svg["aria-label"] for svg in page.all("svg")]
    assert titles[0] == "loss"  # train and validation together, first
    assert sorted(titles[1:4]) == sorted(
        ["bits per dim", HOSTILE.replace("_", " ").rsplit("/", 1)[-1], "grad norm"]
    )
    for unit in ("loss, mean per item (log scale)", "bits/dim", "Euclidean norm", "steps per second"):
        assert unit in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_picture_of_too_many_pixels_is_left_out(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(report.Image, "MAX_IMAGE_PIXELS", 1)
    page = report.write_report(tmp_path / "run").read_text()
    assert "has too many pixels to show here" in page


def test_files_may_vanish_while_they_are_counted(tmp_path, monkeypatch):
    """Beside a training run, which deletes old checkpoints."""
    (tmp_path / "checkpoints").mkdir()
    stored = [tmp_path / "checkpoints" / name for name in "abc"]
    for file in stored:
        file.write_bytes(b"123")
    stat = os.stat

    def then_all_vanish(path, **options):
        found = stat(path, **options)
        if Path(path) in stored:
            for file in stored:
                file.unlink()
        return found

    monkeypatch.setattr(os, "stat", then_all_vanish)
    assert [row["size"] for row in report._files(tmp_path)] == ["1 file, 3 B"]


def test_files_are_listed_with_sizes(run):
    listed = {name: (holds, size) for name, holds, size in cells(run, "files")[1:]}
    names = {path.name + "/" * path.is_dir() for path in run.iterdir()}
    assert listed.keys() == names - {"report.html"}
    assert listed["samples/"][1].startswith("13 files, ")
    size = (run / "metrics.jsonl").stat().st_size
    assert listed["metrics.jsonl"] == ("the curves: one JSON object a line", f"{size / 1000:.3g} kB")


PIECES = ("samples", "result.json", "metrics.jsonl", "manifest.json", "config.json")


@pytest.mark.parametrize("missing", [*((piece,) for piece in PIECES), (*PIECES, "tensorboard")])
def test_a_page_without_some_pieces(tmp_path, run, missing):
    workdir = shutil.copytree(run, tmp_path / "run")
    (workdir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')  # one chart is drawn fast
    for name in missing:
        shutil.rmtree(workdir / name) if (workdir / name).is_dir() else (workdir / name).unlink()
    page = read(workdir)
    said = {
        "samples": "No pictures",
        "result.json": "No scores yet",
        "metrics.jsonl": "No curves",
        "manifest.json": "The command is not known",
        "config.json": "holds no config.json",
    }
    for name, words in said.items():
        assert (words in page.text) is (name in missing)


def test_damage_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json holds no object"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        write_report(tmp_path)


# ---- a real browser


@pytest.fixture(scope="module")
def browser(run, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: install chromium to see the page in a real browser")
    write_report(run)
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as opened:
        opened.open((run / "report.html").as_uri())
        yield opened


SIZES = """
[...document.querySelectorAll('img, svg')].map(element => {
  const box = element.getBoundingClientRect();
  const content = element.tagName == 'IMG' ? element.naturalWidth : element.querySelectorAll('path').length;
  return [element.tagName, content, box.width, box.height];
})
"""
CURVE_IN_CHART = """
(() => {
  const svg = document.querySelector('svg'), chart = svg.getBoundingClientRect();
  const curve = svg.querySelector('[id$=curve0] path').getBoundingClientRect();
  return [curve.left > chart.left, curve.right < chart.right, curve.top > chart.top,
          curve.bottom < chart.bottom, curve.width > chart.width / 2, curve.height > chart.height / 2];
})()
"""


def test_the_browser_shows_title_pictures_and_charts(browser):
    assert browser.evaluate("document.title") == "ddpm:digits · jaxgen run"
    assert browser.evaluate("document.compatMode") == "CSS1Compat"  # standards mode
    shown = browser.evaluate(SIZES)
    assert [tag for tag, *_ in shown].count("IMG") == 8
    assert [tag for tag, *_ in shown].count("svg") == 5
    assert all(min(sizes) > 0 for _, *sizes in shown)
    assert browser.evaluate(CURVE_IN_CHART) == [True] * 6


def test_the_browser_loads_nothing_and_complains_of_nothing(browser):
    requests = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    assert requests
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert sum(url.startswith("file:") for url in requests) == 1  # the page itself
    methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event.get("method") in methods] == []


def test_the_page_fits_narrow_and_wide_windows(browser):
    for width in (400, 1400):
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.call("Emulation.clearDeviceMetricsOverride")


def contrast(first, second):
    """The contrast ratio of two CSS colours, as the Web Content Accessibility Guidelines 2.1 define it."""

    def luminance(colour):
        channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_the_one_of_the_standard():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_can_be_read_in_both_schemes(browser, scheme):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    style = "getComputedStyle(document.querySelector('{}')).{}"
    page = browser.evaluate(style.format("body", "backgroundColor"))
    assert (contrast(page, "rgb(0, 0, 0)") > 10) is (scheme == "light")
    # WCAG AA: 4.5 for text, 3 for the lines of a chart.
    for selector, what, ratio in (
        ("body", "color", 4.5),
        (".note", "color", 4.5),
        (".charts svg text", "fill", 4.5),
        (".charts svg [id$=curve0] path", "stroke", 3.0),
    ):
        assert contrast(page, browser.evaluate(style.format(selector, what))) >= ratio, selector
