"""Points on the sphere that stand for all directions.

Learn a direction as one of many points on the sphere.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import ClassVar, Self

import torch
from torch import Tensor

from dwiml_func._checks import truncated_repr
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.models.direction_getters._layers import TwoLayerNetwork
from dwiml_func.models.direction_getters.base import DirectionGetter

__all__ = ["SmoothSphereClassification", "SphereClassification", "nearest_vertices", "sphere_vertices"]


def sphere_vertices(name: str = "symmetric724") -> Tensor:
    """The points of one of dipy's spheres.

    Args:
        name: symmetric362, symmetric642, symmetric724, repulsion100, repulsion200, repulsion724 or another of dipy's.

    Returns:
        (V, 3) float32, unit vectors, in dipy's order, which is that of the classes in dwi_ml's models.

    Raises:
        ValueError: dipy has no such sphere.

    Source: dipy, `dipy.data.get_sphere`; dwi_ml, `spheres.py`.

    Example:
        >>> sphere_vertices().shape
        torch.Size([724, 3])
    """
    from dipy.data import SPHERE_FILES, get_sphere

    if name not in SPHERE_FILES:
        raise ValueError(f"Expected a sphere among {', '.join(SPHERE_FILES)}. Received: {truncated_repr(name)}")
    return torch.tensor(get_sphere(name=name).vertices, dtype=torch.float32)


def nearest_vertices(directions: Tensor, vertices: Tensor) -> Tensor:
    """Find the vertex nearest to each direction, by one matrix product.

    Args:
        directions: (N, 3) float, of any length.
        vertices: (V, 3) float, unit vectors.

    Returns:
        (N,) int64, the first of the vertices at the least angle; 0 for a direction without length.

    Source: dwi_ml, `spheres.py`.

    Example:
        >>> nearest_vertices(torch.tensor([[0.1, 5, 0], [0, 0, -1]]), torch.cat([torch.eye(3), -torch.eye(3)]))
        tensor([1, 5])
    """
    return (directions @ vertices.to(directions).T).argmax(dim=-1)


_LABEL_WIDTH = 0.1  # radians over which a smooth label falls by the factor e


class SphereClassification(DirectionGetter):
    """A two-layer network that gives a logit for each point of a sphere, and for EOS; the loss is the cross-entropy.

    The loss at a point is -log of the probability of the class that is right: the sphere's point nearest to the true
    direction or, at the last point of a streamline, EOS. A true direction without length counts as the sphere's first
    point, as in dwi_ml.

    Args:
        input_size: features at a point.
        dropout: probability of dropping a value between the layers when training, 0 <= dropout < 1.
        add_eos: learn where streamlines end, as one more class, the last.
        eos_weight: 1; EOS is a class among the others and has no loss of its own to weight.
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
    option_defaults: ClassVar = MappingProxyType({"sphere": "symmetric724"})

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
                f"Expected an eos_weight of 1 with {self.key}: EOS is one of its classes and has no loss of its own. "
                f"Received: {eos_weight}"
            )
        super().__init__(input_size, add_eos=add_eos)
        self.sphere = sphere
        self._vertices = sphere_vertices(sphere)  # a constant: neither in the state nor in dwi_ml's
        self.output_size = len(self._vertices) + add_eos
        self.layers = TwoLayerNetwork(input_size, self.output_size, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits.

        Args:
            features: (N, input_size) float.

        Returns:
            (N, V), the logarithms of the classes' probabilities up to a constant; with `add_eos` (N, V + 1).

        Example:
            >>> SphereClassification(6, sphere="repulsion100")(torch.zeros(2, 6)).shape
            torch.Size([2, 100])
        """
        return self.layers(features)

    def losses(self, outputs: Tensor, targets: Tensor, is_last: Tensor | None = None) -> Tensor:
        """Compare logits with the classes of the true directions and ends.

        Args:
            outputs: (N, V) or (N, V + 1) float, from `forward`.
            targets: (N, 3) float, voxel space, of any length; ignored at the last points.
            is_last: (N,) bool, the last points; given with `add_eos` and only then.

        Returns:
            (N,), see the class.

        Raises:
            ValueError: `outputs` or `targets` have another number of columns, or `is_last` is missing or too much.

        Example:
            >>> getter = SphereClassification(6, sphere="repulsion100")
            >>> getter.losses(torch.zeros(1, 100), torch.tensor([[0.0, 0, 1]]))  # log 100
            tensor([4.6052])
        """
        self._check_rows(outputs, targets, is_last)
        return self._class_losses(outputs.log_softmax(dim=-1), targets, is_last)

    def directions(self, outputs: Tensor) -> Tensor:
        """The point of the sphere that is most probable.

        Args:
            outputs: (N, V) or (N, V + 1) float, from `forward`.

        Returns:
            (N, 3), unit vectors; EOS is not looked at (see `eos_probability`).

        Example:
            >>> getter = SphereClassification(6)
            >>> getter.directions(torch.zeros(2, 724)).norm(dim=1)
            tensor([1., 1.])
        """
        return self._vertices.to(outputs)[self._direction_logits(outputs).argmax(dim=-1)]

    def sample(self, outputs: Tensor, key: Key) -> Tensor:
        """Draw points of the sphere by their probabilities, given that the streamline does not end.

        Args:
            outputs: (N, V) or (N, V + 1) float, from `forward`.
            key: the draw's address.

        Returns:
            (N, 3), unit vectors.

        Example:
            >>> SphereClassification(6).sample(torch.zeros(2, 724), Key(0)).shape
            torch.Size([2, 3])
        """
        probabilities = self._direction_logits(outputs.detach()).softmax(dim=-1)
        with torch_rng(key):
            classes = torch.multinomial(probabilities, 1)[:, 0]
        return self._vertices.to(outputs)[classes]

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
        """Move the constant with the module; it keeps its values and its precision."""
        self._vertices = self._vertices.to(fn(self._vertices).device)
        return super()._apply(fn, recurse)


class SmoothSphereClassification(SphereClassification):
    """Sphere classification whose true class is spread over the neighbouring points of the sphere.

    The label of a point of the sphere is exp(-angle to the true direction / 0.1 rad), divided by the sum over the
    sphere; at the last point of a streamline it is 1 for EOS and 0 elsewhere. The loss at a point is the divergence of
    Kullback and Leibler, the sum over the classes of label * (log label - log probability): 0 where the model gives the
    labels. A true direction without length has equal labels all over the sphere (in dwi_ml not-a-number).

    The arguments are those of `SphereClassification`.

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
        """(N, V) or, with EOS, (N, V + 1): each row's labels add up to 1."""
        lengths = torch.linalg.vector_norm(targets, dim=-1, keepdim=True)
        cosines = targets @ self._vertices.to(targets).T / torch.where(lengths == 0, 1.0, lengths)
        labels = (-cosines.clamp(-1, 1).arccos() / _LABEL_WIDTH).softmax(dim=-1)
        if is_last is None:
            return labels
        ends = is_last[..., None].to(labels)
        return torch.cat([labels * (1 - ends), ends], dim=-1)
