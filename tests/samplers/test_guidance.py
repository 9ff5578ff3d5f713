import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gaussian import network_calls

from jaxgen.processes import linear_schedule
from jaxgen.samplers.chain import run_chain
from jaxgen.samplers.ddim import ddim_chain
from jaxgen.samplers.guidance import classifier_free_guidance

NULL = 10


def network(x, t, label):
    """A network whose output depends on every argument, and on each example alone."""
    shape = t.shape + (1,) * (x.ndim - 1)
    return jnp.sin(x * (1.0 + label.reshape(shape))) + 0.01 * t.reshape(shape)


X = jax.random.normal(jax.random.key(0), (4, 3, 2))
T = jnp.array([3, 1, 4, 1])
LABEL = jnp.array([0, 7, 7, 2])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_guidance_is_the_line_through_the_two_outputs(scale):
    guided = classifier_free_guidance(network, LABEL, NULL, scale)(X, T)
    conditional = np.asarray(network(X, T, LABEL))
    unconditional = np.asarray(network(X, T, jnp.full(4, NULL)))
    np.testing.assert_allclose(guided, unconditional + scale * (conditional - unconditional), atol=2e-6)


@pytest.mark.parametrize(("scale", "batches"), [(0.0, [4]), (1.0, [4]), (2.0, [8])])
def test_guidance_costs_one_call(scale, batches):
    predict, calls = network_calls(network)
    jax.block_until_ready(classifier_free_guidance(predict, LABEL, NULL, scale)(X, T))
    jax.effects_barrier()
    assert [len(t) for t in calls] == batches


def test_guided_sampling_calls_the_network_once_a_step_and_follows_the_labels():
    predict, calls = network_calls(
        lambda x, t, label: jnp.where(label == NULL, 0.0, 0.1 * label)[:, None] + 0.0 * x
    )
    label = jnp.array([0, 1, 2])
    schedule = linear_schedule(50, 1e-3, 0.3)

    def sample(scale):
        guided = classifier_free_guidance(predict, label, NULL, scale)
        chain = ddim_chain(guided, schedule, num_steps=6, prediction="x0")
        return jax.jit(lambda i: run_chain(chain, jax.random.key(0), i, (2,)))(jnp.arange(3))

    for scale, batch in ((0.0, 3), (1.0, 3), (2.5, 6)):
        calls.clear()
        samples = sample(scale)
        jax.effects_barrier()
        assert [len(t) for t in calls] == [batch] * 6
        # The last step of DDIM is the predicted x0 itself.
        np.testing.assert_allclose(samples, np.array([[0.0] * 2, [0.1] * 2, [0.2] * 2]) * scale, atol=1e-6)
