"""Parts of `dwiml-func connectivity`: the check of its options, and its files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import one_line
from dwiml_func.cli._output import check_new_file, folders_above
from dwiml_func.data.grid import Grid
from dwiml_func.data.tractogram_writers import check_name
from dwiml_func.experiment.figures.plots import check_format
from dwiml_func.files.atomic import atomic_file, atomic_write
from dwiml_func.tracking.connectivity import regions_of_blocs

__all__ = ["bloc_image", "check_options", "names_of", "read_matrix", "write_labels", "write_nifti"]

_MOST_REGIONS = 20_000  # a matrix of 3.2 GB


def check_options(options: Any) -> None:
    """Check what needs no file's content."""
    given = options.paths
    files = [path for path in (*given[:1], options.labels, options.reference, options.real) if path is not None]
    for path in files:
        if not Path(path).is_file():
            raise FileNotFoundError(f"The file does not exist: {path}.")
    of_matrix = len(given) == 1 and given[0].endswith(".npy")
    if of_matrix and options.real is not None and not options.nb_blocs and options.labels is None:
        return
    if of_matrix:
        raise ValueError("real: requires one matrix, and nothing else. Give MATRIX.npy --real REAL.npy.")
    if len(given) != 2 or not given[1].endswith(".npy"):
        received = " ".join(given) or "nothing"
        raise ValueError(f"Expected TRACTOGRAM and OUT.npy, or MATRIX.npy and --real. Received: {received}.")
    if bool(options.nb_blocs) == (options.labels is not None):
        raise ValueError("Expected regions: --nb-blocs or --labels. Received both or none. Give one of them.")
    if options.nb_blocs and (len(options.nb_blocs) not in (1, 3) or min(options.nb_blocs) < 1):
        raise ValueError(f"nb_blocs: expected one number or three, each at least 1. Received: {options.nb_blocs}.")
    if options.nb_blocs and (num := math.prod(options.blocs)) > _MOST_REGIONS:
        raise ValueError(f"nb_blocs: expected at most {_MOST_REGIONS} blocs in all. Received: {num}.")
    for name, needs in (("hide_background", "labels"), ("reference", "nb_blocs"), ("save_blocs", "nb_blocs")):
        if getattr(options, name) is not None and not getattr(options, needs):
            raise ValueError(f"{name}: requires --{needs.replace('_', '-')}. Leave it out.")
    if options.use_longest_segment and options.labels is None:
        raise ValueError("use_longest_segment: requires --labels. Leave it out.")
    if options.figure is not None:
        check_format(options.figure)
    if options.save_rejected is not None and options.hide_background is None:
        raise ValueError("save_rejected: requires --hide-background. Leave it out.")
    if options.nb_blocs and given[0].lower().endswith(".tck") and options.reference is None:
        raise ValueError("reference: a TCK file has no grid to cut into blocs. Give --reference, a volume on its grid.")
    if options.save_blocs is not None and not options.save_blocs.endswith((".nii", ".nii.gz")):
        raise ValueError(f"save_blocs: expected a NIfTI file, .nii or .nii.gz. Received: {options.save_blocs}.")
    lines = [out for out in (options.save_biggest, options.save_smallest, options.save_rejected) if out is not None]
    for out in lines:
        check_name(Path(out), columns={})
    for out in (given[1], options.save_blocs, options.figure, *lines):
        if out is not None:
            check_new_file(out, overwrite=options.overwrite)


def read_matrix(path: str) -> NDArray:
    """A square matrix of finite numbers of at least 0."""
    try:
        matrix = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises of many kinds about corrupt files
        raise ValueError(f"{path}: cannot be read as a matrix in .npy ({one_line(error)})") from error
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected a matrix of numbers in .npy.")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{path}: expected a square matrix. Received the shape {matrix.shape}.")
    if not (np.isfinite(matrix) & (matrix >= 0)).all():
        raise ValueError(f"{path}: expected finite numbers of at least 0. Received others.")
    return matrix


def bloc_image(shape: tuple[int, int, int], nb_blocs: tuple[int, int, int]) -> NDArray[np.int32]:
    """The row, from 1, of the bloc around each voxel's centre, (X, Y, Z)."""
    axes = [np.arange(size, dtype=np.float64) + 0.5 for size in shape]
    centres: NDArray[np.float64] = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return (regions_of_blocs(centres, shape, nb_blocs) + 1).astype(np.int32)


def names_of(labels: NDArray[np.int64]) -> list[str]:
    """The names of the rows of a matrix of labels."""
    return list(map(str, np.unique(labels).tolist()))


def write_labels(out: str, names: Sequence[str]) -> None:
    """Write which row has which label beside the matrix."""
    text = "".join(f"{row} = {name}\n" for row, name in enumerate(names))
    with folders_above(out) as path:
        atomic_write(path.with_name(f"{path.stem}_labels.txt"), text)


def write_nifti(out: str, values: NDArray, grid: Grid) -> None:
    """Write a volume; a compressed file has the same bytes each time."""
    import gzip

    import nibabel as nib

    content = nib.Nifti1Image(values, grid.affine).to_bytes()
    with folders_above(out) as path, atomic_file(path) as file:
        file.write(gzip.compress(content, mtime=0) if out.endswith(".gz") else content)
