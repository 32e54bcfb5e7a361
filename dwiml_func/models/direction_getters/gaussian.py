"""Learn a distribution of directions: a Gaussian with a mean and a standard deviation along each axis."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.models.direction_getters._layers import TwoLayerNetwork, check_length, unit_vectors
from dwiml_func.models.direction_getters.base import DirectionGetter

__all__ = ["Gaussian", "bounded_log_sigmas", "gaussian_log_density"]

_LOG_2PI = math.log(2 * math.pi)
_BOUND = 20.0  # of |log sigma|: squares of (x - mean) / sigma and their gradients stay finite in float32


class Gaussian(DirectionGetter):
    """Two two-layer networks, for the mean and for the logarithms of the standard deviations; loss: -log density.

    The loss has no lower bound: it falls by log 2 each time that the three deviations together are halved. Clip
    gradients and keep the learning rate low.

    Args:
        input_size: features at a point.
        dropout: probability of dropping a value between the layers when training, 0 <= dropout < 1.
        add_eos: learn where streamlines end.
        eos_weight: weight of the EOS loss beside that of the direction.
        normalize_targets: length that the true directions get before they are compared; None leaves them alone.
        entropy_weight: how much of the Gaussian's entropy, 1.5 (1 + log 2π) + the sum of log sigma, is subtracted from
            the loss, against deviations that become too small; at least 0.

    Raises:
        ValueError: an argument is out of range.

    Source: dwi_ml, `direction_getter_models.py` and `formulas_fisher_gaussian.rst`.

    Example:
        >>> getter = Gaussian(100)
        >>> getter(torch.zeros(7, 100)).shape
        torch.Size([7, 6])
    """

    key = "gaussian"
    supports_compressed = True
    option_defaults: ClassVar = MappingProxyType({"normalize_targets": None, "entropy_weight": 0.0})

    def __init__(
        self,
        input_size: int,
        *,
        dropout: float = 0.0,
        add_eos: bool = False,
        eos_weight: float = 1.0,
        normalize_targets: float | None = None,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__(input_size, add_eos=add_eos, eos_weight=eos_weight)
        if not (math.isfinite(entropy_weight) and entropy_weight >= 0):
            raise ValueError(f"Expected a finite entropy_weight of at least 0. Received: {entropy_weight}")
        self.normalize_targets = check_length("normalize_targets", normalize_targets)
        self.entropy_weight = entropy_weight
        self.output_size = 6 + add_eos
        self.layers_mean = TwoLayerNetwork(input_size, 3 + add_eos, dropout)
        self.layers_sigmas = TwoLayerNetwork(input_size, 3, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the Gaussian at each point.

        Args:
            features: (N, input_size) float.

        Returns:
            (N, 6): mean x, y, z, voxel space; log sigma x, y, z. With `add_eos` (N, 7), the last the logit of EOS.

        Example:
            >>> Gaussian(6, add_eos=True)(torch.zeros(2, 6)).shape
            torch.Size([2, 7])
        """
        means = self.layers_mean(features)
        return torch.cat([means[..., :3], self.layers_sigmas(features), means[..., 3:]], dim=-1)

    def directions(self, outputs: Tensor) -> Tensor:
        """The means.

        Args:
            outputs: (N, 6) or (N, 7) float, from `forward`.

        Returns:
            (N, 3), voxel space, of any length.

        Example:
            >>> Gaussian(6).directions(torch.tensor([[1.0, 2, 3, 0, 0, 0]]))
            tensor([[1., 2., 3.]])
        """
        return outputs[..., :3]

    def sample(self, outputs: Tensor, key: Key) -> Tensor:
        """Draw a direction from each point's Gaussian.

        Args:
            outputs: (N, 6) or (N, 7) float, from `forward`.
            key: the draw's address.

        Returns:
            (N, 3), voxel space, of any length.

        Example:
            >>> outputs = torch.tensor([[1.0, 2, 3, -20, -20, -20]])
            >>> Gaussian(6).sample(outputs, Key(0))
            tensor([[1., 2., 3.]])
        """
        means, log_sigmas = outputs.detach()[..., :3], outputs.detach()[..., 3:6]
        with torch_rng(key):
            return means + bounded_log_sigmas(log_sigmas).exp() * torch.randn_like(means)

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.normalize_targets is not None:
            targets = unit_vectors(targets) * self.normalize_targets
        means, log_sigmas = outputs[..., :3], outputs[..., 3:6]
        losses = -gaussian_log_density(targets, means, log_sigmas)
        if self.entropy_weight == 0:
            return losses
        entropies = 1.5 * (1 + _LOG_2PI) + bounded_log_sigmas(log_sigmas).sum(dim=-1)
        return losses - self.entropy_weight * entropies


def gaussian_log_density(x: Tensor, means: Tensor, log_sigmas: Tensor) -> Tensor:
    """The logarithm of the density of independent normal distributions along three axes.

    Args:
        x: (..., 3) float.
        means: (..., 3) float.
        log_sigmas: (..., 3) float, the logarithms of the standard deviations; see `bounded_log_sigmas`.

    Returns:
        (...), -0.5 (3 log 2π + |(x - mean) / sigma|²) - the sum of log sigma.

    Source: dwi_ml, `formulas_fisher_gaussian.rst`.

    Example:
        >>> gaussian_log_density(torch.zeros(3), torch.zeros(3), torch.zeros(3))  # -1.5 log 2π
        tensor(-2.7568)
    """
    log_sigmas = bounded_log_sigmas(log_sigmas)
    squares = ((x - means) * (-log_sigmas).exp()).square().sum(dim=-1)
    return -0.5 * (3 * _LOG_2PI + squares) - log_sigmas.sum(dim=-1)


def bounded_log_sigmas(log_sigmas: Tensor) -> Tensor:
    """Keep standard deviations where float32 can work with them: from 2e-9 to 5e8 voxels.

    Args:
        log_sigmas: (...) float, the logarithms of the standard deviations.

    Returns:
        (...), between -20 and 20. The gradient passes unchanged, so that a deviation beyond the bounds is led back.

    Example:
        >>> bounded_log_sigmas(torch.tensor([-100.0, 0.5]))
        tensor([-20.0000,   0.5000])
    """
    return log_sigmas + (log_sigmas.clamp(-_BOUND, _BOUND) - log_sigmas).detach()
