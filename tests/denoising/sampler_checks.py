"""What every sampler of this folder is put through, and the data whose exact denoiser it is given."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import mixtures
from jaxgen.mixtures import gaussian_mixture
from jaxgen.samplers.chain import run_chain

MEAN, STD = 0.3, 0.5
GAUSSIAN = gaussian_mixture([1.0], np.full((1, 2), MEAN), STD**2 * np.eye(2)[None])
# Modes of unequal weight and shape, too far apart to cross between without noise: 8 standard deviations.
MODE_WEIGHTS = np.array([0.2, 0.8])
TWO_MODES = gaussian_mixture(
    MODE_WEIGHTS, [[-4.0, -4.0], [4.0, 4.0]], [[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.3], [0.3, 1.2]]]
)


def gaussian_denoiser(x, sigma):
    return mixtures.denoise(GAUSSIAN, x, sigma)


def two_modes_denoiser(x, sigma):
    return mixtures.denoise(TWO_MODES, x, sigma)


def draw(chain, num, seed=0, shape=(2,)):
    run = jax.jit(lambda indices: run_chain(chain, jax.random.key(seed), indices, shape))
    return np.asarray(run(jnp.arange(num)))


def assert_moments(samples, mean, std, bias=0.0):
    """Every coordinate within 4 standard errors, and `bias` beyond them."""
    n = len(samples)
    assert np.abs(samples.mean(axis=0) - mean).max() < 4 * std / np.sqrt(n) + bias
    assert np.abs(samples.std(axis=0) - std).max() < 4 * std / np.sqrt(2 * n) + bias


def share_of_the_second_mode(samples):
    """The share of the samples, and its standard error were the weight exact."""
    share = float((samples.sum(axis=1) > 0.0).mean())
    return share, np.sqrt(MODE_WEIGHTS.prod() / len(samples))


def assert_the_modes_are_right(samples, bias=0.0):
    """The second mode's weight, mean and covariance within 4 standard errors, and `bias` beyond them."""
    share, error = share_of_the_second_mode(samples)
    assert abs(share - MODE_WEIGHTS[1]) < 4 * error + bias
    mode = samples[samples.sum(axis=1) > 0.0]
    assert np.abs(mode.mean(axis=0) - 4.0).max() < 4 * np.sqrt(1.2 / len(mode)) + bias
    # The standard error of a covariance c of variances a and b is sqrt((a b + c^2) / n).
    expected = np.array([[0.8, 0.3], [0.3, 1.2]])
    errors = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / len(mode))
    assert (np.abs(np.cov(mode.T) - expected) < 4 * errors + bias).all()


def assert_samples_do_not_depend_on_the_batch(chain):
    run = jax.jit(lambda indices: run_chain(chain, jax.random.key(5), indices, (2,)))
    together = run(jnp.arange(7))
    # Rounding alone may differ between sizes.
    np.testing.assert_allclose(run(jnp.array([5, 2])), together[jnp.array([5, 2])], rtol=1e-5, atol=1e-5)
    assert len(np.unique(together[:, 0])) == 7


def num_traces(make_chain, network):
    """How often the network is traced by two runs of the chain that `make_chain(network)` gives."""
    traces = []

    def counted(*args):
        traces.append(1)
        return network(*args)

    chain = make_chain(counted)
    run = jax.jit(lambda indices: run_chain(chain, jax.random.key(6), indices, (2,)))
    for start in (0, 3):
        run(start + jnp.arange(3))
    return len(traces)


def calls_of(chain, calls):
    """The noise levels of the calls that one sample's chain makes, in order; `calls` is `network_calls`'s."""
    draw(chain, 1)
    jax.effects_barrier()
    return [sigma for (sigma,) in calls]
