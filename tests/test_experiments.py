"""Every experiment's smoke preset, run as a user would: trains, resumes to the same bits, samples, reports.

A new experiment is found by its file; nothing here names one, but for the tests that need processes of their
own (kill -9, SIGTERM, two at a time), which take the DDPM: what they test is the loop's, the same for all.
The others run in this process, through the same functions as the command line.
"""

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import time
import types

import chex
import jax
import numpy as np
import pytest
from command import ROOT, environment, experiment_params, jaxgen_command, run
from PIL import Image

from experiments import common
from jaxgen import cli, loop, session, sharding
from jaxgen import run as entry

NAMES = experiment_params()


def _config(name, preset="smoke"):
    return f"--config=experiments/{name}.py:{preset}"


def _here(*arguments):
    """(status, stdout, stderr) of the command, run in this process, which spares the imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = entry.main(["jaxgen.run", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def _digests(workdir, step):
    meta = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return {path: leaf["digest"] for path, leaf in meta["leaves"].items()}


def _steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def _last_step(workdir):
    return _steps(workdir)[-1]


@pytest.fixture(scope="module", params=NAMES)
def finished(request, tmp_path_factory):
    """(name, workdir, stdout) of a smoke run that went through undisturbed."""
    workdir = tmp_path_factory.mktemp("runs") / request.param
    status, stdout, stderr = _here(_config(request.param), f"--workdir={workdir}")
    assert status == 0, stderr
    return request.param, workdir, stdout


def test_a_run_leaves_everything_it_promises(finished):
    name, workdir, stdout = finished
    config = json.loads((workdir / "config.json").read_text())
    assert (config["experiment"], config["preset"]) == (f"experiments/{name}.py", "smoke")
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["seed"] == config["config"]["seed"]
    assert all(len(digest) == 64 for digest in manifest["data"].values())
    assert {"jax", "flax", "optax"} <= set(manifest["packages"])
    assert (manifest["evaluated"]["checkpoint"], manifest["evaluated"]["config"]) == ("newest", {})
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss" in line for line in lines)
    assert any(key.startswith("validation/") for line in lines for key in line)
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    result = json.loads((workdir / "result.json").read_text())
    assert result
    for score in result.values():
        assert set(score) == {"value", "unit", "n", "higher_is_better", "reference", "reference_source"}
        assert np.isfinite(score["value"])
        assert score["n"] > 0
        assert score["unit"]
    assert "<html" in (workdir / "report.html").read_text()
    assert str(workdir / "report.html") in stdout
    assert all(metric in stdout for metric in result)


def test_pictures_open_and_are_not_blank(finished):
    _, workdir, _ = finished
    pictures = list((workdir / "samples").rglob("*.png"))
    assert pictures
    for path in pictures:
        assert np.asarray(Image.open(path)).std() > 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddpm", {"model.dropout": 0.5, "diffusion.label_dropout": 0.5, "diffusion.conditional": True}),
        ("score_sde", {"model.dropout": 0.5}),
        ("score_sde", {"model.dropout": 0.5, "sde.name": "edm"}),
        ("text_to_image", {"model.dropout": 0.5, "text.dropout": 0.5, "diffusion.caption_dropout": 0.5}),
    ],
)
def test_validation_is_without_dropout_and_hides_no_condition(name, settings, monkeypatch):
    """Its program is that of a config in which all rates are 0."""

    def traced(compute, *args, **kwargs):
        return lambda given: str(jax.make_jaxpr(compute)(*given))

    monkeypatch.setattr(common, "make_evaluation", traced)
    module = cli.load_experiment(f"experiments/{name}.py").module
    programs = []
    for on in (False, True):
        config = module.get_config("smoke")
        off = {field: 0.0 for field in settings if field.endswith("dropout")}
        config.update_from_flattened_dict(settings if on else {**settings, **off})
        if "classifier" in config.evaluation:
            config.evaluation.classifier = ""
        experiment = module.build(config, sharding.make_mesh())
        key, batch = jax.eval_shape(lambda: jax.random.key(0)), experiment.train_batch(0)
        params = jax.eval_shape(experiment.system.init, key, batch).params
        state = types.SimpleNamespace(sampling_params=(params, batch, key))
        programs.append(re.sub("0x[0-9a-f]+", "", experiment.validate(state)))
    assert programs[0] == programs[1]


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sampling_is_reproducible_its_seed_matters_and_scores_come_again(finished):
    name, workdir, _ = finished
    module = cli.load_experiment(f"experiments/{name}.py").module
    this_run = session.Session(
        f"experiments/{name}.py:smoke", module.get_config("smoke"), workdir, trained=True
    )
    if getattr(module, "GENERATES", True):
        drawn = []
        for seed in (1, 1, 2):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                this_run.sample("newest", num=5, seed=seed)
            folder = workdir / "samples" / f"seed_{seed}"
            assert all(str(folder) in line for line in out.getvalue().splitlines())
            drawn.append(_files(folder))
        assert drawn[0]
        assert drawn[0] == drawn[1]
        assert drawn[0] != drawn[2]
    before = json.loads((workdir / "result.json").read_text())
    this_run.evaluate("newest")
    assert json.loads((workdir / "result.json").read_text()) == before


def test_going_on_from_an_earlier_checkpoint_gives_the_same_bits(finished, tmp_path):
    name, whole, _ = finished
    again = tmp_path / "run"
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("needs", "samples", "result.json"))
    _, *later = _steps(again)
    assert later, "a smoke preset keeps two checkpoints, so that a test can go on from the first"
    for step in later:
        shutil.rmtree(again / "checkpoints" / str(step))
    mesh = sharding.make_mesh()
    module = cli.load_experiment(f"experiments/{name}.py").module
    loop.train(module.build(module.get_config("smoke"), mesh), again, mesh)
    assert _digests(again, later[-1]) == _digests(whole, later[-1])
    steps = [json.loads(line)["step"] for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_other_preset_in_the_same_workdir_is_refused(finished):
    name, workdir, _ = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    status, _, stderr = _here(_config(name), f"--workdir={workdir}", "--config.seed=7")
    assert status == 2
    assert stderr.count("\n") == 1
    assert "seed is 0 there and 7 now" in stderr
    after = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*") if path.name != ".lock")
    assert after == [entry for entry in before if entry[0].name != ".lock"]


def _start(name, workdir, *overrides):
    return subprocess.Popen(
        jaxgen_command(_config(name), f"--workdir={workdir}", *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )


def _wait_until(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.005)


def _has_checkpoint(workdir):
    return lambda: any(path.name.isdigit() for path in workdir.glob("checkpoints/[1-9]*"))


# The judge's training and many samples would take longer than what is looked at.
UNJUDGED = ("--config.evaluation.classifier=", "--config.evaluation.num_likelihood=16")


LONGER = (
    *UNJUDGED,
    "--config.train.num_steps=40",
    "--config.train.checkpoint_every=4",
    "--config.train.validate_every=20",
)


@pytest.fixture(scope="module")
def whole_ddpm(tmp_path_factory):
    """The workdir of a DDPM that went through undisturbed, for the two tests below to compare with."""
    workdir = tmp_path_factory.mktemp("whole") / "ddpm"
    status, _, stderr = _here(_config("ddpm"), f"--workdir={workdir}", *LONGER)
    assert status == 0, stderr
    return workdir


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_bits(whole_ddpm, tmp_path):
    stopped = tmp_path / "stopped"
    process = _start("ddpm", stopped, *LONGER)
    _wait_until(_has_checkpoint(stopped), process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=240)
    if process.returncode != 0:  # 0: it had finished before the signal came
        assert process.returncode == 128 + signal.SIGTERM, stderr
        assert "the same command goes on" in stderr
        assert "Traceback" not in stderr
        status, _, stderr = run(_config("ddpm"), f"--workdir={stopped}", *LONGER)
        assert status == 0, stderr
    assert _digests(stopped, _last_step(whole_ddpm)) == _digests(whole_ddpm, _last_step(whole_ddpm))


def test_ddpm_killed_at_random_steps_ends_with_the_same_bits(whole_ddpm, tmp_path):
    """kill -9 twice, each at a random moment after some progress, then to the end."""
    rng = np.random.default_rng()  # another moment at every run of the test
    killed = tmp_path / "killed"
    seen = [0]
    for _ in range(2):
        process = _start("ddpm", killed, *LONGER)
        goal = min(seen[-1] + int(rng.integers(1, 16)), 36)

        def came_so_far(goal=goal):
            return (killed / "checkpoints").is_dir() and _last_step_or_0(killed) >= goal

        _wait_until(came_so_far, process)
        time.sleep(float(rng.uniform(0, 0.3)))
        process.kill()
        process.communicate()
        seen.append(_last_step_or_0(killed))
    assert seen[-1] > 0
    status, _, stderr = run(_config("ddpm"), f"--workdir={killed}", *LONGER)
    assert status == 0, stderr
    states = []
    module = cli.load_experiment("experiments/ddpm.py").module
    config = module.get_config("smoke")
    config.train.num_steps = 40
    config.evaluation.classifier = ""
    mesh = sharding.make_mesh()
    experiment = module.build(config, mesh)
    for workdir in (whole_ddpm, killed):
        checkpoints = loop.open_checkpoints(experiment, workdir)
        state = checkpoints.restore(loop.abstract_state(experiment, mesh))
        checkpoints.close()
        states.append(state._replace(key=jax.random.key_data(state.key)))
    assert int(states[0].step) == 40
    chex.assert_trees_all_equal(*states)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert (killed / "result.json").read_bytes() == (whole_ddpm / "result.json").read_bytes()


def _last_step_or_0(workdir):
    steps = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    return max(steps, default=0)


def test_two_runs_on_one_workdir(tmp_path):
    process = _start("ddpm", tmp_path / "run", *LONGER)
    _wait_until(_has_checkpoint(tmp_path / "run"), process)
    status, _, stderr = run(_config("ddpm"), f"--workdir={tmp_path / 'run'}", *LONGER)
    process.kill()
    process.communicate()
    assert status == 2
    assert "Another process is training" in stderr


def test_compare_and_report_need_no_config(finished):
    name, workdir, _ = finished
    status, stdout, stderr = _here(f"--workdir={workdir}", "--mode=report")
    assert status == 0, stderr
    assert "report.html" in stdout
    status, _, stderr = _here(f"--workdir={workdir}", "--mode=compare")
    assert status == 2
    assert f"{name}_smoke.json" in stderr


def test_list_names_every_preset():
    status, stdout, stderr = run("--list")
    assert status == 0, stderr
    for name in cli.experiment_names():
        for preset in cli.load_experiment(f"experiments/{name}.py").module.PRESETS:
            assert f"experiments/{name}.py:{preset}" in stdout
