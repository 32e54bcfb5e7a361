"""Gaussian distributions of directions, one or a mixture, with a mean and a standard deviation along each axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dwiml_func._checks import check_number
from dwiml_func.models.direction_getters.base import (
    DirectionGetter,
    TwoLayerNetwork,
    check_length,
    component,
    mixture_log_density,
    sample_classes,
    with_length,
)

__all__ = ["Gaussian", "GaussianMixture", "bounded_log_sigmas", "gaussian_log_density", "sample_gaussian"]

_LOG_2PI = math.log(2 * math.pi)
_BOUND = 20.0  # of |log sigma|: squares of (x - mean) / sigma and their gradients stay finite in float32


class Gaussian(DirectionGetter):
    """Two two-layer networks, for the mean and for the logarithms of the standard deviations; loss: -log density.

    The loss has no lower bound: it falls by log 2 each time one deviation is halved. Clip gradients and keep the
    learning rate low.

    Args:
        input_size, dropout, add_eos, eos_weight: as in `DirectionGetter`.
        normalize_targets: length given to the true directions in the loss; None leaves them alone.
        entropy_weight: weight of the Gaussian's entropy, 1.5 (1 + log 2π) + the sum of log sigma, which is subtracted
            from the loss to keep deviations from becoming too small; at least 0.

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
        check_number("entropy_weight", entropy_weight, at_least=0)
        self.normalize_targets = check_length("normalize_targets", normalize_targets)
        self.entropy_weight = entropy_weight
        self.output_size = 6 + add_eos
        self.layers_mean = TwoLayerNetwork(input_size, 3 + add_eos, dropout)
        self.layers_sigmas = TwoLayerNetwork(input_size, 3, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute (N, 6): mean x, y, z, along the voxel axes; log sigma x, y, z. With `add_eos` (N, 7), EOS last."""
        means = self.layers_mean(features)
        return torch.cat([means[..., :3], self.layers_sigmas(features), means[..., 3:]], dim=-1)

    def directions(self, outputs: Tensor) -> Tensor:
        """The means (N, 3), along the voxel axes, of any length."""
        return outputs[..., :3]

    def _sample_from(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        return sample_gaussian(outputs[..., :3], outputs[..., 3:6], uniforms[..., :3])

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = with_length(targets, self.normalize_targets)
        means, log_sigmas = outputs[..., :3], outputs[..., 3:6]
        losses = -gaussian_log_density(targets, means, log_sigmas)
        if self.entropy_weight == 0:
            return losses
        entropies = 1.5 * (1 + _LOG_2PI) + bounded_log_sigmas(log_sigmas).sum(dim=-1)
        return losses - self.entropy_weight * entropies


def gaussian_log_density(x: Tensor, means: Tensor, log_sigmas: Tensor) -> Tensor:
    """The log density (...) of independent normal distributions along three axes; the arguments are (..., 3).

    It is -0.5 (3 log 2π + |(x - mean) / sigma|²) - the sum of log sigma, see `bounded_log_sigmas`.

    Source: dwi_ml, `formulas_fisher_gaussian.rst`.
    """
    log_sigmas = bounded_log_sigmas(log_sigmas)
    squares = ((x - means) * (-log_sigmas).exp()).square().sum(dim=-1)
    return -0.5 * (3 * _LOG_2PI + squares) - log_sigmas.sum(dim=-1)


def sample_gaussian(means: Tensor, log_sigmas: Tensor, uniforms: Tensor) -> Tensor:
    """Turn uniform random numbers (..., 3) into samples (..., 3) of normal distributions along three axes."""
    normals = torch.special.ndtri(uniforms).to(means.dtype)
    return means + bounded_log_sigmas(log_sigmas).exp() * normals


def bounded_log_sigmas(log_sigmas: Tensor) -> Tensor:
    """Keep standard deviations where float32 can represent the loss: from 2e-9 to 5e8 voxels.

    The gradient passes unchanged, so that a deviation beyond the bounds returns.
    """
    return log_sigmas + (log_sigmas.clamp(-_BOUND, _BOUND) - log_sigmas).detach()


class GaussianMixture(DirectionGetter):
    """Three two-layer networks, for the weights, the means and the deviations of G Gaussians; loss: -log density.

    In dwi_ml this getter cannot be trained (its constructor rejects `normalize_targets`, its layers are misspelt, and
    it evaluates every point's Gaussian at every point). Formulas and parameter names are dwi_ml's; EOS is one more row
    of `layers_mean`, as in the single Gaussian.

    Args:
        input_size, dropout, add_eos, eos_weight: as in `DirectionGetter`.
        nb_gaussians: G, at least 1.
        normalize_targets: length given to the true directions in the loss; None leaves them alone.

    Raises:
        ValueError: an argument is out of range.

    Source: dwi_ml, `direction_getter_models.py` and `formulas_fisher_gaussian.rst`.

    Example:
        >>> getter = GaussianMixture(100, nb_gaussians=2)
        >>> getter(torch.zeros(7, 100)).shape
        torch.Size([7, 14])
    """

    key = "gaussian-mixture"
    supports_compressed = True

    def __init__(
        self,
        input_size: int,
        *,
        dropout: float = 0.0,
        add_eos: bool = False,
        eos_weight: float = 1.0,
        nb_gaussians: int = 3,
        normalize_targets: float | None = None,
    ) -> None:
        super().__init__(input_size, add_eos=add_eos, eos_weight=eos_weight)
        check_number("nb_gaussians", nb_gaussians, at_least=1)
        self.nb_gaussians = nb_gaussians
        self.normalize_targets = check_length("normalize_targets", normalize_targets)
        self.output_size = 7 * nb_gaussians + add_eos
        self.layers_mixture = TwoLayerNetwork(input_size, nb_gaussians, dropout)
        self.layers_mean = TwoLayerNetwork(input_size, 3 * nb_gaussians + add_eos, dropout)
        self.layers_sigmas = TwoLayerNetwork(input_size, 3 * nb_gaussians, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute (N, 7 G): G logits of weights; G means x, y, z, along the voxel axes; G times log sigma x, y, z.

        With `add_eos` (N, 7 G + 1), the last the logit of EOS.
        """
        means, eos = self.layers_mean(features).split([3 * self.nb_gaussians, int(self.add_eos)], dim=-1)
        return torch.cat([self.layers_mixture(features), means, self.layers_sigmas(features), eos], dim=-1)

    def directions(self, outputs: Tensor) -> Tensor:
        """The mean (N, 3), along the voxel axes, of the Gaussian with the largest weight."""
        logits, means, _ = self._parts(outputs)
        return component(means, logits.argmax(dim=-1))

    def _sample_from(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        logits, means, log_sigmas = self._parts(outputs)
        drawn = sample_classes(logits, uniforms[..., 0])
        return sample_gaussian(component(means, drawn), component(log_sigmas, drawn), uniforms[..., 1:4])

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = with_length(targets, self.normalize_targets)
        logits, means, log_sigmas = self._parts(outputs)
        return -mixture_log_density(logits, gaussian_log_density(targets[..., None, :], means, log_sigmas))

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, G), means (N, G, 3), log sigmas (N, G, 3)."""
        num = self.nb_gaussians
        logits, means, log_sigmas = outputs[..., : 7 * num].split([num, 3 * num, 3 * num], dim=-1)
        return logits, means.unflatten(-1, (num, 3)), log_sigmas.unflatten(-1, (num, 3))
