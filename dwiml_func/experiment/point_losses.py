"""A model's loss at each point of a subject's streamlines, and what it predicts there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func.data.dataset import DatasetIndex, StreamlineDataset
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.layout import read_resampling
from dwiml_func.data.hdf5.problems import open_hdf5, raise_first
from dwiml_func.data.loader import BatchRequest, load_batch
from dwiml_func.data.neighborhood import direction_units
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.streamlines import Streamlines, directions, offsets_of
from dwiml_func.experiment.batches import check_usable, loader_spec
from dwiml_func.experiment.model_store import LoadedModel

__all__ = ["PointLosses", "displacement", "of_one_subject", "point_losses", "resampling_of"]


class PointLosses(NamedTuple):
    """Of S streamlines, at their N points that have a loss: with EOS all points, else all but the last.

    lines: the N points, voxel space, corner origin, sampled as for the model.
    loss: (N,) float32.
    predicted: (N, 3) float32, voxel space, one step from each point in the direction that the model predicts; as long
        in mm as the step to the next real point.
    eos: (N,) float32, the probability that the point is the last; None of a model without EOS.
    is_last: (N,) bool.
    """

    lines: Streamlines
    loss: NDArray[np.float32]
    predicted: NDArray[np.float32]
    eos: NDArray[np.float32] | None
    is_last: NDArray[np.bool_]

    @property
    def by_streamline(self) -> NDArray[np.float64]:
        """(S,) the mean loss of each streamline."""
        starts = self.lines.offsets.numpy()[:-1]
        return np.add.reduceat(self.loss.astype(np.float64), starts) / self.lines.lengths.numpy()

    @property
    def eos_error(self) -> NDArray[np.float32] | None:
        """(N,) the distance of the probability of EOS from 1 at last points, from 0 at others."""
        return None if self.eos is None else np.abs(self.eos - self.is_last)

    def select(self, ids: NDArray[np.int64]) -> PointLosses:
        """The same of some streamlines, in the order asked for."""
        rows = _rows(self.lines, ids)
        return PointLosses(
            self.lines.select(ids),
            self.loss[rows],
            self.predicted[rows],
            None if self.eos is None else self.eos[rows],
            self.is_last[rows],
        )


def of_one_subject(
    path: str, subject: str, *, volume: Tensor, grid: Grid, lines: Streamlines, resampling: Resampling
) -> StreamlineDataset:
    """A dataset of one subject alone, as batches are made from."""
    sizes = torch.from_numpy(np.linalg.norm(grid.affine[:3, :3], axis=0)).float()[None]
    return StreamlineDataset(
        path=Path(path),
        subset="one",
        index=DatasetIndex((subject,), np.array([len(lines)])),
        volumes=(volume,),
        streamlines=lines,
        voxel_sizes=sizes,
        input_attributes={},
        resampling=resampling,
    )


def resampling_of(path: str) -> Resampling:
    """How the streamlines of a dataset were sampled when it was made."""
    with open_hdf5(Path(path)) as file:
        return raise_first(read_resampling(file), path)


def point_losses(model: LoadedModel, dataset: StreamlineDataset, *, batch_size: int = 100) -> PointLosses:
    """Run a model on all streamlines of a dataset of one subject, sampled as for its training, in their order.

    `batch_size` streamlines run at a time; it affects only the rounding. ValueError where the model cannot use the
    dataset, or where a loss is not finite.
    """
    check_usable(dataset, model.config)
    spec, units = loader_spec(model.config), direction_units(dataset.voxel_sizes)[0]
    module, getter = model.tracker, model.tracker.direction_getter
    parts: list[Sequence[Tensor]] = []
    for ids in np.array_split(np.arange(dataset.index.num_total), -(-dataset.index.num_total // batch_size)):
        batch = load_batch(BatchRequest(ids, None, 0, 0), dataset=dataset, spec=spec)
        ahead = directions(batch.points, batch.offsets)
        with torch.no_grad():
            outputs = module(batch)
            loss = getter.losses(outputs, batch.at_inputs(ahead), batch.is_last)
            eos = getter.eos_probability(outputs) if getter.add_eos else torch.empty(0)
            predicted = getter.directions(outputs)
        lengths = batch.input_offsets.diff()
        is_last = torch.zeros(len(loss), dtype=torch.bool) if batch.is_last is None else batch.is_last
        step = torch.linalg.vector_norm(batch.at_inputs(ahead), dim=1)
        step = torch.where(is_last, step.roll(1), step)
        predicted = torch.nn.functional.normalize(predicted.float(), dim=1) * step[:, None]
        points = batch.points[_rows_with_loss(batch.offsets, with_last=batch.has_last_points)]
        parts.append((points / units, (points + predicted) / units, loss, eos, is_last, lengths))
    points, predicted, loss, eos, is_last, lengths = (torch.cat(list(each)) for each in zip(*parts, strict=True))
    num_bad = int((~loss.isfinite()).sum())
    if num_bad:
        raise ValueError(f"Expected losses that are finite. Received: {num_bad} of {len(loss)} that are not.")
    return PointLosses(
        Streamlines(points, offsets_of(lengths)),
        loss.float().numpy(),
        predicted.numpy(),
        eos.float().numpy() if getter.add_eos else None,
        is_last.numpy(),
    )


def displacement(losses: PointLosses) -> Streamlines:
    """Zigzags: at each point of a streamline one step in the predicted direction and back; 3 points for each."""
    points = losses.lines.points.repeat_interleave(3, dim=0)
    points[1::3] = torch.from_numpy(losses.predicted)
    return Streamlines(points, 3 * losses.lines.offsets)


def _rows_with_loss(offsets: Tensor, *, with_last: bool) -> Tensor:
    is_kept = torch.ones(int(offsets[-1]), dtype=torch.bool)
    is_kept[offsets[1:] - 1] = with_last
    return is_kept.nonzero()[:, 0]


def _rows(lines: Streamlines, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    lengths = lines.lengths.numpy()[ids]
    shift = lines.offsets.numpy()[ids] - (np.cumsum(lengths) - lengths)
    return np.arange(lengths.sum()) + np.repeat(shift, lengths)
