"""The streamlines of one subject, with the grid on which they lie and the bundles that they are of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dwiml_func.data.bundles import Bundles
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.grid import streamline_grid, voxel_sizes_of
from dwiml_func.data.hdf5.layout import group_of, named_subject, per_streamline, read_bundles, read_points, read_table
from dwiml_func.data.hdf5.problems import open_hdf5, raise_first
from dwiml_func.data.streamlines import Streamlines, offsets_of

__all__ = ["SubjectStreamlines", "read_subject_streamlines"]


class SubjectStreamlines(NamedTuple):
    """A subject's streamlines in voxel space, corner origin; bundles are None where the file does not say them.

    Tables are data per streamline by name, (S, K).
    """

    streamlines: Streamlines
    grid: Grid
    voxel_sizes: tuple[float, float, float]
    bundles: Bundles | None
    tables: dict[str, NDArray]


def read_subject_streamlines(
    path: str | os.PathLike[str], subject: str, group_name: str = "streamlines"
) -> SubjectStreamlines:
    """Read a group of streamlines of one subject, of whichever subset.

    Raises FileNotFoundError or ValueError, as `open_dataset`; also where there is no such subject, or no streamline.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        group = raise_first(group_of(named_subject(file, subject), group_name, "streamlines"), path)
        grid = raise_first(streamline_grid(group), path)
        x, y, z = raise_first(voxel_sizes_of(group, grid), path).tolist()
        table = raise_first(read_table(group), path)
        if len(table.lengths) == 0:
            raise ValueError(f"{path}: subject {subject!r}, group {group_name!r}: no streamlines.")
        bundles = raise_first(read_bundles(group, len(table.lengths)), path)
        tables = {name: np.asarray(values) for name, values in per_streamline(group).items()}
        points = torch.from_numpy(np.ascontiguousarray(raise_first(read_points(group, table), path)))
    return SubjectStreamlines(
        Streamlines(points, offsets_of(torch.from_numpy(table.lengths))), grid, (x, y, z), bundles, tables
    )
