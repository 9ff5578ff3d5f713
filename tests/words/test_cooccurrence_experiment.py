"""The numbers behind experiments/cooccurrence.py and hypernyms.py, which runs of them do not show."""

import jax
import numpy as np
import pytest
import scipy.sparse

from experiments import cooccurrence, hypernyms
from jaxgen.interop.word2vec import write_word2vec
from jaxgen.types import UserError
from jaxgen.words.factorize import SVD


def test_rounds_of_the_iteration_end_at_the_truncated_svd():
    """float32 products of a matrix of norm about 10; the fourth value is 0.3 of the third."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 5)))[0] for n in (30, 20))
    s = np.asarray([9.0, 5.0, 3.0, 0.9, 0.5])
    whole = (u * s) @ v.T
    matrix = scipy.sparse.csr_matrix(whole)
    blocks = cooccurrence.blocks_of(matrix, 2)
    assert {(field.shape, field.dtype.kind) for field in blocks.values()} == {
        ((2, cooccurrence.BLOCK), "i"),
        ((2, cooccurrence.BLOCK), "f"),
    }
    start = np.linalg.qr(rng.normal(size=(30, 3)))[0].astype(np.float32)
    svd = SVD(jax.numpy.asarray(start), jax.numpy.zeros(3), jax.numpy.zeros((3, 20)))
    step = jax.jit(cooccurrence.iterate)
    left_out = []
    for _ in range(8):
        svd = step(svd, blocks)
        left_out.append(1 - float(np.sum(np.asarray(svd.s) ** 2)) / np.sum(s**2))
    assert left_out[0] > left_out[-1]
    assert left_out[-1] == pytest.approx(np.sum(s[3:] ** 2) / np.sum(s**2), abs=1e-5)
    np.testing.assert_allclose(svd.s, s[:3], rtol=1e-5)
    np.testing.assert_allclose(
        (np.asarray(svd.u) * np.asarray(svd.s)) @ np.asarray(svd.vt),
        (u[:, :3] * s[:3]) @ v[:, :3].T,
        atol=1e-4,
    )


def _own(folder, lines):
    write_word2vec(folder / "v.bin", ["dog", "cat", "animal", "metal", "iron"], 2 * np.eye(5))
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return f"pairs:{folder / 'pairs.tsv'},{folder / 'v.bin'}"


def test_own_pairs_are_set_against_their_reverses_and_other_words_hypernyms(tmp_path):
    lines = ["dog\tanimal", "cat\tanimal", "iron\tmetal", "unicorn\tanimal"]
    found = hypernyms.load_pairs(_own(tmp_path, lines), unit_length=True)
    assert found.pairs[:3] == [("dog", "animal"), ("cat", "animal"), ("iron", "metal")]
    assert found.label[:3].all()
    assert not found.label[3:].any()
    false = set(found.pairs[3:])
    assert {("animal", "dog"), ("animal", "cat"), ("metal", "iron")} <= false
    assert not false & set(found.pairs[:3])
    np.testing.assert_array_equal(found.x[0], np.eye(5)[0])
    longer = hypernyms.load_pairs(_own(tmp_path, lines), unit_length=False)
    np.testing.assert_array_equal(longer.y[0], 2 * np.eye(5)[2])


def test_own_false_pairs_are_taken_as_given(tmp_path):
    source = _own(tmp_path, ["dog\tanimal\t1", "iron\tanimal\t0"])
    found = hypernyms.load_pairs(source, unit_length=True)
    assert found.pairs == [("dog", "animal"), ("iron", "animal")]
    assert found.label.tolist() == [True, False]


@pytest.mark.parametrize("lines", [["dog"], ["dog\tanimal\tyes"], ["dog\tanimal", "cat\tanimal\t1"], [""]])
def test_other_files_than_pairs_are_refused(lines, tmp_path):
    with pytest.raises(UserError, match="is no file of pairs"):
        hypernyms.load_pairs(_own(tmp_path, lines), unit_length=True)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("wordnet", "none of planted"),
        ("planted:x", "none of planted"),
        ("pairs:a", "none of planted"),
        ("pairs:absent.tsv,absent.bin", "no file absent.bin"),
    ],
)
def test_sources_that_are_none(source, said):
    with pytest.raises(UserError, match=said):
        hypernyms.load_pairs(source, unit_length=True)


def test_pairs_of_the_data_folder(real_data_dir, tmp_path):
    words = ["dog", "animal", "canine", "cat", "bird", "mammal"]
    write_word2vec(tmp_path / "v.bin", words, np.eye(len(words)))
    for source in ("wordnet", "bless", "evalution"):
        found = hypernyms.load_pairs(f"{source}:{tmp_path / 'v.bin'}", unit_length=True)
        true = {pair for pair, label in zip(found.pairs, found.label, strict=True) if label}
        assert true & {("dog", "animal"), ("cat", "animal"), ("bird", "animal"), ("dog", "mammal")}
        assert {word for pair in found.pairs for word in pair} <= set(words)
        assert all((y, x) not in true for x, y in true)
