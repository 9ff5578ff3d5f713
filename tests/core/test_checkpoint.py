"""Checkpoints: what goes in comes out; what was damaged is noticed, passed over and set aside."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxgen import sharding
from jaxgen.checkpoint import Checkpoints, leaf_digest
from jaxgen.types import Mean, TrainState, UserError


def _state(step, width=400):
    key = jax.random.fold_in(jax.random.key(7), step)
    params = {"w": jax.random.normal(key, (width, 3)), "b": jnp.full(3, step, jnp.bfloat16)}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        model_state={"count": jnp.int32(step)},
        opt_state=(jax.tree.map(jnp.ones_like, params), jnp.int32(3)),
        ema=jax.tree.map(lambda p: p * 2, params),
        key=jax.random.key(5),
    )


def _abstract(state):
    where = sharding.replicated(sharding.make_mesh())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state)


def _plain(tree):
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf,
        tree,
    )


def _largest_file(directory):
    files = [path for path in directory.rglob("*") if path.is_file() and path.parent.name == "d"]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.fixture
def three(tmp_path):
    """Checkpoints 0, 1 and 2 of a run, and the messages that reading them gave."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in range(3):
        checkpoints.save(_state(step))
    checkpoints.close()
    return tmp_path / "checkpoints"


def _reopen(directory, **kwargs):
    messages = []
    return Checkpoints(directory, keep=3, report=messages.append, **kwargs), messages


def test_every_leaf_comes_back_bit_for_bit(three):
    checkpoints, messages = _reopen(three)
    restored = checkpoints.restore(_abstract(_state(0)))
    checkpoints.close()
    chex.assert_trees_all_equal(_plain(restored), _plain(_state(2)))
    chex.assert_trees_all_equal_dtypes(_plain(restored), _plain(_state(2)))
    assert messages == []


def test_nothing_saved_gives_none(tmp_path):
    checkpoints, _ = _reopen(tmp_path / "checkpoints")
    assert checkpoints.restore(_abstract(_state(0))) is None
    checkpoints.close()


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpoints, _ = _reopen(tmp_path / "checkpoints")
    state = _state(0)
    expected = jax.device_get(_plain(state))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    checkpoints.save(state)
    overwrite(state.params)
    restored = checkpoints.restore(_abstract(_state(0)))
    checkpoints.close()
    chex.assert_trees_all_equal(_plain(restored), expected)


def test_only_the_writer_removes_what_is_half_saved(three):
    """A reader beside a training run must leave the save that is under way alone."""
    half_saved = three / "3.orbax-checkpoint-tmp"
    half_saved.mkdir()
    reader, _ = _reopen(three)
    assert int(reader.restore(_abstract(_state(0))).step) == 2
    reader.close()
    assert half_saved.is_dir()
    writer, _ = _reopen(three, writing=True)
    writer.save(_state(4))
    writer.close()
    assert not half_saved.exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "metadata", "shape", "key"])
def test_a_damaged_newest_checkpoint_falls_back_and_is_set_aside(three, damage):
    newest = three / "2"
    victim = _largest_file(newest)
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 4
        victim.write_bytes(bytes(content))
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    elif damage == "delete":
        victim.unlink()
    elif damage == "metadata":
        (newest / "meta" / "metadata").write_text("{")
    else:
        good, bad = {"shape": ("400", "401"), "key": ('"dtype"', '"dtypd"')}[damage]
        description = (newest / "meta" / "metadata").read_text()
        assert good in description
        (newest / "meta" / "metadata").write_text(description.replace(good, bad, 1))
    checkpoints, messages = _reopen(three)
    restored = checkpoints.restore(_abstract(_state(0)), set_aside=True)
    assert int(restored.step) == 1
    assert "Checkpoint 2" in messages[0]
    assert "checkpoint 1 instead" in messages[1]
    assert (three.parent / "checkpoints_damaged" / "2").is_dir()
    checkpoints.save(_state(2))
    checkpoints.wait()
    chex.assert_trees_all_equal(_plain(checkpoints.restore(_abstract(_state(0)))), _plain(_state(2)))
    checkpoints.close()


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")]
)
def test_running_out_of_memory_is_no_damage(three, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", full)
    checkpoints, messages = _reopen(three)
    with pytest.raises(type(error)):
        checkpoints.restore(_abstract(_state(0)), set_aside=True)
    checkpoints.close()
    assert messages == []
    assert (three / "2").is_dir()


def test_every_checkpoint_damaged_is_an_error_and_loses_nothing(three):
    for step in range(3):
        _largest_file(three / str(step)).write_bytes(b"")
    checkpoints, _ = _reopen(three)
    with pytest.raises(UserError, match="Every checkpoint"):
        checkpoints.restore(_abstract(_state(0)), set_aside=True)
    checkpoints.close()
    assert sorted(path.name for path in three.iterdir() if path.is_dir()) == ["0", "1", "2"]


@pytest.mark.parametrize("content", ["[]", '{"item_handlers": 7}'])
def test_a_description_that_orbax_did_not_write_may_be_deleted(three, content):
    (three / "2" / "_CHECKPOINT_METADATA").write_text(content)
    with pytest.raises(UserError, match=r"_CHECKPOINT_METADATA .* delete it"):
        _reopen(three)
    (three / "2" / "_CHECKPOINT_METADATA").unlink()
    checkpoints, messages = _reopen(three)
    chex.assert_trees_all_equal(_plain(checkpoints.restore(_abstract(_state(0)))), _plain(_state(2)))
    checkpoints.close()
    assert messages == []


@pytest.mark.parametrize("content", [b"", b'{"loss": 1\xff'])
def test_damaged_metrics_may_be_deleted(tmp_path, content):
    options = {"keep": 3, "best_metric": "loss"}
    checkpoints = Checkpoints(tmp_path / "c", **options)
    for step in range(3):
        checkpoints.save(_state(step), {"loss": Mean(jnp.float32(step), jnp.float32(1.0))})
    checkpoints.close()
    damaged = tmp_path / "c" / "0" / "metrics" / "metrics"
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=rf"{damaged} is not what was saved .* delete it"):
        Checkpoints(tmp_path / "c", **options)
    damaged.unlink()
    checkpoints = Checkpoints(tmp_path / "c", **options)
    assert int(checkpoints.restore(_abstract(_state(0)), "best").step) == 1
    assert int(checkpoints.restore(_abstract(_state(0))).step) == 2
    checkpoints.close()


def test_another_models_checkpoint_is_refused_by_name(three):
    checkpoints, _ = _reopen(three)
    with pytest.raises(UserError, match=r"another model: .*params.*'w'.*float32\[400, 3\].*float32\[5, 3\]"):
        checkpoints.restore(_abstract(_state(0, width=5)))
    checkpoints.close()


@pytest.mark.parametrize(("higher", "best"), [(False, 1), (True, 3)])
def test_newest_and_best_are_kept(tmp_path, higher, best):
    options = {"keep": 2, "best_metric": "loss", "best_is_higher": higher}
    checkpoints = Checkpoints(tmp_path / "c", **options)
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 2.5, 2.6]):
        checkpoints.save(_state(step), {"loss": Mean(jnp.float32(loss), jnp.float32(1.0))})
    checkpoints.wait()
    assert checkpoints.steps() == [best, 4, 5]
    assert int(checkpoints.restore(_abstract(_state(0)), "best").step) == best
    assert int(checkpoints.restore(_abstract(_state(0)), "newest").step) == 5
    checkpoints.close()


def test_saves_without_the_metric_are_not_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1, best_metric="loss")
    checkpoints.save(_state(0), {"loss": Mean(jnp.float32(1.0), jnp.float32(1.0))})
    for step in (1, 2, 3):
        checkpoints.save(_state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [0, 3]
    checkpoints.close()


@pytest.mark.parametrize("higher", [False, True])
def test_a_validation_that_is_not_finite_is_not_the_best(tmp_path, higher):
    checkpoints = Checkpoints(tmp_path / "c", keep=1, best_metric="loss", best_is_higher=higher)
    for step, loss in enumerate([2.0, 1.0, 3.0, np.nan, np.inf, -np.inf, 2.5]):
        checkpoints.save(_state(step), {"loss": Mean(jnp.float32(loss), jnp.float32(1.0))})
    checkpoints.wait()
    best = 2 if higher else 1
    assert checkpoints.steps() == [best, 6]
    assert int(checkpoints.restore(_abstract(_state(0)), "best").step) == best
    checkpoints.close()


def test_what_would_be_the_best_is_known(tmp_path):
    def metrics(loss):
        return {"loss": Mean(jnp.float32(loss), jnp.float32(1.0))}

    checkpoints = Checkpoints(tmp_path / "c", keep=1, best_metric="loss")
    assert checkpoints.is_best(metrics(3.0))
    assert not checkpoints.is_best(metrics(np.nan))
    assert not checkpoints.is_best({})
    checkpoints.save(_state(0), metrics(3.0))
    checkpoints.save(_state(1), metrics(4.0))
    assert [checkpoints.is_best(metrics(loss)) for loss in (3.5, 3.0, 2.5)] == [False, False, True]
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "c", keep=1, best_metric="loss")
    assert [checkpoints.is_best(metrics(loss)) for loss in (3.5, 3.0, 2.5)] == [False, False, True]
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    assert not checkpoints.is_best(metrics(2.5))
    checkpoints.close()


def test_there_is_no_best_without_a_value(three):
    checkpoints, _ = _reopen(three, best_metric="loss")
    with pytest.raises(UserError, match=r"No checkpoint has a value of train.best_metric yet"):
        checkpoints.restore(_abstract(_state(0)), "best")
    checkpoints.close()


def test_a_damaged_best_is_told_from_all_damaged(tmp_path):
    checkpoints, messages = _reopen(tmp_path / "c", best_metric="loss")
    for step in range(2):
        checkpoints.save(_state(step), {"loss": Mean(jnp.float32(step), jnp.float32(1.0))})
    checkpoints.wait()
    _largest_file(tmp_path / "c" / "0").write_bytes(b"")
    with pytest.raises(UserError, match=r"The best checkpoint is damaged: use --checkpoint=newest"):
        checkpoints.restore(_abstract(_state(0)), "best")
    assert "Checkpoint 0" in messages[0]
    checkpoints.close()


def test_description_is_json_without_code(three):
    meta = json.loads((three / "2" / "meta" / "metadata").read_text())
    assert meta["leaves"][".params['w']"]["shape"] == [400, 3]
    assert not [path for path in three.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_every_single_bit_flip_changes_the_digest(dtype):
    """Brute force: all bits of a small array."""
    array = np.asarray(jax.random.bits(jax.random.key(0), (7,), jnp.uint32)).view(np.uint8)
    values = (
        array[: 28 if jnp.dtype(dtype).itemsize == 4 else 14].view(jnp.dtype(dtype))
        if dtype != "bool"
        else (array[:14] % 2).astype(bool)
    )
    before = np.asarray(leaf_digest(jnp.asarray(values)))
    digest = jax.jit(leaf_digest)
    raw = values.view(np.uint8)
    for byte in range(raw.size):
        for bit in range(1 if dtype == "bool" else 8):
            flipped = raw.copy()
            flipped[byte] ^= 1 << bit
            assert (np.asarray(digest(jnp.asarray(flipped.view(values.dtype)))) != before).all()


def test_digest_sees_swapped_elements():
    digest = lambda values: tuple(np.asarray(leaf_digest(jnp.float32(values))))
    assert len({digest(order) for order in ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0])}) == 3
