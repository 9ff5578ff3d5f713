"""The smoothings of n-gram models, each as the alpha and gamma of the recursion of `jaxgen.words.ngrams`.

Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling", Computer Speech and
Language 13, is the source of the equations and of the names. c(h w) is a count, c(h) = sum_w c(h w) that of a
context, and N_1+(h .) the number of different words that follow it.
"""

from __future__ import annotations

import numpy as np

from jaxgen.types import UserError
from jaxgen.words.ngrams import NgramCounts, NgramModel, walk

# What KenLM's option --discount_fallback uses too where a text is too small to estimate them.
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


def maximum_likelihood(counts: NgramCounts) -> NgramModel:
    """p(w | h) = c(h w) / c(h); where h was never seen, the same of the longest end of h that was.

    With an end-of-sentence word c(h) is the count of h itself, as in count(w_1, w_2) / count(w_1).
    """
    alphas, gammas = [], []
    for level in range(1, counts.order + 1):
        total = _context_totals(counts, level, counts.counts[level - 1])
        alphas.append(_ratio(counts.counts[level - 1], total[counts.contexts[level - 1]]))
        gammas.append(np.where(total > 0, 0.0, 1.0))
    return NgramModel(counts, tuple(alphas), tuple(gammas))


def add_k(counts: NgramCounts, k: float) -> NgramModel:
    """p(w | h) = (c(h w) + k) / (c(h) + k V), the longest n-grams alone (Lidstone; Laplace with k = 1).

    Contexts shorter than n - 1 words, at the start of a sentence, end in its marker and are of their own
    length.
    """
    if not (np.isfinite(k) and k > 0):
        raise UserError(f"add-k smoothing needs a k above 0, not {k}; use maximum likelihood for 0.")
    alphas, gammas = [], []
    mass = k * counts.vocab_size
    begins = _begins_with_marker(counts)
    for level in range(1, counts.order + 1):
        total = _context_totals(counts, level, counts.counts[level - 1])
        contexts = counts.contexts[level - 1]
        # A shorter n-gram speaks only where the sentence has no longer context.
        if level == counts.order:
            speaks = np.ones(len(total), bool)
        else:
            speaks = begins[level - 2] if level > 1 else np.zeros(1, bool)
        alphas.append(np.where(speaks[contexts], counts.counts[level - 1] / (total[contexts] + mass), 0.0))
        gammas.append(np.where(speaks, mass / (total + mass), 1.0))
    return NgramModel(counts, tuple(alphas), tuple(gammas))


def jelinek_mercer(counts: NgramCounts, weights: np.ndarray) -> NgramModel:
    """p_k(w | h) = lambda c(h w) / c(h) + (1 - lambda) p_{k-1}(w | h').

    weights: float [order, buckets] in [0, 1]: lambda of contexts of k - 1 words that occurred 2^b ... 2^(b+1)
    - 1 times, the last bucket holding all above. `fit_jelinek_mercer` finds them.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 2 or len(weights) != counts.order or not np.all((weights >= 0) & (weights <= 1)):
        raise UserError(f"Jelinek-Mercer weights are [{counts.order}, buckets] numbers from 0 to 1.")
    alphas, gammas = [], []
    for level in range(1, counts.order + 1):
        total = _context_totals(counts, level, counts.counts[level - 1])
        weight = np.where(total > 0, weights[level - 1][_bucket(total, weights.shape[1])], 0.0)
        contexts = counts.contexts[level - 1]
        alphas.append(weight[contexts] * _ratio(counts.counts[level - 1], total[contexts]))
        gammas.append(1.0 - weight)
    return NgramModel(counts, tuple(alphas), tuple(gammas))


def fit_jelinek_mercer(
    counts: NgramCounts,
    held_out: np.ndarray,
    starts: np.ndarray,
    *,
    num_buckets: int = 12,
    num_iterations: int = 30,
) -> np.ndarray:
    """Weights float64 [order, num_buckets] for `jelinek_mercer`, by EM on text that was not counted.

    Each step gives lambda the share of the words, of those whose recursion comes down to this level and
    bucket, that this level is responsible for; the held-out likelihood never falls. Unused buckets keep 1/2.
    """
    probabilities, buckets = [], []
    for level, (entry, context) in enumerate(walk(counts, held_out, starts), start=1):
        total = _context_totals(counts, level, counts.counts[level - 1])
        total = total if len(total) else np.zeros(1)  # no sentence is that long
        seen = (context >= 0) & (total[context] > 0)
        ratio = _ratio(counts.counts[level - 1], total[counts.contexts[level - 1]])
        found = entry >= 0
        probabilities.append(np.where(found, ratio[entry] if len(ratio) else 0.0, 0.0))
        buckets.append(np.where(seen, _bucket(total[context], num_buckets), num_buckets))
    known = np.asarray(held_out) >= 0
    weights = np.full((counts.order, num_buckets + 1), 0.5)
    weights[:, num_buckets] = 0.0  # contexts never seen have no say
    for _ in range(num_iterations):
        # p_k of every word, upwards; then downwards the share of the word that comes to level k.
        lambdas = [row[bucket] for row, bucket in zip(weights, buckets, strict=True)]
        mixed = [np.full(len(known), 1.0 / counts.vocab_size)]
        for weight, own in zip(lambdas, probabilities, strict=True):
            mixed.append(weight * own + (1.0 - weight) * mixed[-1])
        share = known.astype(np.float64)
        new = weights.copy()
        for level in range(counts.order, 0, -1):
            taken = share * _ratio(lambdas[level - 1] * probabilities[level - 1], mixed[level])
            arrived = np.bincount(buckets[level - 1], share, num_buckets + 1)
            took = np.bincount(buckets[level - 1], taken, num_buckets + 1)
            new[level - 1] = np.where(arrived > 0, _ratio(took, arrived), weights[level - 1])
            share = share - taken
        new[:, num_buckets] = 0.0
        weights = new
    return np.clip(weights[:, :num_buckets], 0.0, 1.0)


def witten_bell(counts: NgramCounts) -> NgramModel:
    """p_k(w | h) = (c(h w) + N_1+(h .) p_{k-1}(w | h')) / (c(h) + N_1+(h .))."""
    alphas, gammas = [], []
    for level in range(1, counts.order + 1):
        count, contexts = counts.counts[level - 1], counts.contexts[level - 1]
        total = _context_totals(counts, level, count)
        followers = _context_totals(counts, level, count > 0)
        alphas.append(_ratio(count, (total + followers)[contexts]))
        gammas.append(np.where(total > 0, _ratio(followers, total + followers), 1.0))
    return NgramModel(counts, tuple(alphas), tuple(gammas))


def kneser_ney(counts: NgramCounts) -> NgramModel:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1999, section 3):

        p_k(w | h) = max(c - D(c), 0) / sum_w c(h w) + gamma(h) p_{k-1}(w | h'),

    with a discount D_1, D_2 or D_3+ by the count c, and
    gamma(h) = (D_1 N_1(h .) + D_2 N_2(h .) + D_3+ N_3+(h .)) / sum_w c(h w). Below the longest n-grams c is
    not a count but N_1+(. h w), the number of different words before h w; n-grams that begin with the
    sentence marker, before which nothing stands, keep their counts.
    """
    alphas, gammas = [], []
    for level, count in enumerate(continuation_counts(counts), start=1):
        contexts = counts.contexts[level - 1]
        total = _context_totals(counts, level, count)
        discount = np.asarray([0.0, *modified_discounts(count)])[np.minimum(count, 3)]
        alphas.append(_ratio(count - discount, total[contexts]))
        gammas.append(np.where(total > 0, _ratio(_context_totals(counts, level, discount), total), 1.0))
    return NgramModel(counts, tuple(alphas), tuple(gammas))


def modified_discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """D_1, D_2, D_3+ = 1 - 2 Y n_2/n_1, 2 - 3 Y n_3/n_2, 3 - 4 Y n_4/n_3 with Y = n_1 / (n_1 + 2 n_2).

    n_i: how many of the counts are i (Chen & Goodman 1999). Where a text is so small that one of n_1 ... n_4
    is 0 or a discount falls outside [0, i], they are 0.5, 1, 1.5.
    """
    n1, n2, n3, n4 = (int(np.sum(counts == i)) for i in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return _FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    discounts = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    fits = all(0 <= discount <= i for i, discount in enumerate(discounts, start=1))
    return discounts if fits else _FALLBACK_DISCOUNTS


def continuation_counts(counts: NgramCounts) -> list[np.ndarray]:
    """The counts that Kneser-Ney uses, int64 [E_k] for k = 1 ... order: N_1+(. w) below the longest."""
    begins = _begins_with_marker(counts)
    # The entry of each n-gram without its first word, at the level above.
    ends = [np.zeros(len(counts.keys[0]), np.int64)]
    for level in range(2, counts.order + 1):
        word = counts.keys[level - 1] % (counts.vocab_size + 1)
        ends.append(counts.find(level - 1, ends[-1][counts.contexts[level - 1]], word))

    def seen_after(level: int, num: int) -> np.ndarray:
        # Where the text is still being counted, some n-grams have not been seen.
        return np.bincount(ends[level], counts.counts[level] > 0, minlength=num).astype(np.int64)

    adjusted = [
        np.where(begins[i], counts.counts[i], seen_after(i + 1, len(counts.keys[i])))
        for i in range(counts.order - 1)
    ]
    return [*adjusted, counts.counts[-1]]


def _begins_with_marker(counts: NgramCounts) -> list[np.ndarray]:
    begins = [counts.keys[0] == counts.marker]
    for contexts in counts.contexts[1:]:
        begins.append(begins[-1][contexts])
    return begins


def _context_totals(counts: NgramCounts, level: int, values: np.ndarray) -> np.ndarray:
    """The sum of `values` [E_k] over the words that follow each context, float64 [E_{k-1}]."""
    return np.bincount(
        counts.contexts[level - 1], values.astype(np.float64), minlength=counts.num_contexts(level)
    )


def _bucket(total: np.ndarray, num_buckets: int) -> np.ndarray:
    return np.clip(np.log2(np.maximum(total, 1.0)).astype(np.int64), 0, num_buckets - 1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, and 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(denominator)), where=denominator > 0)
