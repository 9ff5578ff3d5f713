"""The losses of generative adversarial networks: two players, one that makes images and one that judges them.

The discriminator gives a logit for each image. With D = sigmoid(logit) the game of Goodfellow et al. 2014 is
min_G max_D V(D, G), V = E log D(x) + E log(1 - D(G(z))). Nets that play it, and the later games, minimise
their own losses of the logits in turn (`systems.alternating_system`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxgen.objectives import label_of
from jaxgen.types import Array, Batch, Key, LossFn, Mean, Metrics, PyTree

Game: TypeAlias = Literal["minimax", "non_saturating", "wasserstein", "hinge"]
Penalty: TypeAlias = Literal["none", "gradient_penalty", "r1"]

# (generator's params, key, labels int32 [B] or None, num B) -> images [B, H, W, C]; training mode.
Generate: TypeAlias = Callable[[PyTree, Key, Array | None, int], Array]
# (discriminator's params, its model_state, images [B, H, W, C], labels int32 [B] or None, training) ->
# (logits [B], its new model_state); without `training` the state comes back as it was.
Discriminate: TypeAlias = Callable[[PyTree, PyTree, Array, Array | None, bool], tuple[Array, PyTree]]


# ---- the games, elementwise on logits


def value(real_logits: Array, fake_logits: Array) -> Array:
    """V(D, G) = E log D(x) + E log(1 - D(G(z))), a scalar in nats (Goodfellow et al. 2014, eq. 1)."""
    return jnp.mean(jax.nn.log_sigmoid(real_logits)) + jnp.mean(jax.nn.log_sigmoid(-fake_logits))


def optimal_discriminator(p_data: Array, p_g: Array) -> Array:
    """D* = p_data / (p_data + p_g), elementwise on densities (Goodfellow et al. 2014, proposition 1)."""
    return p_data / (p_data + p_g)


def logistic_real_loss(logits: Array) -> Array:
    """-log D(x), elementwise."""
    return jax.nn.softplus(-logits)


def logistic_fake_loss(logits: Array) -> Array:
    """-log(1 - D(G(z))), elementwise."""
    return jax.nn.softplus(logits)


def minimax_generator_loss(logits: Array) -> Array:
    """log(1 - D(G(z))), elementwise; its gradient vanishes where the discriminator is sure."""
    return -jax.nn.softplus(logits)


def non_saturating_generator_loss(logits: Array) -> Array:
    """-log D(G(z)), elementwise (Goodfellow et al. 2014, section 3): the same fixed point, no vanishing."""
    return jax.nn.softplus(-logits)


def hinge_real_loss(logits: Array) -> Array:
    """max(0, 1 - D(x)), D the logit itself, elementwise (Miyato et al. 2018, eq. 16)."""
    return jax.nn.relu(1.0 - logits)


def hinge_fake_loss(logits: Array) -> Array:
    """max(0, 1 + D(G(z))), D the logit itself, elementwise (Miyato et al. 2018, eq. 16)."""
    return jax.nn.relu(1.0 + logits)


def _negative(logits: Array) -> Array:
    return -logits


def _identity(logits: Array) -> Array:
    return logits


class AdversarialLosses(NamedTuple):
    """What the players minimise: each function takes logits of any shape to losses of that shape.

    real, fake: the discriminator's, on real and on generated images; it minimises their sum
    generator: the generator's, on generated images
    output: logits -> what the discriminator says, a probability of being real or a score without bounds
    """

    real: Callable[[Array], Array]
    fake: Callable[[Array], Array]
    generator: Callable[[Array], Array]
    output: Callable[[Array], Array]


def adversarial_losses(game: Game) -> AdversarialLosses:
    """The losses of a game.

    minimax, non_saturating: Goodfellow et al. 2014; they differ in the generator's loss
    wasserstein: E D(G(z)) - E D(x), D 1-Lipschitz (Arjovsky et al. 2017, eq. 2)
    hinge: Lim and Ye 2017, Miyato et al. 2018, eq. 16 and 17
    """
    if game == "minimax":
        logistic = (logistic_real_loss, logistic_fake_loss)
        return AdversarialLosses(*logistic, minimax_generator_loss, jax.nn.sigmoid)
    if game == "non_saturating":
        logistic = (logistic_real_loss, logistic_fake_loss)
        return AdversarialLosses(*logistic, non_saturating_generator_loss, jax.nn.sigmoid)
    if game == "wasserstein":
        return AdversarialLosses(_negative, _identity, _negative, _identity)
    return AdversarialLosses(hinge_real_loss, hinge_fake_loss, _negative, _identity)


# ---- penalties on the discriminator's gradient in the image


def squared_gradient_norm(logits_of: Callable[[Array], Array], x: Array) -> Array:
    """||grad_x D(x)||^2 `[B]` at x `[B, ...]`; logits_of: `[B, ...]` -> `[B]`, each image on its own."""
    gradient = jax.grad(lambda x: jnp.sum(logits_of(x)))(x)
    return jnp.sum(jnp.square(gradient.reshape(x.shape[0], -1)), axis=1)


def gradient_penalty(logits_of: Callable[[Array], Array], real: Array, fake: Array, weight: Array) -> Array:
    """(||grad D(x^)||_2 - 1)^2 `[B]` at x^ = weight real + (1 - weight) fake (Gulrajani et al. 2017, eq. 3).

    real, fake: `[B, ...]`; weight: `[B]`, to be drawn from U(0, 1).
    """
    weight = weight.reshape(-1, *(1,) * (real.ndim - 1))
    squared = squared_gradient_norm(logits_of, weight * real + (1.0 - weight) * fake)
    # The root has no finite derivative at 0, where a discriminator that has gone flat would be lost to NaN.
    return jnp.square(jnp.sqrt(squared + 1e-12) - 1.0)


def r1_penalty(logits_of: Callable[[Array], Array], real: Array) -> Array:
    """||grad D(x)||^2 / 2 `[B]` at real images (Mescheder et al. 2018, eq. 9, without gamma)."""
    return 0.5 * squared_gradient_norm(logits_of, real)


# ---- the players' losses


def make_losses(
    generate: Generate,
    discriminate: Discriminate,
    game: Game,
    *,
    penalty: Penalty = "none",
    penalty_weight: float = 0.0,
    conditional: bool = False,
) -> tuple[LossFn, LossFn]:
    """(the discriminator's loss, the generator's), for `systems.alternating_system`.

    params and model_state have the entries "generator" and "discriminator". Uses batch["image"]
    [B, H, W, C] in [-1, 1], batch["label"] int32 [B] where conditional, for generated images too, and
    batch["mask"] [B] where there. As many images are generated as there are real ones.

    penalty: a term of the discriminator's loss, `penalty_weight` (lambda or gamma) times its mean: at points
        between real and generated images, or at real ones.

    Metrics: "loss" of either; the discriminator's also "real_output" and "fake_output", the means of what it
    says, and "penalty" where there is one, without its weight. Raises UserError, when traced, where labels
    are missing.
    """
    losses = adversarial_losses(game)

    def average(values: Array, mask: Array | None) -> tuple[Array, Mean]:
        mean = Mean.of(values, mask)
        return mean.value_or_zero, mean

    def discriminator_loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        real, label, mask = batch["image"], label_of(batch, conditional), batch.get("mask")
        fake_key, weight_key = jax.random.split(key)
        fake = jax.lax.stop_gradient(generate(params["generator"], fake_key, label, real.shape[0]))
        own, own_state = params["discriminator"], model_state["discriminator"]
        # One pass over both, rows in turn, so that on several devices no row leaves its device.
        both = jnp.stack([real, fake.astype(real.dtype)], axis=1).reshape(-1, *real.shape[1:])
        both_label = None if label is None else jnp.repeat(label, 2)
        logits, own_state = discriminate(own, own_state, both, both_label, True)
        real_logits, fake_logits = logits[0::2], logits[1::2]
        loss = losses.real(real_logits) + losses.fake(fake_logits)
        metrics = {
            "real_output": Mean.of(losses.output(real_logits), mask),
            "fake_output": Mean.of(losses.output(fake_logits), mask),
        }
        if penalty != "none":
            logits_of = lambda x: discriminate(own, own_state, x, label, False)[0]
            if penalty == "r1":
                terms = r1_penalty(logits_of, real)
            else:
                weight = jax.random.uniform(weight_key, (real.shape[0],))
                terms = gradient_penalty(logits_of, real, fake, weight)
            loss = loss + penalty_weight * terms
            metrics["penalty"] = Mean.of(terms, mask)
        scalar, metrics["loss"] = average(loss, mask)
        return scalar, (metrics, {**model_state, "discriminator": own_state})

    def generator_loss(
        params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[Metrics, PyTree]]:
        label = label_of(batch, conditional)
        fake = generate(params["generator"], key, label, batch["image"].shape[0])
        state = model_state["discriminator"]
        logits, _ = discriminate(params["discriminator"], state, fake, label, False)
        scalar, mean = average(losses.generator(logits), batch.get("mask"))
        return scalar, ({"loss": mean}, model_state)

    return discriminator_loss, generator_loss
