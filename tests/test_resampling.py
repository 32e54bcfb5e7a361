from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.data.resampling import Resampling, resample, resample_streamlines
from dwiml_func.data.streamlines import Streamlines

resamplings = st.one_of(
    st.builds(Resampling, step_size=st.floats(0.2, 20)),
    st.builds(Resampling, nb_points=st.integers(2, 30)),
    st.builds(Resampling, compress=st.floats(0.01, 5)),
)


@st.composite
def smooth_streamlines(draw) -> tuple[Streamlines, torch.Tensor]:
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=6))
    lines = [20 + np.cumsum(rng.uniform(-0.2, 1, (length, 3)), axis=0) for length in lengths]
    return Streamlines.from_list(lines), torch.from_numpy(rng.uniform(0.5, 3, (len(lines), 3))).float()


def steps_mm(line: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return (line.double() * sizes.double()).diff(dim=0).norm(dim=1)


@given(smooth_streamlines(), resamplings)
def test_resampling_keeps_ends_to_the_bit_and_lengths_but_for_cut_corners(drawn, resampling):
    lines, sizes = drawn
    found = resample_streamlines(lines, sizes, resampling)
    assert len(found) == len(lines)
    assert found.points.dtype == torch.float32
    for new, old, size in zip(found.to_list(), lines.to_list(), sizes, strict=True):
        assert torch.equal(new[[0, -1]], old[[0, -1]])
        chord = ((old[-1] - old[0]) * size).double().norm().item()
        new_length, old_length = steps_mm(new, size).sum().item(), steps_mm(old, size).sum().item()
        assert chord * (1 - 1e-4) <= new_length <= old_length * (1 + 1e-4)
        if resampling.compress is not None:
            assert set(map(tuple, new.tolist())) <= set(map(tuple, old.tolist()))
        else:
            assert distance_to_curve(new * size, old * size) < 1e-3


def distance_to_curve(points: torch.Tensor, curve: torch.Tensor) -> float:
    start, end = curve[None, :-1].double(), curve[None, 1:].double()
    along = end - start
    share = ((points[:, None].double() - start) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)
    nearest = start + share.clamp(0, 1)[..., None] * along
    return (points[:, None].double() - nearest).norm(dim=-1).amin(dim=1).max().item()


@given(st.floats(0.3, 3), st.integers(2, 50), st.floats(0.3, 5))
def test_a_straight_line_gets_even_steps_of_about_the_size_asked_for(voxel, length, step):
    line = np.linspace([1, 1, 1], [30, 1, 1], length)
    lines, sizes = Streamlines.from_list([line]), torch.full((1, 3), voxel)
    steps = steps_mm(resample_streamlines(lines, sizes, Resampling(step_size=step)).points, sizes[0])
    assert steps.sum().item() == pytest.approx(29 * voxel, rel=1e-5)
    assert (steps - steps.mean()).abs().max().item() < 1e-4
    assert abs(len(steps) - 29 * voxel / step) <= 0.5 + 1e-3


def test_steps_are_measured_in_mm_along_each_axis():
    lines = Streamlines.from_list([[[0, 0, 0], [6, 0, 0]], [[0, 0, 0], [0, 6, 0]]])
    sizes = torch.tensor([[1.0, 3.0, 1.0], [1.0, 3.0, 1.0]])
    assert resample_streamlines(lines, sizes, Resampling(step_size=2.0)).lengths.tolist() == [4, 10]


def test_dwi_mls_rule_makes_fewer_and_longer_steps():
    lines, size = Streamlines.from_list([[[0, 0, 0], [6, 0, 0]]]), torch.ones(1, 3)
    found = resample_streamlines(lines, size, Resampling(step_size=2.0, step_rule="dwi_ml"))
    assert found.points[:, 0].tolist() == [0, 3, 6]
    assert resample_streamlines(lines, size, Resampling(step_size=2.0)).points[:, 0].tolist() == [0, 2, 4, 6]


def test_what_has_the_step_size_already_is_not_sampled_again_whatever_the_rule():
    assert Resampling(step_size=2.0, step_rule="dwi_ml") == Resampling(step_size=2.0)


@given(smooth_streamlines(), st.integers(2, 30))
def test_every_streamline_gets_the_number_of_points_asked_for(drawn, nb_points):
    lines, sizes = drawn
    found = resample_streamlines(lines, sizes, Resampling(nb_points=nb_points))
    assert found.lengths.tolist() == [nb_points] * len(lines)


def test_a_streamline_without_length_stays_at_its_place():
    lines, sizes = Streamlines.from_list([np.full((5, 3), 2.5), [[0, 0, 0], [3, 0, 0]]]), torch.ones(2, 3)
    found = resample_streamlines(lines, sizes, Resampling(step_size=1.0))
    assert found.points[:, 0].tolist() == [2.5, 2.5, 0, 1, 2, 3]
    found = resample_streamlines(lines, sizes, Resampling(nb_points=3))
    assert found.points[:, 0].tolist() == [2.5, 2.5, 2.5, 0, 1.5, 3]


def test_nothing_asked_for_is_nothing_done():
    lines = Streamlines.from_list([np.ones((5, 3))])
    assert resample_streamlines(lines, torch.ones(1, 3), Resampling()) is lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "^step_size: .* above 0 mm. Received: 0.0$"),
        ({"step_size": float("nan")}, "^step_size: "),
        ({"step_size": 1.0, "step_rule": "up"}, "^Expected a step_rule among nearest, dwi_ml. Received: 'up'$"),
        ({"nb_points": 1}, "^nb_points: .* at least 2. Received: 1$"),
        ({"compress": -1.0}, "^compress: "),
        ({"step_size": 1.0, "compress": 1.0}, "at most one of"),
    ],
)
def test_what_is_no_resampling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Resampling(**options)


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_both_ends_of_every_streamline_are_bitwise_those_given(seed, num_steps):
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 9, 20)
    points, offsets = rng.normal(scale=1e3, size=(counts.sum(), 3)) / 3, np.concatenate([[0], np.cumsum(counts)])
    found, new_offsets = resample(points, offsets, np.full(20, num_steps))
    assert found[new_offsets[:-1]].tobytes() == points[offsets[:-1]].tobytes()
    assert found[new_offsets[1:] - 1].tobytes() == points[offsets[1:] - 1].tobytes()
