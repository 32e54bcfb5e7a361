"""A convolutional autoencoder of streamlines: a few numbers describe a whole streamline.

Source: dwi_ml, `ae_models.py`; Legarreta et al., "Filtering in tractography using autoencoders (FINTA)", Medical Image
Analysis, 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dwiml_func._checks import check_choice, check_number
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.models.autoencoder.config import DEFAULT_NB_POINTS

__all__ = ["RECONSTRUCTION_ERROR", "Autoencoder", "compute_reconstruction_loss"]

RECONSTRUCTION_ERROR = "reconstruction_error"
"""The metric's name: voxels (mm where voxels are no cubes), mean over points."""

_KERNEL = 3
_HALVINGS = 5
_LEAST_POINTS = 33  # fewer leave a single point after five halvings, which has no neighbour to reflect


class Autoencoder(torch.nn.Module):
    """Six convolutions and a linear layer to the latent space, and the mirror image back to points.

    Parameters have dwi_ml's names, so its model states load unchanged. A streamline of another length than 256 makes
    another size of the linear layers, which is computed; the decoder then returns as many points as the encoder reads.

    Args:
        nb_points: points of each streamline, at least 33.
        latent_space_dims: values that describe a streamline.
        first_channels: channels of the first convolution; each of the next five has twice as many.
        raw_coordinates: read coordinates as they are, as dwi_ml does, instead of standardised. Training then first has
            to learn where the brain is.
        reconstruction_loss: "mean" over points of the squared distance between a point and its reconstruction, or "sum"
            over all points of a batch.

    Attributes:
        center, scale: buffers (3,) and (), the mean and the standard deviation of the training's points, by which
            coordinates are standardised inside the model; absent with `raw_coordinates`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> model = Autoencoder(nb_points=40, latent_space_dims=4, first_channels=2)
        >>> latent = model.encode(torch.rand(5, 40, 3))
        >>> latent.shape, model.decode(latent).shape
        (torch.Size([5, 4]), torch.Size([5, 40, 3]))
    """

    nb_features = 0  # of the input volume, which it does not read
    center: Tensor
    scale: Tensor

    def __init__(
        self,
        nb_points: int = DEFAULT_NB_POINTS,
        *,
        latent_space_dims: int = 32,
        first_channels: int = 32,
        raw_coordinates: bool = False,
        reconstruction_loss: str = "mean",
    ) -> None:
        super().__init__()
        check_number("nb_points", nb_points, at_least=_LEAST_POINTS)
        check_number("latent_space_dims", latent_space_dims, at_least=1)
        check_number("first_channels", first_channels, at_least=1)
        check_choice("reconstruction_loss", reconstruction_loss, ("mean", "sum"))
        self.nb_points = nb_points
        self.reconstruction_loss = reconstruction_loss
        lengths = [nb_points]
        for _ in range(_HALVINGS):
            lengths.append((lengths[-1] + 1) // 2)
        self._lengths = lengths[-2::-1]  # after each doubling of the decoder
        channels = [3, *(first_channels * 2**number for number in range(_HALVINGS + 1))]
        self._shape = channels[-1], lengths[-1]
        size = channels[-1] * lengths[-1]
        if not raw_coordinates:
            self.register_buffer("center", torch.zeros(3))
            self.register_buffer("scale", torch.ones(()))
        self.raw_coordinates = raw_coordinates
        self.fc1 = torch.nn.Linear(size, latent_space_dims)
        self.fc2 = torch.nn.Linear(latent_space_dims, size)
        strides = [2] * _HALVINGS + [1]
        self._encoder, self._decoder = [], []  # names; dwi_ml's count from 1
        for number, stride in enumerate(strides, start=1):
            self._encoder.append(f"encod_conv{number}")
            self.add_module(self._encoder[-1], _convolution(channels[number - 1], channels[number], stride))
        for number in range(1, len(strides) + 1):
            self._decoder.append(f"decod_conv{number}")
            self.add_module(self._decoder[-1], _convolution(channels[-number], channels[-number - 1], 1))

    def standardize(self, points: Tensor) -> None:
        """Take center and scale from points of the training; without effect with `raw_coordinates`.

        Args:
            points: (P, 3), of one streamline or more, in the space of the training's points.

        Example:
            >>> model = Autoencoder(40, first_channels=2)
            >>> model.standardize(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 3.0]]))
            >>> model.center.tolist()
            [2.0, 2.0, 3.0]
        """
        if self.raw_coordinates:
            return
        center = points.double().mean(0)
        scale = (points.double() - center).square().mean().sqrt()
        self.center.copy_(center)
        self.scale.copy_(scale if scale > 0 else torch.ones(()))

    def encode(self, points: Tensor) -> Tensor:
        """Describe streamlines.

        Args:
            points: (S, nb_points, 3), voxel space, corner origin; of voxels that are no cubes, mm along their axes.

        Returns:
            (S, latent_space_dims).

        Raises:
            ValueError: the streamlines have another number of points.

        Example:
            >>> Autoencoder(40, first_channels=2).encode(torch.rand(2, 40, 3)).shape
            torch.Size([2, 32])
        """
        if points.shape[1:] != (self.nb_points, 3):
            raise ValueError(
                f"Expected streamlines of {self.nb_points} points, as the model reads (S, {self.nb_points}, 3). "
                f"Received: {tuple(points.shape)}. Resample them."
            )
        if not self.raw_coordinates:
            points = (points - self.center) / self.scale
        x = points.transpose(1, 2)
        for name in self._encoder[:-1]:
            x = torch.relu(self.get_submodule(name)(x))
        return self.fc1(self.get_submodule(self._encoder[-1])(x).flatten(1))

    def decode(self, latent: Tensor) -> Tensor:
        """Draw streamlines from their descriptions.

        Args:
            latent: (S, latent_space_dims).

        Returns:
            (S, nb_points, 3), in the space of the training's points.

        Example:
            >>> Autoencoder(40, first_channels=2).decode(torch.zeros(1, 32)).shape
            torch.Size([1, 40, 3])
        """
        x = self.fc2(latent).unflatten(1, self._shape)
        for name, length in zip(self._decoder[:-1], self._lengths, strict=True):
            x = interpolate(torch.relu(self.get_submodule(name)(x)), size=length, mode="linear", align_corners=False)
        points = self.get_submodule(self._decoder[-1])(x).transpose(1, 2)
        return points if self.raw_coordinates else points * self.scale + self.center

    def forward(self, batch: StreamlineBatch) -> Tensor:
        """Reconstruct the streamlines of a batch from their descriptions.

        Args:
            batch: S streamlines of `nb_points` points; with noise, the points with noise are read.

        Returns:
            (S * nb_points, 3), in the order of `batch.points`.

        Raises:
            ValueError: the streamlines have other numbers of points.
        """
        points = batch.forward_points
        if len(points) != len(batch) * self.nb_points:
            raise ValueError(
                f"Expected a batch with {self.nb_points} points for each streamline, as the model reads. Received: "
                f"{len(points)} points of {len(batch)} streamlines. Resample them to nb_points={self.nb_points}."
            )
        return self.decode(self.encode(points.unflatten(0, (len(batch), self.nb_points)))).flatten(0, 1)


def compute_reconstruction_loss(model: Autoencoder, batch: StreamlineBatch) -> tuple[Tensor, int, dict[str, Any]]:
    """The loss of an autoencoder's batch, in the form that `module_loss` takes.

    Args:
        model: the model, in training or in evaluation mode.
        batch: S streamlines of the model's number of points, P points in all.

    Returns:
        The loss; its weight, the P points, or 1 for the sum; and `{"reconstruction_error": ...}`, the mean distance
        between a point and its reconstruction over the P points, without gradient, in voxels (mm where voxels are no
        cubes). The targets are the points without noise, or those with the noise of the targets.

    Example:
        >>> none = torch.zeros(2, dtype=torch.int64)
        >>> batch = StreamlineBatch(
        ...     points=torch.rand(80, 3),
        ...     offsets=torch.tensor([0, 40, 80]),
        ...     subject=none,
        ...     ids=none,
        ...     inputs=torch.zeros(80, 0),
        ... )
        >>> loss, weight, aux = compute_reconstruction_loss(Autoencoder(40, first_channels=2), batch)
        >>> loss.shape, weight, list(aux)
        (torch.Size([]), 80, ['reconstruction_error'])
    """
    squared = (model(batch) - batch.target_points).square().sum(1)
    error, num_points = squared.detach().sqrt().mean(), len(squared)
    if model.reconstruction_loss == "sum":
        return squared.sum(), 1, {RECONSTRUCTION_ERROR: (error, num_points)}
    return squared.mean(), num_points, {RECONSTRUCTION_ERROR: error}


def _convolution(channels: int, filters: int, stride: int) -> torch.nn.Sequential:
    """A convolution that reflects a point beyond each end."""
    return torch.nn.Sequential(torch.nn.ReflectionPad1d(1), torch.nn.Conv1d(channels, filters, _KERNEL, stride=stride))
