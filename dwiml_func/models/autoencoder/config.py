"""The options of the autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEFAULT_NB_POINTS", "AutoencoderOptions"]

DEFAULT_NB_POINTS = 256
"""Points of each streamline that an autoencoder reads, as in dwi_ml, where no number is given."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions:
    """The options that only the autoencoder has; see `Autoencoder`."""

    latent_space_dims: int = 32
    """With the autoencoder: number of values that describe a streamline."""
    first_channels: int = 32
    """With the autoencoder: channels of the first convolution. Each of the next five has twice as many."""
    raw_coordinates: bool = False
    """With the autoencoder: read voxel coordinates as they are, as dwi_ml does, instead of standardised by mean and
    standard deviation of the training's points."""
    reconstruction_loss: Literal["mean", "sum"] = "mean"
    """With the autoencoder: squared distance between a point and its reconstruction, as the mean over points, or as the
    sum over all points of the batch, as in dwi_ml."""
