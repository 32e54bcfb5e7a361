"""What all models that predict directions have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.models.direction_getters.base import DirectionGetter

__all__ = ["TractographyModel"]


class TractographyModel(torch.nn.Module, ABC):
    """Reads the input volume along streamlines, and predicts the next direction at each point.

    Attributes:
        nb_features: features of the input volume at a point.
        input_size: features that the model reads at a point, those of its neighbours included.
        nb_previous_dirs: previous directions that `run_step` takes.
        direction_getter: what the last layers' outputs mean.
    """

    nb_features: int
    input_size: int
    nb_previous_dirs: int
    direction_getter: DirectionGetter

    @property
    def add_eos(self) -> bool:
        """Whether the model learns where streamlines end, and therefore also reads the inputs at their last points."""
        return self.direction_getter.add_eos

    @abstractmethod
    def forward(self, batch: StreamlineBatch) -> Tensor:
        """Predict at every row of the batch's inputs, from the streamline up to that point: (N, K)."""

    @abstractmethod
    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None, /) -> tuple[Tensor, Any]:
        """Predict at the next point of S streamlines, for tracking: the outputs (S, K), and the new state.

        `inputs` (S, input_size) are those at the newest points, `dirs` (S, 3 * nb_previous_dirs) the previous
        directions, the latest first; `state` None starts new streamlines.
        """

    def directions(self, batch: StreamlineBatch) -> Tensor:
        """Predict the direction at every point that has a next one.

        Args:
            batch: S streamlines, P points, as in `forward`.

        Returns:
            (P - S, 3), along the voxel axes, of any length: the directions that deterministic tracking takes.

        Raises:
            ValueError: as in `forward`.

        Example:
            >>> model.directions(batch)  # doctest: +SKIP
        """
        return self.direction_getter.directions(batch.at_directions(self(batch)))

    def check_batch(self, batch: StreamlineBatch) -> None:
        """Raise ValueError for a batch with another number of features, inputs at other points, or none."""
        if batch.inputs.shape[1] != self.input_size:
            raise ValueError(
                f"Expected a batch with {self.input_size} input features, as the model. "
                f"Received: {batch.inputs.shape[1]}. Use the input volume that the model was trained on."
            )
        if batch.num_points == 0:
            raise ValueError("Expected a batch with streamlines of two points or more. Received: none.")
        if batch.num_points != (len(batch.points) if self.add_eos else batch.num_directions):
            expected = "all points" if self.add_eos else "all points but the last of each streamline"
            raise ValueError(
                f"Expected a batch with inputs at {expected}. Received: {batch.num_points} rows for "
                f"{len(batch.points)} points. Load it with LoaderSpec(add_eos={self.add_eos})."
            )
