"""Residual networks and their plain twins on small images (He, Zhang, Ren & Sun 2016, section 4.2).

  python -m jaxgen.run --config=experiments/resnet.py:digits --workdir=runs/resnet_digits
  ... --config.model.residual=False                      # the plain network of the same depth
  ... --mode=evaluate --config.evaluation.deleted=3,     # without its block number 3 (Veit et al. 2016)

digits: half a minute on 2 CPU cores, test error 0.8 % of 360. cifar10 is the published setting (error 8.75 %
for 20 layers), but for the input, which is scaled to [-1, 1] where the paper subtracts each pixel's mean.
"""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import common
from experiments.common import Preset, checks, classifying
from jaxgen.models.resnet import ResNet, cifar_stages
from jaxgen.types import Experiment, UserError

GENERATES = False
_CIFAR10: dict[str, Any] = {
    "data.source": "cifar10",
    "data.augment": "flip,crop4",
    "data.batch_size": 128,
    "model.channels": 16,
    "optim.learning_rate": 0.1,
    "optim.decay_steps": (32_000, 48_000),
    "train.num_steps": 64_000,
    "train.log_every": 200,
    "train.validate_every": 2000,
    "train.checkpoint_every": 4000,
    "evaluation.batch_size": 500,
}
PRESETS = {
    "smoke": Preset(
        "1 CPU core",
        0.3,
        "runs",
        {
            "model.depth": 8,
            "model.channels": 4,
            "data.batch_size": 16,
            "optim.decay_steps": (2,),
            "train.num_steps": 4,
            "train.steps_per_dispatch": 2,
            "train.log_every": 2,
            "train.validate_every": 2,
            "train.checkpoint_every": 2,
            "evaluation.batch_size": 40,
        },
    ),
    "digits": Preset("2 CPU cores", 0.5, "test error 0.8 %", {}),
    "fashion_mnist": Preset(
        "1 GPU",
        10,
        "no published figure of this setting",
        {**_CIFAR10, "data.source": "fashion_mnist"},
    ),
    "cifar10": Preset("1 GPU", 30, "test error 8.75 % (He et al. 2016, 20 layers)", _CIFAR10),
    "cifar10_56": Preset(
        "1 GPU", 80, "test error 6.97 % (He et al. 2016, 56 layers)", {**_CIFAR10, "model.depth": 56}
    ),
    "cifar10_110": Preset(
        "1 GPU",
        160,
        "test error 6.43 % (He et al. 2016, 110 layers)",
        {**_CIFAR10, "model.depth": 110, "optim.warmup_steps": 400},
    ),
    "cifar10_30k": Preset(
        "1 GPU",
        30,
        "no published figure for 30,000 training images",
        {**_CIFAR10, "data.source": "cifar10_30k"},
    ),
}
FIELD_CHECKS = {
    **common.FIELD_CHECKS,
    "optim.optimizer": ("adam", {}),
    "optim.schedule": ("cosine", {}),
    "optim.b2": (0.5, {"optim.optimizer": "adam"}),
    "optim.eps": (1e-3, {"optim.optimizer": "adam"}),
    "optim.decay_steps": ((1,), {}),
    "optim.weight_decay": (0.1, {}),
    "optim.clip_norm": (1.0, {}),
    "model.depth": (14, {}),
    "model.zero_init": (True, {}),
    "model.project": (True, {}),
    "model.dropout": (0.5, {}),
    "objective.label_smoothing": (0.1, {}),
    "evaluation.deleted": ((1,), {}),
}
# Test error in percent by depth, He et al. 2016, table 6, on all of CIFAR-10.
_PUBLISHED = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}


def get_config(preset: str) -> ConfigDict:
    """The config of a preset; the base values are those of `digits`."""
    config = common.base_config(num_steps=800)
    config.data.batch_size = 64
    config.optim.optimizer = "sgd"
    config.optim.schedule = "step"
    config.optim.learning_rate = 0.1
    config.optim.decay_steps = (500, 700)
    config.optim.weight_decay = 1e-4
    config.optim.clip_norm = 0.0
    config.train.validate_every = 100
    config.train.checkpoint_every = 200
    config.model = ConfigDict(
        {
            "depth": 20,  # 6 n + 2
            "channels": 16,
            "residual": True,  # False: the plain network
            "project": False,  # shortcuts that change shape are 1x1 convolutions, else zero-padded
            "zero_init": False,  # residual branches start at zero
            "dropout": 0.0,  # between the convolutions of a block
            "dtype": "float32",
        }
    )
    config.objective = ConfigDict({"label_smoothing": 0.0})
    config.evaluation = ConfigDict(
        {
            "batch_size": 360,
            "deleted": (),  # numbers of the blocks that evaluation leaves out
        }
    )
    return common.with_settings(config, PRESETS[preset].settings)


def check(config: ConfigDict) -> None:
    """UserError where a value makes no sense."""
    checks.check_base(config)
    checks.at_least(config, 1, "model.channels", "evaluation.batch_size")
    checks.at_least(config, 0, "evaluation.deleted")
    checks.in_range(config, 0, 1, "model.dropout", "objective.label_smoothing")
    checks.one_of(config, common.DTYPES, "model.dtype")
    try:
        num_blocks = sum(cifar_stages(config.model.depth))
    except ValueError:
        raise UserError(f"model.depth must be 6 n + 2, such as 20 or 56, not {config.model.depth}.") from None
    if any(block >= num_blocks for block in config.evaluation.deleted):
        raise UserError(f"evaluation.deleted names a block that is not among 0 to {num_blocks - 1}.")


def make_model(config: ConfigDict, num_classes: int) -> ResNet:
    """The network that config.model describes."""
    return ResNet(
        stage_sizes=cifar_stages(config.depth),
        channels=config.channels,
        num_classes=num_classes,
        residual=config.residual,
        project=config.project,
        zero_init=config.zero_init,
        dropout=config.dropout,
        dtype=common.DTYPES[config.dtype],
    )


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Experiment:
    """Binds network, loss, data and metrics."""
    check(config)
    train, test = common.load_images(config.data.source)
    model = make_model(config.model, classifying.num_classes(train))
    published = _PUBLISHED.get(config.model.depth) if config.data.source == "cifar10" else None
    return classifying.bind(
        config,
        mesh,
        model,
        train,
        test,
        reference=(published, "He et al. 2016, table 6" if published else ""),
        evaluated_model=model.clone(deleted=tuple(config.evaluation.deleted)),
    )
