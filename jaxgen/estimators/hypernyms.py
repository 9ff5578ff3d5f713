"""Semantic hierarchies from word vectors: is y a hypernym of x ("a dog is an animal")?

Fu et al. 2014, "Learning semantic hierarchies via word embeddings" (ACL): a matrix Phi takes the vector of a
hyponym to that of its hypernym. Since one matrix does not fit all kinds of is-a, the offsets y - x of the
known pairs are clustered and each cluster has its own Phi (section 3.3). A pair is judged by the cluster of
its offset: it is an is-a pair if d(Phi_k x, y) = |Phi_k x - y|^2 is below a threshold delta, and pairs follow
from pairs by transitivity (section 3.4). Vectors are float [N, D], the pairs' hyponyms x and hypernyms y row
by row.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxgen.estimators.gmm import kmeans, nearest
from jaxgen.types import Array, Key, UserError

Word = TypeVar("Word", bound=Hashable)


class Projection(NamedTuple):
    """`phi` float32 [K, D, D], one matrix a cluster of offsets, and the clusters' `centres` [K, D]."""

    phi: Array
    centres: Array


class Detection(NamedTuple):
    """Of `num_pairs` judged ones: the share of those found that are right, of the right ones found, and F1.

    0 where nothing was found.
    """

    precision: float
    recall: float
    f1: float
    num_pairs: int


@jax.jit
def _least_squares(x: Array, y: Array, weight: Array, ridge: Array) -> Array:
    """argmin_Phi sum_n w_n |Phi x_n - y_n|^2 + ridge * |Phi - I|^2   [D, D]; weight [N], 0 or 1."""
    exact = jax.lax.Precision.HIGHEST
    weighted, identity = x * weight[:, None], jnp.eye(x.shape[1])
    gram = jnp.matmul(weighted.T, x, precision=exact) + ridge * identity
    cross = jnp.matmul(weighted.T, y, precision=exact) + ridge * identity
    return jnp.linalg.solve(gram, cross).T


def fit(key: Key, x: ArrayLike, y: ArrayLike, num_clusters: int = 1, *, ridge: float = 1e-3) -> Projection:
    """Phi_k = argmin 1/N_k sum_{n in cluster k} |Phi x_n - y_n|^2   (Fu et al. 2014, eq. 2; eq. 1 for K = 1).

    Deviations: direct and indirect pairs are not clustered apart (as in section 3.3.3, in 20 and 5 clusters);
    least squares are solved in closed form rather than by stochastic gradients, with a penalty
    ridge * s^2 * |Phi - I|^2 on the sum, s^2 the mean square of x's entries times N, so that a cluster of
    fewer pairs than dimensions keeps to the identity in the directions that it knows nothing of.
    num_clusters: 1 is the uniform projection, more the piecewise one (k-means on y - x).

    Raises:
        UserError: fewer pairs than clusters, x and y do not fit, or a negative ridge.
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    if x.ndim != 2 or x.shape != y.shape:
        raise UserError(f"pairs are vectors [N, D] and [N, D], not {x.shape} and {y.shape}.")
    if not 1 <= num_clusters <= len(x):
        raise UserError(f"There must be 1 to {len(x)} clusters for these pairs, not {num_clusters}.")
    if not ridge >= 0:
        raise UserError(f"the ridge of a projection must be at least 0, not {ridge}.")
    offset = y - x
    centres = kmeans(key, offset, num_clusters, num_steps=30)
    cluster = nearest(offset, centres)
    penalty = jnp.asarray(ridge * len(x), jnp.float32) * jnp.mean(x**2)
    phi = [_least_squares(x, y, (cluster == k).astype(jnp.float32), penalty) for k in range(num_clusters)]
    return Projection(jnp.stack(phi), centres)


@jax.jit
def distance(projection: Projection, x: ArrayLike, y: ArrayLike) -> Array:
    """d(Phi_k x, y) = |Phi_k x - y|^2 with k the cluster nearest to y - x   [N]   (Fu et al. 2014, eq. 3)."""
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    cluster = nearest(y - x, projection.centres)
    projected = jnp.einsum("kij,nj->kni", projection.phi, x, precision=jax.lax.Precision.HIGHEST)
    chosen = jnp.take_along_axis(projected, cluster[None, :, None], axis=0)[0]
    return jnp.sum((chosen - y) ** 2, axis=1)


def offset_distance(centres: ArrayLike, x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """min_k |x + c_k - y|^2 of the clusters' centres [K, D], [N]: the vector-offset baseline.

    With the mean offset alone it is that of Mikolov et al. 2013; with K, a projection Phi_k x = x + c_k.
    """
    offset = np.asarray(y, np.float32) - np.asarray(x, np.float32)
    return np.min([np.sum((offset - c) ** 2, axis=1) for c in np.asarray(centres, np.float32)], axis=0)


def cosine_distance(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """1 - cos(x, y) [N]: the baseline that knows similarity but no direction."""
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return 1.0 - np.sum(x * y, axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)


def choose_threshold(score: ArrayLike, label: ArrayLike) -> float:
    """The delta for which "score < delta" has the greatest F1 on development pairs; label [N] is 0 or 1.

    Halfway between two neighbouring scores; infinite if taking all pairs is best.

    Raises:
        UserError: no pair is an is-a pair.
    """
    score, label = np.asarray(score, np.float64), np.asarray(label, bool)
    if not label.any():
        raise UserError("a threshold needs development pairs of which at least one is an is-a pair.")
    order = np.argsort(score, kind="stable")
    ranked, hits = score[order], np.cumsum(label[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + label.sum())
    # A threshold cannot part equal scores.
    f1[:-1][ranked[1:] == ranked[:-1]] = -1.0
    best = int(np.argmax(f1))
    return float(np.inf) if best == len(ranked) - 1 else float((ranked[best] + ranked[best + 1]) / 2)


def detection(predicted: ArrayLike, label: ArrayLike) -> Detection:
    """Precision, recall and F1 of bool [N] against 0 or 1 [N]."""
    predicted, label = np.asarray(predicted, bool), np.asarray(label, bool)
    hits, found, right = int((predicted & label).sum()), int(predicted.sum()), int(label.sum())
    f1 = 2 * hits / (found + right) if found + right else 0.0
    return Detection(hits / found if found else 0.0, hits / right if right else 0.0, f1, len(label))


def transitive_closure(pairs: Iterable[tuple[Word, Word]]) -> set[tuple[Word, Word]]:
    """All (x, z) with a path of pairs from x to z; (x, x) only where there is a cycle through x."""
    above: dict[Word, set[Word]] = {}
    for x, y in pairs:
        above.setdefault(x, set()).add(y)
    closed = set()
    for x in above:
        waiting, seen = list(above[x]), set(above[x])
        while waiting:
            for z in above.get(waiting.pop(), ()):
                if z not in seen:
                    seen.add(z)
                    waiting.append(z)
        closed |= {(x, z) for z in seen}
    return closed


def remove_cycles(distances: Mapping[tuple[Word, Word], float]) -> set[tuple[Word, Word]]:
    """The pairs that stay when, nearest first, each is taken unless it would close a cycle of is-a.

    So of every cycle the pair of greatest distance goes (Fu et al. 2014, section 3.4). Deviation: in cycles
    of more than two words they turn that pair round instead.
    """
    above: dict[Word, set[Word]] = {}
    kept = set()
    for x, y in sorted(distances, key=lambda pair: (distances[pair], str(pair))):
        waiting, reached = [y], {y}
        while waiting and x not in reached:
            new = above.get(waiting.pop(), set()) - reached
            reached |= new
            waiting.extend(new)
        if x not in reached:
            above.setdefault(x, set()).add(y)
            kept.add((x, y))
    return kept


def lexical_split(
    pairs: Sequence[tuple[str, str]], *, shares: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[np.ndarray]:
    """Rows of the pairs for each part, int64, so that no word is in two parts.

    Every word is dealt to one part at random; pairs whose words are in different parts are in none (Levy et
    al. 2015: else classifiers learn which words are hypernyms, not which pairs).
    shares: of the words, one number above 0 a part.
    """
    if not shares or min(shares) <= 0:
        raise UserError("every part of a split needs a share above 0.")
    words = sorted({word for pair in pairs for word in pair})
    bounds = np.cumsum(np.asarray(shares) / np.sum(shares))[:-1]
    part = np.searchsorted(
        bounds, np.random.default_rng(seed).permutation(len(words)) / max(len(words), 1), "right"
    )
    of = dict(zip(words, part, strict=True))
    where = np.asarray([of[x] if of[x] == of[y] else -1 for x, y in pairs], np.int64)
    return [np.flatnonzero(where == number) for number in range(len(shares))]
