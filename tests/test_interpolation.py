from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from dwiml_func.data.interpolation import FlatVolumes, Interpolation, interpolate

shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))


def make_volume_and_points(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Float64; two points in three lie beyond a border, some at whole and half coordinates."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-2, np.array(shape[:3]) + 2, size=(40, 3))
    points[:10] = np.round(points[:10] * 2) / 2
    return rng.standard_normal(shape), points


def corner_by_definition(volume: np.ndarray, points: np.ndarray) -> np.ndarray:
    """dwi_ml's torch_trilinear_interpolation: weights from the fractional part, eight indices clipped one by one."""
    floor = np.floor(points)
    fraction = points - floor
    values = np.zeros((len(points), volume.shape[3]))
    for corner in itertools.product((0, 1), repeat=3):
        index = np.clip(floor.astype(int) + corner, 0, np.array(volume.shape[:3]) - 1)
        weight = np.prod(np.where(corner, fraction, 1 - fraction), axis=1)
        values += weight[:, None] * volume[tuple(index.T)]
    return values


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**16))
def test_trilinear_agrees_with_scipy_also_outside(shape, seed):
    volume, points = make_volume_and_points(shape, seed)
    expected = np.stack(
        [map_coordinates(volume[..., f], (points - 0.5).T, order=1, mode="nearest") for f in range(shape[3])], axis=1
    )
    found = interpolate(torch.from_numpy(volume), torch.from_numpy(points))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    single = interpolate(torch.from_numpy(volume).float(), torch.from_numpy(points).float())
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-5)
    mixed = interpolate(torch.from_numpy(volume).float(), torch.from_numpy(points))  # of the volume's dtype
    assert mixed.dtype == torch.float32
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**16))
def test_trilinear_corner_agrees_with_the_references_definition_also_outside(shape, seed):
    volume, points = make_volume_and_points(shape, seed)
    found = interpolate(torch.from_numpy(volume), torch.from_numpy(points), mode="trilinear-corner")
    np.testing.assert_allclose(found.numpy(), corner_by_definition(volume, points), rtol=0, atol=1e-12)


def centres(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.argwhere(np.ones(shape))).float() + 0.5


def test_at_a_voxels_centre_trilinear_gives_that_voxels_value_exactly():
    volume = torch.randn(4, 5, 6, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(interpolate(volume, centres((4, 5, 6))), volume.reshape(-1, 3))


def test_at_a_voxels_centre_trilinear_corner_gives_the_mean_of_eight_voxels():
    volume = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(1))
    found = interpolate(volume, torch.full((1, 3), 0.5), mode="trilinear-corner")
    torch.testing.assert_close(found[0], volume.reshape(8, 3).mean(dim=0))


def test_axes_are_not_mixed_up():
    volume = centres((4, 5, 6)).reshape(4, 5, 6, 3)  # every voxel holds its own centre
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([3.0, 4.0, 5.0]) + 0.5
    torch.testing.assert_close(interpolate(volume, points), points)


def test_a_volume_that_is_not_contiguous_gives_the_same():
    volume = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(2)) * 4
    strided = volume.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    assert torch.equal(interpolate(strided, points), interpolate(volume, points))


def test_no_points_give_no_rows():
    assert interpolate(torch.zeros(2, 2, 2, 7), torch.zeros(0, 3)).shape == (0, 7)


def test_points_far_away_get_the_border_and_nan_stays_nan():
    volume = torch.arange(8.0).reshape(2, 2, 2, 1)
    one_nan_each = torch.where(torch.eye(3).bool(), float("nan"), 0.5)
    points = torch.cat([torch.tensor([[1e30, -1e30, float("inf")]]), one_nan_each])
    found = interpolate(volume, points)
    assert found[0].item() == volume[1, 0, 1].item()
    assert found[1:].isnan().all()


@pytest.mark.parametrize("num_features", [1, 28, 45])
def test_the_number_of_threads_and_the_neighbours_in_a_batch_do_not_change_the_bytes(num_features):
    generator = torch.Generator().manual_seed(1)
    volume = torch.randn(20, 21, 22, num_features, generator=generator)
    points = torch.rand(12_000, 3, generator=generator) * 21
    num_threads = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(interpolate(volume, points))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0][77:99], interpolate(volume, points[77:99]))


def test_arguments_stay_as_they_were():
    volume, points = (torch.from_numpy(array) for array in make_volume_and_points((3, 3, 3, 2), 1))
    before = volume.clone(), points.clone()
    interpolate(volume, points)
    assert torch.equal(volume, before[0])
    assert torch.equal(points, before[1])
    assert volume._version == points._version == 0


def test_an_unknown_mode_is_refused_by_name():
    with pytest.raises(ValueError, match=r"trilinear, trilinear-corner, received 'cubic'\.$"):
        interpolate(torch.zeros(1, 1, 1, 1), torch.zeros(1, 3), mode="cubic")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("volume", "points"), [((2, 2, 2), (1, 3)), ((2, 2, 2, 1), (1, 2)), ((2, 2, 2, 1), (3,))])
def test_wrong_shapes_are_refused_with_the_shapes(volume, points):
    with pytest.raises(ValueError, match="Received") as raised:
        interpolate(torch.zeros(volume), torch.zeros(points))
    assert f"{volume} and {points}" in str(raised.value)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**16))
def test_nearest_agrees_with_scipy_also_outside(shape, seed):
    volume, points = make_volume_and_points(shape, seed)
    # scipy's order 0 takes the voxel whose centre is nearest, and the upper one on a face.
    expected = [map_coordinates(volume[..., f], np.floor(points).T, order=0, mode="nearest") for f in range(shape[3])]
    found = interpolate(torch.from_numpy(volume), torch.from_numpy(points), mode="nearest")
    assert np.array_equal(found.numpy(), np.stack(expected, axis=1))


def places(size: int) -> dict[str, list[float]]:
    inner = [i + 0.5 for i in range(size)]
    return {
        "centre": inner,
        "face": [float(i) for i in range(size + 1)],
        "outside": [-3.7, -0.5, size + 0.5, size + 9.0],
    }


@pytest.mark.parametrize("kinds", list(itertools.product(["centre", "face", "outside"], repeat=3)), ids="-".join)
def test_centres_faces_edges_corners_and_outside_agree_with_scipy_in_float64(kinds):
    shape = (3, 4, 2, 2)
    volume = np.random.default_rng(3).standard_normal(shape)
    points = np.array(list(itertools.product(*(places(size)[kind] for size, kind in zip(shape, kinds, strict=False)))))
    found = interpolate(torch.from_numpy(volume), torch.from_numpy(points)).numpy()
    corner = interpolate(torch.from_numpy(volume), torch.from_numpy(points), mode="trilinear-corner").numpy()
    nearest = interpolate(torch.from_numpy(volume), torch.from_numpy(points), mode="nearest").numpy()
    for f in range(shape[3]):
        expected = map_coordinates(volume[..., f], (points - 0.5).T, order=1, mode="nearest")
        np.testing.assert_allclose(found[:, f], expected, rtol=0, atol=1e-12)
        expected = map_coordinates(volume[..., f], points.T, order=1, mode="nearest")
        np.testing.assert_allclose(corner[:, f], expected, rtol=0, atol=1e-12)
    voxel = np.clip(np.floor(points).astype(int), 0, np.array(shape[:3]) - 1)
    assert np.array_equal(nearest, volume[tuple(voxel.T)])


def test_nearest_takes_far_points_to_the_border_and_nan_to_nan():
    volume = torch.arange(8.0).reshape(2, 2, 2, 1)
    one_nan_each = torch.where(torch.eye(3).bool(), float("nan"), 0.5)
    points = torch.cat([torch.tensor([[1e30, -1e30, float("inf")]]), one_nan_each])
    found = interpolate(volume, points, mode="nearest")
    assert found[0].item() == volume[1, 0, 1].item()
    assert found[1:].isnan().all()


def test_a_device_gets_the_numbers_of_a_grid_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta`: on a GPU each copy would wait for it, at each step of tracking."""
    volume, points = torch.empty(3, 4, 5, 2, device="meta"), torch.empty(7, 3, device="meta")
    assert interpolate(volume, points).shape == (7, 2)
    monkeypatch.delattr(torch, "tensor")
    for mode in get_args(Interpolation):
        assert interpolate(volume, points, mode=mode).shape == (7, 2)


@pytest.mark.parametrize("mode", ["nearest", "trilinear", "trilinear-corner"])
def test_points_of_several_volumes_are_read_together_each_in_its_own(mode):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 5, 2), (6, 2, 3, 2), (1, 1, 1, 2))
    volumes = [torch.randn(shape, generator=generator) for shape in shapes]
    points, subject = torch.rand(60, 3, generator=generator) * 8 - 1, torch.arange(60) % 3
    found = FlatVolumes.of(volumes, shapes, torch.device("cpu")).read(points, subject, mode=mode)
    for number, volume in enumerate(volumes):
        own = subject == number
        torch.testing.assert_close(found[own], interpolate(volume, points[own], mode=mode), rtol=0, atol=0)
