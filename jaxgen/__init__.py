"""jaxgen: representation learning and generative models in JAX, one loop for all of them."""

__version__ = "0.1.0"
