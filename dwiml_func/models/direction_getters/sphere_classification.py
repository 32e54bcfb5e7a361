"""Directions as classes: the points of a sphere, of which one is nearest to the true direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from dwiml_func._checks import check_choice
from dwiml_func.models.direction_getters.base import DirectionGetter, TwoLayerNetwork, sample_classes

__all__ = ["SmoothSphereClassification", "SphereClassification", "nearest_vertices", "sphere_vertices"]


def sphere_vertices(name: str = "symmetric724") -> Tensor:
    """The points of one of dipy's spheres: (V, 3) float32 unit vectors, in the order of the classes in dwi_ml's models.

    Source: dipy, `dipy.data.get_sphere`; dwi_ml, `spheres.py`.
    """
    from dipy.data import SPHERE_FILES, get_sphere

    check_choice("sphere", name, SPHERE_FILES)
    return torch.tensor(get_sphere(name=name).vertices, dtype=torch.float32)


def nearest_vertices(directions: Tensor, vertices: Tensor) -> Tensor:
    """The index (N,) of the vertex (V, 3) nearest to each direction (N, 3); 0 for a direction without length.

    Source: dwi_ml, `spheres.py`.
    """
    return (directions @ vertices.to(directions).T).argmax(dim=-1)


_LABEL_WIDTH = 0.1  # radians over which a smooth label falls by the factor e


class SphereClassification(DirectionGetter):
    """A two-layer network to a logit for each point of a sphere, and for EOS; the loss is the cross-entropy.

    The loss at a point is -log of the probability of the true class: the sphere's point nearest to the true direction
    or, at the last point of a streamline, EOS. A true direction without length counts as the sphere's first point, as
    in dwi_ml.

    Args:
        input_size, dropout: as in `DirectionGetter`.
        add_eos: learn where streamlines end, as one more class, the last.
        eos_weight: 1; EOS is one class of all and has no separate loss to weight.
        sphere: one of dipy's spheres, see `sphere_vertices`.

    Raises:
        ValueError: an argument is out of range, `eos_weight` is not 1, or there is no such sphere.

    Source: dwi_ml, `direction_getter_models.py`.

    Example:
        >>> getter = SphereClassification(100, add_eos=True)
        >>> getter(torch.zeros(7, 100)).shape
        torch.Size([7, 725])
    """

    key = "sphere-classification"

    def __init__(
        self,
        input_size: int,
        *,
        dropout: float = 0.0,
        add_eos: bool = False,
        eos_weight: float = 1.0,
        sphere: str = "symmetric724",
    ) -> None:
        if eos_weight != 1:
            raise ValueError(
                f"eos_weight: expected none (or 1) with {self.key}, where EOS is one class of all and has no separate "
                f"loss, received {eos_weight}."
            )
        super().__init__(input_size, add_eos=add_eos)
        self.sphere = sphere
        self._vertices = sphere_vertices(sphere)  # a constant: not in the state, as in dwi_ml
        self.output_size = len(self._vertices) + add_eos
        self.layers = TwoLayerNetwork(input_size, self.output_size, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits (N, V) of the classes; with `add_eos` (N, V + 1)."""
        return self.layers(features)

    def losses(self, outputs: Tensor, targets: Tensor, is_last: Tensor | None = None) -> Tensor:
        """The losses (N,) of logits, see the class and `DirectionGetter.losses`; targets at last points are ignored."""
        self._check_rows(outputs, targets, is_last)
        return self._class_losses(outputs.log_softmax(dim=-1), targets, is_last)

    def directions(self, outputs: Tensor) -> Tensor:
        """The most probable point of the sphere, (N, 3) unit vectors; EOS does not count (see `eos_probability`)."""
        return self._vertices.to(outputs)[self._direction_logits(outputs).argmax(dim=-1)]

    def _sample_from(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Points of the sphere, given that the streamline does not end."""
        return self._vertices.to(outputs)[sample_classes(self._direction_logits(outputs), uniforms[..., 0])]

    def eos_is_most_likely(self, outputs: Tensor) -> Tensor:
        """Whether EOS is the likeliest class, (N,) bool, see `DirectionGetter.eos_is_most_likely`."""
        if not self.add_eos:
            return super().eos_is_most_likely(outputs)
        return outputs[..., -1] > self._direction_logits(outputs).amax(dim=-1)

    def _class_losses(self, log_probabilities: Tensor, targets: Tensor, is_last: Tensor | None) -> Tensor:
        classes = nearest_vertices(targets, self._vertices)
        if is_last is not None:
            classes = torch.where(is_last, len(self._vertices), classes)
        return -log_probabilities.gather(-1, classes[..., None])[..., 0]

    def _direction_logits(self, outputs: Tensor) -> Tensor:
        return outputs[..., : len(self._vertices)]

    def _eos_probability(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(dim=-1)[..., -1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the constant to the module's device; it keeps its precision."""
        self._vertices = self._vertices.to(fn(self._vertices).device)
        return super()._apply(fn, recurse)


class SmoothSphereClassification(SphereClassification):
    """Sphere classification whose true class is spread over the neighbouring points of the sphere.

    The label of a point of the sphere is exp(-angle to the true direction / 0.1 rad), divided by the sum over the
    sphere; at the last point of a streamline it is 1 for EOS and 0 elsewhere. The loss at a point is the Kullback-
    Leibler divergence, the sum over the classes of label * (log label - log probability): 0 if the model predicts the
    labels. A true direction without length has equal labels all over the sphere (in dwi_ml NaN).

    Args:
        input_size, dropout, add_eos, eos_weight, sphere: as in `SphereClassification`.

    Source: dwi_ml, `sos_eos_management.py`; Benou and Riklin Raviv, "DeepTract: A Probabilistic Deep Learning Framework
    for White Matter Fiber Tractography", MICCAI 2019.

    Example:
        >>> getter = SmoothSphereClassification(6)
        >>> getter.losses(torch.zeros(1, 724), torch.tensor([[0.0, 0, 1]])) < torch.tensor(724).log()
        tensor([True])
    """

    key = "smooth-sphere-classification"

    def _class_losses(self, log_probabilities: Tensor, targets: Tensor, is_last: Tensor | None) -> Tensor:
        labels = self._labels(targets, is_last).to(log_probabilities)
        return (torch.xlogy(labels, labels) - labels * log_probabilities).sum(dim=-1)

    def _labels(self, targets: Tensor, is_last: Tensor | None) -> Tensor:
        """Labels (N, V) or, with EOS, (N, V + 1); each row adds up to 1."""
        lengths = torch.linalg.vector_norm(targets, dim=-1, keepdim=True)
        cosines = targets @ self._vertices.to(targets).T / torch.where(lengths == 0, 1.0, lengths)
        labels = (-cosines.clamp(-1, 1).arccos() / _LABEL_WIDTH).softmax(dim=-1)
        if is_last is None:
            return labels
        ends = is_last[..., None].to(labels)
        return torch.cat([labels * (1 - ends), ends], dim=-1)
