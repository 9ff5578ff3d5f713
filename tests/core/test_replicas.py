"""Replicas: programs merged by their numbers, runs side by side equal to runs alone, scores summed up."""

import json
import math
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import ROOT, environment

from experiments import common
from jaxgen import cli, data, loop, replicas, session, sharding, systems
from jaxgen import run as entry
from jaxgen.replicas import Label
from jaxgen.types import Experiment, Mean, Score, UserError

# ---- programs


def _scaled(factor, table=(1.0, 2.0)):
    table = np.array(table, np.float32)

    def function(x):
        return {"y": jnp.sin(factor * x) + jnp.asarray(table), "x": (1 - factor) * x}

    return function


def test_what_differs_becomes_an_argument():
    x = jnp.array([0.3, -0.7])
    functions = [_scaled(2.0), _scaled(3.0, (1.0, 5.0)), _scaled(-1.0)]
    run, numbers = replicas.merge_functions(functions, x)
    assert {number.shape for number in numbers} == {(3,), (3, 2)}  # two literals, a table
    together = jax.vmap(run, in_axes=(0, None))(numbers, x)
    for index, function in enumerate(functions):
        for name, value in function(x).items():
            np.testing.assert_allclose(together[name][index], value, rtol=1e-6)


def test_equal_programs_need_no_argument():
    run, numbers = replicas.merge_functions([_scaled(math.nan), _scaled(math.nan)], jnp.zeros(2))
    assert numbers == []
    assert run([], jnp.ones(2))["y"].shape == (2,)


def _looped(factor):
    return lambda x: jax.lax.scan(lambda c, _: (c * factor, None), x, None, length=3)[0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_scaled(2.0), _scaled(2.0, (1.0,))),  # a shape
        (jnp.sin, jnp.cos),  # an operation
        (lambda x: x + x * 2, lambda x: x + x + x * 2),  # their number
        (lambda x: x[0] - x[1], lambda x: x[1] - x[0]),  # which array
        (lambda x: jnp.sum(x), lambda x: jnp.sum(x, keepdims=True)),  # what is returned
        (lambda x: (x, 1.0), lambda x: (x, 2.0)),  # a number that nothing reads
        (_looped(2.0), _looped(3.0)),  # a number in a loop
    ],
)
def test_what_is_not_one_program_is_refused(first, second):
    with pytest.raises(replicas.Different):
        replicas.merge_functions([first, second], jnp.ones(2))


# ---- configs


def _config(**settings):
    config = common.base_config(num_steps=4)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in settings.items()})
    return config


def test_seeds_and_values_make_the_configs_of_runs_alone():
    (label,) = cli.replica_configs(_config())
    assert str(label) == ""
    configs = cli.replica_configs(_config(seed=5, num_seeds=2, sweep="optim.lr: 1e-4, 1e-3"))
    assert [str(label) for label in configs] == [
        f"optim.learning_rate={rate},seed={seed}" for rate in (0.0001, 0.001) for seed in (5, 6)
    ]
    assert [config.optim.learning_rate for config in configs.values()] == [1e-4, 1e-4, 1e-3, 1e-3]
    assert [config.seed for config in configs.values()] == [5, 6, 5, 6]
    assert all((config.num_seeds, config.sweep) == (1, "") for config in configs.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_seeds": 0}, "at least 1"),
        ({"num_seeds": 2000}, "1024"),
        ({"num_seeds": 2, "sweep": "seed:1,2"}, "use one of them"),
        ({"sweep": "optim.learning_rate"}, "needs values"),
        ({"sweep": "optim.learning_rate:1e-3"}, "two values"),
        ({"sweep": "optim.learning_rate:1e-3,0.001"}, "all different"),
        ({"sweep": "optim.learning_rate:1e-3,fast"}, "must be a number"),
        ({"sweep": "optim.learning_rte:1,2"}, "did you mean 'optim.learning_rate'"),
        ({"sweep": "optim:1,2"}, "group of fields"),
        ({"sweep": "optim.schedule:cosine,constant"}, "only a field that is a number"),
        ({"sweep": "optim.ema_warmup:true,false"}, "only a field that is a number"),
        ({"sweep": "optim.decay_steps:1,2"}, "only a field that is a number"),
    ],
)
def test_bad_requests_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        cli.replica_configs(_config(**settings))


# ---- scores


def _score(value):
    return Score(value, "share", 360, True, 0.9, "somewhere")


def test_mean_and_spread_by_hand():
    found = replicas.summary(
        {Label("", seed): {"accuracy": _score(v)} for seed, v in enumerate((1.0, 3.0, 5.0))}
    )
    assert list(found) == ["accuracy", "accuracy_spread", *(f"accuracy@seed={seed}" for seed in range(3))]
    assert found["accuracy"] == _score(3.0)
    assert found["accuracy_spread"] == Score(2.0, "share, standard deviation", 3, False)
    assert found["accuracy@seed=2"] == _score(5.0)


def test_a_sweep_has_a_row_for_each_value():
    found = replicas.summary({Label(f"lr={rate}", None): {"accuracy": _score(rate)} for rate in (0.1, 0.2)})
    assert found == {"accuracy@lr=0.1": _score(0.1), "accuracy@lr=0.2": _score(0.2)}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_score_that_only_some_replicas_have_is_theirs(order):
    """A swept evaluation.num_probe=0 leaves the probe's score out."""
    scores = [{"loss": _score(1.0), "probe": _score(0.5)}, {"loss": _score(2.0)}]
    found = replicas.summary({Label(f"n={index}", None): scores[index] for index in order})
    assert found == {"loss@n=0": _score(1.0), "loss@n=1": _score(2.0), "probe@n=0": _score(0.5)}


# ---- runs: a linear model with noise of its own, told apart by data, start, noise and rate


def _source():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 17, (40, 2, 2, 1), dtype=np.uint8)
    return data.Source("made_up", "train", {"image": x}, None, 17)


def _build(config, mesh):
    def loss(params, model_state, batch, key):
        x = batch["image"].reshape(len(batch["image"]), -1)
        noise = 0.1 * jax.random.normal(key, x.shape)
        error = (x + noise) @ params["w"] + params["b"] - x.sum(axis=1) / 4
        mean = Mean.of(error**2)
        return mean.value, ({"loss": mean}, model_state)

    def init(key, batch):
        return {"w": jax.random.normal(key, (4,)), "b": jnp.zeros(())}, {}

    system = systems.gradient_system(
        init, loss, common.make_optimizer(config.optim, num_steps=config.train.num_steps), ema_decay=0.9
    )
    stream = common.training_stream(config.data, _source(), seed=config.seed, mesh=mesh)
    norm = jax.jit(lambda params: jnp.linalg.norm(params["w"]))

    def write_samples(state, key, num, directory):
        directory.mkdir(parents=True)
        path = directory / "key.txt"
        path.write_text(str(jax.random.key_data(key).tolist()))
        return [path]

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: {"norm": Mean.of(norm(state.params))},
        evaluate=lambda state, needed: {"norm": Score(float(norm(state.ema)), "norm", 1, False)},
        write_samples=write_samples,
        data_fingerprints={"train": "0"},
        seed=config.seed,
    )


MODULE = types.SimpleNamespace(build=_build)


def small_config(**settings):
    return _config(
        **{
            "seed": 3,
            "data__batch_size": 8,
            "train__steps_per_dispatch": 2,
            "train__log_every": 2,
            "train__validate_every": 4,
            "train__checkpoint_every": 2,
            **settings,
        }
    )


def _numbers(state):
    plain = state._replace(key=jax.random.key_data(state.key))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(plain)}


def _train(config, workdir, mesh):
    experiment = session.build(MODULE, config, mesh)
    return experiment, loop.train(experiment, workdir, mesh, show_progress=False)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """(config, experiment, state, workdir) of 2 seeds at 3 rates, trained side by side."""
    config = small_config(num_seeds=2, sweep="optim.learning_rate:0.01,0.03,0.1")
    workdir = tmp_path_factory.mktemp("grid")
    experiment, state = _train(config, workdir, sharding.make_mesh())
    return config, experiment, state, workdir


def test_every_replica_is_the_run_alone(grid, tmp_path):
    """To 1e-6: the same operations on float32, but XLA may fuse and sum them in another order."""
    config, experiment, state, _ = grid
    mesh = sharding.make_mesh()
    alone = list(cli.replica_configs(config).items())
    assert len(alone) == 6
    for number in (0, 3, 5):  # each rate, both seeds
        label, one = alone[number]
        _, expected = _train(one, tmp_path / str(number), mesh)
        mine, theirs = _numbers(experiment.slices(mesh, state)[number]), _numbers(expected)
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_allclose(
                mine[name], theirs[name], rtol=1e-6, atol=1e-6, err_msg=f"{label} {name}"
            )
    ends = {_numbers(each)[".params['w']"].tobytes() for each in experiment.slices(mesh, state)}
    assert len(ends) == 6


def test_metrics_have_the_mean_and_each_replica(grid):
    _, experiment, _, workdir = grid
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for split, name in (("train", "loss"), ("validation", "norm")):
        line = next(line for line in lines if f"{split}/{name}" in line)
        of_each = [line[f"{split}/{name}@{label}"] for label in experiment.labels]
        assert len(set(of_each)) == 6
        assert line[f"{split}/{name}"] == pytest.approx(np.mean(of_each), rel=1e-5)


def test_going_on_gives_the_same_bits(grid, tmp_path):
    config, _, state, workdir = grid
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    _, again = _train(config, tmp_path / "run", sharding.make_mesh())
    for name, array in _numbers(state).items():
        np.testing.assert_array_equal(_numbers(again)[name], array, err_msg=name)


def test_samples_are_drawn_with_each_seed_s_key(grid, tmp_path):
    _, experiment, state, _ = grid
    mesh = sharding.make_mesh()
    key = replicas.run_key(experiment, mesh, 7)
    paths = loop.write_samples(experiment, mesh, state, key, 0, tmp_path)
    assert [path.parent.name for path in paths] == [str(label) for label in experiment.labels]
    for path, part in zip(paths, experiment.parts, strict=True):
        alone = jax.random.fold_in(jax.random.key(part.seed), 7)
        assert path.read_text() == str(jax.random.key_data(alone).tolist())


def test_a_replica_that_is_not_finite_is_named(tmp_path):
    config = small_config(sweep="optim.learning_rate:0.01,1e38", optim__clip_norm=0.0, train__num_steps=20)
    with pytest.raises(UserError, match=r"of replica optim.learning_rate=1e\+38 is not finite"):
        _train(config, tmp_path, sharding.make_mesh())


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("train.num_steps:4,8", "group train"),
        ("optim.weight_decay:0,0.1", "cannot be trained in one program"),
    ],
)
def test_a_sweep_of_what_is_not_one_program_is_refused(sweep, words):
    mesh = sharding.make_mesh()

    def trace():
        experiment = session.build(MODULE, small_config(sweep=sweep), mesh)
        loop.abstract_update(experiment, loop.abstract_state(experiment, mesh))

    with pytest.raises(UserError, match=words):
        trace()


def test_batches_of_different_shapes_are_refused():
    parts = [types.SimpleNamespace(train_batch=lambda step, n=n: {"x": np.zeros(n)}) for n in (2, 3)]
    with pytest.raises(UserError, match="different shapes at step 7"):
        replicas._stacked_batch([Label("", 0), Label("", 1)], parts, 7)


ON_DEVICES = """
import pathlib, sys
import numpy as np, jax
sys.path.insert(0, "tests/core"); sys.path.insert(0, "tests")
import test_replicas as tests
from jaxgen import sharding
sharding.initialize(distributed=False)
for number, folder in ((4, "over_replicas"), (3, "over_rows")):
    config = tests.small_config(num_seeds=number)
    experiment, state = tests._train(config, pathlib.Path(sys.argv[1]) / folder, sharding.make_mesh())
    share = state.params["w"].addressable_shards[0].data.size / state.params["w"].size
    np.savez(f"{sys.argv[1]}/{folder}.npz", share=share, **tests._numbers(state))
"""


def test_replicas_are_dealt_to_devices_or_their_rows_are(tmp_path):
    """4 replicas over 4 devices, and 3, which do not divide; to 1e-6, as sums over rows may be reordered."""
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=1"
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(XLA_FLAGS=flags),
    )
    assert done.returncode == 0, done.stderr
    for number, folder, share in ((4, "over_replicas", 1 / 4), (3, "over_rows", 1)):
        _, state = _train(small_config(num_seeds=number), tmp_path / f"here{number}", sharding.make_mesh())
        there = np.load(tmp_path / f"{folder}.npz")
        assert there["share"] == share
        for name, array in _numbers(state).items():
            np.testing.assert_allclose(there[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_the_command_with_seeds(tmp_path, capsys):
    """A classifier of digits, as a user starts it: scores of three seeds in the result and in the report."""
    command = ["jaxgen.run", "--config=experiments/classifier.py:smoke", f"--workdir={tmp_path}"]
    assert entry.main([*command, "--config.num_seeds=3"]) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "result.json").read_text())
    singles = [result[f"test_accuracy@seed={seed}"]["value"] for seed in range(3)]
    assert result["test_accuracy"]["value"] == pytest.approx(np.mean(singles))
    assert result["test_accuracy_spread"]["value"] == pytest.approx(np.std(singles, ddof=1))
    assert result["test_accuracy_spread"]["n"] == 3
    assert json.loads((tmp_path / "config.json").read_text())["config"]["num_seeds"] == 3
    page = (tmp_path / "report.html").read_text()
    assert "±" in page
    assert "seed=2" in page


def test_a_run_from_before_the_fields_goes_on(tmp_path):
    """Its config.json has neither num_seeds nor sweep, which then are what they were: one run."""
    old = small_config().to_dict()
    del old["num_seeds"], old["sweep"]
    content = {"experiment": "experiments/x.py", "preset": "y", "config": old}
    (tmp_path / "config.json").write_text(json.dumps(content))
    session._check_same_config(tmp_path, "experiments/x.py:y", small_config().to_dict())
    with pytest.raises(UserError, match="num_seeds is 1 there and 2 now"):
        session._check_same_config(tmp_path, "experiments/x.py:y", small_config(num_seeds=2).to_dict())


@pytest.mark.slow
def test_ddpm_seeds_are_the_runs_alone(tmp_path):
    """To 1e-6 after 2 updates: convolutions of replicas are grouped, and summed in another order."""
    module, mesh = cli.load_experiment("experiments/ddpm.py").module, sharding.make_mesh()
    config = module.get_config("smoke")
    config.update_from_flattened_dict(
        {"num_seeds": 2, "train.num_steps": 2, "evaluation.classifier": "", "evaluation.num_likelihood": 16}
    )
    whole = session.build(module, config, mesh)
    state = loop.train(whole, tmp_path / "whole", mesh, show_progress=False)
    for number, one in enumerate(cli.replica_configs(config).values()):
        alone = loop.train(module.build(one, mesh), tmp_path / str(number), mesh, show_progress=False)
        mine = whole.slices(mesh, state)[number]
        for name, array in _numbers(alone).items():
            np.testing.assert_allclose(_numbers(mine)[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
