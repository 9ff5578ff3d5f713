"""Recorded runs: small, without private paths; and a run set beside one, in words."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from jaxgen import record, recorded
from jaxgen import workdir as files
from jaxgen.types import Score, UserError

CONFIG = {"optim": {"learning_rate": 0.001}, "model": {"channels": [1, 2]}, "data_dir": None}
SCORES = {
    "frechet": Score(5.0, "squared distance", 1000, False, 4.5, "the floor"),
    "accuracy": Score(0.9, "share", 500, True),
}


def make_run(
    workdir, *, config=CONFIG, steps=range(10, 1001, 10), scale=1.0, seed=0, scores=SCORES, **manifest
):
    """A run whose loss is scale * exp(-step / 300) + 0.1 with noise of standard deviation 0.003."""
    rng = np.random.default_rng(seed)
    files.write_json(workdir / "config.json", config)
    facts = {"experiment": "ddpm", "preset": "smoke", "seed": 0, "device_kind": "cpu", "device_count": 1}
    files.write_json(workdir / "manifest.json", {**facts, "packages": {"jax": "0.10.2"}, **manifest})
    with record.Recorder(workdir, start_step=0, num_steps=1000, show_progress=False) as r:
        for step in steps:
            loss = scale * math.exp(-step / 300) + 0.1 + 0.003 * rng.normal()
            r.log(step, {"loss": loss, "steps_per_second": 100.0 * rng.random()}, prefix="train/")
    if scores:
        files.write_result(workdir, scores)
    return workdir


def test_record_has_config_manifest_curve_scores_and_picture(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "samples").mkdir()
    (run / "samples" / "samples.png").write_bytes(b"picture")
    path = recorded.record_run(run, tmp_path / "results", name="ddpm_smoke", tag="h100")
    assert path == tmp_path / "results" / "ddpm_smoke_h100.json"
    content = json.loads(path.read_text())
    assert content.keys() == {"config", "manifest", "curve", "scores"}
    assert content["config"] == CONFIG
    assert content["scores"]["frechet"]["reference_source"] == "the floor"
    whole = files.read_metrics(run)["train/loss"]
    assert [step for step, _ in content["curve"]["train/loss"]] == [step for step, _ in whole]
    # Six digits: a relative error of at most 5e-6.
    np.testing.assert_allclose(content["curve"]["train/loss"], whole, rtol=5e-6)
    assert path.with_suffix(".png").read_bytes() == b"picture"

    (run / "samples" / "samples.png").unlink()
    recorded.record_run(run, tmp_path / "results", name="ddpm_smoke", tag="h100")
    assert not path.with_suffix(".png").exists()  # the old picture is not this record's


@pytest.mark.parametrize("num_curves", [1, 12, 150])
def test_a_record_stays_small(tmp_path, num_curves):
    run = make_run(tmp_path / "run", steps=[])
    rng = np.random.default_rng(0)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1000):
            values = {f"train/metric_number_{i}": x for i, x in enumerate(rng.normal(size=num_curves))}
            file.write(json.dumps({"step": step, **values}) + "\n")
    path = recorded.record_run(run, tmp_path, name="big")
    assert path.stat().st_size < 200_000
    curves = json.loads(path.read_text())["curve"]
    whole = files.read_metrics(run)
    assert curves.keys() == whole.keys()
    for name, curve in curves.items():
        assert 5 <= len(curve) <= 200
        values = [value for _, value in whole[name]]
        expected = {float(f"{x:.6g}") for x in (values[0], values[-1], min(values), max(values))}
        assert expected <= {value for _, value in curve}


def test_too_many_curves_are_refused(tmp_path):
    run = make_run(tmp_path / "run", steps=[])
    line = {"step": 1, **{f"{'x' * 60}{i}": 1.0 for i in range(3000)}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="log fewer metrics"):
        recorded.record_run(run, tmp_path, name="big")
    assert not (tmp_path / "big.json").exists()


def test_private_paths_are_taken_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "alice"))
    run = tmp_path / "secret project" / "run"
    home = os.path.expanduser("~")
    config = {
        "data_dir": f"{home}/images",
        "own": str(run / "checkpoints"),
        "other": "/mnt/customer/archive.npz",
        "paths": [f"{home}", f"{Path.cwd()}/experiments/ddpm.py:digits"],
        "kept": [
            "bits/dim",
            "images/s",
            "a / b",
            "https://arxiv.org/abs/2006.11239",
            "/",
            "1/2/3",
            "runs/x",
            "~/y",
        ],
    }
    command = [
        f"{home}/.venv/bin/python",
        "-m",
        "jaxgen.run",
        f"--workdir={run}",
        "--data_dir=/mnt/customer/a b",
    ]
    make_run(run, config=config, command=command)
    path = recorded.record_run(run, tmp_path / "results", name="x")
    text = path.read_text()
    for private in ("alice", "secret", "customer", str(tmp_path), str(Path.cwd())):
        assert private not in text
    content = json.loads(text)
    assert content["config"]["data_dir"] == "~/images"
    assert content["config"]["own"] == "<workdir>/checkpoints"
    assert content["config"]["other"] == "…/archive.npz"
    assert content["config"]["paths"] == ["~", "./experiments/ddpm.py:digits"]
    assert content["config"]["kept"] == config["kept"]
    assert content["manifest"]["command"][:4] == [
        "~/.venv/bin/python",
        "-m",
        "jaxgen.run",
        "--workdir=<workdir>",
    ]
    # What is left out of the record is left out of the comparison as well.
    assert "Config: no differences." in recorded.compare(run, path)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "result.json"])
def test_an_unfinished_run_cannot_be_recorded(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(UserError, match=name):
        recorded.record_run(run, tmp_path, name="x")
    assert not (tmp_path / "x.json").exists()


def test_a_record_cannot_escape_its_folder(tmp_path):
    with pytest.raises(UserError, match="cannot name"):
        recorded.record_run(make_run(tmp_path / "run"), tmp_path, name="../x")


def test_score_table_is_aligned():
    text = recorded.score_table({**SCORES, "ppl": Score(12345.6, "", 2, False, 0.001, "x")})
    assert text == (
        "metric     value  unit                  n  better  reference  source\n"
        "frechet        5  squared distance  1,000  ↓             4.5  the floor\n"
        "accuracy     0.9  share               500  ↑               –\n"
        "ppl       12,346                        2  ↓           0.001  x"
    )


NUMBERS = {0.0: "0", 3.0: "3", 0.123456: "0.1235", 1234.5678: "1235", 123456.7: "123,457", -2e6: "-2,000,000"}
EXTREMES = {1e-7: "1e-07", 1e20: "1e+20", math.nan: "NaN", -math.inf: "-Infinity"}


@pytest.mark.parametrize(("value", "text"), [*NUMBERS.items(), *EXTREMES.items()])
def test_numbers_for_people(value, text):
    assert recorded.number(value) == text


@pytest.fixture
def reference(tmp_path):
    return recorded.record_run(make_run(tmp_path / "reference"), tmp_path, name="ddpm_smoke")


def test_the_same_settings_with_other_noise_are_in_line(tmp_path, reference):
    text = recorded.compare(make_run(tmp_path / "run", seed=1), reference)
    assert "Config: no differences." in text
    assert "train/loss: in line;" in text
    assert "train/steps_per_second: not judged" in text
    assert "In all: 1 of 1 curves in line, 2 of 2 scores the same or better." in text
    assert "Your run has reached" not in text


def test_a_wrong_loss_is_seen_in_a_run_that_has_just_begun(tmp_path, reference):
    """Twice the loss, a sixth of the steps, logged at other steps, not evaluated yet."""
    run = make_run(tmp_path / "run", scale=2.0, steps=range(7, 171, 14), scores=None)
    text = recorded.compare(run, reference)
    assert "Your run has reached step 161 of the recorded 1,000" in text
    line = next(line for line in text.splitlines() if line.startswith("train/loss: NOT in line;"))
    # Over the second half, steps 91 to 161, 2 e + 0.1 against e + 0.1 with e from 0.74 to 0.58: 87 % higher.
    percent = float(line.split("; ")[1].split(" %")[0])
    assert percent == pytest.approx(87, abs=1.5)
    assert "higher than recorded over steps 91 to 161" in line
    assert "frechet: not measured in your run (recorded 5 squared distance)." in text
    assert "In all: 0 of 1 curves in line, 0 of 0 scores the same or better." in text


def test_curves_are_interpolated_at_the_steps_of_the_run():
    theirs = [(0, 0.0), (10, 1.0), (20, 4.0)]
    text, verdict = recorded._compare_curve(
        "x", [(-5, 9.0), (5, 0.5), (15, 2.5), (20, 4.0), (25, 9.0)], theirs
    )
    assert verdict is True
    rows = [line.split() for line in text.splitlines()[1:]]
    assert rows == [
        ["step", "5", "15", "20"],
        ["yours", "0.5", "2.5", "4"],
        ["recorded", "0.5", "2.5", "4"],
        ["difference", "+0.0", "%", "+0.0", "%", "+0.0", "%"],
    ]


def test_noise_alone_does_not_put_a_curve_out_of_line():
    """Noise of 30 %: the mean of 50 wanders 4 %, and a shift of 30 % stands out at seven standard errors."""
    rng = np.random.default_rng(0)
    theirs = [(step, 1.0) for step in range(100)]
    verdicts = {}
    for shift in (0.0, 0.3):
        verdicts[shift] = [
            recorded._compare_curve("x", [(s, 1 + shift + 0.3 * rng.normal()) for s in range(100)], theirs)[1]
            for _ in range(100)
        ]
    # |mean| > max(0.05, 3 standard errors = 0.127) has a chance of 0.3 %: two or fewer in a hundred.
    assert sum(not verdict for verdict in verdicts[0.0]) <= 2
    assert not any(verdicts[0.3])


def test_a_loss_that_is_not_finite_is_named(tmp_path, reference):
    run = make_run(tmp_path / "run", steps=range(10, 31, 10))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "train/loss": "NaN"}\n')
    assert "train/loss: yours is not finite at step 40." in recorded.compare(run, reference)


def test_config_differences_are_listed(tmp_path, reference):
    config = {"optim": {"learning_rate": 0.002}, "model": {"channels": (1, 2), "depth": {}}, "data_dir": None}
    text = recorded.compare(make_run(tmp_path / "run", config=config), reference)
    lines = text.split("Config differences:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split() for line in lines] == [
        ["field", "yours", "recorded"],
        ["model.depth", "{}", "(absent)"],
        ["optim.learning_rate", "0.002", "0.001"],
    ]


def test_what_the_scores_were_measured_with_is_compared(tmp_path):
    config = {"experiment": "ddpm.py", "config": {"sampling": {"num_steps": 1000}}}
    evaluated = {"checkpoint": "best", "step": 500, "config": {"sampling.num_steps": 20}}
    run = make_run(tmp_path / "run", config=config, evaluated=evaluated)
    path = recorded.record_run(run, tmp_path, name="other")
    assert json.loads(path.read_text())["manifest"]["evaluated"] == evaluated
    assert "Config: no differences." in recorded.compare(run, path)
    text = recorded.compare(make_run(tmp_path / "usual", config=config), path)
    lines = text.split("Config differences:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["config.sampling.num_steps", "1000", "20"],
        ["evaluated.checkpoint", '"newest"', '"best"'],
    ]


@pytest.mark.parametrize(
    ("mine", "words", "same"),
    [
        (Score(5.05, "u", 1000, False), "5.05 against 5 u recorded: the same to within 2 % (+1.0 %).", True),
        (
            Score(6.0, "u", 10, False),
            "20.0 % higher, which is WORSE (yours from 10 items, recorded from 1,000).",
            False,
        ),
        (Score(4.0, "u", 1000, False), "20.0 % lower, which is better.", True),
        (Score(math.nan, "u", 1000, False), "NaN against 5 u recorded: cannot be compared.", False),
    ],
)
def test_verdicts_on_scores(mine, words, same):
    text, verdict = recorded._compare_score(mine, Score(5.0, "u", 1000, False))
    assert text.endswith(words)
    assert verdict is same


def test_verdicts_follow_the_better_direction_and_a_recorded_nought():
    assert recorded._compare_score(Score(0.5, "u", 1, True), Score(0.9, "u", 1, True))[0].endswith("WORSE.")
    text, verdict = recorded._compare_score(Score(0.5, "u", 1, True), Score(0.0, "u", 1, True))
    assert text == "0.5 against 0 u recorded: 0.5 higher, which is better."
    assert verdict
    assert recorded._compare_score(Score(0.0, "u", 1, True), Score(0.0, "u", 1, True))[1]


@pytest.mark.parametrize(
    ("mine", "theirs", "comparable"),
    [
        ("distance, classifier digits 0957ce4f", "distance, classifier digits a1b2c3d4", False),
        ("dB, 3 times enlarged", "dB, 4 times enlarged", False),
        ("Spearman, 1,104 pairs out of vocabulary", "Spearman, 62 pairs out of vocabulary", True),
        ("share, 168 out of the 30,000 words", "share, 1,763 out of the 30,000 words", True),
        ("f1, 191 of the pairs are is-a", "f1, 1,195 of the pairs are is-a", True),
    ],
)
def test_other_units_have_no_verdict(mine, theirs, comparable):
    text, verdict = recorded._compare_score(Score(5.0, mine, 20, False), Score(6.0, theirs, 20, False))
    assert (verdict is not None) is comparable
    if not comparable:
        assert text == f"5 {mine} against 6 {theirs} recorded: other units, not comparable."


@pytest.mark.parametrize("content", ["[]", "{}", '{"curve": {}}', '{"curve": {"x": [1]}, "config": {}}'])
def test_a_foreign_record_is_one_sentence(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="not a recorded run"):
        recorded.compare(make_run(tmp_path / "run"), tmp_path / "x.json")
    with pytest.raises(UserError, match="does not exist"):
        recorded.compare(make_run(tmp_path / "run"), tmp_path / "y.json")
