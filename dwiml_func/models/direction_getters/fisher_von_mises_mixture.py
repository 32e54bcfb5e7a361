"""Learn a distribution on the sphere with several peaks: a weighted sum of Fisher-von Mises distributions."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.models.direction_getters._layers import TwoLayerNetwork, unit_vectors
from dwiml_func.models.direction_getters._mixture import component, draw_components, mixture_log_density
from dwiml_func.models.direction_getters.base import DirectionGetter
from dwiml_func.models.direction_getters.fisher_von_mises import (
    LARGEST_KAPPA,
    draw_fisher_von_mises,
    fisher_von_mises_log_density,
)

__all__ = ["FisherVonMisesMixture"]


class FisherVonMisesMixture(DirectionGetter):
    """Three two-layer networks, for the weights, the means and the concentrations of C distributions.

    The loss is -log density. The true directions are normalised. Each kappa is 20 times a sigmoid. dwi_ml has a name
    for this getter and no code; the parts are those of its single Fisher-von Mises and of its Gaussian mixture.

    Args:
        input_size: features at a point.
        dropout: probability of dropping a value between the layers when training, 0 <= dropout < 1.
        add_eos: learn where streamlines end.
        eos_weight: weight of the EOS loss beside that of the direction.
        n_cluster: C, at least 1.

    Raises:
        ValueError: an argument is out of range.

    Source: dwi_ml, `formulas_fisher_gaussian.rst`.

    Example:
        >>> getter = FisherVonMisesMixture(100, n_cluster=2)
        >>> getter(torch.zeros(7, 100)).shape
        torch.Size([7, 10])
    """

    key = "fisher-von-mises-mixture"
    option_defaults: ClassVar = MappingProxyType({"n_cluster": 3})

    def __init__(
        self,
        input_size: int,
        *,
        dropout: float = 0.0,
        add_eos: bool = False,
        eos_weight: float = 1.0,
        n_cluster: int = 3,
    ) -> None:
        super().__init__(input_size, add_eos=add_eos, eos_weight=eos_weight)
        if n_cluster < 1:
            raise ValueError(f"Expected n_cluster of at least 1. Received: {n_cluster}")
        self.n_cluster = n_cluster
        self.output_size = 5 * n_cluster + add_eos
        self.layers_mixture = TwoLayerNetwork(input_size, n_cluster, dropout)
        self.layers_mean = TwoLayerNetwork(input_size, 3 * n_cluster + add_eos, dropout)
        self.layers_kappa = TwoLayerNetwork(input_size, n_cluster, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the mixture at each point.

        Args:
            features: (N, input_size) float.

        Returns:
            (N, 5 C): C logarithms of weights, up to a constant; C means x, y, z, unit vectors in voxel space; C kappas,
            0 to 20. With `add_eos` (N, 5 C + 1), the last the logit of EOS.

        Example:
            >>> FisherVonMisesMixture(6, add_eos=True)(torch.zeros(2, 6)).shape
            torch.Size([2, 16])
        """
        means, eos = self.layers_mean(features).split([3 * self.n_cluster, int(self.add_eos)], dim=-1)
        means = unit_vectors(means.unflatten(-1, (self.n_cluster, 3))).flatten(-2)
        kappas = LARGEST_KAPPA * self.layers_kappa(features).sigmoid()
        return torch.cat([self.layers_mixture(features), means, kappas, eos], dim=-1)

    def directions(self, outputs: Tensor) -> Tensor:
        """The mean of the distribution with the largest weight.

        Args:
            outputs: (N, 5 C) or (N, 5 C + 1) float, from `forward`.

        Returns:
            (N, 3), voxel space, unit vectors.

        Example:
            >>> outputs = torch.tensor([[0.0, 1, *(1, 0, 0), *(0, 1, 0), 7, 7]])
            >>> FisherVonMisesMixture(6, n_cluster=2).directions(outputs)
            tensor([[0., 1., 0.]])
        """
        logits, means, _ = self._parts(outputs)
        return component(means, logits.argmax(dim=-1))

    def sample(self, outputs: Tensor, key: Key) -> Tensor:
        """Draw a distribution by its weight at each point, then a direction from it.

        Args:
            outputs: (N, 5 C) or (N, 5 C + 1) float, from `forward`.
            key: the draw's address.

        Returns:
            (N, 3), voxel space, unit vectors.

        Example:
            >>> outputs = torch.tensor([[0.0, 99, *(1, 0, 0), *(0, 1, 0), 7, 20]])
            >>> FisherVonMisesMixture(6, n_cluster=2).sample(outputs, Key(0))[0, 1] > 0.5
            tensor(True)
        """
        logits, means, kappas = self._parts(outputs.detach())
        with torch_rng(key):
            drawn = draw_components(logits)
            return draw_fisher_von_mises(component(means, drawn), component(kappas[..., None], drawn)[..., 0])

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, means, kappas = self._parts(outputs)
        log_densities = fisher_von_mises_log_density(unit_vectors(targets)[..., None, :], means, kappas)
        return -mixture_log_density(logits, log_densities)

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, C), means (N, C, 3), kappas (N, C)."""
        num = self.n_cluster
        logits, means, kappas = outputs[..., : 5 * num].split([num, 3 * num, num], dim=-1)
        return logits, means.unflatten(-1, (num, 3)), kappas
