"""The U-Net that a config describes."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments import common
from jaxgen.models.unet import UNet


def make_unet(model: ConfigDict, *, out_channels: int, num_classes: int | None = None) -> UNet:
    """The network of config.model, whose fields `checks.check_unet` looks at."""
    return UNet(
        channels=model.channels,
        channel_multipliers=tuple(model.channel_multipliers),
        num_res_blocks=model.num_res_blocks,
        attention_resolutions=tuple(model.attention_resolutions),
        head_dim=model.head_dim or None,
        num_groups=model.num_groups,
        dropout=model.dropout,
        out_channels=out_channels,
        num_classes=num_classes,
        remat=model.get("remat", False),
        dtype=common.DTYPES[model.dtype],
    )
