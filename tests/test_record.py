"""What a run writes as it goes: manifest, metrics.jsonl, TensorBoard events, progress bar."""

import datetime
import hashlib
import io
import json
import math
import re
import struct
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxgen import record
from jaxgen import workdir as files
from jaxgen.types import UserError


def recorder(workdir, start_step=0, num_steps=10, **kwargs):
    return record.Recorder(
        workdir, start_step=start_step, num_steps=num_steps, **{"show_progress": False, **kwargs}
    )


def read_events(workdir):
    """All TensorBoard events, file by file in TensorBoard's order, read by tensorboardX's own definitions."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,), (header_crc,) = struct.unpack("<Q", content[:8]), struct.unpack("<I", content[8:12])
            data, (crc,) = content[12 : 12 + length], struct.unpack("<I", content[12 + length : 16 + length])
            assert (header_crc, crc) == (masked_crc32c(content[:8]), masked_crc32c(data))
            events.append(Event.FromString(data))
            content = content[16 + length :]
    return events


def tensorboard_scalars(workdir):
    """What TensorBoard shows: a START event makes it forget the events at or after its step."""
    shown = []
    for event in read_events(workdir):
        if event.HasField("session_log"):
            assert event.session_log.status == event.session_log.START
            shown = [item for item in shown if item[0] < event.step]
        shown += [
            (event.step, value.tag, value.simple_value)
            for value in event.summary.value
            if value.HasField("simple_value")
        ]
    return shown


def test_log_writes_a_line_of_json_and_tensorboard_scalars(tmp_path):
    with recorder(tmp_path) as r:
        r.log(1, {"loss": 0.5, "norm": jnp.float32(2.0)}, prefix="train/")
        r.log(2, {"loss": np.float32(0.25)}, prefix="train")
        r.log(2, {"bits": math.nan, "top": math.inf})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "train/loss": 0.5, "train/norm": 2.0},
        {"step": 2, "train/loss": 0.25},
        {"step": 2, "bits": "NaN", "top": "Infinity"},
    ]
    assert [(s, t) for s, t, _ in tensorboard_scalars(tmp_path)] == [
        (1, "train/loss"),
        (1, "train/norm"),
        (2, "train/loss"),
        (2, "bits"),
        (2, "top"),
    ]
    curves = files.read_metrics(tmp_path)
    assert curves["train/loss"] == [(1, 0.5), (2, 0.25)]
    assert math.isnan(curves["bits"][0][1])


def test_lines_are_on_disk_before_the_run_ends(tmp_path):
    with recorder(tmp_path) as r:
        r.log(1, {"loss": 0.5})
        assert files.read_metrics(tmp_path) == {"loss": [(1, 0.5)]}


def test_a_metric_called_step_is_refused(tmp_path):
    with recorder(tmp_path) as r, pytest.raises(ValueError, match="step"):
        r.log(1, {"step": 1.0})


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with recorder(tmp_path) as r:
        for step in range(6):
            r.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')  # killed while writing
    with recorder(tmp_path, start_step=3) as r:
        r.log(4, {"loss": 40.0})
    assert files.read_metrics(tmp_path) == {"loss": [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]}
    # Two files within one second keep apart, and TensorBoard shows the same curve.
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert tensorboard_scalars(tmp_path) == [(s, "loss", float(s)) for s in range(4)] + [(4, "loss", 40.0)]


def test_resuming_leaves_a_sound_file_alone(tmp_path):
    with recorder(tmp_path) as r:
        r.log(3, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").stat()
    with recorder(tmp_path, start_step=3):
        pass
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


def test_resuming_removes_damaged_lines_and_says_so(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n{"step": 2, "loss": 2.0}')  # no line end
    with recorder(tmp_path, start_step=2) as r:
        r.log(3, {"loss": 3.0})
    assert files.read_metrics(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}
    assert "1 damaged line" in capsys.readouterr().err


def test_a_disabled_recorder_writes_nothing(tmp_path, capsys):
    with recorder(tmp_path / "run", enabled=False, show_progress=True) as r:
        r.log(1, {"loss": 1.0})
        r.advance(1, {"loss": 1.0})
        r.image("x", 1, np.zeros((2, 2, 1), np.uint8))
        r.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_image_reaches_tensorboard(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    with recorder(tmp_path) as r:
        r.image("samples", 4, picture)
        r.image("grey", 4, picture[..., :1])
        with pytest.raises(ValueError, match="uint8"):
            r.image("samples", 4, picture.astype(np.float32))
    found = {value.tag: (e.step, value.image) for e in read_events(tmp_path) for value in e.summary.value}
    step, image = found["samples"]
    assert (step, image.height, image.width, image.colorspace) == (4, 3, 5, 3)
    decoded = Image.open(io.BytesIO(image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(decoded), picture)
    decoded = Image.open(io.BytesIO(found["grey"][1].encoded_image_string))
    np.testing.assert_array_equal(np.asarray(decoded), picture[..., 0])


def test_progress_bar_shows_step_loss_rate_and_messages(tmp_path, capsys):
    with recorder(tmp_path, start_step=2, num_steps=8, show_progress=True) as r:
        r.advance(4, {"loss": 0.123456})
        r.message("half way")
        r.advance(8, {"loss": 0.1})
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "2/8" in printed.err
    assert re.search(r"8/8 \[.*step/s, loss 0\.1\]", printed.err)
    assert "half way\n" in printed.err


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_stops_the_run_with_one_sentence(tmp_path, full):
    r = recorder(tmp_path)
    r.log(1, {"loss": 1.0})
    owner = r if full == "metrics.jsonl" else r._events
    owner._file.close()
    owner._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (the recorder closes it)
    with pytest.raises(UserError, match=f"No space is left to write .*{full}"), r:
        r.log(2, {"loss": 1.0})
    assert r._file.closed
    assert r._events._file.closed
    assert files.read_metrics(tmp_path)["loss"][0] == (1, 1.0)


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="another workdir"):
        recorder(tmp_path / "run")


def make_manifest(**changes):
    facts = {
        "config": {"b": 1, "a": [1.5, float("inf")]},
        "experiment": "ddpm",
        "preset": "smoke",
        "seed": 3,
        "data_fingerprints": {"digits": "ab12"},
        "command": ["python", "-m", "jaxgen.run"],
    }
    return record.manifest(**{**facts, **changes})


def test_manifest_says_what_ran_where(tmp_path):
    facts = make_manifest()
    assert (facts["experiment"], facts["preset"], facts["seed"]) == ("ddpm", "smoke", 3)
    assert facts["data"] == {"digits": "ab12"}
    assert facts["command"] == ["python", "-m", "jaxgen.run"]
    assert facts["packages"]["jax"] == jax.__version__
    assert facts["packages"]["numpy"] == np.__version__
    assert {"flax", "optax", "jaxlib", "orbax-checkpoint"} <= facts["packages"].keys()
    assert (facts["backend"], facts["device_count"], facts["process_count"]) == ("cpu", jax.device_count(), 1)
    assert facts["cpu"]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(facts["started"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    files.write_json(tmp_path / "manifest.json", facts)
    assert files.read_json(tmp_path / "manifest.json") == facts


def test_manifest_digest_is_of_the_content_not_of_its_order():
    expected = hashlib.sha256(b'{"a":[1.5,"Infinity"],"b":1}').hexdigest()
    assert make_manifest()["config_sha256"] == expected
    assert make_manifest(config={"a": (1.5, np.inf), "b": 1})["config_sha256"] == expected
    assert make_manifest(config={"a": [1.5], "b": 1})["config_sha256"] != expected


def test_git_state_of_a_checkout(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    nothing = {"revision": None, "dirty": None}
    assert record._git_state(package) == nothing  # no repository
    git("init", "-q")
    assert record._git_state(package) == nothing  # somebody else's repository: the code is not tracked
    git("add", ".")
    git("commit", "-qm", "x")
    clean = {"revision": git("rev-parse", "HEAD"), "dirty": False}
    assert record._git_state(package) == clean
    (tmp_path / "notes.txt").write_text("not code")
    assert record._git_state(package) == clean
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "experiment.py").write_text("x = 1")
    assert record._git_state(package) == {**clean, "dirty": True}
    (tmp_path / "new" / "deep" / "experiment.py").unlink()
    (package / "__init__.py").write_text("changed = True")
    assert record._git_state(package) == {**clean, "dirty": True}
