"""Models with a closed form to track with, and what tests of tracking share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.models.direction_getters import CosineRegression, DirectionGetter
from dwiml_func.tracking import TrackingSpace, TrackingSpec, track


class FieldModel:
    """Not a module: its outputs are a function of the position, which the volume of `positions` gives it.

    It counts the points that each line has been read at, so that a state that is mixed up shows.
    """

    nb_previous_dirs = 0

    def __init__(self, field: Callable[[Tensor], Tensor], *, add_eos: bool = False) -> None:
        self.field = field
        self.direction_getter: DirectionGetter = CosineRegression(1, add_eos=add_eos)

    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        count = torch.zeros(len(inputs)) if state is None else state["count"]
        return self.field(inputs), {"count": count + 1}


class SteeredModel(FieldModel):
    """Follows the line's previous direction, through a field of axes: the nearer of both senses."""

    nb_previous_dirs = 1

    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = super().run_step(inputs, dirs, state)
        return torch.where((outputs * dirs).sum(dim=1, keepdim=True) < 0, -outputs, outputs), state


def positions(*shape: int, voxel_sizes: tuple[float, float, float] = (1.0, 1.0, 1.0), **options: Any) -> TrackingSpace:
    """A space whose volume has the coordinates of each voxel's centre: trilinear reading gives the point itself."""
    axes = torch.meshgrid(*[torch.arange(size) + 0.5 for size in shape], indexing="ij")
    return TrackingSpace(volume=torch.stack(axes, dim=-1), voxel_sizes=voxel_sizes, **options)


def tracked_lines(
    seeds: Any, model: Any, space: TrackingSpace, *, num_rows: int = 16, **options: Any
) -> dict[int, Tensor]:
    """The lines by their seeds' numbers."""
    spec = TrackingSpec(**{"step_size": 1.0, "min_length": 0.0, **options})
    seeds = torch.as_tensor(seeds, dtype=torch.float32).reshape(-1, 3)
    lines = {}
    for tracked in track(seeds, model=model, space=space, spec=spec, key=Key(5), num_rows=num_rows):
        numbers = tracked.seeds.tolist()
        assert numbers == sorted(numbers)
        assert not lines or not numbers or numbers[0] > max(lines)
        lines |= dict(zip(numbers, tracked.streamlines.to_list(), strict=True))
    return lines
