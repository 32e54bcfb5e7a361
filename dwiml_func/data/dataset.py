"""A dataset as a value: each subject's input volume, and the streamlines of all subjects in one flat set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dwiml_func._checks import pluralize, truncated_repr
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.streamlines import Streamlines

__all__ = ["DatasetIndex", "StreamlineDataset", "StreamlineSource", "VolumeSource"]


class VolumeSource(Protocol):
    """Volumes by row of the subject, read from a file when they are asked for."""

    @property
    def num_features(self) -> int:
        """F, known without reading a volume."""
        ...

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(X, Y, Z, F) of each volume, known too."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, row: int, /) -> Tensor: ...


class StreamlineSource(Protocol):
    """Streamlines by id: a flat set in memory, or a source that reads them from a file when they are asked for."""

    def __len__(self) -> int: ...

    @property
    def points(self) -> Tensor:
        """(P, 3) float32, of all streamlines."""
        ...

    @property
    def offsets(self) -> Tensor:
        """(S + 1,) int64."""
        ...

    @property
    def lengths(self) -> Tensor:
        """(S,) int64, points a streamline."""
        ...

    def to_list(self) -> list[Tensor]:
        """One tensor a streamline."""
        ...

    def select(self, ids: Tensor | ArrayLike) -> Streamlines:
        """Gather streamlines, in the order asked for."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DatasetIndex:
    """Who owns which streamline: all that an epoch's plan needs to know of a dataset.

    Streamline ids count through the subjects in their order: the first subject has 0 to num_streamlines[0] - 1.

    Args:
        subjects: names, in the dataset's order.
        num_streamlines: (num_subjects,) int64, streamlines of each subject.
        lengths_mm: (num_total,) float64, each streamline's length in mm; None where it is not known.

    Example:
        >>> index = DatasetIndex(("subj0", "subj1"), np.array([3, 2]))
        >>> index.num_total, index.subject_of(np.array([4, 0, 2]))
        (5, array([1, 0, 0]))
    """

    subjects: tuple[str, ...]
    num_streamlines: NDArray[np.int64]
    lengths_mm: NDArray[np.float64] | None = None

    def __repr__(self) -> str:
        lengths = "no lengths in mm" if self.lengths_mm is None else "lengths in mm"
        size = f"{pluralize(len(self.subjects), 'subject')}, {pluralize(self.num_total, 'streamline')}"
        return f"<DatasetIndex: {size}, {lengths}>"

    @property
    def num_total(self) -> int:
        """Streamlines of all subjects together."""
        return int(self.num_streamlines.sum())

    def subject_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find the owner of each streamline.

        Args:
            ids: (S,) int64, each 0 <= id < num_total.

        Returns:
            (S,) int64, rows of `subjects`.

        Example:
            >>> DatasetIndex(("a", "empty", "b"), np.array([1, 0, 1])).subject_of(np.array([0, 1]))
            array([0, 2])
        """
        return np.searchsorted(np.cumsum(self.num_streamlines), ids, side="right")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamlineDataset:
    """One subset (training, validation or testing) of a dataset. It can be pickled, so sent to workers.

    Args:
        path: the file it was read from.
        subset: "training", "validation" or "testing".
        index: subjects and their numbers of streamlines; no subjects where the file lists none for the subset.
        volumes: one (X, Y, Z, F) float32 tensor a subject, the input volume. F is the same for all. A tuple in memory,
            or `dwiml_func.data.hdf5.lazy.LazyVolumes`.
        streamlines: of all subjects, in the index's order; voxel space, corner origin. `Streamlines` in memory, or
            `dwiml_func.data.hdf5.lazy.LazyStreamlines`.
        voxel_sizes: (num_subjects, 3) float32, mm.
        affine: (4, 4) float64, of the first subject's volume, from voxel centres to RAS mm; the axes of all point
            alike. None where it is not known.
        input_attributes: attributes of the first subject's input group, as plain Python values or numpy arrays. Where
            subjects were standardised by different values, standardization_mean and standardization_std are arrays
            (num_subjects, 1 or F).
        resampling: how the streamlines were sampled when the file was made.
        bundles: the bundle of each streamline; None where not every subject of the file has them.
        linked: other files from which values come: targets of external links, sources of virtual datasets.

    Example:
        >>> import torch
        >>> dataset = StreamlineDataset(
        ...     path=Path("phantom.hdf5"),
        ...     subset="training",
        ...     index=DatasetIndex(("subj0",), np.array([1])),
        ...     volumes=(torch.zeros(4, 4, 4, 28),),
        ...     streamlines=Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]]),
        ...     voxel_sizes=torch.ones(1, 3),
        ...     input_attributes={"type": "volume"},
        ... )
        >>> dataset.num_features
        28
    """

    path: Path
    subset: str
    index: DatasetIndex
    volumes: tuple[Tensor, ...] | VolumeSource
    streamlines: StreamlineSource
    voxel_sizes: Tensor
    input_attributes: dict[str, object]
    resampling: Resampling = field(default_factory=Resampling)
    bundles: Bundles | None = None
    affine: NDArray[np.float64] | None = None
    linked: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        size = f"{pluralize(len(self.index.subjects), 'subject')}, {pluralize(self.index.num_total, 'streamline')}"
        size += f", {pluralize(self.num_features, 'feature')}"
        where = "in memory" if isinstance(self.volumes, tuple) else "lazy"
        return f"<StreamlineDataset {truncated_repr(self.path.name)} {self.subset}: {size}, {where}>"

    @property
    def num_features(self) -> int:
        """F, features a voxel; 0 without subjects."""
        if isinstance(self.volumes, tuple):
            return self.volumes[0].shape[3] if self.volumes else 0
        return self.volumes.num_features

    @property
    def volume_shapes(self) -> list[tuple[int, ...]]:
        """(X, Y, Z, F) of each subject's volume, without reading one."""
        if isinstance(self.volumes, tuple):
            return [tuple(volume.shape) for volume in self.volumes]
        return list(self.volumes.shapes)
