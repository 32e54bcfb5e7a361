"""A mixture of Fisher-von Mises distributions: several peaks on the sphere of directions."""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func._checks import check_number
from dwiml_func.models.direction_getters._parts import (
    TwoLayerNetwork,
    component,
    mixture_log_density,
    sample_classes,
    unit_vectors,
)
from dwiml_func.models.direction_getters.base import DirectionGetter
from dwiml_func.models.direction_getters.fisher_von_mises import (
    LARGEST_KAPPA,
    fisher_von_mises_log_density,
    sample_fisher_von_mises,
)

__all__ = ["FisherVonMisesMixture"]


class FisherVonMisesMixture(DirectionGetter):
    """Three two-layer networks, for the weights, the means and the concentrations of C distributions.

    The loss is -log density. The true directions are normalised. Each kappa is 20 times a sigmoid. dwi_ml names this
    getter but has no code for it; the parts are those of its single Fisher-von Mises and of its Gaussian mixture.

    Args:
        input_size, dropout, add_eos, eos_weight: as in `DirectionGetter`.
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
        check_number("n_cluster", n_cluster, at_least=1)
        self.n_cluster = n_cluster
        self.output_size = 5 * n_cluster + add_eos
        self.layers_mixture = TwoLayerNetwork(input_size, n_cluster, dropout)
        self.layers_mean = TwoLayerNetwork(input_size, 3 * n_cluster + add_eos, dropout)
        self.layers_kappa = TwoLayerNetwork(input_size, n_cluster, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute (N, 5 C): C logits of weights; C means x, y, z, unit vectors along the voxel axes; C kappas, 0 to 20.

        With `add_eos` (N, 5 C + 1), the last the logit of EOS.
        """
        means, eos = self.layers_mean(features).split([3 * self.n_cluster, int(self.add_eos)], dim=-1)
        means = unit_vectors(means.unflatten(-1, (self.n_cluster, 3))).flatten(-2)
        kappas = LARGEST_KAPPA * self.layers_kappa(features).sigmoid()
        return torch.cat([self.layers_mixture(features), means, kappas, eos], dim=-1)

    def directions(self, outputs: Tensor) -> Tensor:
        """The mean (N, 3), a unit vector along the voxel axes, of the distribution with the largest weight."""
        logits, means, _ = self._parts(outputs)
        return component(means, logits.argmax(dim=-1))

    def _sample_from(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        logits, means, kappas = self._parts(outputs)
        drawn = sample_classes(logits, uniforms[..., 0])
        kappa = component(kappas[..., None], drawn)[..., 0]
        return sample_fisher_von_mises(component(means, drawn), kappa, uniforms[..., 1:3])

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, means, kappas = self._parts(outputs)
        log_densities = fisher_von_mises_log_density(unit_vectors(targets)[..., None, :], means, kappas)
        return -mixture_log_density(logits, log_densities)

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, C), means (N, C, 3), kappas (N, C)."""
        num = self.n_cluster
        logits, means, kappas = outputs[..., : 5 * num].split([num, 3 * num, num], dim=-1)
        return logits, means.unflatten(-1, (num, 3)), kappas
