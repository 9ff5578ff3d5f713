"""The tasks' labels against an independent reading of their definitions."""

import numpy as np
import pytest

from jaxgen.data import sequence_tasks
from jaxgen.data.sequence_tasks import CLASSES, load_task
from jaxgen.types import UserError


def _fields(task):
    return [task.source.fields[name] for name in ("tokens", "lengths", "targets")]


def test_recall_asks_for_the_first_symbol():
    task = load_task("recall", "train", num=200, length=12, seed=3)
    tokens, lengths, targets = _fields(task)
    assert tokens.shape == (200, 12)
    assert (lengths == 12).all()
    for row, target in zip(tokens, targets, strict=True):
        text = "".join(task.symbols[i] for i in row)
        assert text[0] == task.classes[target]
        assert set(text[1:-1]) <= set(".,:;")
        assert text[-1] == "?"
    assert set(targets) == set(range(8))


def test_character_classes_of_a_line():
    text = 'x = "a#"  # note\nfor i in 12: pass\n'
    found = [CLASSES[i] for i in sequence_tasks.character_classes(text)]
    expected = {"x": "name", "=": "operator", "12": "number", "for": "keyword", "i ": "name"}
    for piece, name in expected.items():
        assert found[text.index(piece)] == name
    start = text.index('"')
    assert found[start : start + 4] == ["string"] * 4
    assert found[text.index("# note")] == "comment"
    assert found[1] == "space"
    assert found[text.index("i in") + 2] == "keyword"
    # str.splitlines would end a line in the comment, tokenize does not.
    after = sequence_tasks.character_classes("# a\x0cb\u2028c\nx\n")
    assert [CLASSES[i] for i in after] == [*["comment"] * 7, "space", "name", "space"]


def test_labelling_is_of_real_source():
    task = load_task("labelling", "test", num=50, length=40, seed=0)
    tokens, _, targets = _fields(task)
    assert tokens.shape == targets.shape == (50, 40)
    assert not task.generated
    assert set(np.unique(targets)) == set(range(len(CLASSES)))
    spaces = tokens == ord(" ") + 1
    # A space is white space, or inside a string or a comment.
    allowed = [CLASSES.index(name) for name in ("space", "string", "comment")]
    assert np.isin(targets[spaces], allowed).all()


def _judge(words):
    """The sentiment by reading from the last clause: what stands before it does not matter."""
    last = " ".join(words).replace(" and ", " | ").replace(" but ", " | ").split(" | ")[-1].split()
    good = last[-1] in sequence_tasks._WORDS["good"]
    return int(good != ("not" in last))


def test_sentiment_is_that_of_the_last_clause_and_splits_share_no_sentence():
    texts = {}
    for split in ("train", "test"):
        task = load_task("sentiment", split, num=300, length=20, seed=1)
        texts[split] = set()
        for row, length, target in zip(*_fields(task), strict=True):
            words = [task.symbols[i] for i in row[:length]]
            assert _judge(words) == target
            assert (row[length:] == 0).all()
            texts[split].add(" ".join(words))
        assert 100 < task.source.fields["targets"].sum() < 200  # binomial: 150, standard deviation 8.7
    assert not texts["train"] & texts["test"]


@pytest.mark.parametrize("name", ["recall", "labelling", "sentiment"])
def test_tasks_come_again_and_their_splits_differ(name):
    prints = [
        load_task(name, split, num=20, length=30, seed=1).source.fingerprint
        for split in ("train", "train", "test")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_bad_requests():
    with pytest.raises(UserError, match="did you mean 'recall'"):
        load_task("recal", "train", num=1, length=9, seed=0)
    for name, length in (("recall", 2), ("sentiment", 19), ("labelling", 10**8)):
        with pytest.raises(UserError, match=r"data\.length"):
            load_task(name, "train", num=1, length=length, seed=0)
