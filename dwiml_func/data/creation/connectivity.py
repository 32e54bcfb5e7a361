"""The connectivity matrix that belongs to a group of streamlines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import one_line
from dwiml_func.data.creation.config import StreamlineGroup
from dwiml_func.data.creation.files import GroupFiles
from dwiml_func.data.creation.volumes import load_labels
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.consistency import matrix_fault

if TYPE_CHECKING:
    import h5py

__all__ = ["Connectivity", "load_connectivity", "read_connectivity", "write_connectivity"]


class Connectivity(NamedTuple):
    """Which regions streamlines connect: (N, N) bool; regions are blocs along each axis, or (X, Y, Z) labels."""

    matrix: NDArray[np.bool_]
    blocs: tuple[int, int, int] | None = None
    labels: NDArray[np.int64] | None = None


def load_connectivity(group: StreamlineGroup, found: GroupFiles, expected: Grid | None) -> Connectivity | None:
    """Read a group's connectivity matrix; None where the config asks for none, or files that may be missing are."""
    source = found.matrix
    if source is None or (group.connectivity_labels is not None and found.labels is None):
        return None
    try:
        with source.path.open("rb") as file:
            values = np.load(file, allow_pickle=False)
            if file.read(1):
                raise ValueError("the file continues after the values that its header promises")
    except Exception as error:  # numpy raises of many kinds about corrupt files
        raise ValueError(f"{source}: cannot be read as a matrix in .npy ({one_line(error)})") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise ValueError(f"{source}: expected a matrix of numbers in .npy")
    if not np.isfinite(values).all():
        raise ValueError(f"{source}: the matrix holds NaN or infinite values. Expected finite values only")
    blocs = group.connectivity_nb_blocs
    labels = None if found.labels is None else load_labels(found.labels, expected)
    fault = matrix_fault(values.shape, blocs, labels)
    if fault is not None:
        raise ValueError(f"{source}: {fault}")
    return Connectivity(values > 0, blocs, labels)


def write_connectivity(group: h5py.Group, connectivity: Connectivity) -> None:
    """Write the connectivity beside the streamlines it belongs to, in dwi_ml's layout."""
    group.create_dataset("connectivity_matrix", data=connectivity.matrix)
    group.attrs["connectivity_matrix_type"] = "from_blocs" if connectivity.labels is None else "from_labels"
    if connectivity.blocs is not None:
        group.attrs["connectivity_nb_blocs"] = connectivity.blocs
    if connectivity.labels is not None:
        group.create_dataset("connectivity_label_volume", data=connectivity.labels)


def read_connectivity(group: h5py.Group) -> Connectivity | None:
    """The connectivity of a streamline group whose matrix fits, see `hdf5.consistency`; None where it has none."""
    if "connectivity_matrix" not in group:
        return None
    data: Any = group
    matrix = np.asarray(data["connectivity_matrix"][()]) > 0
    if "connectivity_label_volume" in group:
        labels = np.asarray(data["connectivity_label_volume"][()]).astype(np.int64)
        return Connectivity(_with_all_labels(matrix, np.unique(labels)), labels=labels)
    if "connectivity_nb_blocs" not in group.attrs:
        return None
    x, y, z = np.broadcast_to(np.asarray(group.attrs["connectivity_nb_blocs"]).ravel(), 3).tolist()
    return Connectivity(matrix, blocs=(x, y, z))


def _with_all_labels(matrix: NDArray[np.bool_], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """A row for each of the ascending labels, of a matrix that fits them, see `matrix_fault`."""
    if len(matrix) == len(labels):
        return matrix
    is_region = labels > 0
    rows = np.arange(len(matrix)) if is_region.sum() == len(matrix) else labels[is_region] - 1
    whole = np.zeros((len(labels), len(labels)), dtype=bool)
    whole[np.ix_(is_region, is_region)] = matrix[np.ix_(rows, rows)]
    return whole
