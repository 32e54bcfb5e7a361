"""Claims about the oracle: it follows real streamlines where they go, in mm, from whichever side a line comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dwiml_func.core.rng import Key
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.tracking import NearestDirection, TrackingMask, TrackingSpace, TrackingSpec, position_space, track


def circle(sizes: tuple[float, float, float]) -> Streamlines:
    """Half a circle of radius 20 mm around (30, 5, 5) mm, in voxels."""
    angles = np.linspace(0, np.pi, 630)
    points = np.stack([30 - 20 * np.cos(angles), 5 + 20 * np.sin(angles), np.full(630, 5.0)], axis=1)
    return Streamlines.from_list([points / sizes])


@pytest.mark.parametrize("sizes", [(2.0, 2.0, 2.0), (1.0, 2.0, 2.5)])
@pytest.mark.parametrize("mode", ["nearest", "trilinear-corner"])
def test_from_a_seed_on_a_circle_it_goes_round_both_ways(sizes: Any, mode: Any) -> None:
    real, in_mm = circle(sizes), torch.tensor(sizes)
    shape = [round(size / each) for size, each in zip((60, 40, 10), sizes, strict=True)]
    inside = torch.ones(shape)
    inside[:, : round(10 / sizes[1])] = 0  # lines end before the end of the half circle
    space = TrackingSpace(
        volume=torch.zeros(*shape, 28), voxel_sizes=sizes, interpolation=mode, mask=TrackingMask(values=inside)
    )
    seed = torch.tensor([[30.0, 25.0, 5.0]]) / in_mm
    spec = TrackingSpec(step_size=0.5, min_length=0, max_length=80)
    (found,) = track(
        seed, model=NearestDirection(real, sizes), space=position_space(space), spec=spec, key=Key(0), num_rows=4
    )
    points = (found.streamlines.points * in_mm).numpy() - (30, 5, 5)
    assert points[[0, -1], 1] == pytest.approx([5, 5], abs=0.6)  # down to y = 10 mm on both sides
    assert points[0, 0] == pytest.approx(-points[-1, 0], abs=0.6)
    num_steps = np.abs(np.arange(len(points)) - len(points) // 2)
    # A step along the tangent makes a right angle with the radius.
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), np.sqrt(400 + 0.25 * num_steps), atol=0.03)


def test_the_nearest_segment_is_that_whose_middle_is_nearest_in_mm() -> None:
    sizes = (1.0, 0.5, 2.0)
    model = NearestDirection(Streamlines.from_list([[[0, 0, 0], [4, 0, 0], [4, 8, 0]]]), sizes)
    where = torch.tensor([[2.2, 0.2, 0.0], [3.9, 0.6, 0.0], [2.0, 3.0, 1.0]])  # voxels: middles at 2, 0 and 4, 2 mm
    found, _ = model.run_step(where, torch.tensor([[0.0, 0, 0], [0, 1, 0], [-1, 0.0, 0.0]]))
    assert found.tolist() == [[4, 0, 0], [0, 4, 0], [-4, 0, 0]]  # mm, on the side of the previous direction


def test_a_volume_of_positions_is_read_as_the_point_itself() -> None:
    space = TrackingSpace(
        volume=torch.zeros(5, 6, 7, 2),
        voxel_sizes=(1.0, 1.0, 1.0),
        interpolation="nearest",
        neighborhood=Neighborhood(type="axes"),
    )
    points = 0.5 + torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 5.0, 6.0])
    torch.testing.assert_close(position_space(space).read(points), points)
    assert position_space(space).read(torch.zeros(1, 3)).tolist() == [[0.5, 0.5, 0.5]]


def test_streamlines_of_one_point_have_no_direction() -> None:
    with pytest.raises(ValueError, match="two points or more"):
        NearestDirection(Streamlines.from_list([[[0, 0, 0]]]), (1.0, 1.0, 1.0))
