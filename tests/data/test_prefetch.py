import threading
import time

import numpy as np
import pytest

from jaxgen.data import Stream, load_source, prefetch


def background_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(holds, seconds=5.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.002)
    return holds()


def batch_of(step):
    return {"x": np.full((3, 2), step), "y": np.array([step])}


def test_spans_arrive_in_order_stacked_and_placed_in_the_background():
    where = []

    def place(batch):
        where.append(threading.current_thread())
        return {name: value + 100 for name, value in batch.items()}

    spans = [(0, 3), (3, 1), (10, 2)]
    seen = list(prefetch(batch_of, spans, place))
    assert [first for first, _ in seen] == [0, 3, 10]
    for (first, num_steps), (_, placed) in zip(spans, seen, strict=True):
        assert placed["x"].shape == (num_steps, 3, 2)
        np.testing.assert_array_equal(placed["y"][:, 0], np.arange(first, first + num_steps) + 100)
    assert threading.main_thread() not in where
    assert not background_threads()


def test_it_delivers_what_the_stream_gives():
    stream = Stream(load_source("digits", "train"), batch_size=16, seed=0, augment=("flip",))
    for first, batches in prefetch(stream, [(88, 4), (92, 4)], lambda batch: batch):
        for i in range(4):
            for name, value in stream(first + i).items():
                np.testing.assert_array_equal(batches[name][i], value)


def fail_in_stream(step):
    if step == 3:
        raise OSError("step 3 cannot be read")
    return batch_of(step)


def fail_in_place(batch):
    if batch["y"][0, 0] == 3:
        raise OSError("step 3 cannot be placed")
    return batch


def fail_in_spans():
    yield from [(0, 1), (1, 1), (2, 1)]
    raise OSError("no more spans")


@pytest.mark.parametrize(
    ("stream", "spans", "place"),
    [
        (fail_in_stream, [(s, 1) for s in range(9)], lambda batch: batch),
        (batch_of, [(s, 1) for s in range(9)], fail_in_place),
        (batch_of, fail_in_spans(), lambda batch: batch),
    ],
    ids=["stream", "place", "spans"],
)
def test_an_error_in_the_background_is_raised_here_after_what_came_before(stream, spans, place):
    seen = []
    batches = prefetch(stream, spans, place)
    with pytest.raises(OSError, match=r"step 3|no more spans"):  # noqa: PT012
        for first, _ in batches:
            seen.append(first)
    assert seen == [0, 1, 2]
    assert not background_threads()


@pytest.mark.parametrize("depth", [1, 3])
def test_it_runs_ahead_by_its_depth_and_no_further(depth):
    made = []

    def stream(step):
        made.append(step)
        return batch_of(step)

    batches = prefetch(stream, ((s, 1) for s in range(1000)), lambda batch: batch, depth=depth)
    next(batches)
    # One was taken, `depth` wait, and one more is made and waits for room.
    assert wait_until(lambda: len(made) == depth + 2)
    time.sleep(0.05)
    assert len(made) == depth + 2
    batches.close()
    assert not background_threads()
    assert len(made) <= depth + 3


def test_closing_ends_a_thread_that_is_busy():
    started, release = threading.Event(), threading.Event()

    def place(batch):
        if batch["y"][0, 0] == 1:
            started.set()
            release.wait(5)
        return batch

    batches = prefetch(batch_of, ((s, 1) for s in range(1000)), place)
    next(batches)
    assert started.wait(5)
    threading.Timer(0.05, release.set).start()
    batches.close()
    assert not background_threads()


def test_leaving_the_loop_ends_the_thread():
    for first, _ in prefetch(batch_of, ((s, 1) for s in range(1000)), lambda batch: batch):
        if first == 2:
            break
    assert wait_until(lambda: not background_threads())
