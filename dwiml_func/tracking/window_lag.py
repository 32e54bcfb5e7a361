"""Window lag: a model reads a piece of a real streamline and continues it; how far it comes from the real one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func.core.rng import Key, numpy_rng
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.resampling import Resampling, resample_streamlines, travelled_mm
from dwiml_func.data.streamlines import Streamlines, offsets_of, pieces, scale_streamlines
from dwiml_func.tracking.distances import lags
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec
from dwiml_func.tracking.state import StepModel, TrackState, init_track_state
from dwiml_func.tracking.step import reads_at_once, track_step, with_first_halves_read

__all__ = ["AHEAD_MM", "EVERY_MM", "LagWindows", "choose_windows", "continue_lines", "even_step", "window_lags"]

EVERY_MM = 30.0
"""mm between two cuts of a streamline."""

AHEAD_MM = 20.0
"""mm that a model goes alone."""

READ_MM = 60.0
_MOST_LINES = 512  # of a dataset, from which windows are taken
_LOOK_EVERY = 16  # steps: on a GPU each look at what still grows waits for the device
_MOST_WINDOWS = 128  # the mean lag of so many is known to about a third of a mm


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LagWindows:
    """Pieces of real streamlines, each cut at a point: what is read, and what follows.

    Args:
        read: W pieces in voxel space, corner origin, up to the cut; the model reads them in this order.
        ahead: the W rests in mm, from the cut on, of at least 20 mm.
        subject: (W,) int64, rows of the dataset's subjects, ascending.
        voxel_sizes: (W, 3) mm.
        step_size: mm, that of the streamlines.

    Example:
        >>> LagWindows.__slots__
        ('read', 'ahead', 'subject', 'voxel_sizes', 'step_size')
    """

    read: Streamlines
    ahead: Streamlines
    subject: Tensor
    voxel_sizes: Tensor
    step_size: float

    def __len__(self) -> int:
        return len(self.read)


def choose_windows(
    dataset: StreamlineDataset,
    *,
    key: Key,
    resampling: Resampling | None = None,
    share: float = 0.25,
    max_points: int | None = None,
) -> LagWindows | None:
    """Choose windows of a dataset's streamlines: cuts at every 30 mm, both ways round, 60 mm at most before each.

    Args:
        dataset: real streamlines.
        key: of the choice.
        resampling: how the streamlines are sampled before, as for the model; None: as they are.
        share: of the windows that are chosen, at random, 128 at most, of at most 512 streamlines.

        max_points: points that the model can read, those of the 20 mm included; None for any number.

    Returns:
        The windows; None where the streamlines have no even steps, or none is long enough.

    Example:
        >>> from pathlib import Path
        >>> from dwiml_func.data import DatasetIndex
        >>> dataset = StreamlineDataset(
        ...     path=Path("a.hdf5"),
        ...     subset="validation",
        ...     index=DatasetIndex(("anna",), np.array([1])),
        ...     volumes=(torch.zeros(90, 4, 4, 28),),
        ...     streamlines=Streamlines.from_list([[[x, 2, 2] for x in range(81)]]),
        ...     voxel_sizes=torch.ones(1, 3),
        ...     input_attributes={},
        ... )
        >>> windows = choose_windows(dataset, key=Key(0), share=1.0)
        >>> windows.read.lengths.tolist(), windows.ahead.lengths.tolist()
        ([31, 61, 31, 61], [51, 21, 51, 21])
    """
    rng = numpy_rng(key)
    ids = np.sort(rng.permutation(dataset.index.num_total)[:_MOST_LINES])
    subject = dataset.index.subject_of(ids)
    sizes = dataset.voxel_sizes[torch.from_numpy(subject)]
    lines = resample_streamlines(dataset.streamlines.select(ids), sizes, resampling or Resampling())
    step = even_step(lines, sizes)
    if step is None:
        return None
    num_read = round(READ_MM / step)  # points before the cut
    if max_points is not None:
        num_read = min(num_read, max_points - math.ceil(AHEAD_MM / step - 1e-6))
    if num_read < 1:
        return None
    lines = _both_ways(lines)
    sizes, subject = sizes.repeat(2, 1), np.tile(subject, 2)
    line, cut = _cuts(lines, sizes)
    chosen = np.sort(rng.permutation(len(line))[: min(_MOST_WINDOWS, math.ceil(share * len(line)))])
    chosen = chosen[np.argsort(subject[line[chosen]], kind="stable")]
    if len(chosen) == 0:
        return None
    line, cut = line[chosen], cut[chosen]
    starts, ends = lines.offsets[line], lines.offsets[line + 1]
    sizes, cuts = sizes[torch.from_numpy(line)], torch.from_numpy(cut)
    first = torch.maximum(starts, cuts - num_read)
    return LagWindows(
        read=pieces(lines.points, first, cuts + 1 - first),
        ahead=scale_streamlines(pieces(lines.points, cuts, ends - cuts), sizes),
        subject=torch.from_numpy(subject[line]),
        voxel_sizes=sizes,
        step_size=step,
    )


def window_lags(model: StepModel, windows: LagWindows, space_of: Callable[[int], TrackingSpace]) -> NDArray[np.float64]:
    """Let a model read each window, go 20 mm alone, and measure how far it is from the real streamline.

    Args:
        model: the model, in evaluation mode.
        windows: W windows.
        space_of: gives the space of a subject by its row; its mask is not read.

    Returns:
        (W,) float64, mm; see `lags`.

    Example:
        >>> from dwiml_func.models import Learn2Track
        >>> line = Streamlines.from_list([[[x, 2, 2] for x in range(30)]])
        >>> windows = LagWindows(
        ...     read=line, ahead=line, subject=torch.tensor([0]), voxel_sizes=torch.ones(1, 3), step_size=1.0
        ... )
        >>> space = TrackingSpace(volume=torch.zeros(90, 4, 4, 28), voxel_sizes=(1.0, 1.0, 1.0))
        >>> window_lags(Learn2Track(28).eval(), windows, lambda row: space).shape
        (1,)
    """
    found = []
    for row in windows.subject.unique().tolist():
        of_subject = (windows.subject == row).nonzero()[:, 0]
        spec = TrackingSpec(step_size=windows.step_size, theta=180.0, min_length=0.0)
        space = replace(space_of(row), mask=None)
        lines = continue_lines(windows.read.select(of_subject), model=model, space=space, spec=spec, distance=AHEAD_MM)
        in_mm = scale_streamlines(lines, torch.tensor(space.voxel_sizes))
        found.append(lags(in_mm, windows.ahead.select(of_subject), (AHEAD_MM,))[:, 0])
    return np.concatenate(found)


def continue_lines(
    given: Streamlines, *, model: StepModel, space: TrackingSpace, spec: TrackingSpec, distance: float
) -> Streamlines:
    """Let a model read lines, and continue from their last points for a distance in the direction in which they run.

    Args:
        given: L lines of one point or more, voxel space, corner origin, sampled as for the model.
        model: the model, in evaluation mode.
        space: where it tracks.
        spec: the options; its lengths do not count.
        distance: mm, at most.

    Returns:
        What the model added, L lines from the last points of `given` on, voxel space, on the CPU; a line that ended at
        once has that point alone.

    Example:
        >>> from dwiml_func.models import Learn2Track
        >>> space = TrackingSpace(volume=torch.zeros(9, 9, 9, 28), voxel_sizes=(2.0, 2.0, 2.0))
        >>> given = Streamlines.from_list([[[4, 4, 3], [4, 4, 3.5]]])
        >>> spec = TrackingSpec(step_size=1, theta=180)
        >>> continue_lines(given, model=Learn2Track(28).eval(), space=space, spec=spec, distance=3).lengths.tolist()
        [4]
    """
    num_ahead = math.ceil(distance / spec.step_size - 1e-6)
    longest = int(given.lengths.max())
    num_steps = longest - 1 + num_ahead
    spec = replace(spec, min_length=0.0, max_length=(longest + num_steps) * spec.step_size)
    state = _given_lines(init_track_state(model, space, spec, key=Key(0), num_rows=len(given)), given)
    if reads_at_once(model, space):
        state, num_steps = with_first_halves_read(state, state.is_replay, model, space), num_ahead
    for number in range(num_steps):
        if number % _LOOK_EVERY == 0 and not state.is_live.any():
            break
        state = track_step(state, model=model, space=space, spec=spec, donate=True)
    lengths = given.lengths.to(state.points.device)
    num_added = (state.num_points - lengths).clamp(max=num_ahead)
    places = torch.arange(num_ahead + 1, device=lengths.device)
    column = (lengths[:, None] - 1 + places).clamp(max=state.points.shape[1] - 1)
    column[:, 0] = 0  # the last given point: lines start there and hold the given ones behind it
    points = state.points.gather(1, column[..., None].expand(-1, -1, 3))
    is_there = places <= num_added[:, None]
    return Streamlines(points[is_there].cpu(), offsets_of((num_added + 1).cpu()))


def _given_lines(state: TrackState, given: Streamlines) -> TrackState:
    """Lines whose first halves are the given ones, turned round: the model reads them from their ends to the seeds."""
    device = state.points.device
    lengths = given.lengths
    line = torch.arange(len(given)).repeat_interleave(lengths)
    column = (lengths - 1)[line] - (torch.arange(len(given.points)) - given.offsets[line])
    points = state.points.clone()
    points[line.to(device), column.to(device)] = given.points.to(device)
    lengths = lengths.to(device)
    return replace(
        state,
        points=points,
        num_points=lengths,
        turn=lengths,
        cursor=lengths - 1,
        position=given.points[given.offsets[:-1]].to(device),
        line=torch.arange(len(given), device=device),
        is_live=torch.ones_like(state.is_live),
    )


def even_step(lines: Streamlines, voxel_sizes: Tensor) -> float | None:
    """The step in mm of streamlines that are cut evenly; None where steps differ by more than a fifth."""
    steps = torch.linalg.vector_norm(scale_streamlines(lines, voxel_sizes).points.double().diff(dim=0), dim=1)
    inside = torch.ones(max(0, len(lines.points) - 1), dtype=torch.bool)
    inside[lines.offsets[1:-1] - 1] = False
    steps = steps[inside]
    if len(steps) == 0:
        return None
    step = float(steps.median())
    is_even = step > 0 and float((steps - step).abs().quantile(0.95)) <= 0.2 * step
    return step if is_even else None


def _both_ways(lines: Streamlines) -> Streamlines:
    """The lines, then the same ones turned round."""
    offsets = offsets_of(lines.lengths.repeat(2))
    flipped = lines.points.flip(0)  # the last line first
    last_first = Streamlines(flipped, offsets_of(lines.lengths.flip(0)))
    turned = last_first.select(torch.arange(len(lines) - 1, -1, -1))
    return Streamlines(torch.cat([lines.points, turned.points]), offsets)


def _cuts(lines: Streamlines, voxel_sizes: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The lines, and the points, nearest to every 30 mm that have 20 mm after them."""
    offsets = lines.offsets.numpy()
    points = scale_streamlines(lines, voxel_sizes).points.double().numpy()
    travelled = travelled_mm(points, offsets)
    lengths = travelled[offsets[1:] - 1] - travelled[offsets[:-1]]
    num_cuts = np.maximum(0, np.floor((lengths - AHEAD_MM) / EVERY_MM + 1e-6)).astype(np.int64)
    line = np.repeat(np.arange(len(lines)), num_cuts)
    number = np.arange(len(line)) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)
    target = travelled[offsets[line]] + EVERY_MM * (number + 1)
    after = np.searchsorted(travelled, target)  # 20 mm and more before the line's end
    cut = after - (target - travelled[after - 1] < travelled[after] - target)
    has_rest = travelled[offsets[line + 1] - 1] - travelled[cut] >= AHEAD_MM - 1e-6
    return line[has_rest], cut[has_rest]
