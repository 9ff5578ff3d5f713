"""A session: what a workdir must hold, what is written when, and what is found out before any work."""

import json
import subprocess
import sys

import pytest

from jaxgen import cli, loop, session
from jaxgen import workdir as files
from jaxgen.data.cache import cache_dir
from jaxgen.types import UserError

SOURCE = "experiments/classifier.py:smoke"
DDPM = "experiments/ddpm.py:smoke"


_USE_COMPILATION_CACHE = session._use_compilation_cache


@pytest.fixture(autouse=True)
def _compilation_cache_stays(monkeypatch):
    monkeypatch.setattr(session, "_use_compilation_cache", lambda: None)


def _config(source=SOURCE, **changes):
    file, _, preset = source.partition(":")
    config = cli.load_experiment(file).module.get_config(preset)
    config.update_from_flattened_dict(changes)
    return config


def _session(workdir, source=SOURCE, *, trained=False, **changes):
    return session.Session(source, _config(source, **changes), workdir, trained=trained)


def _claim(workdir, source=SOURCE, **changes):
    """What `train` does before it trains."""
    this = _session(workdir, source, **changes)
    session._claim(workdir, this.experiment, source, this.config.to_dict())
    return this


# ---- what is written


def test_building_writes_nothing(tmp_path):
    _session(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_claim_writes_config_and_manifest(tmp_path):
    this = _claim(tmp_path / "run")
    config = files.read_json(tmp_path / "run" / "config.json")
    assert (config["experiment"], config["preset"]) == ("experiments/classifier.py", "smoke")
    assert config["config"] == json.loads(files.to_json(this.config.to_dict()))
    manifest = files.read_json(tmp_path / "run" / "manifest.json")
    assert manifest["data"] == this.experiment.data_fingerprints
    assert "resumed" not in manifest


def test_going_on_keeps_the_first_manifest_and_notes_each_start(tmp_path):
    for _ in range(3):
        _claim(tmp_path)
    manifest = files.read_json(tmp_path / "manifest.json")
    assert len(manifest["resumed"]) == 2
    assert all("resumed" not in again for again in manifest["resumed"])
    assert manifest["started"] <= manifest["resumed"][0]["started"]


def test_killed_before_the_config_was_written(tmp_path):
    """The manifest comes first; a run that got no further may begin again."""
    _claim(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / ".config.json.123.tmp").touch()
    (tmp_path / ".lock").touch()
    _claim(tmp_path)
    assert files.read_json(tmp_path / "config.json")["preset"] == "smoke"


def test_what_the_scores_were_measured_with_is_noted(tmp_path):
    this = _claim(tmp_path, DDPM)
    other = _config(DDPM, **{"sampling.num_steps": 2}).to_dict()
    session._write_scores(tmp_path, {}, "best", 3, other)
    assert files.read_result(tmp_path) == {}
    expected = {"checkpoint": "best", "step": 3, "config": {"sampling.num_steps": 2}}
    assert files.read_json(tmp_path / "manifest.json")["evaluated"] == expected
    _claim(tmp_path, DDPM)
    assert files.read_json(tmp_path / "manifest.json")["evaluated"] == expected
    session._write_scores(tmp_path, {}, "newest", 4, this.config.to_dict())
    assert files.read_json(tmp_path / "manifest.json")["evaluated"]["config"] == {}


# ---- what the workdir must hold


def test_modes_that_need_a_run_may_change_how_it_is_looked_at(tmp_path):
    _claim(tmp_path, DDPM)
    _session(tmp_path, DDPM, trained=True, **{"sampling.num_steps": 2, "evaluation.num_samples": 5})
    with pytest.raises(UserError, match=r"another config: sampling.num_steps is 4 there and 2 now"):
        _session(tmp_path, DDPM, **{"sampling.num_steps": 2})
    with pytest.raises(UserError, match=r"another config: seed is 0 there and 1 now; use that"):
        _session(tmp_path, DDPM, trained=True, seed=1)


def test_fields_that_came_or_went_are_told(tmp_path):
    _claim(tmp_path)
    saved = files.read_json(tmp_path / "config.json")
    del saved["config"]["seed"]
    files.write_json(tmp_path / "config.json", saved)
    with pytest.raises(UserError, match=r"seed is absent there and 0 now"):
        _session(tmp_path)
    saved["config"] |= {"seed": 0, "a_new_field": None}
    files.write_json(tmp_path / "config.json", saved)
    with pytest.raises(UserError, match=r"a_new_field is None there and absent now"):
        _session(tmp_path)


def test_the_same_experiment_by_another_path_is_the_same(tmp_path):
    _claim(tmp_path)
    file = cli.experiments_folder() / "classifier.py"
    session.Session(f"{file}:smoke", _config(), tmp_path)


def test_a_missing_manifest_is_told(tmp_path):
    _claim(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json does not exist"):
        _session(tmp_path)


def test_a_file_in_place_of_the_checkpoints(tmp_path):
    _claim(tmp_path)
    (tmp_path / "checkpoints").write_text("keep me")
    with pytest.raises(UserError, match=r"checkpoints is a file where a folder belongs"):
        _session(tmp_path)


def test_a_run_is_evaluated_on_the_data_that_it_was_trained_on(tmp_path):
    """A text of the same characters, whose splits lie elsewhere; how many are held out may be asked anew."""
    text, source = tmp_path / "text.txt", "experiments/language_model.py:smoke"
    text.write_text("a rose is a rose is a rose\nno rose is a daisy\n" * 60)
    changes = {"data.source": f"text:{text}"}
    _claim(tmp_path / "run", source, **changes)
    _session(tmp_path / "run", source, trained=True, **changes, **{"sampling.num": 3})
    text.write_text("a rose is a rose is a rose\nno rose is a daisy\n" * 61)
    for look in ({}, {"sampling.num": 3}):
        with pytest.raises(UserError, match=r"The data have changed since the run in .*run began"):
            _session(tmp_path / "run", source, trained=True, **changes, **look)


def test_other_held_out_data_by_another_setting_of_the_evaluation(tmp_path):
    source = "experiments/sequence_tasks.py:smoke"
    _claim(tmp_path, source)
    _session(tmp_path, source, trained=True, **{"evaluation.num_examples": 8})


# ---- what the evaluation needs


def test_a_needed_run_is_looked_at_before_the_training(tmp_path):
    _claim(tmp_path / "classifier", **{"model.hidden": 16})
    this = _session(tmp_path / "run", DDPM, **{"evaluation.classifier_workdir": str(tmp_path / "classifier")})
    with pytest.raises(UserError, match=r"another config: model.hidden is 16 there and 8 now"):
        this.train()
    assert not (tmp_path / "run").exists()


def _save(this, step):
    """An untrained state of a session's run, said to be of this update."""
    experiment, mesh = this.experiment, this.mesh
    state = loop.initial_state(experiment, mesh, loop.abstract_state(experiment, mesh))
    checkpoints = loop.open_checkpoints(experiment, this.workdir)
    checkpoints.save(state._replace(step=state.step + step))
    checkpoints.close()


def test_a_needed_run_may_have_been_trained_for_longer_but_must_be_finished(tmp_path):
    needed = _claim(tmp_path / "classifier", **{"train.num_steps": 9, "optim.learning_rate": 0.1})
    this = _session(tmp_path / "run", DDPM, **{"evaluation.classifier_workdir": str(tmp_path / "classifier")})
    _save(needed, 4)
    with pytest.raises(UserError, match=r"classifier is at update 4 of 9: train it to the end first"):
        this.train()
    assert not (tmp_path / "run").exists()
    _save(needed, 9)
    this._check_needs()


def test_a_needed_run_inside_the_workdir_must_be_the_one(tmp_path):
    _claim(tmp_path / "needs" / "classifier", **{"model.hidden": 16})
    with pytest.raises(UserError, match=r"needs/classifier holds a run with another config"):
        _session(tmp_path, DDPM).train()


def test_sampling_needs_no_classifier(tmp_path):
    """A mismatch there must not keep a user from sampling."""
    _claim(tmp_path, DDPM)
    _claim(tmp_path / "needs" / "classifier", **{"model.hidden": 16})
    with pytest.raises(UserError, match=r"holds no checkpoint yet"):
        _session(tmp_path, DDPM, trained=True).sample("newest", num=1, seed=0)


def test_a_needed_run_is_trained_by_one_process(tmp_path):
    this = _claim(tmp_path, DDPM)
    classifier = this.experiment.needs["classifier"]
    with (
        session._WorkdirLock(tmp_path / "needs" / "classifier"),
        pytest.raises(UserError, match=r"Another process is training in .*needs/classifier; wait for it"),
    ):
        this._needed_state("classifier", classifier)
    assert not (tmp_path / "needs" / "classifier" / "config.json").exists()


# ---- the lock


_HOLD = (
    "import sys, pathlib; from jaxgen import session\n"
    "with session._WorkdirLock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def test_the_lock_keeps_another_process_out_and_ends_with_it(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        lock = session._WorkdirLock(tmp_path)
        with pytest.raises(UserError, match="Another process is training in"), lock:
            pass
        holder.kill()
        holder.wait()
    lock.__exit__()
    with session._WorkdirLock(tmp_path):
        pass


def test_programs_lie_beside_prepared_data(monkeypatch):
    monkeypatch.setenv("JAXGEN_CACHE_DIR", "")  # as if it were not set
    set_to = {}
    monkeypatch.setattr(session.jax.config, "update", set_to.__setitem__)
    _USE_COMPILATION_CACHE()
    assert set_to["jax_compilation_cache_dir"] == str(cache_dir() / "xla")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s")])
def test_durations(seconds, text):
    assert session._duration(seconds) == text
