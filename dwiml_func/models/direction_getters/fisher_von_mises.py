"""Fisher-von Mises distributions on the sphere of directions, one or a mixture, with a mean and a concentration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dwiml_func._checks import check_number
from dwiml_func.models.direction_getters.base import (
    DirectionGetter,
    TwoLayerNetwork,
    component,
    mixture_log_density,
    sample_classes,
    unit_vectors,
)

__all__ = ["FisherVonMises", "FisherVonMisesMixture", "fisher_von_mises_log_density", "sample_fisher_von_mises"]

LARGEST_KAPPA = 20.0
"""The largest concentration of the networks' sigmoid, as in dwi_ml: most directions lie within 20 degrees."""

_LOG_2PI = math.log(2 * math.pi)
_SMALL = 0.3  # below, the series of log(sinh k / k) is exact to 1e-13, and differences of 1 / k would lose digits


class FisherVonMises(DirectionGetter):
    """Two two-layer networks, for the mean direction and for the concentration kappa; the loss is -log density.

    The true directions are normalised. Kappa is 20 times a sigmoid.

    Args:
        input_size, dropout, add_eos, eos_weight: as in `DirectionGetter`.

    Raises:
        ValueError: an argument is out of range.

    Source: dwi_ml, `direction_getter_models.py`, `fisher_von_mises.py` and `formulas_fisher_gaussian.rst`. dwi_ml takes
        e^k - e^-k as at least 1e-5, so its loss grows without bound for kappa below 5e-6; here the density becomes
        uniform. A true direction without length before the last point costs -log C here (see
        `fisher_von_mises_log_density`), NaN in dwi_ml.

    Example:
        >>> getter = FisherVonMises(100)
        >>> getter(torch.zeros(7, 100)).shape
        torch.Size([7, 4])
    """

    key = "fisher-von-mises"

    def __init__(
        self, input_size: int, *, dropout: float = 0.0, add_eos: bool = False, eos_weight: float = 1.0
    ) -> None:
        super().__init__(input_size, add_eos=add_eos, eos_weight=eos_weight)
        self.output_size = 4 + add_eos
        self.layers_mean = TwoLayerNetwork(input_size, 3 + add_eos, dropout)
        self.layers_kappa = TwoLayerNetwork(input_size, 1, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute (N, 4): mean x, y, z, a unit vector along the voxel axes; kappa, 0 to 20.

        With `add_eos` (N, 5), the last the logit of EOS.
        """
        means = self.layers_mean(features)
        kappas = LARGEST_KAPPA * self.layers_kappa(features).sigmoid()
        return torch.cat([unit_vectors(means[..., :3]), kappas, means[..., 3:]], dim=-1)

    def directions(self, outputs: Tensor) -> Tensor:
        """The means (N, 3), unit vectors along the voxel axes."""
        return outputs[..., :3]

    def _sample_from(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        return sample_fisher_von_mises(outputs[..., :3], outputs[..., 3], uniforms[..., :2])

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -fisher_von_mises_log_density(unit_vectors(targets), outputs[..., :3], outputs[..., 3])


def fisher_von_mises_log_density(directions: Tensor, means: Tensor, kappas: Tensor) -> Tensor:
    """The log density (...) on the unit sphere, per steradian, for unit vectors (..., 3) and concentrations (...) >= 0.

    It is log C + kappa * (mean . direction) with C = kappa / (2π (e^kappa - e^-kappa)); kappa 0 is the uniform
    distribution, and a direction of zeros gets log C. Value and gradient are finite, and exact to rounding, for every
    float32 kappa.

    Source: dwi_ml, `formulas_fisher_gaussian.rst`.
    """
    return _log_peak(kappas) + kappas * ((means * directions).sum(dim=-1) - 1)


def sample_fisher_von_mises(means: Tensor, kappas: Tensor, uniforms: Tensor) -> Tensor:
    """Turn uniform random numbers (..., 2) into directions (..., 3) around unit vectors, with concentrations >= 0.

    Source: W. Jakob, "Numerically stable sampling of the von Mises-Fisher distribution on S² (and other tricks)", 2012:
        the cosine to the mean by its inverse distribution function. The angle around the mean counts from an axis of
        Duff et al., "Building an Orthonormal Basis, Revisited", JCGT 2017.
    """
    first, second = uniforms.to(means.dtype).unbind(-1)
    kappas = kappas.clamp(min=1e-6)  # as good as uniform, and no division by zero
    one_less_cosine = -torch.log1p((1 - first) * torch.expm1(-2 * kappas)) / kappas
    one_less_cosine = one_less_cosine.clamp(max=2)[..., None]  # infinite where e^(-2 kappa) underflows
    angle = (2 * math.pi * second)[..., None]
    one, other = _across(means)
    sine = (one_less_cosine * (2 - one_less_cosine)).sqrt()
    return unit_vectors((1 - one_less_cosine) * means + sine * (angle.cos() * one + angle.sin() * other))


def _across(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Two unit vectors (..., 3) that are perpendicular to unit vectors (..., 3), and to each other."""
    x, y, z = directions.unbind(-1)
    sign = torch.where(z < 0, -1.0, 1.0).to(z.dtype)
    factor = -1 / (sign + z)
    product = x * y * factor
    one = torch.stack([1 + sign * x * x * factor, sign * product, -sign * x], dim=-1)
    return one, torch.stack([product, sign + y * y * factor, -y], dim=-1)


def _log_peak(kappas: Tensor) -> Tensor:
    """The log density at the mean, log(k / (2π (1 - e^-2k))), by its series where kappa is small."""
    is_small = kappas < _SMALL
    small, large = torch.where(is_small, kappas, 0.0), torch.where(is_small, 1.0, kappas)  # no 0 / 0 in a gradient
    square = small.square()
    # log(sinh k / k) = k²/6 - k⁴/180 + k⁶/2835 - k⁸/37800 + k¹⁰/467775 - ...
    series = square * (1 / 6 - square * (1 / 180 - square * (1 / 2835 - square * (1 / 37800 - square / 467775))))
    of_small = small - math.log(2) - series
    of_large = torch.log(large) - torch.log1p(-torch.exp(-2 * large))
    return torch.where(is_small, of_small, of_large) - _LOG_2PI


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
