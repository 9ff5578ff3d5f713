import numpy as np
import pytest

from jaxgen.data import Source, Stream, evaluation_batches, load_source
from jaxgen.types import UserError


def numbered(n):
    """A source whose record i is an image of value i and has label i."""
    image = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 9, 8, 3), np.uint8)
    return Source("numbered", "train", {"image": image, "label": np.arange(n, dtype=np.int32)}, n, 256)


def labels(stream, steps):
    return np.concatenate([stream(step)["label"] for step in steps])


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 23])
def test_the_stream_is_the_concatenation_of_one_permutation_an_epoch(batch_size):
    n = 10
    stream = Stream(numbered(n), batch_size=batch_size, seed=3)
    seen = labels(stream, range(60 // batch_size + 2))
    by_hand = np.concatenate([np.random.default_rng([3, epoch]).permutation(n) for epoch in range(12)])
    np.testing.assert_array_equal(seen, by_hand[: len(seen)])
    # What that gives: every epoch shows each record once, and epochs differ.
    epochs = seen[: len(seen) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1)))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_steps_per_epoch_rounds_up():
    assert [Stream(numbered(10), batch_size=b, seed=0).steps_per_epoch for b in (1, 5, 6, 10, 11)] == [
        10, 2, 2, 1, 1,
    ]  # fmt: skip


def test_a_batch_depends_on_seed_and_step_alone():
    source = load_source("digits", "train")
    stream = Stream(source, batch_size=32, seed=1, augment=("flip", "crop4"))
    in_order = [stream(step) for step in range(100)]
    for step in (99, 3, 44, 45, 44, 0):  # 45 is the first step that reaches into the second epoch
        again = Stream(source, batch_size=32, seed=1, augment=("flip", "crop4"))(step)
        for field, value in again.items():
            np.testing.assert_array_equal(value, in_order[step][field])
            np.testing.assert_array_equal(value, stream(step)[field])
    other = Stream(source, batch_size=32, seed=2, augment=("flip", "crop4"))(0)
    assert (other["image"] != in_order[0]["image"]).any()


def test_a_far_step_costs_no_more_than_a_near_one():
    stream = Stream(numbered(10), batch_size=4, seed=0)
    far = stream(10**12)  # would take days if it walked there
    epoch, start = divmod(4 * 10**12, 10)
    np.testing.assert_array_equal(
        far["label"], np.random.default_rng([0, epoch]).permutation(10)[start : start + 4]
    )


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_see_the_one_process_batch(process_count):
    source = load_source("digits", "train")
    arguments = {"batch_size": 24, "seed": 5, "augment": ("crop4", "flip")}
    whole = Stream(source, **arguments)
    parts = [
        Stream(source, process_index=i, process_count=process_count, **arguments)
        for i in range(process_count)
    ]
    for step in (0, 7, 59, 60):
        shares = [part(step) for part in parts]
        for field, value in whole(step).items():
            np.testing.assert_array_equal(np.concatenate([share[field] for share in shares]), value)


def test_batches_have_the_declared_types_and_ranges():
    batch = Stream(load_source("digits", "train"), batch_size=200, seed=0)(0)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((200, 8, 8, 1), "float32"),
        "label": ((200,), "int32"),
    }
    assert batch["image"].min() == -1
    assert batch["image"].max() == 1
    tokens = np.arange(12, dtype=np.uint8).reshape(6, 2)
    batch = Stream(Source("t", "train", {"tokens": tokens}, None, 256), batch_size=6, seed=0)(0)
    assert batch["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"][np.argsort(batch["tokens"][:, 0])], tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"batch_size": 3, "process_count": 2}, "not a multiple of the 2 processes"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "below 2\\*\\*32"),
        ({"augment": ("filp",)}, "unknown augmentation 'filp': did you mean 'flip'"),
        ({"augment": ("flip", "flip")}, "named twice"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Stream(numbered(10), **{"batch_size": 4, "seed": 0} | arguments)


def test_text_cannot_be_augmented_and_steps_are_not_negative():
    text = Source("t", "train", {"tokens": np.zeros(5, np.uint8)}, None, 256)
    with pytest.raises(UserError, match="no images to augment"):
        Stream(text, batch_size=1, seed=0, augment=("flip",))
    with pytest.raises(ValueError, match="step is -1"):
        Stream(text, batch_size=1, seed=0)(-1)


@pytest.mark.parametrize(("batch_size", "limit"), [(4, None), (5, None), (16, None), (4, 7), (4, 99), (4, 1)])
@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_each_record_once_in_order(batch_size, limit, process_count):
    if batch_size % process_count:
        batch_size += 1
    parts = [
        list(
            evaluation_batches(
                numbered(10), batch_size=batch_size, limit=limit, process_index=i, process_count=process_count
            )
        )
        for i in range(process_count)
    ]
    assert len({len(part) for part in parts}) == 1
    seen = []
    for shares in zip(*parts, strict=True):
        batch = {field: np.concatenate([share[field] for share in shares]) for field in shares[0]}
        assert batch["mask"].shape == (batch_size,)
        assert batch["mask"].dtype == np.float32
        assert batch["image"].shape == (batch_size, 9, 8, 3)
        seen.extend(batch["label"][batch["mask"] == 1])
        np.testing.assert_array_equal(np.sort(batch["mask"])[::-1], batch["mask"])  # padding comes last
    assert seen == sorted(set(seen))
    assert len(seen) == min(limit or 10, 10)


def test_an_evaluation_of_some_records_sees_every_class_of_a_sorted_folder():
    batches = evaluation_batches(numbered(100), batch_size=8, limit=20)
    label = np.concatenate([batch["label"][batch["mask"] == 1] for batch in batches])
    assert len(set(label)) == 20
    assert set(label // 20) == set(range(5))
    again = evaluation_batches(numbered(100), batch_size=20, limit=20)
    np.testing.assert_array_equal(next(again)["label"], label)


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        evaluation_batches(numbered(10), batch_size=4, limit=0)
