"""Fitting PCA, a Gaussian mixture and a hidden Markov model: ours against scikit-learn and hmmlearn.

  python -m benchmarks.estimators [--quick] [--record]

Both sides start from the same parameters and do the same number of EM steps on the same rows, float32 for
ours and float64 for the peers' EM, which is what their users get. The floor of a step of EM with full
covariances is about 3 N K D^2 multiplications, a third for the densities and the rest for the scatters; of
the forward and backward pass of an HMM, 4 B T K^2 exponentials or multiplications; of a PCA the N D^2
multiplications of the covariance and its eigenvectors.

Of the largest PCA most is the covariance, at the speed of a plain product of matrices, and the rest the same
LAPACK routine as the peer's. Tried: the upper triangle of the covariance alone, in 2, 3, 4 or 8 blocks of
columns, takes 0.55, 0.61, 0.67 and 0.85 s of processor time against 0.54 s whole, as XLA copies the blocks.
With gain: 2,000 rows at a time, which never leave the cache once the mean is taken off: in turn in one
process a fit takes 0.21 s, all rows at once 0.29 s, scikit-learn 0.28 to 0.30 s.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from jaxgen import memory
from jaxgen.estimators import families, gmm, hmm, linear
from jaxgen.estimators.mixture import Mixture

EM_STEPS = 10
PCA_SIZES = ((1_797, 64, 16), (20_000, 256, 32), (60_000, 784, 50))  # rows, columns, components
GMM_SIZES = ((1_797, 16, 10), (20_000, 32, 16), (100_000, 32, 32))  # rows, columns, components
HMM_SIZES = ((50, 100, 4), (200, 200, 8), (500, 400, 16))  # sequences, steps, states


def correlated(rows: int, columns: int, seed: int) -> np.ndarray:
    """Gaussian rows whose principal variances fall as 1 / i, float32 [rows, columns]."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.standard_normal((columns, columns)))[0] / np.sqrt(np.arange(1, columns + 1))
    return (rng.standard_normal((rows, columns)) @ mixing.T).astype(np.float32)


def clustered(rows: int, columns: int, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of overlapping clusters, float32 [rows, columns], and means to start from [clusters, columns]."""
    rng = np.random.default_rng(seed)
    means = 1.5 * rng.standard_normal((clusters, columns))
    x = means[rng.integers(0, clusters, rows)] + rng.standard_normal((rows, columns))
    return x.astype(np.float32), (means + 0.3 * rng.standard_normal(means.shape)).astype(np.float32)


def pca_case(size: tuple[int, int, int], **limits: Any) -> timing.Case:
    from sklearn.decomposition import PCA

    rows, columns, rank = size
    x = correlated(rows, columns, 0)
    on_device = jnp.asarray(x)
    if rows >= 10 * columns:  # scikit-learn's own choice there too: the covariance
        fit: Callable[[], linear.PCA] = lambda: linear.pca_of_scatter(linear.scatter_of(on_device), rank)
    else:
        fit = lambda: linear.fit_pca(on_device, rank)
    theirs = lambda: PCA(rank).fit(x)
    fits = min(50, max(1, 10**9 // (rows * columns**2)))  # so many that a call takes tens of milliseconds

    def repeated(fit: Callable[[], Any]) -> None:
        for _ in range(fits):
            jax.block_until_ready(fit())

    np.testing.assert_allclose(fit().variance, theirs().explained_variance_, rtol=1e-3)
    return timing.compare(
        f"PCA {rows}x{columns} to {rank}",
        lambda: repeated(fit),
        lambda: repeated(theirs),
        work=fits,
        unit="fits/s",
        **limits,
    )


def gmm_case(size: tuple[int, int, int], **limits: Any) -> timing.Case:
    from sklearn.mixture import GaussianMixture

    rows, columns, clusters = size
    x, means = clustered(rows, columns, clusters, 0)
    on_device = jnp.asarray(x)
    initial = Mixture(
        jnp.full(clusters, -np.log(clusters), jnp.float32),
        families.RotatedGaussians(
            jnp.asarray(means),
            jnp.broadcast_to(jnp.eye(columns), (clusters, columns, columns)),
            jnp.ones((clusters, columns)),
        ),
    )
    # A tolerance below any gain: exactly EM_STEPS steps.
    ours = lambda: gmm.fit_from(
        families.GAUSSIAN_FULL, initial, on_device, max_steps=EM_STEPS, tolerance=-np.inf
    )
    peer = GaussianMixture(
        clusters,
        max_iter=EM_STEPS,
        tol=0.0,
        weights_init=np.full(clusters, 1 / clusters),
        means_init=means,
        precisions_init=np.broadcast_to(np.eye(columns), (clusters, columns, columns)),
    )

    def theirs() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged: so it was asked
            return peer.fit(x)

    theirs()
    np.testing.assert_allclose(ours().objective[-1], peer.score(x), atol=5e-3)
    return timing.compare(
        f"GMM {rows}x{columns}, {clusters} full covariances",
        lambda: jax.block_until_ready(ours()),
        theirs,
        work=EM_STEPS,
        unit="EM steps/s",
        **limits,
    )


def hmm_case(size: tuple[int, int, int], **limits: Any) -> timing.Case:
    from hmmlearn.hmm import GaussianHMM

    sequences, steps, states = size
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.ones(states), states) * 0.3 + 0.7 * np.eye(states)
    x, means = clustered(sequences * steps, 3, states, 0)
    variances = np.ones((states, 3), np.float32)
    initial = hmm.HMM(
        jnp.full(states, -np.log(states), jnp.float32),
        jnp.asarray(np.log(transition), jnp.float32),
        families.Gaussians(jnp.asarray(means), jnp.asarray(variances)),
    )
    batch = jnp.asarray(x.reshape(sequences, steps, 3))
    ours = lambda: hmm.fit_em(
        families.GAUSSIAN_DIAGONAL, initial, batch, smoothing=1e-3, max_steps=EM_STEPS, tolerance=-np.inf
    )
    lengths = [steps] * sequences

    def theirs() -> Any:
        peer = GaussianHMM(
            states, "diag", n_iter=EM_STEPS, tol=-np.inf, init_params="", covars_prior=0.0, covars_weight=1.0
        )
        peer.startprob_, peer.transmat_ = np.full(states, 1 / states), transition
        peer.means_, peer.covars_ = means.astype(float), variances.astype(float)
        return peer.fit(x, lengths)

    np.testing.assert_allclose(
        float(ours().objective[-1]), theirs().score(x, lengths) / (sequences * steps), atol=5e-3
    )
    return timing.compare(
        f"HMM {sequences}x{steps}, {states} states",
        lambda: jax.block_until_ready(ours()),
        theirs,
        work=EM_STEPS,
        unit="EM steps/s",
        **limits,
    )


def main() -> None:
    """The table; the goal of at least the peer's speed is for the largest size of each."""
    flags = timing.parser(__doc__ or "").parse_args()
    timing.require("sklearn", "hmmlearn")
    limits = {"rounds": 5, "seconds": 15.0} if flags.quick else {"rounds": 15, "seconds": 60.0}
    cases = []
    for case, sizes in ((pca_case, PCA_SIZES), (gmm_case, GMM_SIZES), (hmm_case, HMM_SIZES)):
        for size in sizes:
            cases.append(case(size, goal=1.0 if size == sizes[-1] else None, **limits))
    timing.report("estimators", cases, ("scikit-learn", "hmmlearn", "numpy"), flags.record)


if __name__ == "__main__":
    memory.keep_freed_memory()  # as jaxgen.run does; both sides gain
    main()
