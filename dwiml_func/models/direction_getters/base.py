"""What all direction getters have in common."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, where
from torch.nn.functional import binary_cross_entropy_with_logits, dropout

from dwiml_func._checks import check_number
from dwiml_func.core.rng import Key, torch_rng

__all__ = [
    "NUM_UNIFORMS",
    "DirectionGetter",
    "TwoLayerNetwork",
    "check_length",
    "component",
    "mixture_log_density",
    "sample_classes",
    "unit_vectors",
    "with_length",
]

NUM_UNIFORMS = 4
"""How many uniform random numbers `DirectionGetter.sample_from` takes for a direction."""

_COMMON_ARGUMENTS = ("input_size", "dropout", "add_eos", "eos_weight")


class DirectionGetter(torch.nn.Module, ABC):
    """Turns features at points into outputs, and defines what the outputs mean: their loss, and their direction.

    Directions are along the voxel axes, in the units of the batch's points: voxels, or mm where voxels are not cubes.
    Only `forward` uses parameters; losses, directions and samples are functions of the outputs alone, so they also work
    on outputs of `torch.func.functional_call`.

    With `add_eos` the model also learns where streamlines end (EOS, end of streamline): the last column of the outputs
    is the logit of "this is the last point", and every point of a streamline has a row. Without it, the last point has
    no row, because it has no next direction.

    Args:
        input_size: features at a point.
        dropout: of a subclass: probability of dropping a value between its layers when training, 0 <= dropout < 1.
        add_eos: learn where streamlines end.
        eos_weight: weight of the EOS loss relative to that of the direction; at least 0. No effect without `add_eos`.

    Attributes:
        key: its name on the command line and in dwi_ml's `parameters.json`.
        supports_compressed: whether it can learn from streamlines whose steps differ in length.
        is_probabilistic: whether it has a distribution of directions to sample from.
        option_names: a subclass's further arguments, named as in dwi_ml's `dg_args`.
        output_size: columns of the outputs, K.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from dwiml_func.models.direction_getters import CosineRegression
        >>> getter = CosineRegression(100, add_eos=True)
        >>> isinstance(getter, DirectionGetter), getter.key, getter.option_names, getter.output_size
        (True, 'cosine-regression', ('normalize_targets', 'normalize_outputs'), 4)
    """

    key: ClassVar[str]
    supports_compressed: ClassVar[bool] = False
    is_probabilistic: ClassVar[bool] = True
    option_names: ClassVar[tuple[str, ...]] = ()
    output_size: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.option_names = tuple(name for name in inspect.signature(cls).parameters if name not in _COMMON_ARGUMENTS)

    def __init__(self, input_size: int, *, add_eos: bool = False, eos_weight: float = 1.0) -> None:
        super().__init__()
        if input_size < 1:
            raise ValueError(f"input_size: expected at least 1, received {input_size}.")
        check_number("eos_weight", eos_weight, at_least=0)
        self.input_size = input_size
        self.add_eos = add_eos
        self.eos_weight = eos_weight

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            features: (N, input_size) float, N points of any streamlines.

        Returns:
            (N, K); the subclass defines the columns. With `add_eos` the last is the logit of EOS.
        """

    def losses(self, outputs: Tensor, targets: Tensor, is_last: Tensor | None = None) -> Tensor:
        """Compare outputs with the true directions and, with `add_eos`, with the true ends of the streamlines.

        Args:
            outputs: (N, K) float, from `forward`.
            targets: (N, 3) float, along the voxel axes, the direction to the next point, not normalised; zeros at the
                last point of a streamline, which has a row only with `add_eos`.
            is_last: (N,) bool, the last points; required with `add_eos`, else None.

        Returns:
            (N,), the loss at each point: the subclass's loss of the direction plus, with `add_eos`, `eos_weight` times
            the binary cross-entropy of EOS. The last points count in both: their target direction is (0, 0, 0), as in
            dwi_ml.

        Raises:
            ValueError: `outputs` or `targets` have another number of columns, or `is_last` does not match `add_eos`.

        Source: dwi_ml, `direction_getter_models.py`. It takes the cross-entropy of a rounded sigmoid, clamped at 100:
            confident mistakes (a logit above about 15 before the end) cost up to 100 and have no gradient. Here it is
            taken of the logit, so a confident mistake costs the logit itself.

        Example:
            >>> from dwiml_func.models.direction_getters import CosineRegression
            >>> outputs = torch.tensor([[3.0, 0, 0, -2], [3, 0, 0, 2]])
            >>> targets, is_last = torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.tensor([False, True])
            >>> CosineRegression(6, add_eos=True).losses(outputs, targets, is_last)  # 1.0 of the last: any direction
            tensor([0.1269, 1.1269])
        """
        self._check_rows(outputs, targets, is_last)
        losses = self._direction_losses(outputs, targets)
        if is_last is None:
            return losses
        eos = binary_cross_entropy_with_logits(outputs[..., -1], is_last.to(outputs.dtype), reduction="none")
        return losses + self.eos_weight * eos

    def loss(self, outputs: Tensor, targets: Tensor, is_last: Tensor | None = None) -> tuple[Tensor, int]:
        """The mean of `losses`, and its weight.

        Args:
            outputs: (N, K), as in `losses`.
            targets: (N, 3), as in `losses`.
            is_last: (N,) bool, as in `losses`.

        Returns:
            mean: (), over all N rows: all points with `add_eos`, else all points but the last of each streamline.
            weight: N.

        Raises:
            ValueError: as in `losses`.

        Example:
            >>> from dwiml_func.models.direction_getters import CosineRegression
            >>> CosineRegression(6).loss(torch.tensor([[1.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]))
            (tensor(2.), 1)
        """
        return self.losses(outputs, targets, is_last).mean(), outputs.shape[0]

    @abstractmethod
    def directions(self, outputs: Tensor) -> Tensor:
        """The direction at each point that deterministic tracking takes.

        Args:
            outputs: (N, K), from `forward`.

        Returns:
            (N, 3), along the voxel axes, of any length.
        """

    def sample(self, outputs: Tensor, key: Key) -> Tensor:
        """Sample a direction at each point, for probabilistic tracking.

        Args:
            outputs: (N, K), from `forward`.
            key: of the random numbers: the same key gives the same directions (on one kind of device).

        Returns:
            (N, 3), along the voxel axes, without gradient.

        Raises:
            ValueError: the getter has no distribution to sample from.

        Example:
            >>> from dwiml_func.models.direction_getters import CosineRegression
            >>> CosineRegression(6).sample(torch.zeros(1, 3), Key(0))
            Traceback (most recent call last):
            ...
            ValueError: cosine-regression has no distribution of directions to sample from. Use `directions`.
        """
        with torch_rng(key):
            uniforms = torch.rand(len(outputs), NUM_UNIFORMS, dtype=torch.float64, device=outputs.device)
        return self.sample_from(outputs, uniforms)

    def sample_from(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Turn uniform random numbers into directions: a row of the result depends on that row of the arguments alone.

        Args:
            outputs: (N, K), from `forward`.
            uniforms: (N, 4) float64, each 0 < u < 1; a getter may leave the last ones unused.

        Returns:
            (N, 3), along the voxel axes, without gradient, as from `sample`.

        Raises:
            ValueError: the getter has no distribution to sample from.

        Example:
            >>> from dwiml_func.models.direction_getters import Gaussian
            >>> outputs = torch.tensor([[0.0, 0, 1, -9, -9, -9]])  # a mean, and small deviations
            >>> Gaussian(6).sample_from(outputs, torch.full((1, 4), 0.5, dtype=torch.float64))
            tensor([[0., 0., 1.]])
        """
        if not self.is_probabilistic:
            raise ValueError(f"{self.key} has no distribution of directions to sample from. Use `directions`.")
        return self._sample_from(outputs.detach(), uniforms)

    def eos_probability(self, outputs: Tensor) -> Tensor:
        """The probability that a point is its streamline's last.

        Args:
            outputs: (N, K), from `forward`.

        Returns:
            (N,), 0 to 1.

        Raises:
            ValueError: the getter was made without `add_eos`.

        Example:
            >>> from dwiml_func.models.direction_getters import CosineRegression
            >>> CosineRegression(6, add_eos=True).eos_probability(torch.zeros(2, 4))
            tensor([0.5000, 0.5000])
        """
        if not self.add_eos:
            raise ValueError("This direction getter does not learn where streamlines end. Make it with add_eos=True.")
        return self._eos_probability(outputs)

    def eos_is_most_likely(self, outputs: Tensor) -> Tensor:
        """Whether a point is more likely its streamline's last than not; of classes: whether EOS is the likeliest.

        Args:
            outputs: (N, K), from `forward`.

        Returns:
            (N,) bool.

        Raises:
            ValueError: the getter was made without `add_eos`.

        Example:
            >>> from dwiml_func.models.direction_getters import CosineRegression
            >>> CosineRegression(6, add_eos=True).eos_is_most_likely(torch.tensor([[1.0, 0, 0, 2], [1, 0, 0, -2]]))
            tensor([ True, False])
        """
        return self.eos_probability(outputs) > 0.5

    def _sample_from(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """See `sample_from`; of a getter with a distribution."""
        raise NotImplementedError

    def _direction_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of the direction alone, (N,)."""
        raise NotImplementedError

    def _eos_probability(self, outputs: Tensor) -> Tensor:
        return outputs[..., -1].sigmoid()

    def _check_rows(self, outputs: Tensor, targets: Tensor, is_last: Tensor | None) -> None:
        if outputs.shape[-1] != self.output_size or targets.shape != (*outputs.shape[:-1], 3):
            raise ValueError(
                f"Expected outputs (N, {self.output_size}) and targets (N, 3). "
                f"Received: {tuple(outputs.shape)} and {tuple(targets.shape)}."
            )
        if self.add_eos != (is_last is not None):
            expected = "with add_eos: which points are the last" if self.add_eos else "None without add_eos"
            raise ValueError(f"Expected is_last {expected}. Received: {'None' if is_last is None else 'a tensor'}.")
        if is_last is not None and is_last.shape != outputs.shape[:-1]:
            raise ValueError(f"Expected is_last {tuple(outputs.shape[:-1])}. Received: {tuple(is_last.shape)}.")


class TwoLayerNetwork(torch.nn.ModuleList):
    """Two linear layers, input_size to ceil(input_size / 2) to output_size; between them ReLU, then dropout.

    It is a list of its two layers, so that their parameters are named `0.weight` and `1.weight` as in dwi_ml.

    Source: dwi_ml, `direction_getter_models.py`.
    """

    def __init__(self, input_size: int, output_size: int, dropout: float = 0.0) -> None:
        check_number("dropout", dropout, at_least=0, below=1)
        hidden_size = math.ceil(input_size / 2)
        super().__init__([torch.nn.Linear(input_size, hidden_size), torch.nn.Linear(hidden_size, output_size)])
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map rows (N, input_size) to (N, output_size), also under `torch.autocast` in the dtype of the parameters.

        Eight bits of a mean are too few for a density of width 0.01.
        """
        first, last = self
        hidden = dropout(first(x).relu(), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            return last(hidden.to(cast(Tensor, last.weight).dtype))


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divide vectors (..., D) by their lengths; vectors without length stay zero, where dwi_ml gets NaN.

    The gradient at a vector without length is that of the vector itself, so that it stays finite.
    """
    squares = vectors.square().sum(dim=-1, keepdim=True)
    return vectors / where(squares == 0, 1.0, squares).sqrt()


def with_length(vectors: Tensor, length: float | None) -> Tensor:
    """Give vectors (..., D) a length; None leaves them alone."""
    return vectors if length is None else unit_vectors(vectors) * length


def check_length(name: str, length: float | None) -> float | None:
    """Return a length for `with_length`, if it is valid."""
    if length is not None:
        check_number(name, length, above=0)
    return length


def mixture_log_density(logits: Tensor, log_densities: Tensor) -> Tensor:
    """The log density (...) of mixtures, from the logits of their weights and their log densities, both (..., G).

    Source: dwi_ml, `formulas_fisher_gaussian.rst`.
    """
    return (logits.log_softmax(dim=-1) + log_densities).logsumexp(dim=-1)


def sample_classes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Turn uniform random numbers (N,) into classes (N,) int64 with the probabilities of logits (N, G)."""
    distribution = logits.softmax(dim=-1).cumsum(dim=-1)
    # Never beyond the last class that has a probability, though rounding may leave the sum below 1.
    target = uniforms.to(logits.dtype).clamp(max=1 - torch.finfo(logits.dtype).eps)[:, None] * distribution[:, -1:]
    return (distribution <= target).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def component(values: Tensor, index: Tensor) -> Tensor:
    """Take the values (N, D) of one distribution of each mixture from those of all (N, G, D)."""
    # Not take_along_dim: torch.compile would make a graph for each N.
    rows = index[..., None, None].expand(*values.shape[:-2], 1, values.shape[-1])
    return values.gather(-2, rows)[..., 0, :]
