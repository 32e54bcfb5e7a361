"""Three ways to ask how well a model tracks, and the scores of each.

*continue*: the first 6 mm of each held-out streamline are given. *free*: seeds anywhere in a mask, followed both ways.
*core*: seeds within half a voxel of points of the held-out streamlines, followed both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dwiml_func.core.rng import Key, Stream, fold_in
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.streamlines import Streamlines, join_streamlines, offsets_of, scale_streamlines
from dwiml_func.tracking.distances import lags
from dwiml_func.tracking.random_numbers import uniforms
from dwiml_func.tracking.scores import LineScores, ReferenceBundle, score_lines
from dwiml_func.tracking.seeds import seeds_in_mask
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import StepModel
from dwiml_func.tracking.track import track
from dwiml_func.tracking.window_lag import continue_lines

__all__ = [
    "DRIFT_MM",
    "LAG_MM",
    "Protocol",
    "ProtocolLines",
    "ProtocolScores",
    "Tracker",
    "ask_tracker",
    "score_protocols",
    "track_protocols",
]

Protocol = Literal["continue", "free", "core"]
"""What a model is given; see the module."""

LAG_MM = (10.0, 20.0, 40.0, 80.0)
"""Ways from the start at which the lag is printed."""

DRIFT_MM = tuple(float(way) for way in range(0, 81, 2))
"""Ways from the start at which the lag is measured."""

GIVEN_MM = 6.0
NUM_FREE, NUM_CORE = 1000, 500
_CORE = 0xC0E  # of the tracking stream's random numbers


class ProtocolScores(NamedTuple):
    """Shares of the streamlines that are not shorter than `min_length`.

    num_started: seeds, or held-out streamlines.
    num_streamlines: how many of them gave such a streamline.
    valid: join both ends of a bundle and run along it, see `score_lines`; of *continue* those of their own bundle.
    both_ends: join both ends.
    lag_mm: only of *continue*: mean distance in mm from the real streamline after 10, 20, 40 and 80 mm.

    Example:
        >>> ProtocolScores._fields
        ('num_started', 'num_streamlines', 'valid', 'both_ends', 'lag_mm')
    """

    num_started: int
    num_streamlines: int
    valid: float
    both_ends: float
    lag_mm: tuple[float, ...] | None


class ProtocolLines(NamedTuple):
    """What a model tracked by a protocol.

    num_started: seeds, or held-out streamlines.
    lines: S streamlines in mm from the corner of the grid, those not shorter than `min_length`.
    found: what became of each of them; the rows of its bundles are those of the references.
    drift_mm: only of *continue*: mean distance in mm from the real streamline after 0, 2, ..., 80 mm; NaN where no real
        one is so long.

    Example:
        >>> ProtocolLines._fields
        ('num_started', 'lines', 'found', 'drift_mm')
    """

    num_started: int
    lines: Streamlines
    found: LineScores
    drift_mm: tuple[float, ...] | None

    @property
    def scores(self) -> ProtocolScores:
        """The shares of what became of the lines."""
        num = len(self.lines)
        valid, both_ends = (int(kind.sum()) / num if num else 0.0 for kind in (self.found.valid, self.found.both_ends))
        lag = None if self.drift_mm is None else tuple(self.drift_mm[DRIFT_MM.index(way)] for way in LAG_MM)
        return ProtocolScores(self.num_started, num, valid, both_ends, lag)


class Tracker(NamedTuple):
    """Who tracks, in voxel space, corner origin.

    ahead: what is added to each given line within so many mm, from its last point on.
    from_seeds: the streamlines both ways from seeds (S, 3), in the order of these, without those that are too short.
    """

    ahead: Callable[[Streamlines, float], Streamlines]
    from_seeds: Callable[[Tensor], Streamlines]


def score_protocols(
    model: StepModel,
    real: Streamlines,
    bundles: Bundles,
    references: Sequence[ReferenceBundle],
    **where: Any,
) -> dict[Protocol, ProtocolScores]:
    """Track by the three protocols, and score what comes.

    Args:
        model, real, bundles, references: as of `track_protocols`.
        where: space, spec, seeding_mask and key, as of it too.

    Returns:
        The scores by protocol.

    Example:
        >>> score_protocols(model, real, bundles, references, **where)["free"].valid  # doctest: +SKIP
        0.31
    """
    tracked = track_protocols(model, real, bundles, references, **where)
    return {protocol: lines.scores for protocol, lines in tracked.items()}


def track_protocols(
    model: StepModel,
    real: Streamlines,
    bundles: Bundles,
    references: Sequence[ReferenceBundle],
    *,
    space: TrackingSpace,
    spec: TrackingSpec,
    seeding_mask: Tensor | None,
    key: Key,
) -> dict[Protocol, ProtocolLines]:
    """Track by the three protocols, and tell what became of each line.

    Args:
        model: the model, in evaluation mode.
        real: the held-out streamlines of one subject, voxel space, corner origin, sampled as for the model.
        bundles: of which bundle each is.
        references: their bundles, in mm; see `reference_bundles`.
        space: the subject's volume.
        spec: the options; `track_forward_only` does not count, nor `min_length` for *continue*.
        seeding_mask: (X, Y, Z), for *free*; None leaves it out.
        key: of the seeds.

    Returns:
        The lines by protocol; *free* and *core* in the order of their seeds, *continue* in that of `real`.

    Example:
        >>> track_protocols(model, real, bundles, references, **where)["core"].num_started  # doctest: +SKIP
        500
    """
    both_ways = replace(spec, track_forward_only=False)

    def ahead(given: Streamlines, distance: float) -> Streamlines:
        if (max_len := getattr(model, "max_len", None)) is not None:  # a transformer reads the given points too
            distance = min(distance, max(max_len - int(given.lengths.max()), 1) * spec.step_size)
        return continue_lines(given, model=model, space=space, spec=spec, distance=distance)

    def from_seeds(seeds: Tensor) -> Streamlines:
        parts = track(seeds, model=model, space=space, spec=both_ways, key=key)
        return join_streamlines([part.streamlines for part in parts])

    return ask_tracker(
        Tracker(ahead, from_seeds),
        real,
        bundles,
        references,
        space=space,
        max_length=spec.max_length,
        seeding_mask=seeding_mask,
        key=key,
    )


def ask_tracker(
    tracker: Tracker,
    real: Streamlines,
    bundles: Bundles,
    references: Sequence[ReferenceBundle],
    *,
    space: TrackingSpace,
    max_length: float,
    seeding_mask: Tensor | None,
    key: Key,
) -> dict[Protocol, ProtocolLines]:
    """`track_protocols` for whoever tracks, a program of others too; lines continue for `max_length` mm at most."""
    sizes = torch.tensor(space.voxel_sizes)
    names = [reference.name for reference in references]
    expected = np.array([names.index(bundles.names[number]) for number in bundles.ids])
    given, ahead = _split(real, sizes, GIVEN_MM)
    added = tracker.ahead(given, max_length)
    lag = lags(scale_streamlines(added, sizes), scale_streamlines(ahead, sizes), DRIFT_MM)
    with np.errstate(invalid="ignore"):
        drift = np.nansum(lag, axis=0) / np.isfinite(lag).sum(axis=0)
    whole = scale_streamlines(_joined(given, added), sizes)
    found = score_lines(whole, references, expected=expected)
    tracked: dict[Protocol, ProtocolLines] = {"continue": ProtocolLines(len(real), whole, found, tuple(drift.tolist()))}
    seeds: dict[Protocol, Tensor] = {}
    if seeding_mask is not None:
        seeds["free"] = seeds_in_mask(seeding_mask, nt=NUM_FREE, key=key)
    seeds["core"] = _seeds_near(real.points, space, key)
    for protocol, where in seeds.items():
        lines = scale_streamlines(tracker.from_seeds(where), sizes)
        tracked[protocol] = ProtocolLines(len(where), lines, score_lines(lines, references), None)
    return tracked


def _seeds_near(points: Tensor, space: TrackingSpace, key: Key) -> Tensor:
    """Seeds (500, 3) within half a voxel, along each axis, of points (P, 3), and within the volume."""
    number = torch.arange(NUM_CORE)
    random = uniforms(fold_in(key, Stream.TRACK, _CORE), number, torch.zeros_like(number))
    chosen = points[(random[:, 3] * len(points)).long().clamp(max=len(points) - 1)]
    most = torch.tensor(space.volume.shape[:3]) - 1e-3
    return torch.minimum((chosen + random[:, :3] - 0.5).clamp(min=0), most).float()


def _split(lines: Streamlines, sizes: Tensor, distance: float) -> tuple[Streamlines, Streamlines]:
    """The points of each line up to a way in mm from its start, at least two; and the rest, from the last of those."""
    steps = torch.linalg.vector_norm((lines.points * sizes).double().diff(dim=0, prepend=lines.points[:1]), dim=1)
    steps[lines.offsets[:-1]] = 0
    travelled = steps.cumsum(0)
    line = torch.arange(len(lines)).repeat_interleave(lines.lengths)
    place = torch.arange(len(lines.points)) - lines.offsets[line]
    way = travelled - travelled[lines.offsets[:-1]][line]
    is_given = (way <= distance + 1e-3) | (place < 2)
    num_given = torch.zeros(len(lines), dtype=torch.int64).index_add(0, line, is_given.long())
    is_ahead = place >= (num_given - 1)[line]
    return (
        Streamlines(lines.points[is_given], offsets_of(num_given)),
        Streamlines(lines.points[is_ahead], offsets_of(lines.lengths - num_given + 1)),
    )


def _joined(given: Streamlines, added: Streamlines) -> Streamlines:
    """Lines and what was added from their last points on."""
    lengths = given.lengths + added.lengths - 1
    offsets = offsets_of(lengths)
    line = torch.arange(len(given)).repeat_interleave(lengths)
    place = torch.arange(int(offsets[-1])) - offsets[line]
    is_added = place >= given.lengths[line]
    rows = torch.where(is_added, added.offsets[line] + place - given.lengths[line] + 1, given.offsets[line] + place)
    both = torch.cat([given.points, added.points])
    return Streamlines(both[rows + len(given.points) * is_added], offsets)
