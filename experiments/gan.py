"""Generative adversarial networks on images: Goodfellow's, DCGAN, SNGAN with projection, WGAN-GP.

  python -m jaxgen.run --config=experiments/gan.py:digits --workdir=runs/gan_digits
  ... --config.gan.game=wasserstein --config.gan.penalty=gradient_penalty --config.model.spectral=False

Read objectives/gan, models/gan, systems.alternating_system and this file, in that order. A step is
`gan.num_critic` updates of the discriminator on `data.batch_size` images each, all different, and one of the
generator. Samples and scores use the generator's averaged (EMA) weights. `PRESETS` says what each preset
needs and reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, generating
from experiments.common.judging import judge_of
from jaxgen import data, pictures, systems
from jaxgen.models import gan as models
from jaxgen.objectives import gan as objective
from jaxgen.samplers.chain import normal
from jaxgen.types import Array, Batch, Experiment, Key, Metrics, PyTree, Score, Scores, TrainState, UserError

KINDS = ("dcgan", "resnet")
_MNIST = {
    "data.source": "mnist",
    "model.num_levels": 2,
    "model.generator_channels": 16,
    "model.discriminator_channels": 16,
    "train.num_steps": 5000,
    "train.validate_every": 1000,
    "train.checkpoint_every": 500,
    "evaluation.num_samples": 10_000,
    "evaluation.batch_size": 250,
    "evaluation.classifier": "mnist",
}
_CIFAR10 = {
    "data.source": "cifar10",
    "data.augment": "flip",
    "gan.game": "hinge",
    "gan.num_critic": 5,
    "gan.latent_dim": 128,
    "gan.conditional": False,
    "model.kind": "resnet",
    "model.num_levels": 3,
    "model.generator_channels": 256,
    "model.discriminator_channels": 128,
    "optim.learning_rate": 2e-4,
    "optim.discriminator_rate": 1.0,
    "optim.b1": 0.0,
    "optim.b2": 0.9,
    "optim.schedule": "cosine",  # published: falls to 0 in a straight line
    "optim.ema_decay": 0.9999,
    "train.num_steps": 100_000,
    "train.log_every": 500,
    "train.validate_every": 5000,
    "train.sample_every": 10_000,
    "train.checkpoint_every": 5000,
    "sampling.num_statistics": 1000,
    "evaluation.num_samples": 10_000,
    "evaluation.batch_size": 500,
    "evaluation.classifier": "cifar10",
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.3,
        "runs",
        {
            "gan.num_critic": 2,
            "gan.latent_dim": 8,
            "model.generator_channels": 4,
            "model.discriminator_channels": 4,
            "data.batch_size": 8,
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "sampling.num": 4,
            "sampling.num_statistics": 16,
            "evaluation.num_samples": 20,
            "evaluation.batch_size": 20,
            "evaluation.classifier": "smoke",
        },
    ),
    "digits": Preset("2 CPU cores", 5, "0.99 recognised (held-out images: 0.98), Fréchet ratio 1.5", {}),
    "mnist": Preset("2 CPU cores", 10, "0.99 recognised (held-out images: 0.98), Fréchet ratio 4.7", _MNIST),
    "fashion_mnist": Preset(
        "2 CPU cores",
        45,
        "not run yet",
        {**_MNIST, "data.source": "fashion_mnist", "evaluation.classifier": "fashion_mnist"},
    ),
    "cifar10": Preset("1 GPU", 600, "FID 16.8 (mimicry's SNGAN; paper 21.7)", _CIFAR10),
    "cifar10_cond": Preset(
        "1 GPU", 600, "FID 10.8 (mimicry's cGAN with projection)", {**_CIFAR10, "gan.conditional": True}
    ),
    "cifar10_wgan_gp": Preset(
        "1 GPU",
        900,
        "FID 22.3 (mimicry's WGAN-GP)",
        {
            **_CIFAR10,
            "gan.game": "wasserstein",
            "gan.penalty": "gradient_penalty",
            "gan.penalty_weight": 10.0,
            "model.spectral": False,
        },
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    **generating.FIELD_CHECKS,
    "gan.game": ("wasserstein", {}),
    "gan.penalty": ("r1", {}),
    "gan.penalty_weight": (5.0, {"gan.penalty": "r1"}),
    "model.kind": ("resnet", {}),
}
_INTERPOLATIONS, _FRAMES = 8, 9


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=4000)
    config.data.batch_size = 64
    config.optim.learning_rate = 5e-4
    config.optim.b1 = 0.0
    config.optim.b2 = 0.99
    config.optim.clip_norm = 0.0
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.999
    config.optim.discriminator_rate = 2.0  # the discriminator's learning rate over the generator's
    config.train.log_every = 100
    config.gan = ConfigDict(
        {
            "game": "non_saturating",  # minimax, non_saturating, wasserstein, hinge
            "penalty": "none",  # none, gradient_penalty, r1
            "penalty_weight": 1.0,
            "num_critic": 1,  # updates of the discriminator for each of the generator
            "latent_dim": 64,
            "conditional": True,  # told the class
        }
    )
    config.model = ConfigDict(
        {
            "kind": "dcgan",  # dcgan, resnet
            "generator_channels": 64,
            "discriminator_channels": 64,
            "num_levels": 1,  # how often the size is doubled, and with dcgan halved
            "spectral": True,  # spectral norm in the discriminator
            "dtype": "float32",
        }
    )
    config.sampling = ConfigDict(
        {"num": 64, "num_statistics": 500}
    )  # latents for the batch norm's statistics
    config.evaluation = generating.evaluation_config()
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.above(config, 0, "optim.discriminator_rate")
    checks.one_of(config, get_args(objective.Game), "gan.game")
    checks.one_of(config, get_args(objective.Penalty), "gan.penalty")
    checks.above(config, 0, "gan.penalty_weight")
    checks.at_least(config, 1, "gan.num_critic", "gan.latent_dim", "sampling.num", "model.num_levels")
    checks.at_least(config, 1, "model.generator_channels", "model.discriminator_channels")
    checks.at_least(config, 2, "sampling.num_statistics")
    checks.one_of(config, KINDS, "model.kind")
    checks.one_of(config, common.DTYPES, "model.dtype")
    generating.check_evaluation(config)


def make_players(
    model: ConfigDict, shape: tuple[int, int, int], num_classes: int | None
) -> tuple[models.Generator, models.Discriminator]:
    """The nets that config.model describes, for images of this shape."""
    halvings = model.num_levels if model.kind == "dcgan" else max(model.num_levels, 2)
    if (shape[0] | shape[1]) % 2**halvings:
        raise UserError(
            f"Images of {shape[0]}x{shape[1]} cannot be halved {halvings} times, as model.num_levels and "
            "model.kind ask: lower model.num_levels, or take model.kind=dcgan."
        )
    dtype = common.DTYPES[model.dtype]
    if model.kind == "dcgan":
        return (
            models.DCGANGenerator(shape, model.generator_channels, model.num_levels, num_classes, dtype),
            models.DCGANDiscriminator(
                model.discriminator_channels, model.num_levels, model.spectral, num_classes, dtype
            ),
        )
    return (
        models.ResNetGenerator(shape, model.generator_channels, model.num_levels, num_classes, dtype),
        models.ResNetDiscriminator(model.discriminator_channels, model.spectral, num_classes, dtype),
    )


def make_system(
    config: ConfigDict, generator: models.Generator, discriminator: models.Discriminator
) -> systems.System:
    """The two players' training that config.gan and config.optim describe."""
    latent_dim, num_critic = config.gan.latent_dim, config.gan.num_critic

    def generate(params: PyTree, key: Key, label: Array | None, num: int) -> Array:
        z = jax.random.normal(key, (num, latent_dim))
        return models.generate_in_training(generator, params, z, label)

    def discriminate(
        params: PyTree, state: PyTree, x: Array, label: Array | None, train: bool
    ) -> tuple[Array, PyTree]:
        return models.discriminate(discriminator, params, state, x, label, train)

    of_discriminator, of_generator = objective.make_losses(
        generate,
        discriminate,
        config.gan.game,
        penalty=config.gan.penalty,
        penalty_weight=config.gan.penalty_weight,
        conditional=generator.num_classes is not None,
    )
    # The discriminator's schedule counts its own updates.
    critic = ConfigDict(config.optim.to_dict())
    critic.learning_rate *= config.optim.discriminator_rate
    critic.warmup_steps *= num_critic
    critic.decay_steps = tuple(num_critic * step for step in critic.decay_steps)
    num_steps = config.train.num_steps
    return systems.alternating_system(
        lambda key, batch: models.init_players(generator, discriminator, key, batch["image"], latent_dim),
        of_discriminator,
        of_generator,
        discriminator_optimizer=common.make_optimizer(critic, num_steps=num_critic * num_steps),
        generator_optimizer=common.make_optimizer(config.optim, num_steps=num_steps),
        num_critic=num_critic,
        ema_decay=config.optim.ema_decay,
        ema_warmup=config.optim.ema_warmup,
        accumulate=config.optim.accumulate,
    )


def between(first: Array, last: Array, num: int) -> Array:
    """Latents on the great circle from one to the other, `[N, L]` -> `[num, N, L]` (Shoemake 1985).

    A straight line would pass nearer to the origin than latents are ever drawn.
    """
    unit = lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    cosine = jnp.sum(unit(first) * unit(last), axis=-1, keepdims=True)
    angle = jnp.arccos(jnp.clip(cosine, -0.999, 0.999))[None]
    t = jnp.linspace(0.0, 1.0, num)[:, None, None]
    return (jnp.sin((1 - t) * angle) * first[None] + jnp.sin(t * angle) * last[None]) / jnp.sin(angle)


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds nets, losses, data and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    shape = train.fields["image"].shape[1:]
    num_classes = train.num_classes if config.gan.conditional else None
    if config.gan.conditional and num_classes is None:
        raise UserError(f"gan.conditional needs labels, and {train.name} has none: set it to False.")
    generator, discriminator = make_players(config.model, shape, num_classes)
    system = make_system(config, generator, discriminator)
    of_step = ConfigDict(config.data.to_dict())
    of_step.batch_size *= config.gan.num_critic
    stream = common.training_stream(of_step, train, seed=config.seed, mesh=mesh)

    # ---- sampling: sample number i is of class i mod num_classes where the model is conditional

    def images_of(params: PyTree, z: Array, label: Array | None) -> Array:
        statistics = models.standing_statistics(
            generator, params, jax.random.key(0), config.sampling.num_statistics, config.gan.latent_dim
        )
        variables = {"params": params, "batch_stats": statistics}
        return cast(Array, generator.apply(variables, z, label, train=False))

    def latents(key: Key, indices: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)
        return normal(keys, (config.gan.latent_dim,))

    def label_of(indices: Array) -> Array | None:
        return None if num_classes is None else indices % num_classes

    @jax.jit
    def sample(params: PyTree, key: Key, indices: Array) -> Array:
        return images_of(params["generator"], latents(key, indices), label_of(indices))

    @jax.jit
    def interpolate(params: PyTree, key: Key) -> Array:
        """Frames `[F, N, H, W, C]` from samples 0..N-1 to samples N..2N-1, of the former's classes."""
        z = latents(key, jnp.arange(2 * _INTERPOLATIONS))
        way = between(z[:_INTERPOLATIONS], z[_INTERPOLATIONS:], _FRAMES).reshape(-1, z.shape[1])
        label = label_of(jnp.tile(jnp.arange(_INTERPOLATIONS), _FRAMES))
        return images_of(params["generator"], way, label).reshape(_FRAMES, _INTERPOLATIONS, *shape)

    def write_samples(state: TrainState, key: Key, num: int, directory: Path) -> list[Path]:
        num, batch_size = num or config.sampling.num, config.evaluation.batch_size
        params = state.sampling_params
        grid = generating.write_grid(sample, params, key, num, batch_size, directory)
        strip = directory / "interpolation.png"
        frames = np.asarray(interpolate(params, key))
        pictures.save_strip(strip, frames, scale=max(1, 64 // shape[0]))
        return [grid, strip]

    # ---- evaluation: the discriminator against the generator that samples are drawn from

    losses, _ = objective.make_losses(
        lambda params, key, label, num: images_of(
            params, jax.random.normal(key, (num, config.gan.latent_dim)), label
        ),
        lambda params, state, x, label, _: models.discriminate(discriminator, params, state, x, label, False),
        config.gan.game,
        conditional=num_classes is not None,
    )

    def outputs(players: tuple[PyTree, PyTree], batch: Mapping[str, Array], key: Key) -> Metrics:
        return losses(*players, batch, key)[1][0]

    def players_of(state: TrainState) -> tuple[PyTree, PyTree]:
        return {**state.params, "generator": state.sampling_params["generator"]}, state.model_state

    def on(source: data.Source):
        return common.make_evaluation(
            outputs,
            source,
            mesh,
            batch_size=config.evaluation.batch_size,
            limit=len(test),
            seed=config.seed,
        )

    on_test, on_train = on(test), on(train)
    checks.check_best_metric(config.train.best_metric, losses, system, cast(Batch, stream(0)))

    def discriminator_scores(state: TrainState) -> Scores:
        """What the discriminator says; that it knows training from held-out images shows overfitting."""
        held_out = common.mean_values(on_test(players_of(state)))
        training = common.mean_values(on_train(players_of(state)))
        logistic = config.gan.game in ("minimax", "non_saturating")
        unit = "probability of being real, mean" if logistic else "output, mean"
        # Goodfellow et al. 2014, proposition 1 at p_g = p_data; the other games fix no value.
        reference = (0.5, "1/2 at the equilibrium") if logistic else (None, "")
        return {
            name: Score(value, unit, num, True, *reference)
            for name, value, num in (
                ("discriminator_on_held_out", held_out["real_output"], len(test)),
                ("discriminator_on_training", training["real_output"], min(len(test), len(train))),
                ("discriminator_on_samples", held_out["fake_output"], len(test)),
            )
        }

    def evaluate(state: TrainState, needed: Mapping[str, TrainState]) -> Scores:
        scores = dict(discriminator_scores(state))
        if judge := judge_of(config.evaluation, needed, train, test, mesh):
            judged = generating.sample_scores(sample, state.sampling_params, judge, config, mesh)
            scores = {**judged, **scores}
        return scores

    return Experiment(
        system=system,
        loop=common.loop_settings(config.train),
        train_batch=stream,
        validate=lambda state: on_test(players_of(state)),
        evaluate=evaluate,
        write_samples=write_samples,
        data_fingerprints={"train": train.fingerprint, "test": test.fingerprint},
        seed=config.seed,
        needs=generating.judge_needs(config, train, test, mesh),
    )
