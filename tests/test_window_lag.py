"""Window lag: closed forms, the model line by line, and cuts found by loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tracking_cases import FieldModel, positions

from dwiml_func.core.rng import Key
from dwiml_func.data import DatasetIndex, Resampling, StreamlineDataset, open_dataset
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.models import Learn2Track
from dwiml_func.tracking import (
    TrackingMask,
    TrackingSpace,
    TrackingSpec,
    choose_windows,
    continue_lines,
    window_lags,
)
from dwiml_func.tracking.window_lag import even_step

SIZES = (2.0, 1.5, 3.0)


class StraightModel(FieldModel):
    """Repeats the previous direction."""

    nb_previous_dirs = 1

    def __init__(self) -> None:
        super().__init__(lambda inputs: inputs)

    def run_step(self, inputs: Any, dirs: Any, state: Any = None) -> tuple[Any, Any]:
        return dirs, super().run_step(inputs, dirs, state)[1]


def circle(radius: float, step: float = 1.0, angle: float = 3.0) -> np.ndarray:
    """In mm, sampled at even steps along the arc."""
    angles = np.arange(0, angle, step / radius)
    return radius * np.stack([np.sin(angles), 1 - np.cos(angles), 0 * angles], axis=1) + [60, 10, 30]


def dataset_of(lines_mm: list[np.ndarray], subjects: tuple[int, ...] | None = None, **options: Any) -> Any:
    counts = (len(lines_mm),) if subjects is None else subjects
    sizes = torch.tensor([SIZES] * len(counts))
    return StreamlineDataset(
        path=Path("a.hdf5"),
        subset="validation",
        index=DatasetIndex(tuple(f"s{i}" for i in range(len(counts))), np.array(counts)),
        volumes=(),
        streamlines=Streamlines.from_list([line / SIZES for line in lines_mm]),
        voxel_sizes=sizes,
        input_attributes={},
        **options,
    )


def test_a_model_that_goes_straight_leaves_a_circle_by_what_geometry_tells() -> None:
    radius, step = 40.0, 0.5
    windows = choose_windows(dataset_of([circle(radius, step)]), key=Key(0), share=1.0)
    assert windows is not None
    space = positions(70, 90, 20, voxel_sizes=SIZES)
    received = window_lags(StraightModel(), windows, lambda row: space)
    turn = step / radius  # straight on along the last step, which is half a turn behind the tangent
    heading = np.array([np.cos(-turn / 2), np.sin(-turn / 2)])
    true = radius * np.array([np.sin(20 / radius), 1 - np.cos(20 / radius)])
    np.testing.assert_allclose(received, np.linalg.norm(20 * heading - true), atol=0.02)
    assert len(received) == 2 * (int(3.0 * radius - 20) // 30)


@pytest.mark.parametrize("resampling", [None, Resampling(step_size=1.0)])
def test_each_subject_is_read_in_its_own_space_and_measured_in_its_own_voxels(resampling) -> None:
    line = circle(40.0, 0.5)
    sizes = np.array([SIZES, (1.5, 1.0, 3.0), (2.0, 2.0, 2.0)])
    dataset = dataset_of([line] * 3, (1, 1, 1))
    lines = Streamlines.from_list([line / size for size in sizes])
    dataset = replace(dataset, streamlines=lines, voxel_sizes=torch.tensor(sizes, dtype=torch.float32))
    windows = choose_windows(dataset, key=Key(0), share=1.0, resampling=resampling)
    assert windows is not None
    spaces = [positions(*(200 / size).astype(int).tolist(), voxel_sizes=tuple(size.tolist())) for size in sizes]
    found = np.split(window_lags(StraightModel(), windows, lambda row: spaces[row]), 3)
    for other in found[1:]:
        np.testing.assert_allclose(np.sort(other), np.sort(found[0]), atol=1e-3)
    assert windows.step_size == pytest.approx(0.5 if resampling is None else 1.0, rel=1e-2)


def test_a_model_that_ends_at_once_lags_by_the_whole_way_and_one_that_is_right_not_at_all() -> None:
    line = np.stack([np.linspace(10, 110, 101), np.full(101, 30.0), np.full(101, 30.0)], axis=1)
    windows = choose_windows(dataset_of([line]), key=Key(0), share=1.0)
    assert windows is not None
    mask = TrackingMask(values=torch.zeros(70, 40, 20))  # which is not read
    space = positions(70, 40, 20, voxel_sizes=SIZES, mask=mask)
    np.testing.assert_allclose(window_lags(StraightModel(), windows, lambda row: space), 0, atol=1e-3)
    stops = FieldModel(lambda inputs: torch.full((len(inputs), 3), torch.nan))
    np.testing.assert_allclose(window_lags(stops, windows, lambda row: space), 20, atol=1e-3)
    back = torch.tensor([-0.5, 3**0.5 / 2, 0.0])  # a turn of 120 degrees, which ends no line here, and of 60 degrees
    turns = FieldModel(lambda inputs: back.expand(len(inputs), 3))
    received = np.sort(window_lags(turns, windows, lambda row: space))
    np.testing.assert_allclose(received, 20 * np.sqrt([1, 1, 3, 3]), atol=1e-3)


def alone(model: Learn2Track, given: np.ndarray, space: TrackingSpace, num: int, step: float) -> np.ndarray:
    """Read one line and continue from its end, a step at a time."""
    sizes, points = torch.tensor(space.voxel_sizes), torch.tensor(given)
    state, dirs, outputs = None, torch.zeros(1, 3), torch.zeros(1, 3)
    for before, point in zip([points[0], *points[:-1]], points, strict=True):
        dirs = (point - before)[None] * sizes  # mm, as the voxels are no cubes
        outputs, state = model.run_step(space.read(point[None]), dirs, state)
    found = [points[-1]]
    for _ in range(num):
        mm = model.direction_getter.directions(outputs)[0]
        dirs = (mm / mm.norm() * step)[None]
        found.append(found[-1] + dirs[0] / sizes)
        outputs, state = model.run_step(space.read(found[-1][None]), dirs, state)
    return torch.stack(found).numpy()


def test_a_model_reads_lines_of_any_length_and_goes_on_as_it_does_with_each_alone() -> None:
    torch.manual_seed(0)
    model = Learn2Track(5, nb_previous_dirs=1, rnn_layer_sizes=(8, 8)).eval()
    space = TrackingSpace(volume=torch.randn(30, 40, 20, 5), voxel_sizes=SIZES)
    line = (circle(20, 1.0) - [45, 0, 5]) / SIZES
    given = [line[:30].astype(np.float32), line[10:11].astype(np.float32), line[40:20:-1].astype(np.float32)]
    spec = TrackingSpec(step_size=1.0, theta=180)
    with torch.no_grad():
        expected = [alone(model, piece, space, 12, 1.0) for piece in given]
        received = continue_lines(Streamlines.from_list(given), model=model, space=space, spec=spec, distance=12)
    for mine, line_alone in zip(received.to_list(), expected, strict=True):
        np.testing.assert_allclose(mine, line_alone, atol=1e-4)


@pytest.mark.parametrize("step", [0.5, 4.0])
def test_lines_go_on_for_the_whole_distance_whatever_the_step(step: float) -> None:
    points = np.stack([20 + step * np.arange(12), np.full(12, 20.0), np.full(12, 20.0)], axis=1) / SIZES
    space = positions(90, 40, 20, voxel_sizes=SIZES)
    given = Streamlines.from_list([points, points[:3]])
    spec = TrackingSpec(step_size=step)
    added = continue_lines(given, model=StraightModel(), space=space, spec=spec, distance=40)
    assert added.lengths.tolist() == [40 / step + 1] * 2


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_windows_are_those_of_a_loop_over_lines_both_ways(step: float) -> None:
    rng = np.random.default_rng(0)
    lines = [circle(rng.uniform(20, 45), step, rng.uniform(0.5, 3)) for _ in range(7)]
    windows = choose_windows(dataset_of(lines, (4, 0, 3)), key=Key(0), share=1.0)
    assert windows is not None
    expected = []
    for number, line in enumerate(lines):
        for way in (line, line[::-1]):
            travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(way, axis=0), axis=1))])
            for target in np.arange(30, travelled[-1], 30):
                cut = int(np.abs(travelled - target).argmin())
                if travelled[-1] - max(target, travelled[cut]) >= 20 - 1e-4:
                    piece = way[max(0, cut - round(60 / step)) : cut + 1]
                    expected.append((0 if number < 4 else 2, piece, way[cut:]))
    received = zip(windows.subject.tolist(), windows.read.to_list(), windows.ahead.to_list(), strict=True)
    found = [(row, (read * torch.tensor(SIZES)).numpy(), ahead.numpy()) for row, read, ahead in received]
    assert len(found) == len(expected)
    for mine, theirs in zip(sorted(found, key=_place), sorted(expected, key=_place), strict=True):
        assert mine[0] == theirs[0]
        np.testing.assert_allclose(mine[1], theirs[1], atol=1e-3)
        np.testing.assert_allclose(mine[2], theirs[2], atol=1e-3)
    assert (windows.subject.diff() >= 0).all()
    assert windows.step_size == pytest.approx(step, rel=1e-3)


def test_a_cut_that_is_midway_between_two_points_is_at_the_later_one() -> None:
    line = np.stack([4.0 * np.arange(4, 20), np.full(16, 30.0), np.full(16, 30.0)], axis=1)  # 28 and 32 mm: 2 from 30
    windows = choose_windows(dataset_of([line]), key=Key(0), share=1.0)
    assert windows is not None
    assert windows.read.lengths.tolist() == [9, 9]
    assert windows.ahead.lengths.tolist() == [8, 8]


def _place(window: Any) -> tuple:
    return (window[0], *np.round(window[1][-1], 2).tolist(), *np.round(window[2][-1], 2).tolist())


def test_the_choice_is_a_quarter_fixed_by_its_key_and_capped() -> None:
    lines = [circle(30 + 0.1 * number) for number in range(40)]
    every = choose_windows(dataset_of(lines), key=Key(0), share=1.0)
    first, again, other = (choose_windows(dataset_of(lines), key=Key(seed)) for seed in (0, 0, 1))
    assert every is not None
    assert first is not None
    assert again is not None
    assert other is not None
    assert len(every) == 128  # of 160
    assert len(first) == 40
    assert torch.equal(first.read.points, again.read.points)
    assert not torch.equal(first.read.points, other.read.points)


def test_windows_are_of_512_streamlines_at_most() -> None:
    dataset = dataset_of([circle(30, 2.0, 1.8)] * 520)
    ids: list[np.ndarray] = []

    class Recording:
        def select(self, wanted: np.ndarray) -> Streamlines:
            ids.append(wanted)
            return dataset.streamlines.select(wanted)

    assert choose_windows(replace(dataset, streamlines=Recording()), key=Key(0)) is not None
    assert len(np.unique(ids[0])) == 512
    assert ids[0][0] > 0 or ids[0][-1] > 511  # at random


def test_streamlines_without_even_steps_or_too_short_have_no_windows() -> None:
    line = circle(40)
    uneven = line[np.sort(np.random.default_rng(0).choice(len(line), 30, replace=False))]
    assert choose_windows(dataset_of([uneven]), key=Key(0)) is None
    assert choose_windows(dataset_of([line[:45]]), key=Key(0)) is None
    assert choose_windows(dataset_of([], (0,)), key=Key(0)) is None
    resampled = choose_windows(dataset_of([uneven]), key=Key(0), resampling=Resampling(step_size=2.0))
    assert resampled is not None
    assert resampled.step_size == pytest.approx(2.0, rel=0.02)


def test_a_model_that_can_read_few_points_only_gets_no_more() -> None:
    lines = [circle(30), circle(35)]
    windows = choose_windows(dataset_of(lines), key=Key(0), share=1.0, max_points=45)
    assert windows is not None
    assert (
        windows.read.lengths.max() == 45 - 21 + 1
    )  # the cut is read too, the last of 21 points is not; chords are short
    assert choose_windows(dataset_of(lines), key=Key(0), max_points=20) is None


def test_lazy_datasets_give_the_same_windows() -> None:
    phantom = Path(__file__).parent / "data" / "phantom.hdf5"
    datasets = [open_dataset(phantom, "validation", lazy=lazy) for lazy in (False, True)]
    sizes = torch.full((1, 3), 5.0)  # as if its voxels were large: its streamlines are short
    windows = [choose_windows(replace(dataset, voxel_sizes=sizes), key=Key(0)) for dataset in datasets]
    assert windows[0] is not None
    assert windows[1] is not None
    assert torch.equal(windows[0].read.points, windows[1].read.points)
    assert len(windows[0]) > 10


@pytest.mark.parametrize(("other", "step"), [(2.0, 2.0), (2.3, 2.0), (2.6, None), (1.4, None)])
def test_steps_are_even_to_a_fifth(other, step) -> None:
    lengths = torch.tensor([2.0] * 6 + [other] * 4) / 2  # voxels of 2 mm
    points = torch.cat([torch.zeros(1), lengths.cumsum(0)])[:, None] * torch.tensor([1.0, 0, 0])
    found = even_step(Streamlines.from_list([points]), torch.full((1, 3), 2.0))
    assert found == (step if step is None else pytest.approx(step))
