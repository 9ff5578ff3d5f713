"""Every field of every experiment's config changes what it names; a field that changes nothing fails.

The experiment is built and all that it would compute is traced but not computed: `jax.jit` is replaced by a
stand-in that writes down the program (operations, literals, constants) and hands back made-up numbers. Two
configs that differ in one field must differ in what was written down, in their batches, or in the settings of
the loop (whose effects tests/core/test_loop.py looks at).
"""

import contextlib
import functools
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import experiment_params, is_slow
from inception_weights import write_blank_weights

from experiments import common
from experiments.common import judging
from jaxgen import cli, loop, recorded, session, sharding

NAMES = experiment_params()


def _hash_constants(jaxpr, digest):
    """Adds the values of all closed-over arrays, those of inner programs included."""
    for constant in jaxpr.consts:
        if isinstance(constant, jax.Array | np.ndarray) and not jnp.issubdtype(
            constant.dtype, jax.dtypes.prng_key
        ):
            digest.update(np.asarray(constant).tobytes())
    for equation in jaxpr.jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    _hash_constants(inner, digest)


def _program(function, *args):
    """A hash of the traced program with its literals and constants, and the shapes it returns."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(jaxpr)).encode())
    _hash_constants(jaxpr, digest)
    return digest.hexdigest(), shapes


def _made_up(shape):
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape.shape)
    return jnp.full(shape.shape, 0.5, shape.dtype)


class _Judge:
    """In place of the judge, whose numbers would be nonsense on made-up images."""

    def __init__(self, written, *args, **kwargs):
        self.written = written
        written.append(f"judge {[arg.name for arg in args if isinstance(arg, judging.Eye)]} {kwargs}")

    def scores(self, samples):
        self.written.append(f"samples {samples.shape}")
        return {}


@contextlib.contextmanager
def _only_traced(written, monkeypatch):
    """Inside, what jax.jit and the judge are given is written down instead of computed.

    written: returns the list to write to at the time of the call
    """

    def traced_only(function=None, **options):
        if function is None:
            return lambda f: traced_only(f, **options)

        def call(*args):
            program, shapes = _program(function, *args)
            written().append(program)
            return jax.tree.map(_made_up, shapes)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", traced_only)
        patch.setattr(judging, "ImageJudge", lambda *a, **k: _Judge(written(), *a, **k))
        yield


class _Observed:
    """What an experiment built from this config would do, each part as text, worked out when asked for."""

    PARTS = ("build", "init", "step", "samples", "evaluate", "validate")

    def __init__(self, module, config, folder, monkeypatch):
        self._module, self._folder, self._monkeypatch = module, folder, monkeypatch
        self._parts = {}
        with self._writing("build") as written:
            self._experiment = experiment = session.build(module, config, sharding.make_mesh())
            self._batch = experiment.train_batch(0)
            needs = [
                (name, need.source, need.config, need.workdir) for name, need in experiment.needs.items()
            ]
            written += [
                f"{experiment.loop} {experiment.seed} {sorted(experiment.data_fingerprints.items())} {needs}",
                *(f"{name} {field.shape} {field.tobytes()!r}" for name, field in self._batch.items()),
            ]

    @contextlib.contextmanager
    def _writing(self, part):
        self._written = self._parts[part] = []
        with _only_traced(lambda: self._written, self._monkeypatch):
            yield self._written

    def __getitem__(self, part):
        if part not in self._parts:
            with self._writing(part) as written:
                getattr(self, f"_{part}")(written)
        return self._parts[part]

    @functools.cached_property
    def _init_program(self):
        return _program(self._experiment.system.init, jax.random.key(0), self._batch)

    @property
    def _state(self):
        return jax.tree.map(_made_up, self._init_program[1])

    def _init(self, written):
        written += [self._init_program[0], str(self._init_program[1])]

    def _step(self, written):
        written.append(_program(self._experiment.system.step, self._init_program[1], self._batch)[0])

    def _validate(self, written):
        self._experiment.validate(self._state)

    def _samples(self, written):
        files = self._experiment.write_samples(self._state, jax.random.key(0), 0, self._folder)
        written.append(str([(path.name, path.read_bytes()[:40]) for path in files]))

    def _evaluate(self, written):
        def trained(system, batch):
            return jax.tree.map(_made_up, jax.eval_shape(system.init, jax.random.key(0), batch))

        needed = {
            name: trained(need.experiment.system, need.experiment.train_batch(0))
            for name, need in self._experiment.needs.items()
        }
        self._experiment.evaluate(self._state, needed)


def _parts_for(field):
    """All parts, those first in which this field is most likely to be seen."""
    likely = {
        "optim": ("build", "step"),
        "sampling": ("build", "samples"),
        "evaluation": ("build", "evaluate"),
    }.get(field.split(".")[0], ())
    return sorted(_Observed.PARTS, key=lambda part: (part not in likely, _Observed.PARTS.index(part)))


def _other_value(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value if value else 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    raise NotImplementedError(f"give a value for it in FIELD_CHECKS (it is {value!r})")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Other images of the digits' shape, other words, a network's weights, and a trained run."""
    path = tmp_path_factory.mktemp("images")
    (path / "words.txt").write_text("The quick brown fox jumps over the lazy dog\n" * 40)
    (path / "text.txt").write_text("a rose is a rose is a rose\nno rose is a daisy\n" * 60)
    (path / "others.txt").write_text("To be or not to be that is the question\n" * 40)
    rng = np.random.default_rng(0)
    np.savez(
        path / "images.npz",
        image=rng.integers(0, 256, (80, 8, 8, 1), dtype=np.uint8),
        label=np.arange(80, dtype=np.int32) % 10,
    )
    write_blank_weights(path / "inception.safetensors")
    run = path / "denoiser_run"  # all that is read of it before it is needed
    run.mkdir()
    (run / "config.json").write_text('{"experiment": "experiments/ddpm.py", "preset": "smoke", "config": {}}')
    return path


def _fields():
    for name in cli.experiment_names():
        config = cli.load_experiment(f"experiments/{name}.py").module.get_config("smoke")
        for field in recorded.flatten(config.to_dict()):
            marks = [pytest.mark.slow] if is_slow(name) else []
            yield pytest.param(name, field, id=f"{name}:{field}", marks=marks)


@functools.cache
def _module(name):
    return cli.load_experiment(f"experiments/{name}.py").module


_SEEN = {}


@pytest.mark.parametrize(("name", "field"), list(_fields()))
def test_changing_a_field_changes_what_is_done(name, field, folder, tmp_path, monkeypatch):
    module = _module(name)

    def observed(settings):
        config = module.get_config("smoke")
        config.update_from_flattened_dict(settings)
        return _Observed(module, config, tmp_path, monkeypatch)

    flat = recorded.flatten(module.get_config("smoke").to_dict())
    checks = {"sweep": common.FIELD_CHECKS["sweep"], **getattr(module, "FIELD_CHECKS", {})}
    value, context = checks.get(field, (None, {}))
    value = _other_value(flat[field]) if value is None else value
    changes = value if isinstance(value, dict) else {field: value}
    fill = lambda value: value.format(folder=folder) if isinstance(value, str) else value
    changes, context = (
        {name: fill(value) for name, value in values.items()} for values in (changes, context)
    )
    before = (name, str(sorted(context.items())))
    if all(seen != name for seen, _ in _SEEN):  # another experiment's programs are of no more use
        _SEEN.clear()
        jax.clear_caches()
    if before not in _SEEN:
        _SEEN[before] = observed(context)
    changed = observed({**context, **changes})
    if all(changed[part] == _SEEN[before][part] for part in _parts_for(field)):
        pytest.fail(f"{changes} changes nothing")


def _all_parts(observed):
    return {part: observed[part] for part in _Observed.PARTS}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_config_is_seen_to_do_the_same(name, tmp_path, monkeypatch):
    """Without this, noise in what is written down would hide an unused field."""
    config = _module(name).get_config("smoke")
    first, second = (_all_parts(_Observed(_module(name), config, tmp_path, monkeypatch)) for _ in range(2))
    assert first == second
    assert any(first.values())


def test_an_unused_field_is_caught(tmp_path, monkeypatch):
    module = _module("classifier")
    config, changed = module.get_config("smoke"), module.get_config("smoke")
    for which, value in ((config, 1), (changed, 2)):
        with which.unlocked():
            which.model.unused = value
    seen = [_all_parts(_Observed(module, which, tmp_path, monkeypatch)) for which in (config, changed)]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_has_a_config_of_the_same_fields(name):
    module = cli.load_experiment(f"experiments/{name}.py").module
    fields = set(recorded.flatten(module.get_config("smoke").to_dict()))
    for preset in module.PRESETS:
        assert set(recorded.flatten(module.get_config(preset).to_dict())) == fields
    assert not [check for check in getattr(module, "FIELD_CHECKS", {}) if check not in fields]


@pytest.mark.parametrize(
    ("name", "preset", "field", "value"),
    [
        # yang-song/score_sde: eps of losses.py and likelihood.py.
        ("score_sde", "cifar10", "sde.t_min", 1e-5),
        # ermongroup/ncsn: torch.optim.Adam of configs/anneal.yml, with no schedule.
        ("ncsn", "mnist", "optim.warmup_steps", 0),
        ("ncsn", "cifar10", "optim.warmup_steps", 0),
    ],
)
def test_a_preset_has_the_setting_whose_published_score_it_quotes(name, preset, field, value):
    config = cli.load_experiment(f"experiments/{name}.py").module.get_config(preset)
    assert recorded.flatten(config.to_dict())[field] == value


def test_a_preset_that_quotes_an_fid_says_against_which_images_and_what_it_needs():
    """Judges compare with the held-out images, the published runs of these with the training images."""
    for name in ("ddpm", "ncsn", "score_sde"):
        expected = cli.load_experiment(f"experiments/{name}.py").module.PRESETS["cifar10"].expected
        assert "against the training images" in expected
        assert "needs evaluation.inception" in expected


def test_the_cifar10_preset_is_the_published_network(tmp_path):
    """35.7 million parameters (Ho et al. 2020, appendix B); only the shape of the data matters here."""
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", image=images, label=np.arange(40, dtype=np.int32) % 10)
    module = cli.load_experiment("experiments/ddpm.py").module
    config = module.get_config("cifar10")
    config.data.source = f"npz:{tmp_path}/images.npz"
    config.evaluation.classifier = ""
    mesh = sharding.make_mesh()
    state = loop.abstract_state(module.build(config, mesh), mesh)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 35_746_307
