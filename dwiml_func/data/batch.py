"""What a model sees at one step: streamlines, and the input volume along them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["StreamlineBatch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamlineBatch:
    """What a model sees at one step: S streamlines and the input volume along them.

    Args:
        points: (P, 3) float32, voxel space, corner origin (voxel i covers [i, i + 1)).
        offsets: (S + 1,) int64, of `points`.
        subject: (S,) int64, each streamline's row in `dataset.index.subjects`.
        ids: (S,) int64, each streamline's number in the whole dataset.
        inputs: (P - S, F) float32, the subject's input volume interpolated at all points but the last of each
            streamline.
        noisy_points, noisy_targets: (P, 3) float32, the points with the noise that the model shall see, and with that
            of the targets; None where there is none.

    Example:
        >>> batch = StreamlineBatch(
        ...     points=torch.zeros(5, 3),
        ...     offsets=torch.tensor([0, 3, 5]),
        ...     subject=torch.tensor([0, 0]),
        ...     ids=torch.tensor([7, 2]),
        ...     inputs=torch.zeros(3, 28),
        ... )
        >>> len(batch), batch.num_points
        (2, 3)
    """

    points: Tensor
    offsets: Tensor
    subject: Tensor
    ids: Tensor
    inputs: Tensor
    noisy_points: Tensor | None = None
    noisy_targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_points(self) -> int:
        """P - S: the points that have a next direction, which is the weight of the batch in every mean."""
        return len(self.points) - len(self)

    @property
    def forward_points(self) -> Tensor:
        """(P, 3), what a model computes previous directions from: `points`, or those with noise."""
        return self.points if self.noisy_points is None else self.noisy_points

    @property
    def target_points(self) -> Tensor:
        """(P, 3), the points from which targets are computed: `points`, or those with noise."""
        return self.points if self.noisy_targets is None else self.noisy_targets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StreamlineBatch:
        """Move every tensor to a device.

        Args:
            device: where to.
            non_blocking: let copies from pinned memory overlap with computation.

        Returns:
            A batch on that device; tensors that are there already are shared.

        Example:
            >>> from dwiml_func.data.streamlines import Streamlines
            >>> lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]])
            >>> one = torch.zeros(1, dtype=torch.int64)
            >>> batch = StreamlineBatch(
            ...     points=lines.points, offsets=lines.offsets, subject=one, ids=one, inputs=torch.zeros(1, 2)
            ... )
            >>> batch.to("cpu").inputs.device
            device(type='cpu')
        """
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items() if t is not None}
        return StreamlineBatch(**moved)
