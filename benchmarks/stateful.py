"""Streamlines as a stateful loader holds them, for the baselines: one by one, in lists and in dipy's tractograms.

As in dwi_ml, each subject's streamlines pass through a StatefulTractogram, and all points of a subject are interpolated
together, at eight gathered corners. As favourable as that way allows: volumes and the open file are kept, and the
tractogram's bounding box is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from dipy.io.stateful_tractogram import Origin, Space, StatefulTractogram
from torch import Tensor

from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume

__all__ = ["FEATURES", "StatefulData", "write_file"]

FEATURES = 45


def write_file(path: Path, *, num_subjects: int, num_streamlines: int, side: int) -> None:
    """Random volumes of FEATURES features, and smooth streamlines of 80 to 160 points, half a voxel apart."""
    rng = np.random.default_rng(0)
    names = [f"subject{number}" for number in range(num_subjects)]
    with new_dataset(path, training=names, groups_config={}, date="benchmark") as file:
        for name in names:
            subject = file.create_group(name)
            volume = rng.standard_normal((side, side, side, FEATURES), dtype=np.float32)
            write_volume(subject, "input", volume, np.eye(4))
            lengths = rng.integers(80, 160, num_streamlines)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            time_ = (np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths))[:, None] * 0.5 / (side / 3)
            phase = np.repeat(rng.uniform(0, 6.28, (num_streamlines, 3)), lengths, axis=0)
            points = side / 2 + side / 3 * np.sin(time_ + phase) / np.sqrt(1.5)
            write_streamlines(subject, "streamlines", points, offsets, affine=np.eye(4), dimensions=(side, side, side))


class StatefulData:
    """The training subjects of a file that `write_file` wrote.

    Args:
        path: the file.
        lazily: whether streamlines are read from the file each time; volumes are in memory.
        placed_at: where in its voxel a value holds: 0.0 at the lower corner, as in dwi_ml, 0.5 in the centre.
    """

    def __init__(self, path: Path, *, lazily: bool, placed_at: float) -> None:
        file: Any = h5py.File(path)
        subjects = [file[name] for name in file.attrs["training_subjs"]]
        groups = [subject["streamlines"] for subject in subjects]
        self._offsets = [group["offsets"][()] for group in groups]
        self._lengths = [group["lengths"][()] for group in groups]
        self._points = [group["data"] if lazily else group["data"][()] for group in groups]
        self._volumes = [torch.from_numpy(subject["input"]["data"][()]) for subject in subjects]
        self._header = (np.eye(4), self._volumes[0].shape[:3], np.ones(3), "RAS")
        self._placed_at = placed_at

    def load(
        self, ids: np.ndarray, augment: Callable[[StatefulTractogram], StatefulTractogram] | None = None
    ) -> Iterator[tuple[np.ndarray, list[Tensor], list[Tensor]]]:
        """By subject: which ids are its, their streamlines, and its volume at all of their points but the last."""
        num_each = len(self._offsets[0])
        for subject in np.unique(ids // num_each):
            chosen = ids[ids // num_each == subject]
            starts, lengths = (of_each[subject][chosen % num_each] for of_each in (self._offsets, self._lengths))
            points = self._points[subject]
            arrays = [points[start : start + length] for start, length in zip(starts, lengths, strict=True)]
            tractogram = StatefulTractogram(arrays, self._header, Space.VOX, origin=Origin.TRACKVIS)
            if augment is not None:
                tractogram = augment(tractogram)
            tractogram.to_vox()
            tractogram.to_corner()
            lines = [torch.as_tensor(line) for line in tractogram.streamlines]
            values = self._interpolate(self._volumes[subject], torch.cat([line[:-1] for line in lines]))
            yield chosen, lines, list(values.split([len(line) - 1 for line in lines]))

    def _interpolate(self, volume: Tensor, points: Tensor) -> Tensor:
        """Eight gathered corners, weighted and summed."""
        points = points - self._placed_at
        lower = points.floor()
        fraction, lower = points - lower, lower.long()
        last = torch.tensor(volume.shape[:3]) - 1
        corners = torch.tensor([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        index = torch.minimum((lower[:, None] + corners).clamp(min=0), last)
        values = volume[index[..., 0], index[..., 1], index[..., 2]]  # (P, 8, F)
        weights = torch.where(corners.bool(), fraction[:, None], 1 - fraction[:, None]).prod(dim=2)
        return (values * weights[..., None]).sum(dim=1)
