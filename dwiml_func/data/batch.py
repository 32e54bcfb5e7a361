"""What a model sees at one step: streamlines, and the input volume along them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dwiml_func._checks import pluralize
from dwiml_func.data.streamlines import input_offsets, input_rows

__all__ = ["StreamlineBatch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamlineBatch:
    """What a model sees at one step: S streamlines and the input volume along them.

    Args:
        points: (P, 3) float32, voxel space, corner origin (voxel i covers [i, i + 1)); of a subject whose voxels are no
            cubes, in mm along the voxel axes.
        offsets: (S + 1,) int64, of `points`.
        subject: (S,) int64, each streamline's row in `dataset.index.subjects`.
        ids: (S,) int64, each streamline's number in the whole dataset.
        inputs: (N, F) float32, the subject's input volume interpolated along the streamlines. N = P - S: at all points
            but the last of each streamline, those that have a next direction. N = P: at every point, for models that
            learn where streamlines end (EOS), see `LoaderSpec.add_eos`.
        noisy_points, noisy_targets: (P, 3) float32, the points with the noise that the model shall see, and with that
            of the targets; None where there is none.
        is_real: (N,) bool, in a batch filled up to a shape that many batches have (see `with_fixed_shape`): which rows
            of `inputs` are streamlines; only these count in a mean over points. None: all.
        padded_length: to how many rows a model may pad the inputs of each streamline, none of which has more: known to
            the host, so that no accelerator is asked for it. None: models find out how long the streamlines are.

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
    is_real: Tensor | None = None
    padded_length: int | None = None

    def __repr__(self) -> str:
        size = f"{pluralize(len(self), 'streamline')}, {pluralize(len(self.points), 'point')}"
        inputs = f"inputs {tuple(self.inputs.shape)}"
        kind = f"{str(self.inputs.dtype).removeprefix('torch.')}, {self.inputs.device}"
        noise = [name for name in ("noisy_points", "noisy_targets") if getattr(self, name) is not None]
        return f"<StreamlineBatch: {', '.join([size, inputs, kind, *noise])}>"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_points(self) -> int:
        """N, the rows of `inputs`, which without `is_real` is the weight of the batch in every mean over points."""
        return len(self.inputs)

    @property
    def num_directions(self) -> int:
        """P - S: the points that have a next direction."""
        return len(self.points) - len(self)

    @property
    def has_last_points(self) -> bool:
        """Whether `inputs` has a row at the last point of each streamline too."""
        return len(self.inputs) == len(self.points)

    @property
    def is_last(self) -> Tensor | None:
        """(N,) bool, which rows of `inputs` are the last of their streamline; None where the last have no row."""
        if not self.has_last_points:
            return None
        if self.is_real is not None:  # all streamlines have as many rows
            is_real = self.is_real.unflatten(0, (len(self), -1))
            return (is_real & ~torch.nn.functional.pad(is_real[:, 1:], (0, 1))).flatten()
        is_last = torch.zeros(len(self.points), dtype=torch.bool, device=self.points.device)
        is_last[self.offsets[1:] - 1] = True
        return is_last

    @property
    def has_direction(self) -> Tensor | None:
        """(P - S,) bool, which rows of `at_directions` are of streamlines; None for all."""
        if self.is_real is None or not self.has_last_points:
            return self.is_real
        return self.is_real.unflatten(0, (len(self), -1))[:, 1:].flatten()

    @property
    def input_offsets(self) -> Tensor:
        """(S + 1,) int64, of `inputs`."""
        return self.offsets if self.has_last_points else input_offsets(self.offsets)

    def at_directions(self, rows: Tensor) -> Tensor:
        """Of values at the rows of `inputs`, those at points that have a next direction.

        Args:
            rows: (N, ...), one row for each of `inputs`.

        Returns:
            (P - S, ...), in the same order; `rows` itself where the last points have no row.

        Example:
            >>> from dwiml_func.data.streamlines import Streamlines
            >>> lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]])
            >>> one = torch.zeros(1, dtype=torch.int64)
            >>> batch = StreamlineBatch(
            ...     points=lines.points, offsets=lines.offsets, subject=one, ids=one, inputs=torch.zeros(2, 6)
            ... )
            >>> batch.is_last, batch.at_directions(torch.tensor([5, 7]))
            (tensor([False,  True]), tensor([5]))
        """
        if not self.has_last_points:
            return rows
        return rows.index_select(0, input_rows(self.offsets, len(self.points)))

    def at_inputs(self, directions: Tensor) -> Tensor:
        """Directions at the rows of `inputs`: zeros at the last points, where those have rows.

        Args:
            directions: (P - S, ...), one row for each point that has a next direction.

        Returns:
            (N, ...); `directions` itself where the last points have no row.

        Example:
            >>> from dwiml_func.data.streamlines import Streamlines
            >>> lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]])
            >>> one = torch.zeros(1, dtype=torch.int64)
            >>> batch = StreamlineBatch(
            ...     points=lines.points, offsets=lines.offsets, subject=one, ids=one, inputs=torch.zeros(2, 6)
            ... )
            >>> batch.at_inputs(torch.ones(1, 3)).tolist()
            [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
        """
        if not self.has_last_points:
            return directions
        zeros = directions.new_zeros(len(self.points), *directions.shape[1:])
        return zeros.index_copy(0, input_rows(self.offsets, len(self.points)), directions)

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
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StreamlineBatch:
        """Copy every tensor to memory from which a GPU copies by itself; a torch DataLoader asks for this too.

        Returns:
            A batch in pinned memory; tensors that are in it already are shared.
        """
        return self._mapped(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of every tensor until a CUDA stream has done what it was given so far."""
        for field in fields(self):
            if isinstance(tensor := getattr(self, field.name), Tensor):
                tensor.record_stream(stream)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> StreamlineBatch:
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: function(t) if isinstance(t, Tensor) else t for name, t in parts.items()}
        return StreamlineBatch(**moved)
