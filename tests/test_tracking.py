"""Tracking in fields whose lines have a closed form, and at all that can end a line."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from tracking_cases import FieldModel, SteeredModel, positions, tracked_lines

from dwiml_func.core.rng import Key
from dwiml_func.data.neighborhood import Neighborhood
from dwiml_func.models import Learn2Track
from dwiml_func.models.direction_getters import CosineRegression, SphereClassification
from dwiml_func.tracking import TrackingMask, TrackingSpace, TrackingSpec, init_track_state, track, track_step
from dwiml_func.tracking.processes import track_in_processes
from dwiml_func.tracking.state import with_lines
from dwiml_func.tracking.step import next_steps
from dwiml_func.tracking.track import check_tracking

ALONG_X = FieldModel(lambda p: torch.tensor([1.0, 0, 0]).expand(len(p), 3))
AXIS_X = SteeredModel(lambda p: torch.tensor([1.0, 0, 0]).expand(len(p), 3))


def circle(p):
    """Counterclockwise around (20, 20), any z."""
    return torch.stack([20 - p[:, 1], p[:, 0] - 20, torch.zeros(len(p))], dim=1)


def test_a_constant_field_gives_a_straight_line_to_the_border():
    (line,) = tracked_lines([3.25, 4.5, 4.5], ALONG_X, positions(10, 9, 9), track_forward_only=True).values()
    expected = torch.tensor([[3.25 + i, 4.5, 4.5] for i in range(7)])
    assert torch.equal(line, expected)


def test_both_halves_make_one_line_through_the_seed():
    (line,) = tracked_lines([3.25, 4.5, 4.5], AXIS_X, positions(10, 9, 9)).values()
    assert torch.equal(line, torch.tensor([[9.25 - i, 4.5, 4.5] for i in range(10)]))


def test_forward_only_leaves_out_the_second_half():
    (line,) = tracked_lines([3.25, 4.5, 4.5], AXIS_X, positions(10, 9, 9), track_forward_only=True).values()
    assert line[:, 0].tolist() == [3.25 + i for i in range(7)]


@pytest.mark.parametrize("radius", [5.0, 12.0])
def test_steps_along_a_circle_drift_outwards_as_those_of_euler_do(radius):
    # A step of length h along the tangent takes the squared radius from r² to r² + h², exactly.
    (line,) = tracked_lines(
        [20 + radius, 20, 4.5],
        FieldModel(circle),
        positions(40, 40, 9),
        step_size=0.5,
        track_forward_only=True,
        max_length=40,
    ).values()
    squares = (line[:, :2].double() - 20).square().sum(dim=1)
    assert len(line) == 81
    np.testing.assert_allclose(squares, radius**2 + 0.25 * np.arange(81), rtol=1e-5)


def test_the_drift_from_a_helix_shrinks_with_the_step():
    radius, pitch = 8.0, 0.3  # mm, and the rise per mm around the axis

    def helix(p):
        around = circle(p)
        return around + torch.tensor([0, 0, pitch]) * torch.linalg.vector_norm(around, dim=1, keepdim=True)

    drifts = []
    for step in (1.0, 0.5, 0.25, 0.125):
        (line,) = tracked_lines(
            [20 + radius, 20, 1.0],
            FieldModel(helix),
            positions(40, 40, 40),
            step_size=step,
            max_length=30,
            track_forward_only=True,
        ).values()
        travelled = 30 / math.sqrt(1 + pitch**2)  # mm around the axis
        angle = travelled / radius
        end = np.array([20 + radius * math.cos(angle), 20 + radius * math.sin(angle), 1 + pitch * travelled])
        assert len(line) == round(30 / step) + 1
        drifts.append(np.linalg.norm(line[-1].numpy() - end))
    ratios = np.array(drifts[:-1]) / drifts[1:]
    assert ((ratios > 1.8) & (ratios < 2.2)).all()  # Euler's method is of first order
    assert drifts[-1] < 30 * 0.125 / radius  # the length times the step over the radius


def test_steps_have_their_length_in_mm_whatever_the_shape_of_voxels():
    sizes = (1.0, 2.0, 4.0)
    diagonal = SteeredModel(lambda p: torch.tensor([1.0, 1.0, 1.0]).expand(len(p), 3))  # mm, as no cubes
    (line,) = tracked_lines([10.5, 10.5, 10.5], diagonal, positions(21, 21, 21, voxel_sizes=sizes)).values()
    steps = line.double().diff(dim=0)
    np.testing.assert_allclose((steps * torch.tensor(sizes)).norm(dim=1), 1, rtol=1e-5)
    in_mm = steps * torch.tensor(sizes)
    assert (in_mm.amax(dim=1) - in_mm.amin(dim=1)).abs().max() < 1e-5  # the model's direction


def test_angles_are_those_in_mm():
    # (1, 0, 0) and (1, 1, 0) in mm make 45 degrees; in voxels of 1 x 4 mm it would be atan(1 / 4), 14 degrees.
    def bend(p):
        return torch.where(p[:, :1] < 5, torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 1.0, 0]))

    space = positions(20, 40, 9, voxel_sizes=(1.0, 4.0, 1.0))
    ends = {}
    for theta in (40, 50):
        (line,) = tracked_lines(
            [2.5, 4.5, 4.5], FieldModel(bend), space, theta=theta, track_forward_only=True, max_length=12
        ).values()
        ends[theta] = len(line)
    assert ends == {40: 4, 50: 13}


def test_at_180_degrees_no_rounding_ends_a_line_that_turns_back():
    direction = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    for theta, is_valid in ((180, True), (179, False)):
        spec = TrackingSpec(step_size=1.0, theta=theta)
        assert (next_steps(direction, -0.7 * direction, positions(9, 9, 9), spec)[1] == is_valid).all()


@pytest.mark.parametrize("forward_only", [True, False])
@pytest.mark.parametrize("step", [1.0, 0.3])
def test_the_longest_line_has_max_length_in_mm_in_one_half_or_two(forward_only, step):
    options = {"step_size": step, "max_length": 12.0, "track_forward_only": forward_only}
    seeds = [[20.5 + i, 4.5, 4.5] for i in range(5)] + [[98.5, 4.5, 4.5]]  # the last meets the border first
    lines = tracked_lines(seeds, AXIS_X, positions(100, 9, 9), **options)
    lengths = [float(line.diff(dim=0).norm(dim=1).sum()) for line in lines.values()]
    np.testing.assert_allclose(lengths[:5], 12, rtol=1e-5)
    np.testing.assert_allclose(
        lengths[5], 1.5 if forward_only and step == 0.3 else 1 if forward_only else 12, atol=0.31
    )


def test_lines_below_min_length_in_mm_are_left_out():
    seeds = [[9.5 - i, 4.5, 4.5] for i in range(5)]  # 0, 1, 2, 3, 4 mm to the border
    lines = tracked_lines(seeds, ALONG_X, positions(10, 9, 9), track_forward_only=True, min_length=3)
    assert sorted(lines) == [3, 4]


def test_a_line_without_a_step_is_none():
    assert tracked_lines([9.5, 4.5, 4.5], ALONG_X, positions(10, 9, 9)) == {}


@pytest.mark.parametrize("discard", [False, True])
def test_the_last_point_outside_the_mask_is_kept_or_not(discard):
    mask = torch.zeros(10, 9, 9)
    mask[2:6] = 1
    space = positions(10, 9, 9, mask=TrackingMask(values=mask))
    (line,) = tracked_lines([3.5, 4.5, 4.5], AXIS_X, space, discard_last_point=discard).values()
    inside = [5.5, 4.5, 3.5, 2.5]
    assert line[:, 0].tolist() == (inside if discard else [6.5, *inside, 1.5])


def test_a_mask_is_read_at_the_nearest_voxel_or_between_the_centres():
    mask = torch.zeros(10, 9, 9)
    mask[:5] = 1  # nearest: up to 5.0; trilinear: 0.5 is reached at 5.0 too, from 1 at 4.5 to 0 at 5.5
    mask[5] = 0.8  # nearest: up to 6.0; trilinear: 0.5 at 5.5 + 0.3 / 0.8
    ends = {}
    for interpolation in ("nearest", "trilinear", "trilinear-corner"):
        space = positions(10, 9, 9, mask=TrackingMask(values=mask, interpolation=interpolation))
        (line,) = tracked_lines(
            [2.0, 4.5, 4.5], ALONG_X, space, step_size=0.01, track_forward_only=True, discard_last_point=True
        ).values()
        ends[interpolation] = float(line[-1, 0])
    assert ends == pytest.approx({"nearest": 6.0, "trilinear": 5.875, "trilinear-corner": 5.375}, abs=0.02)
    assert TrackingMask(values=mask).interpolation == "nearest"


@pytest.mark.parametrize(("value", "allowed"), [(0.5, True), (0.499, False), (1.0, True), (2.0, True)])
def test_a_line_stays_where_the_mask_is_at_least_a_half(value, allowed):
    space = positions(3, 3, 3, mask=TrackingMask(values=torch.full((3, 3, 3), value)))
    assert space.allows(torch.tensor([[1.5, 1.5, 1.5]])).tolist() == [allowed]


def test_a_mask_of_one_voxel_holds_lines_of_its_size():
    mask = torch.zeros(9, 9, 9)
    mask[4, 4, 4] = 1
    space = positions(9, 9, 9, mask=TrackingMask(values=mask))
    (line,) = tracked_lines([4.5, 4.5, 4.5], AXIS_X, space, step_size=0.2, discard_last_point=True).values()
    assert line[:, 0].min() >= 4
    assert line[:, 0].max() < 5
    assert len(line) == 5  # 4.1, 4.3, 4.5, 4.7, 4.9


def test_seeds_on_the_border_track_inwards_and_those_beyond_are_refused():
    space = positions(10, 9, 9)
    (line,) = tracked_lines([0.0, 0.0, 0.0], ALONG_X, space, track_forward_only=True).values()
    assert line[:, 0].tolist() == [float(i) for i in range(10)]
    for seed in ([10.0, 4, 4], [-0.01, 4, 4], [float("nan"), 4, 4]):
        with pytest.raises(ValueError, match=r"seeds in the volume of 10 x 9 x 9 voxels.* Received: 1 of 2 outside"):
            tracked_lines([[1.0, 1, 1], seed], ALONG_X, space)


def test_a_model_that_is_not_a_number_ends_the_line_and_no_point_is_nan():
    def breaks(p):
        return torch.where(p[:, :1] > 5, torch.nan, torch.tensor([1.0, 0, 0]))

    lines = tracked_lines([[2.5, 4.5, 4.5], [7.5, 4.5, 4.5]], FieldModel(breaks), positions(10, 9, 9))
    assert list(lines) == [0]
    assert lines[0][:, 0].tolist() == [5.5, 4.5, 3.5, 2.5]  # the second half starts backwards: a turn of 180 degrees


def test_a_direction_without_length_ends_the_line():
    assert tracked_lines([2.5, 4.5, 4.5], FieldModel(lambda p: 0 * p), positions(10, 9, 9)) == {}


@pytest.mark.parametrize(("stop", "num_points"), [(None, 4), ("max", 4), (0.5, 4), (0.9, 6), (1.0, 8)])
def test_a_line_ends_where_its_model_says(stop, num_points):
    # The logit of the end: 0 from x = 3 on, which is a probability of 0.5 and not above it, 1 from 5 on, 3 from 7 on.
    def field(p):
        eos = (p[:, :1] > 3) * 3.0 + (p[:, :1] > 5) * 1.0 + (p[:, :1] > 7) * 2.0 - 3.0
        return torch.cat([torch.tensor([1.0, 0, 0]).expand(len(p), 3), eos], dim=1)

    model = FieldModel(field, add_eos=True)
    options = {"track_forward_only": True, "eos_stop": stop}
    (line,) = tracked_lines([2.5, 4.5, 4.5], model, positions(10, 9, 9), **options).values()
    assert len(line) == num_points  # the point at which it ends is the last


@pytest.mark.parametrize(("stop", "is_ended"), [("max", True), (None, False), (0.4, True)])
def test_of_classes_the_end_may_be_the_likeliest_without_a_probability_of_a_half(stop, is_ended):
    getter = SphereClassification(1, sphere="repulsion100", add_eos=True)
    ahead = int(getter.directions(torch.eye(101)[:100]).select(1, 0).argmax())

    def field(p):
        logits = torch.zeros(len(p), 101)
        logits[:, ahead], logits[:, ahead - 1] = 9.0, 8.99
        logits[:, 100] = torch.where(p[:, 0] > 5, 9.5, 0.0)  # a probability of 0.45 there
        return logits

    model = FieldModel(field)
    model.direction_getter = getter
    options = {"track_forward_only": True, "eos_stop": stop}
    (line,) = tracked_lines([2.5, 4.5, 4.5], model, positions(10, 9, 9), **options).values()
    assert (float(line[-1, 0]) < 6.5) == is_ended


def test_an_end_at_the_seed_gives_no_line():
    model = FieldModel(lambda p: torch.tensor([1.0, 0, 0, 9]).expand(len(p), 4), add_eos=True)
    assert tracked_lines([2.5, 4.5, 4.5], model, positions(10, 9, 9)) == {}


def test_the_second_half_starts_with_the_memory_of_the_first_turned_round():
    # The direction is that of the count of points read since the line's start, so it tells what the model has seen.
    class Counting(FieldModel):
        def run_step(self, inputs, dirs, state=None):
            _, state = super().run_step(inputs, dirs, state)
            up = state["count"][:, None] * 0.01
            return torch.cat([torch.ones_like(up), up, torch.zeros_like(up)], dim=1), state

    space = positions(9, 9, 9)
    model, spec = Counting(circle), TrackingSpec(step_size=1, min_length=0, theta=180, max_length=8)
    (tracked,) = track(torch.tensor([[4.5, 4.5, 4.5]]), model=model, space=space, spec=spec, key=Key(1), num_rows=16)
    line = tracked.streamlines.points.double()
    slopes = line.diff(dim=0)[:, 1] / line.diff(dim=0)[:, 0]
    # Read at 5 points forwards (4 steps, the fifth leaves the volume), then again at the 4 that are no seed, then on.
    assert len(line) == 9
    np.testing.assert_allclose(slopes[:4].flip(0), [0.01, 0.02, 0.03, 0.04], rtol=1e-3)
    np.testing.assert_allclose(slopes[4:], [0.05, 0.06, 0.07, 0.08], rtol=1e-3)


def test_the_second_half_starts_without_the_previous_directions_of_the_first():
    class Seeing(SteeredModel):
        nb_previous_dirs, seen = 2, []

        def run_step(self, inputs, dirs, state=None):
            self.seen.append(dirs[0].tolist())
            return super().run_step(inputs, dirs[:, :3], state)

    tracked_lines([3.25, 4.5, 4.5], Seeing(AXIS_X.field), positions(10, 9, 9), num_rows=4)
    (none, ahead, back), seen = ([0, 0, 0], [1, 0, 0], [-1, 0, 0]), Seeing.seen[1:]  # after that of the first state
    assert seen[:3] == [none + none, ahead + none, ahead + ahead]
    assert seen[6:10] == [ahead + ahead, none + none, back + none, back + back]  # turned after seven points


def test_a_model_may_remember_nothing():
    class Forgetful(SteeredModel):
        def run_step(self, inputs, dirs, state=None):
            assert state is None
            return super().run_step(inputs, dirs)[0], None

    model, space = Forgetful(AXIS_X.field), positions(10, 9, 9)
    (line,), (expected,) = (tracked_lines([3.25, 4.5, 4.5], each, space).values() for each in (model, AXIS_X))
    assert torch.equal(line, expected)


def test_a_step_leaves_the_state_before_it_as_it_was():
    space, spec = positions(9, 9, 9), TrackingSpec(step_size=1)
    state = init_track_state(AXIS_X, space, spec, key=Key(1), num_rows=4)
    started = with_lines(state, torch.tensor([1]), torch.tensor([7]), torch.tensor([[4.5, 4.5, 4.5]]))
    before = started.points.clone()
    after = track_step(started, model=AXIS_X, space=space, spec=spec)
    assert not state.points.any()
    assert torch.equal(started.points, before)
    assert after.num_points.tolist() == [0, 2, 0, 0]
    again = track_step(started, model=AXIS_X, space=space, spec=spec)
    assert torch.equal(after.points, again.points)


@pytest.mark.parametrize("size", [0.0, -1.0, math.inf, math.nan])
def test_a_voxel_without_a_size_along_any_axis_is_refused(size):
    with pytest.raises(ValueError, match="Expected voxel sizes above 0 mm"):
        positions(3, 3, 3, voxel_sizes=(1.0, size, 1.0))


def test_nothing_to_track_gives_nothing():
    assert tracked_lines(torch.zeros(0, 3), ALONG_X, positions(9, 9, 9)) == {}


def test_what_cannot_track_is_refused():
    space = TrackingSpace(volume=torch.zeros(4, 4, 4, 6), voxel_sizes=(1.0, 1.0, 1.0))
    model = Learn2Track(6, rnn_layer_sizes=(4,))
    with pytest.raises(ValueError, match="a model in evaluation mode"):
        tracked_lines([1.0, 1, 1], model, space)
    model.eval()
    with pytest.raises(ValueError, match=r"prob requires a direction getter with a distribution.*cosine-regression"):
        tracked_lines([1.0, 1, 1], model, space, algo="prob")
    with pytest.raises(ValueError, match="eos_stop: requires a model that learned where streamlines end"):
        tracked_lines([1.0, 1, 1], model, space, eos_stop=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0}, "step_size: expected a finite number above 0"),
        ({"algo": "best"}, "algo: expected one of det, prob, received 'best'"),
        ({"max_length": 5}, "max_length: expected at least min_length, 10.0 mm, received 5"),
        ({"max_length": 0.5, "min_length": 0}, "max_length: expected at least a step, 1.0 mm, received 0.5"),
        ({"max_length": math.nan}, "max_length: expected a finite number above 0"),
        ({"min_length": -1}, "min_length: expected a finite number at least 0"),
        ({"min_length": math.nan}, "min_length: expected a finite number at least 0"),
        ({"theta": 0}, "theta: expected a finite number above 0"),
        ({"eos_stop": -0.5}, "eos_stop: expected a finite number at least 0"),
        ({"eos_stop": 1.5}, "eos_stop: expected a probability from 0 to 1, received 1.5"),
        ({"eos_stop": "often"}, "eos_stop: expected a probability or max, received 'often'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        TrackingSpec(**{"step_size": 1.0, **options})


def test_the_defaults_of_tracking():
    assert TrackingSpec(step_size=1.0) == TrackingSpec(
        step_size=1.0, algo="det", track_forward_only=False, min_length=10.0, max_length=300.0, theta=90.0,
        eos_stop=None, discard_last_point=False,
    )  # fmt: skip


@pytest.mark.parametrize(("step", "mm"), [(0.1, 0.7), (0.3, 2.1), (0.2, 0.6), (0.1, 1.1), (0.5, 3.0)])
def test_lengths_that_are_whole_steps_but_for_rounding_are_whole_steps(step, mm):
    """0.7 / 0.1 is below 7, and 1.1 / 0.1 above 11."""
    spec = TrackingSpec(step_size=step, min_length=mm, max_length=mm)
    assert (spec.min_steps, spec.max_steps) == (round(mm / step), round(mm / step))
    shorter = TrackingSpec(step_size=step, min_length=mm + 0.001 * step, max_length=mm + 0.999 * step)
    assert (shorter.min_steps, shorter.max_steps) == (round(mm / step) + 1, round(mm / step))


class RecordingGetter(CosineRegression):
    """Samples the outputs themselves, and keeps the random numbers that it gets."""

    is_probabilistic = True

    def __init__(self):
        super().__init__(1)
        self.seen = []

    def sample_from(self, outputs, uniforms):
        self.seen.append(uniforms[0])  # of the line in the first row
        return outputs


def test_each_question_of_a_line_has_random_numbers_of_its_own():
    """Also the end of its first half and the seed, where the second half starts: as many points are known there."""
    model = SteeredModel(lambda p: torch.tensor([1.0, 0, 0]).expand(len(p), 3))
    model.direction_getter = getter = RecordingGetter()
    (line,) = tracked_lines([3.25, 4.5, 4.5], model, positions(10, 9, 9), algo="prob", num_rows=4).values()
    assert len(line) == 10
    assert len(torch.stack(getter.seen).unique(dim=0)) == 9 + 2  # a question for each step, and one at each end


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 2, 3)])
def test_seeds_of_another_shape_are_refused(shape):
    spec = TrackingSpec(step_size=1.0)
    with pytest.raises(ValueError, match=r"Expected seeds of shape \(N, 3\)"):
        list(track(torch.ones(shape), model=ALONG_X, space=positions(10, 9, 9), spec=spec, key=Key(5)))


def test_lines_are_as_long_as_the_model_reads_and_no_longer():
    spec, model = TrackingSpec(step_size=1.0, min_length=0.0, max_length=8.0), cast(Any, FieldModel(circle))
    model.max_len = 8  # the last of nine points is not read
    check_tracking(torch.full((1, 3), 4.5), model, positions(9, 9, 9), spec)
    model.max_len = 7
    with pytest.raises(ValueError, match="max_length: the model reads lines of at most 7 points"):
        check_tracking(torch.full((1, 3), 4.5), model, positions(9, 9, 9), spec)


def test_one_process_keeps_the_numbers_of_the_seeds():
    options = {"model": ALONG_X, "space": positions(10, 9, 9), "spec": TrackingSpec(step_size=1.0, min_length=0.0)}
    seeds = torch.tensor([[1.5, 2, 2], [2.5, 2, 2]])
    for num_processes in (1, 4):  # nor do others start for few seeds: they could not have this model, of a lambda
        where = {"key": Key(5), "numbers": torch.tensor([7, 9]), "num_processes": num_processes}
        (tracked,) = track_in_processes(seeds, **where, **options)
        assert tracked.seeds.tolist() == [7, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"volume": torch.zeros(4, 4, 4)}, r"a volume of shape \(X, Y, Z, F\). Received: \(4, 4, 4\)"),
        (
            {"mask": TrackingMask(values=torch.ones(4, 4, 5))},
            r"a tracking mask of \(4, 4, 4\) voxels, as the volume. Received: \(4, 4, 5\)",
        ),
        *(({"voxel_sizes": (1.0, size, 1.0)}, "voxel sizes above 0 mm") for size in (0.0, -1.0, float("inf"))),
        ({"voxel_sizes": (1.0, 2.0, 1.0), "neighborhood": Neighborhood(type="axes")}, "needs cubic voxels"),
    ],
)
def test_what_is_no_space_is_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"volume": torch.zeros(4, 4, 4, 6), "voxel_sizes": (1.0, 1.0, 1.0)}
    TrackingSpace(**given, mask=TrackingMask(values=torch.ones(4, 4, 4)), neighborhood=Neighborhood(type="axes"))
    with pytest.raises(ValueError, match=message):
        TrackingSpace(**(given | options))
