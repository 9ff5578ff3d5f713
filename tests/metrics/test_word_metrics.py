"""Scores of word vectors against loops in NumPy and against gensim with the same vectors."""

import os
from pathlib import Path

import numpy as np
import pytest

from jaxgen.metrics import words as metric
from jaxgen.types import UserError

NAMES = ["king", "queen", "man", "woman", "King", "paris", "france", "rome", "italy", "apple", "Rome", "pear"]


def _table(seed=0):
    """Random vectors, of which two nearly complete a parallelogram."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(len(NAMES), 5))
    for a, b, c, d in ((0, 1, 2, 3), (5, 6, 7, 8)):
        table[d] = table[b] - table[a] + table[c] + 0.5 * rng.normal(size=5)
    return table.astype(np.float32)


QUESTIONS = {
    "family": [("king", "queen", "man", "woman"), ("man", "woman", "king", "queen"), ("a", "b", "c", "d")],
    "capitals": [
        ("Paris", "France", "Rome", "Italy"),
        ("rome", "italy", "paris", "france"),
        ("paris", "france", "apple", "pear"),
        ("rome", "italy", "apple", "zzz"),
    ],
}


def _loop_answer(unit, forms, a, b, c, method, eps):
    """The best answer by the definition, one candidate at a time."""
    best, best_score = None, -np.inf
    for d in range(len(unit)):
        if forms[d] in {forms[a], forms[b], forms[c]}:
            continue
        cosine = [float(unit[d] @ unit[i]) for i in (a, b, c)]
        if method == "add":
            score = cosine[1] - cosine[0] + cosine[2]
        else:
            near = [(x + 1) / 2 for x in cosine]
            score = near[1] * near[2] / (near[0] + eps)
        if score > best_score:
            best, best_score = d, score
    return best


@pytest.mark.parametrize("method", ["add", "mul"])
@pytest.mark.parametrize("fold_case", [False, True])
@pytest.mark.parametrize("restrict", [None, 9])
def test_analogies_are_those_of_a_loop(method, fold_case, restrict):
    hits = 0
    for seed in range(6):  # so that some answers are right and some wrong
        table = _table(seed)
        vectors = metric.Vectors(table, NAMES, restrict=restrict, fold_case=fold_case)
        names = NAMES[:restrict]
        fold = str.upper if fold_case else str
        first = {}
        for number, name in enumerate(names):
            first.setdefault(fold(name), number)
        forms = [first[fold(name)] for name in names]
        unit = table[:restrict] / np.linalg.norm(table[:restrict], axis=1, keepdims=True)
        found = metric.analogies(vectors, QUESTIONS, method=method, batch_size=2)
        total = np.zeros(3, int)
        for section, questions in QUESTIONS.items():
            expected = np.zeros(3, int)
            for question in questions:
                rows = [first.get(fold(word)) for word in question]
                if None in rows:
                    expected[2] += 1
                    continue
                expected[1] += 1
                expected[0] += forms[_loop_answer(unit, forms, *rows[:3], method, 1e-3)] == rows[3]
            assert found[section] == tuple(expected)
            total += expected
        assert found["total"] == tuple(total)
        hits += total[0]
    assert hits > 0


def test_a_parallelogram_is_answered_and_the_given_words_are_not():
    """queen = king - man + woman exactly; king itself is nearer to that than any other word but queen."""
    man, woman, royal = np.eye(3, 4, dtype=np.float32)
    table = np.stack([man + royal, woman + royal, man, woman, np.asarray([0, 0, 0, 1], np.float32)])
    vectors = metric.Vectors(table, ["king", "queen", "man", "woman", "apple"])
    for method in ("add", "mul"):
        score = metric.analogies(vectors, {"s": [("man", "woman", "king", "queen")]}, method=method)
        assert score["total"] == (1, 1, 0)
        assert score["total"].accuracy == 1.0
    nothing = metric.analogies(vectors, {"s": [("x", "y", "z", "w")]})["total"]
    assert nothing == (0, 0, 1)
    assert np.isnan(nothing.accuracy)


def test_similarity_is_spearmans_with_ties_and_missing_words():
    table = _table(1)
    pairs = [
        metric.WordPair(*row)
        for row in [("king", "queen", 9), ("man", "woman", 7), ("paris", "rome", 7), ("apple", "pear", 1)]
    ]
    pairs.append(metric.WordPair("king", "nowhere", 3))
    found = metric.similarity(metric.Vectors(table, NAMES), pairs)
    cosine = []
    for pair in pairs[:-1]:
        x, y = (table[NAMES.index(word)].astype(np.float64) for word in pair[:2])
        cosine.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    # Ranks by counting: 1 + those below + half of the other equal ones.
    rank = lambda v: [1 + sum(b < a for b in v) + (sum(b == a for b in v) - 1) / 2 for a in v]
    r, s = np.asarray(rank(cosine)), np.asarray(rank([pair.score for pair in pairs[:-1]]))
    r, s = r - r.mean(), s - s.mean()
    np.testing.assert_allclose(found.rho, r @ s / np.sqrt(r @ r * (s @ s)), rtol=1e-12)
    assert found[1:] == (4, 1)
    assert np.isnan(metric.similarity(metric.Vectors(table, NAMES), pairs[:1]).rho)


def test_neighbours_and_the_odd_one_out_are_those_of_a_loop():
    table = _table(2)
    vectors = metric.Vectors(table, NAMES)
    cosine = lambda i, j: float(table[i] @ table[j] / np.linalg.norm(table[i]) / np.linalg.norm(table[j]))
    expected = sorted(((cosine(0, j), NAMES[j]) for j in range(1, len(NAMES))), reverse=True)[:3]
    found = metric.nearest_neighbours(vectors, "king", num=3)
    assert [word for word, _ in found] == [word for _, word in expected]
    np.testing.assert_allclose([c for _, c in found], [c for c, _ in expected], rtol=1e-5)
    assert metric.nearest_neighbours(vectors, table[0], num=1)[0][0] == "king"
    assert metric.nearest_neighbours(vectors, table[0], num=1, without=["king"])[0][0] == expected[0][1]
    folded = metric.Vectors(table, NAMES, fold_case=True)
    assert "King" not in [word for word, _ in metric.nearest_neighbours(folded, "KING", num=50)]
    with pytest.raises(UserError, match="'nobody' is not among the 12 words"):
        metric.nearest_neighbours(vectors, "nobody")

    chosen = ["king", "paris", "apple", "nobody", "pear"]
    rows = [NAMES.index(word) for word in chosen if word in NAMES]
    mean = sum(table[i] / np.linalg.norm(table[i]) for i in rows) / len(rows)
    least = min(rows, key=lambda i: float(table[i] @ mean / np.linalg.norm(table[i])))
    assert metric.odd_one_out(vectors, chosen) == (NAMES[least], ("nobody",))
    with pytest.raises(UserError, match="at least two"):
        metric.odd_one_out(vectors, ["king", "nobody"])


def test_purity_of_the_textbook_and_categories_found():
    """Manning, Raghavan & Schuetze 2008, figure 16.4: (5 + 4 + 3) / 17."""
    cluster = [0] * 6 + [1] * 6 + [2] * 5
    label = [0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 2, 0, 0, 2, 2, 2]
    assert metric.purity(cluster, label) == pytest.approx(12 / 17)
    rng = np.random.default_rng(0)
    table = np.concatenate([rng.normal(size=(4, 3)) * 0.05 + 5 * axis for axis in np.eye(3)])
    names = [f"w{i}" for i in range(12)]
    groups = {"a": names[:4], "b": names[4:8], "c": [*names[8:], "missing"]}
    vectors = metric.Vectors(table, names)
    assert metric.categorisation(vectors, groups) == (1.0, 12, 1)
    mixed = {"a": names[:2] + names[4:6], "b": names[2:4] + names[6:8], "c": names[8:]}
    assert metric.categorisation(vectors, mixed) == (8 / 12, 12, 0)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="need vectors"):
        metric.Vectors(_table(), NAMES[:3])
    with pytest.raises(UserError, match="finite"):
        metric.Vectors(np.full((1, 2), np.nan), ["a"])
    with pytest.raises(UserError, match="at least 1"):
        metric.Vectors(_table(), NAMES, restrict=0)
    with pytest.raises(UserError, match="'add' or 'mul'"):
        metric.analogies(metric.Vectors(_table(), NAMES), QUESTIONS, method="cos")


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (metric.read_analogies, b"a b c d\n"),
        (metric.read_analogies, b": s\na b c\n"),
        (metric.read_analogies, b": s\n"),
        (metric.read_analogies, b": s\na b c \xff\n"),
        (metric.read_similarities, b"a b x\n"),
        (metric.read_similarities, b"a b nan\n"),
        (metric.read_similarities, b"a b\n"),
        (metric.read_similarities, b"\n"),
        (metric.read_similarities, b"a\xff b 1\n"),
        (metric.read_similarities, None),
        (metric.read_analogies, None),
    ],
)
def test_malformed_files_end_in_one_sentence(read, content, tmp_path):
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def _words_folder():
    folder = Path(os.environ.get("JAXGEN_DATA_DIR", "")) / "wordsim"
    if not (folder / "questions-words.txt").is_file():
        pytest.skip("JAXGEN_DATA_DIR has no wordsim/")
    return folder


def test_the_real_files_are_read():
    folder = _words_folder()
    sections = metric.read_analogies(folder / "questions-words.txt")
    assert (len(sections), sum(map(len, sections.values()))) == (14, 19_544)
    assert sections["family"][0] == ("boy", "girl", "brother", "sister")
    assert len(metric.read_similarities(folder / "EN-WS-353-ALL.txt")) == 353
    assert len(metric.read_similarities(folder / "EN-SIMLEX-999.txt")) == 999


def test_gensim_gives_the_same_scores(tmp_path):
    """Vectors with a planted structure, so that part of the questions is right; gensim folds case."""
    models = pytest.importorskip("gensim.models", reason="gensim is not installed")
    rng = np.random.default_rng(0)
    words, rows, questions = [], [], []
    offset = rng.normal(size=8)
    for i in range(30):
        country = rng.normal(size=8)
        words += [f"Capital{i}", f"country{i}"]
        rows += [country + offset + 0.5 * rng.normal(size=8), country + 0.5 * rng.normal(size=8)]
    words.append("capital3")  # a second, rarer form
    rows.append(rng.normal(size=8))
    for i in range(29):
        line = f"capital{i} Country{i} CAPITAL{i + 1} country{i + 1}"
        questions.append(line)
    text = (
        ": one\n" + "\n".join(questions[:15]) + "\n: two\n" + "\n".join([*questions[15:], "x y z w"]) + "\n"
    )
    (tmp_path / "questions.txt").write_text(text)
    pairs = [f"capital{i}\tCountry{i + i % 3}\t{rng.uniform():.3f}" for i in range(28)] + ["x\ty\t1"]
    (tmp_path / "pairs.txt").write_text("\n".join(pairs) + "\n")
    table = np.asarray(rows, np.float32)
    keyed = models.KeyedVectors(8)
    keyed.add_vectors(words, table)
    for restrict in (None, 40):
        vectors = metric.Vectors(table, words, restrict=restrict, fold_case=True)
        found = metric.analogies(vectors, metric.read_analogies(tmp_path / "questions.txt"))
        limit = restrict or len(words)
        accuracy, sections = keyed.evaluate_word_analogies(tmp_path / "questions.txt", restrict_vocab=limit)
        assert 0 < found["total"].correct < found["total"].asked
        assert found["total"].accuracy == pytest.approx(accuracy, abs=1e-12)
        for section in sections[:2]:
            correct, wrong = len(section["correct"]), len(section["incorrect"])
            assert found[section["section"]][:2] == (correct, correct + wrong)
        score = metric.similarity(vectors, metric.read_similarities(tmp_path / "pairs.txt"))
        _, spearman, missing = keyed.evaluate_word_pairs(tmp_path / "pairs.txt", restrict_vocab=limit)
        assert score.rho == pytest.approx(spearman.statistic, abs=1e-9)
        assert 100 * score.out_of_vocabulary / len(pairs) == pytest.approx(missing)
    whole = metric.Vectors(table, words)
    some = ["Capital1", "Capital2", "country7", "Capital4"]
    assert metric.odd_one_out(whole, some).word == keyed.doesnt_match(some)
    ours, theirs = metric.nearest_neighbours(whole, "country5"), keyed.most_similar("country5")
    assert [word for word, _ in ours] == [word for word, _ in theirs]
