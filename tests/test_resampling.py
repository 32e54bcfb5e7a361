from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.data.resampling import Resampling, resample, resample_others, resample_streamlines, steps_for
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


@pytest.mark.parametrize(("tolerance", "num_points"), [(0.29, 3), (0.31, 2)])
def test_compressing_removes_what_lies_within_the_tolerance_in_mm(tolerance, num_points):
    lines = Streamlines.from_list([[[0, 0, 0], [5, 0.1, 0], [10, 0, 0]]])  # 0.3 mm beside the straight line
    found = resample_streamlines(lines, torch.tensor([[1.0, 3.0, 1.0]]), Resampling(compress=tolerance))
    assert len(found.points) == num_points


def test_a_streamline_of_more_than_a_million_steps_is_refused():
    lines, size = Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]]), torch.ones(1, 3)
    with pytest.raises(
        ValueError, match=r"a streamline of 1 mm would have more than 1000000 points\. Received: 1e-07 mm"
    ):
        resample_streamlines(lines, size, Resampling(step_size=1e-7))


def test_only_streamlines_of_another_number_of_points_are_resampled_each_in_its_own_voxels():
    bent = [[0, 0, 0], [6, 0, 0], [6, 6, 0]]
    lines = Streamlines.from_list([bent[:2], bent, bent[1:], bent])
    sizes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    three = resample_others(lines, sizes, Resampling(nb_points=3)).to_list()
    assert [line[1].tolist() for line in three] == [[3, 0, 0], [6, 0, 0], [6, 3, 0], [6, 0, 0]]
    sizes[:, 1] = torch.tensor([1.0, 3.0, 1.0, 2.0])
    two = resample_others(Streamlines.from_list([bent[:2], bent, bent]), sizes[1:], Resampling(nb_points=2)).to_list()
    assert [line.tolist() for line in two] == [bent[:2], bent[::2], bent[::2]]
    five = resample_others(
        Streamlines.from_list([[[0, 0, 0]] * 4, bent, bent]), sizes[[0, 1, 3]], Resampling(nb_points=4)
    )
    # 6 + 3 * 6 mm and 6 + 2 * 6 mm, in three steps each
    torch.testing.assert_close(
        five.points[4:],
        torch.tensor(
            [[0, 0, 0], [6, 2 / 3, 0], [6, 10 / 3, 0], [6, 6, 0], [0, 0, 0], [6, 0, 0], [6, 3, 0], [6, 6, 0.0]]
        ),
    )
    assert resample_others(lines, sizes, Resampling(step_size=1.0)) is lines


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
        ({"step_size": 1.0, "step_rule": "up"}, "^step_rule: expected one of nearest, dwi_ml, received 'up'.$"),
        ({"nb_points": 1}, "^nb_points: .* at least 2. Received: 1$"),
        ({"nb_points": 2.5}, "^nb_points: expected a whole number of at most 1000000. Received: 2.5$"),
        ({"nb_points": 1_000_001}, "^nb_points: expected a whole number of at most 1000000. Received: 1000001$"),
        ({"compress": 0.0}, "^compress: .* above 0 mm. Received: 0.0$"),
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


@pytest.mark.parametrize(("rule", "steps"), [("nearest", [1, 1, 2, 2, 4]), ("dwi_ml", [1, 1, 1, 2, 3])])
def test_the_number_of_steps_is_the_nearest_or_of_the_points_the_quotient_rounded_up(rule, steps):
    assert steps_for(np.array([0.2, 1.2, 1.75, 2.25, 3.75]), 1.0, rule).tolist() == steps
