"""Learn a distribution of directions with several peaks: a weighted sum of Gaussians."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.models.direction_getters._layers import TwoLayerNetwork, check_length, unit_vectors
from dwiml_func.models.direction_getters._mixture import component, draw_components, mixture_log_density
from dwiml_func.models.direction_getters.base import DirectionGetter
from dwiml_func.models.direction_getters.gaussian import bounded_log_sigmas, gaussian_log_density

__all__ = ["GaussianMixture"]


class GaussianMixture(DirectionGetter):
    """Three two-layer networks, for the weights, the means and the deviations of G Gaussians; loss: -log density.

    In dwi_ml this getter cannot be trained (its constructor refuses `normalize_targets`, its layers are misspelt, and
    it takes every point's Gaussian at every point). The formulas and the names of the parameters are those it has
    there; EOS is a further row of `layers_mean`, as in its single Gaussian.

    Args:
        input_size: features at a point.
        dropout: probability of dropping a value between the layers when training, 0 <= dropout < 1.
        add_eos: learn where streamlines end.
        eos_weight: weight of the EOS loss beside that of the direction.
        nb_gaussians: G, at least 1.
        normalize_targets: length that the true directions get before they are compared; None leaves them alone.

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
    option_defaults: ClassVar = MappingProxyType({"nb_gaussians": 3, "normalize_targets": None})

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
        if nb_gaussians < 1:
            raise ValueError(f"Expected nb_gaussians of at least 1. Received: {nb_gaussians}")
        self.nb_gaussians = nb_gaussians
        self.normalize_targets = check_length("normalize_targets", normalize_targets)
        self.output_size = 7 * nb_gaussians + add_eos
        self.layers_mixture = TwoLayerNetwork(input_size, nb_gaussians, dropout)
        self.layers_mean = TwoLayerNetwork(input_size, 3 * nb_gaussians + add_eos, dropout)
        self.layers_sigmas = TwoLayerNetwork(input_size, 3 * nb_gaussians, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the mixture at each point.

        Args:
            features: (N, input_size) float.

        Returns:
            (N, 7 G): G logarithms of weights, up to a constant; G means x, y, z, voxel space; G times log sigma
            x, y, z. With `add_eos` (N, 7 G + 1), the last the logit of EOS.

        Example:
            >>> GaussianMixture(6, add_eos=True)(torch.zeros(2, 6)).shape
            torch.Size([2, 22])
        """
        means, eos = self.layers_mean(features).split([3 * self.nb_gaussians, int(self.add_eos)], dim=-1)
        return torch.cat([self.layers_mixture(features), means, self.layers_sigmas(features), eos], dim=-1)

    def directions(self, outputs: Tensor) -> Tensor:
        """The mean of the Gaussian with the largest weight.

        Args:
            outputs: (N, 7 G) or (N, 7 G + 1) float, from `forward`.

        Returns:
            (N, 3), voxel space, of any length.

        Example:
            >>> outputs = torch.tensor([[0.0, 1, *(1, 0, 0), *(0, 2, 0), *(0, 0, 0), *(0, 0, 0)]])
            >>> GaussianMixture(6, nb_gaussians=2).directions(outputs)
            tensor([[0., 2., 0.]])
        """
        logits, means, _ = self._parts(outputs)
        return component(means, logits.argmax(dim=-1))

    def sample(self, outputs: Tensor, key: Key) -> Tensor:
        """Draw a Gaussian by its weight at each point, then a direction from it.

        Args:
            outputs: (N, 7 G) or (N, 7 G + 1) float, from `forward`.
            key: the draw's address.

        Returns:
            (N, 3), voxel space, of any length.

        Example:
            >>> outputs = torch.tensor([[0.0, 99, *(1, 0, 0), *(0, 2, 0), *(0, 0, 0), *(-20, -20, -20)]])
            >>> GaussianMixture(6, nb_gaussians=2).sample(outputs, Key(0)).round().abs()
            tensor([[0., 2., 0.]])
        """
        logits, means, log_sigmas = self._parts(outputs.detach())
        with torch_rng(key):
            drawn = draw_components(logits)
            mean, log_sigma = component(means, drawn), component(log_sigmas, drawn)
            return mean + bounded_log_sigmas(log_sigma).exp() * torch.randn_like(mean)

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.normalize_targets is not None:
            targets = unit_vectors(targets) * self.normalize_targets
        logits, means, log_sigmas = self._parts(outputs)
        return -mixture_log_density(logits, gaussian_log_density(targets[..., None, :], means, log_sigmas))

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, G), means (N, G, 3), log sigmas (N, G, 3)."""
        num = self.nb_gaussians
        logits, means, log_sigmas = outputs[..., : 7 * num].split([num, 3 * num, 3 * num], dim=-1)
        return logits, means.unflatten(-1, (num, 3)), log_sigmas.unflatten(-1, (num, 3))
