"""Claims about the three protocols of tracking, on a bundle of straight lines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dwiml_func.cli._summary import format_tracking
from dwiml_func.core.rng import Key
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.tracking.evaluation import ORACLE, TrackingEvaluation
from dwiml_func.tracking.baselines import KeepStraight, PrincipalDirection
from dwiml_func.tracking.protocols import ProtocolScores, _seeds_near, _split, score_protocols, track_protocols
from dwiml_func.tracking.scores import reference_bundles
from dwiml_func.tracking.space import TrackingMask, TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec

SIZES = (2.0, 2.5, 1.5)
LINES = [[[x / 2, 4 + 0.2 * y, 4.0] for x in range(4, 77)] for y in range(6)]  # 36 voxels, 72 mm, of steps of 1 mm
BUNDLES = Bundles(("straight",), np.zeros(6, dtype=np.int64))
SPEC = TrackingSpec(step_size=1.0)


class AlongX(KeepStraight):
    """Knows the bundle's direction at a seed too."""

    def run_step(self, inputs: Any, dirs: Any, state: Any = None, /) -> tuple[Any, Any]:
        ahead = torch.tensor([1.0, 0.0, 0.0]).expand(len(dirs), 3)
        return torch.where((dirs[:, :1] < 0), -ahead, ahead), ()


def scores(model: Any, *, mask: torch.Tensor | None = None, spec: TrackingSpec = SPEC) -> dict[Any, ProtocolScores]:
    return score_protocols(model, **where(mask, spec))


def where(mask: torch.Tensor | None, spec: TrackingSpec) -> Any:
    real = Streamlines.from_list(LINES)
    inside = torch.zeros(40, 10, 10)
    inside[2:38, 3:6, 3:6] = 1
    space = TrackingSpace(
        volume=torch.zeros(40, 10, 10, 28),
        voxel_sizes=SIZES,
        mask=TrackingMask(values=inside if mask is None else mask),
    )
    references = reference_bundles(Streamlines(real.points * torch.tensor(SIZES), real.offsets), BUNDLES)
    what = {"real": real, "bundles": BUNDLES, "references": references}
    return {**what, "space": space, "spec": spec, "seeding_mask": inside, "key": Key(1)}


def test_who_knows_the_way_is_valid_and_does_not_lag() -> None:
    found = scores(AlongX())
    assert list(found) == ["continue", "free", "core"]
    assert (found["continue"].num_started, found["free"].num_started, found["core"].num_started) == (6, 1000, 500)
    assert found["continue"].valid == found["core"].both_ends == 1.0
    assert found["free"].num_streamlines == 1000
    lag = found["continue"].lag_mm
    assert lag is not None
    assert max(lag[:3]) < 1e-3
    assert np.isnan(lag[3])  # no line has 80 mm after its first 6
    assert found["core"].valid > found["free"].valid  # from a corner of the mask a line runs beside the bundle
    assert found["free"].both_ends > 0.9


def test_keeping_straight_needs_a_start() -> None:
    found = scores(KeepStraight())
    assert found["continue"].valid == 1.0
    assert (found["free"].num_streamlines, found["free"].valid, found["core"].valid) == (0, 0.0, 0.0)


def test_no_line_is_longer_than_what_a_transformer_reads() -> None:
    model: Any = AlongX()
    model.max_len = 30
    found = track_protocols(model, **where(None, replace(SPEC, max_length=30.0)))
    assert {protocol: int(lines.lines.lengths.max()) for protocol, lines in found.items()} == {
        "continue": 30, "free": 31, "core": 31,  # the seed itself, and 30 steps: what is read ends a point before
    }  # fmt: skip


def test_stopping_early_wins_nothing() -> None:
    """Within half of the mask nothing joins the ends, and the lag grows with the way that was not gone."""
    half = torch.zeros(40, 10, 10)
    half[2:20] = 1
    found = scores(AlongX(), mask=half)
    lag = found["continue"].lag_mm
    assert found["continue"].valid == 0.0
    assert lag is not None
    assert lag[0] < 1e-3
    assert lag[2] == pytest.approx(10.0, abs=1.1)  # 30 mm to the edge and the point behind it, of 40


def test_short_lines_are_no_streamlines() -> None:
    few = scores(AlongX(), spec=replace(SPEC, min_length=200.0, max_length=300.0))
    assert (few["free"].num_streamlines, few["free"].valid) == (0, 0.0)
    assert few["continue"].num_streamlines == 6  # where no length is asked for


def test_a_line_that_was_continued_is_of_its_own_bundle_alone_and_seeds_are_followed_both_ways() -> None:
    what = where(None, replace(SPEC, track_forward_only=True)) | {"seeding_mask": None}
    lines = what["real"].to_list() + [line + 3 for line in what["real"].to_list()]
    names = ("none of it", "straight", "beside")
    every = Streamlines.from_list([line.numpy() * SIZES for line in lines])
    what["references"] = reference_bundles(every, Bundles(names, np.repeat([1, 2], 6)))
    for row, valid in ((1, 1.0), (2, 0.0)):
        found = track_protocols(AlongX(), **what | {"bundles": Bundles(names, np.full(6, row))})
        assert list(found) == ["continue", "core"]  # without a mask no free seeds
        assert found["continue"].found.bundle.tolist() == [row - 1] * 6
        assert found["continue"].scores.valid == valid
        assert found["continue"].found.wrong_connection.all() == (row == 2)
        assert found["core"].scores.both_ends == 1.0


def test_core_seeds_lie_within_half_a_voxel_of_points_and_in_the_volume() -> None:
    points = torch.tensor([[2.0, 5.0, 8.0], [30.0, 0.2, 9.9]])
    space = TrackingSpace(volume=torch.zeros(40, 10, 10, 1), voxel_sizes=SIZES)
    seeds = _seeds_near(points, space, Key(1))
    of_first = seeds[:, 0] < 16
    assert 200 < of_first.sum() < 300  # of 500, each point as often
    away = seeds[of_first] - points[0]
    assert away.abs().max() <= 0.5
    assert (away.amin(dim=0) < -0.45).all()
    assert (away.amax(dim=0) > 0.45).all()
    assert space.contains(seeds).all()
    assert not torch.equal(_seeds_near(points, space, Key(2)), seeds)


def test_what_is_given_is_6_mm_and_two_points_at_least() -> None:
    lines = Streamlines.from_list(
        [
            [[x, 0, 0] for x in range(6)],  # steps of 2 mm: up to 6 mm
            [[0, y, 0] for y in range(6)],  # of 2.5 mm: up to 5 mm
            [[0, 0, 0], [0, 0, 20], [0, 0, 40]],  # of 30 mm
            [[1, 1, 1]],
        ]
    )
    given, ahead = _split(lines, torch.tensor(SIZES), 6.0)
    assert given.lengths.tolist() == [4, 3, 2, 1]
    assert ahead.lengths.tolist() == [3, 4, 2, 1]  # from the last given point on
    for line, first, rest in zip(lines.to_list(), given.to_list(), ahead.to_list(), strict=True):
        assert torch.equal(torch.cat([first, rest[1:]]), line)
        assert torch.equal(first[-1], rest[0])


def test_the_principal_direction_is_that_of_the_baseline_on_the_side_of_the_line() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 28, generator=generator) * 0.02
    inputs[:, 0] = 1.5  # the mean of the signal
    tracker = PrincipalDirection({"sh_order": 6})
    at_seed, _ = tracker.run_step(inputs, torch.zeros(20, 3))
    torch.testing.assert_close(at_seed.norm(dim=1), torch.ones(20))
    dirs = -at_seed + 0.1 * torch.randn(20, 3, generator=generator)
    turned, _ = tracker.run_step(inputs, dirs)
    torch.testing.assert_close(turned, -at_seed)
    scale = torch.linspace(0.5, 2.0, 28)
    by_subject = {"sh_order": 6, "standardization_std": torch.stack([scale, torch.ones(28)]).numpy()}
    of_first, _ = PrincipalDirection(by_subject).run_step(inputs / scale, torch.zeros(20, 3))
    torch.testing.assert_close((of_first * at_seed).sum(dim=1).abs(), torch.ones(20))


def test_the_summary_says_all_shares_beside_the_ceiling() -> None:
    model = {
        "continue": ProtocolScores(6, 6, 0.5, 0.75, (1.0, 2.0, 3.0, float("nan"))),
        "core": ProtocolScores(9, 8, 0.25, 0.5, None),
    }
    text = format_tracking(
        TrackingEvaluation(
            subject="anna", subset="validation", step_size=2.0, has_mask=False, scores={"model": model, ORACLE: model},  # pyright: ignore[reportArgumentType]
            ceiling_valid=0.84, ceiling_both_ends=0.88,
        )
    )  # fmt: skip
    assert "validation subject anna, steps of 2 mm" in text
    assert "0.50 (0.75)" in text
    assert "  oracle               0.50 (0.75)      0.25 (0.50)  follows the nearest real direction\n" in text
    assert "0.84 (0.88)" in text
    assert "after 10, 20, 40 mm: 1.0, 2.0, 3.0 mm" in text  # no real streamline is 80 mm longer
    assert "free" not in text
