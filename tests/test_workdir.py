"""The files of a workdir: JSON whole or not at all, curves that survive being cut short, scores."""

import dataclasses
import errno
import json
import math
import os

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from jaxgen import workdir
from jaxgen.types import Score, UserError


def test_json_is_sorted_indented_and_read_back(tmp_path):
    path = tmp_path / "new" / "x.json"
    workdir.write_json(path, {"b": [1, 2.5, None], "a": {"z": True, "y": "é<"}})
    assert path.read_text() == '{\n  "a": {\n    "y": "é<",\n    "z": true\n  },\n  "b": [1, 2.5, null]\n}\n'
    assert workdir.read_json(path) == {"a": {"y": "é<", "z": True}, "b": [1, 2.5, None]}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]  # no temporary file is left


def test_everything_with_a_json_form_is_taken(tmp_path):
    @dataclasses.dataclass
    class Inner:
        width: int = 3

    value = {
        "array": np.arange(3, dtype=np.int32),
        "scalar": jnp.float32(0.5),
        "flag": np.bool_(True),
        "tuple": (1, (2, 3)),
        "path": tmp_path,
        "dataclass": Inner(),
        "config": ml_collections.ConfigDict({"model": {"channels": (1, 2)}}),
        7: frozenset({"b", "a"}),
    }
    assert workdir.plain(value) == {
        "array": [0, 1, 2],
        "scalar": 0.5,
        "flag": True,
        "tuple": [1, [2, 3]],
        "path": str(tmp_path),
        "dataclass": {"width": 3},
        "config": {"model": {"channels": [1, 2]}},
        "7": ["a", "b"],
    }
    with pytest.raises(TypeError, match="no JSON form"):
        workdir.write_json(tmp_path / "x.json", {"f": print})
    assert not (tmp_path / "x.json").exists()


def test_non_finite_floats_are_strings_in_valid_json(tmp_path):
    path = tmp_path / "x.json"
    workdir.write_json(path, {"x": [math.nan, math.inf, -math.inf, np.float32("nan")]})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(path.read_text(), parse_constant=refuse)["x"]
    assert read == ["NaN", "Infinity", "-Infinity", "NaN"]
    assert math.isnan(float(read[0]))
    assert [float(text) for text in read[1:3]] == [math.inf, -math.inf]


def test_bytes_that_are_no_utf8_are_written(tmp_path):
    argument = os.fsdecode(b"--workdir=runs/\x80")  # as sys.argv has it
    workdir.write_json(tmp_path / "x.json", [argument])
    assert workdir.read_json(tmp_path / "x.json") == [argument]


def _refusing(code):
    def fsync(_):
        raise OSError(code, os.strerror(code))

    return fsync


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "No space is left"), (errno.EROFS, "Read-only"), (errno.EIO, "check the disk")],
)
def test_a_refusing_disk_leaves_the_old_file(tmp_path, monkeypatch, code, words):
    path = tmp_path / "x.json"
    workdir.write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", _refusing(code))
    with pytest.raises(UserError, match=words) as caught:
        workdir.write_json(path, {"new": 2})
    assert "\n" not in str(caught.value)
    assert workdir.read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="another workdir"):
        workdir.write_json(tmp_path / "run" / "config.json", {})


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"\x00" * 10])
def test_damaged_json_is_one_sentence(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="not valid JSON"):
        workdir.read_json(tmp_path / "x.json")


def test_missing_json_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        workdir.read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot be read"):
        workdir.read_json(tmp_path)


def test_curves_merge_lines_and_the_later_value_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 3.0}\n{"step": 1, "loss": 4.0, "x": "NaN"}\n'
        '{"step": 2, "loss": 2.5, "y": "-Infinity"}\n'
    )
    curves = workdir.read_metrics(tmp_path)
    assert curves["loss"] == [(1, 4.0), (2, 2.5)]
    assert curves["y"] == [(2, -math.inf)]
    assert math.isnan(curves["x"][0][1])
    assert workdir.read_metrics(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "lo', b'{"step": 2, "loss": 1', b"\x00\x00\x00", b"[1]", b"{}"]
)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_torn_last_line_is_passed_over_and_one_before_it_is_not(tmp_path, torn, end):
    good = b'{"step": 1, "loss": 4.0}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(good + torn + end)
    assert workdir.read_metrics(tmp_path) == {"loss": [(1, 4.0)]}
    path.write_bytes(good + torn + b"\n" + good)
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl is damaged"):
        workdir.read_metrics(tmp_path)


def test_thin_keeps_ends_extremes_and_the_first_non_finite_point():
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000)
    values[1234], values[2345], values[3456], values[3457] = 50.0, -50.0, np.nan, np.nan
    thinned = workdir.thin(list(enumerate(values)), 200)
    steps = [step for step, _ in thinned]
    assert len(steps) <= 200
    assert len(steps) >= 190
    assert steps == sorted(set(steps))
    assert {0, 1234, 2345, 3456, 4999} <= set(steps)
    assert max(np.diff(steps)) <= 5000 / 195 + 1  # evenly spread
    assert all(np.isnan(value) or value == values[step] for step, value in thinned)
    assert workdir.thin([(3, 1.0)], 5) == [(3, 1.0)]
    assert len(workdir.thin([(step, math.nan) for step in range(100)], 5)) <= 5


SCORES = {
    "frechet_distance": Score(5.25, "squared distance", 1797, False, 4.5, "Heusel et al. 2017"),
    "accuracy": Score(0.875, "share", 360, True),
    "broken": Score(math.nan, "nats", 1, False),
}


def test_scores_are_read_back_in_their_order(tmp_path):
    workdir.write_result(tmp_path, SCORES)
    raw = json.loads((tmp_path / "result.json").read_text())
    assert raw["frechet_distance"] == {
        "value": 5.25,
        "unit": "squared distance",
        "n": 1797,
        "higher_is_better": False,
        "reference": 4.5,
        "reference_source": "Heusel et al. 2017",
    }
    read = workdir.read_result(tmp_path)
    assert list(read) == list(SCORES)
    assert read["accuracy"] == SCORES["accuracy"]
    assert math.isnan(read["broken"].value)


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": {"value": "x"}}', '{"a": {"value": 1.0}}'])
def test_a_foreign_result_is_one_sentence(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(UserError, match="holds no scores"):
        workdir.read_result(tmp_path)
