"""Every parser of data from outside: whatever it is given, it is read as it stands or refused in a sentence.

Parsers with tests of their own like these: the command line (tests/core/test_cli.py), word2vec files
(tests/interop/test_word2vec_files.py), .npz files and folders of images (tests/data/test_files.py,
test_folder.py), IDX files (test_originals.py). Corpora and photographs from the network are read only where
their sha256 is the published one.
"""

import contextlib
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments import hypernyms
from experiments.common import trained_runs
from jaxgen import cli, operators, recorded, session, sharding, workdir
from jaxgen.checkpoint import Checkpoints
from jaxgen.data import captioned_scenes, texts
from jaxgen.interop import safetensors
from jaxgen.metrics import words as judges
from jaxgen.types import TrainState, UserError
from jaxgen.words.text import count_words

examples = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Lines that are nearly right, and bytes that are not.
FIELDS = st.text(alphabet=st.sampled_from("ab 1.0\u2028\r\x00é:"), max_size=6)
LINES = st.lists(st.lists(FIELDS, max_size=5).map("\t".join), max_size=5).map("\n".join)
BYTES = st.one_of(LINES.map(str.encode), st.binary(max_size=40))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner)),
    max_leaves=8,
)


def refused_or(function, *args):
    """What the function gives, or None where it refuses; another exception fails the test."""
    with contextlib.suppress(UserError):
        return function(*args)
    return None


# ---- config


@examples
@given(
    st.sampled_from(["optim.lr", "optim.learning_rate", "data.batch_size", "optim", "no.such", "seed", ""]),
    st.sampled_from([":", "=", "", "::"]),
    st.lists(st.one_of(st.text(max_size=4), st.sampled_from(["1", "2", "1e-3", "nan", "٣"])), max_size=4),
    st.integers(-2, 3),
)
def test_sweeps(name, between, values, num_seeds):
    config = cli.load_experiment("experiments/classifier.py").module.get_config("smoke")
    config.sweep, config.num_seeds = name + between + ",".join(values), num_seeds
    configs = refused_or(cli.replica_configs, config)
    if configs:
        assert len({str(label) for label in configs}) == len(configs)
        assert len({json.dumps(each.to_dict()) for each in configs.values()}) == len(configs)


# ---- text


@examples
@given(BYTES)
def test_user_text(tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    text = refused_or(texts.read_user_text, str(tmp_path / "text"))
    if text is not None:
        assert text.encode() == content.removeprefix(b"\xef\xbb\xbf")


@examples
@given(LINES)
def test_tsv_of_pairs(text):
    found = refused_or(texts.parse_tsv, text, "file")
    if found is not None:
        rows = [row for row in texts.lines_of(text) if row.strip()]
        assert [list(pair) for pair in zip(*found, strict=True)] == [row.split("\t")[:2] for row in rows]


@examples
@given(LINES, LINES, st.sampled_from(["train", "validation", "test"]))
def test_line_parallel_pairs(tmp_path, source, target, split):
    paths = [tmp_path / name for name in ("source", "target")]
    for path, text in zip(paths, (source, target), strict=True):
        path.write_bytes(text.encode())
    pairs = refused_or(texts.load_pairs, f"lines:{paths[0]},{paths[1]}", split)
    if pairs is not None:
        assert len(pairs.source) == len(pairs.target) > 0
        assert all(each.strip() for each in (*pairs.source, *pairs.target))


@examples
@given(BYTES, st.integers(1, 7))
def test_words_are_counted_alike_in_pieces_of_any_size(tmp_path, content, chunk_bytes):
    path = tmp_path / "text"
    path.write_bytes(content)
    whole = refused_or(count_words, path)
    in_pieces = refused_or(lambda: count_words(path, chunk_bytes=chunk_bytes))
    assert in_pieces == whole
    if whole is not None:
        text = content.removeprefix(b"\xef\xbb\xbf").decode()
        assert sum(whole.values()) == len(text.split())


@examples
@given(LINES)
def test_pairs_of_hypernyms(tmp_path, text):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(text.encode())
    vectors = {"a": np.ones(2), "b": np.zeros(2)}
    found = refused_or(hypernyms._own_pairs, path, vectors)
    if found is not None:
        pairs, labels = found
        assert len(pairs) == len(labels)
        assert all(len(pair) == 2 for pair in pairs)


@examples
@given(BYTES)
def test_questions_and_similarities(tmp_path, content):
    path = tmp_path / "judge.txt"
    path.write_bytes(content)
    for read in (judges.read_analogies, judges.read_similarities):
        refused_or(read, path)


# ---- images and arrays


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a picture for training and one for testing."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(folder / f"{number}.png")
    return folder


@examples
@given(
    st.lists(
        st.tuples(st.sampled_from([*(f"{n}.png" for n in range(40)), "captions.tsv", ".", "x"]), FIELDS),
        max_size=40,
    ),
    st.sampled_from(["\t", " ", "\t\t"]),
)
def test_captions(pictures, rows, between):
    text = "\n".join(f"{name}{between}{caption}" for name, caption in rows)
    (pictures / "captions.tsv").write_bytes(text.encode())
    found = refused_or(captioned_scenes.load_captioned_folder, str(pictures), "train")
    if found is not None:
        source, captions = found
        assert source.fields["image"].shape[1:] == (4, 4, 1)
        assert len(source.fields["image"]) == len(captions)


@examples
@given(st.binary(max_size=30), st.integers(0, 200), st.integers(1, 255))
def test_a_damaged_safetensors_file(tmp_path, noise, place, change):
    path = tmp_path / "x.safetensors"
    safetensors.write_tensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= change
    for damaged in (bytes(content), bytes(content[:place]), noise):
        path.write_bytes(damaged)
        found = refused_or(safetensors.read_tensors, path)
        assert found is None or all(isinstance(array, np.ndarray) for array in found.values())


@examples
@given(
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.one_of(st.floats(width=32), st.just(0.1)),
)
def test_kernels(shape, value):
    kernel = refused_or(operators.check_kernel, np.full(shape, value))
    if kernel is not None:
        assert kernel.ndim in (2, 3)
        assert all(side % 2 for side in kernel.shape[-2:])
        assert np.isfinite(kernel).all()


# ---- what a run left


def _object(**values):
    return st.one_of(
        JSON, st.fixed_dictionaries({name: st.one_of(JSON, each) for name, each in values.items()})
    )


RUN = _object(
    experiment=st.sampled_from(["experiments/ddpm.py", "../../os", "word2vec"]),
    preset=st.sampled_from(["smoke", "none"]),
    config=st.fixed_dictionaries({"model": JSON, "seed": JSON}),
)


@examples
@given(st.one_of(JSON, RUN))
def test_config_json_of_another_run(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    for read in (trained_runs.read_run, trained_runs.read_denoiser_run):
        run = refused_or(read, str(tmp_path))
        assert run is None or run.module.__name__ == f"experiments.{Path(run.experiment).stem}"
    refused_or(session._read_config, tmp_path)


@examples
@given(
    st.one_of(BYTES, st.lists(JSON, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
)
def test_metrics_and_results(tmp_path, content):
    for name in ("metrics.jsonl", "result.json", "record.json"):
        (tmp_path / name).write_bytes(content)
    curves = refused_or(workdir.read_metrics, tmp_path)
    assert curves is None or all(isinstance(step, int) for curve in curves.values() for step, _ in curve)
    refused_or(workdir.read_result, tmp_path)
    refused_or(recorded._read_record, tmp_path / "record.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a folder with the checkpoint of one state, the state)."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    params = {"w": jnp.arange(6.0), "b": jnp.ones(3, jnp.bfloat16)}
    state = TrainState(jnp.int32(4), params, {}, (), None, jax.random.key(5))
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(state)
    checkpoints.close()
    return folder, state


@settings(examples, max_examples=20)
@given(st.data())
def test_a_damaged_checkpoint_gives_the_saved_state_or_none(saved, tmp_path, data):
    """Any byte of any of its files changed, any file cut short, or our description of the arrays another."""
    folder, state = saved
    copy = tmp_path / "checkpoints"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    path = data.draw(st.sampled_from(sorted(path for path in copy.rglob("*") if path.is_file())))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, max(len(content) - 1, 0)))
    if path.parent.name == "meta" and data.draw(st.booleans()):
        content = json.dumps(data.draw(JSON)).encode()
    elif content and data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        content = content[:place]
    path.write_bytes(content)
    where = sharding.replicated(sharding.make_mesh())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state)
    checkpoints = Checkpoints(copy, keep=2, report=lambda message: None)
    with contextlib.suppress(UserError):
        found = checkpoints.restore(abstract)
        if found is not None:
            plain = [each._replace(key=jax.random.key_data(each.key)) for each in (found, state)]
            chex.assert_trees_all_equal(*plain)
    checkpoints.close()
