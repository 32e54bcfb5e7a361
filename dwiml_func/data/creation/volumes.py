"""From NIfTI files to the volume of one group of one subject: joined, checked, standardised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.creation.config import Standardization
from dwiml_func.data.creation.files import Source
from dwiml_func.data.grid import Grid, grid_difference, grid_of

__all__ = ["Volume", "load_labels", "load_volume", "standardize"]

_LEAST_STD = 1e-6  # below it a feature counts as constant, as in dwi_ml; it is shifted, not scaled


class Volume(NamedTuple):
    """An (X, Y, Z, F) volume and its grid; the mean and std, () or (F,), of a standardised one."""

    data: NDArray[np.float32]
    grid: Grid
    mean: NDArray[np.float64] | None = None
    std: NDArray[np.float64] | None = None


def load_volume(
    files: Sequence[Source],
    *,
    standardization: Standardization = "none",
    masks: Sequence[Source] = (),
    expected: Grid | None = None,
    forbid_masks: bool = False,
) -> Volume:
    """Read the NIfTI files of a group, (X, Y, Z) or (X, Y, Z, F), and join them along their features.

    The union of `masks` says which voxels are measured; without, those whose features are all other than zero. With
    `forbid_masks`, a 3-D file of zeros and one other value is an error.
    """
    images = [_open(source) for source in files]
    grid = _grid(files[0], images[0])
    for source, image in zip(files, images, strict=True):
        _check_grid(source, _grid(source, image), grid, "as the group's first file has")
        if expected is not None:
            _check_grid(source, grid, expected, "as the subject's first volume group has")
    widths = [1 if len(image.shape) == 3 else image.shape[3] for image in images]
    mask = _union(masks, grid)
    data = np.empty((*grid.shape, sum(widths)), dtype=np.float32)
    measured: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for source, image, end, width in zip(files, images, np.cumsum(widths), widths, strict=True):
        part = data[..., end - width : end]
        part[...] = _read(source, image).reshape(part.shape)
        _check_finite(source, part)
        if forbid_masks and len(image.shape) == 3 and ((part == 0) | (part == part.max())).all():
            raise ValueError(
                f"{source}: a 3-D mask (zero and one other value) as a model's input. Expected a diffusion or "
                "anatomical volume. A mask belongs in std_mask, or in another group with standardization 'none'"
            )
        if standardization == "per_file":
            mean, std = standardize(part, mask, independent=False, source=source)
            measured.append((np.repeat(mean, width), np.repeat(std, width)))
    if standardization == "none":
        return Volume(data, grid)
    if standardization == "per_file":
        means, stds = zip(*measured, strict=True)
        return Volume(data, grid, np.concatenate(means), np.concatenate(stds))
    mean, std = standardize(data, mask, independent=standardization == "independent", source=files[0])
    return Volume(data, grid, mean, std)


def load_labels(source: Source, expected: Grid | None) -> NDArray[np.int64]:
    """The (X, Y, Z) labels of a 3-D NIfTI file of whole numbers, on the expected grid."""
    image = _open(source)
    if len(image.shape) != 3:
        raise ValueError(f"{source}: labels of shape {image.shape}. Expected (X, Y, Z)")
    if expected is not None:
        _check_grid(source, _grid(source, image), expected, "as the subject's volumes have")
    data = _read(source, image)
    if not (np.isfinite(data) & (data >= 0) & (data == np.rint(data))).all():
        raise ValueError(f"{source}: expected labels, whole numbers of at least 0. Received others")
    return data.astype(np.int64)


def standardize(
    data: NDArray[np.float32], mask: NDArray[np.bool_] | None, *, independent: bool, source: Source
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Subtract a mean from all voxels, and divide them by a standard deviation, in place; returns both, () or (F,).

    Both are measured inside the mask, or else in voxels whose features are all other than zero. A feature with a
    standard deviation below 1e-6 is only shifted. Source: dwi_ml, `standardize_data`
    (general/data/processing/dwi/dwi.py).
    """
    measured = data[np.all(data != 0, axis=-1) if mask is None else mask]
    if len(measured) == 0:
        what = "no voxel whose features are all other than zero" if mask is None else "no voxel in its std_mask"
        raise ValueError(f"{source}: {what}, so there is nothing to standardise by. Give another std_mask")
    axis = 0 if independent else None
    mean = np.asarray(measured.mean(axis=axis, dtype=np.float64))
    std = np.asarray(measured.std(axis=axis, dtype=np.float64))
    std = np.where(std < _LEAST_STD, 1.0, std)
    data -= mean.astype(np.float32)
    data /= std.astype(np.float32)
    return mean, std


def _open(source: Source) -> Any:
    import nibabel as nib

    if not source.path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{source}: expected a NIfTI file, .nii or .nii.gz")
    try:
        image: Any = nib.load(source.path)
    except Exception as error:  # nibabel raises of many kinds about corrupt files
        raise ValueError(f"{source}: cannot be read as NIfTI ({_reason(error)})") from error
    if len(image.shape) not in (3, 4) or 0 in image.shape:
        raise ValueError(f"{source}: a volume of shape {image.shape}. Expected (X, Y, Z) or (X, Y, Z, features)")
    return image


def _read(source: Source, image: Any) -> NDArray[np.float32]:
    try:
        return image.get_fdata(dtype=np.float32, caching="unchanged")
    except Exception as error:
        raise ValueError(f"{source}: cannot be read as NIfTI ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _grid(source: Source, image: Any) -> Grid:
    try:
        return grid_of(image.affine, image.shape)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _check_grid(source: Source, received: Grid, expected: Grid, as_where: str) -> None:
    difference = grid_difference(received, expected)
    if difference is not None:
        raise ValueError(f"{source}: {difference}, {as_where}")


def _check_finite(source: Source, data: NDArray[np.float32]) -> None:
    num_bad = data.size - np.count_nonzero(np.isfinite(data))
    if num_bad:
        raise ValueError(f"{source}: {num_bad} of {data.size} values are NaN or infinite. Expected finite values only")


def _union(masks: Sequence[Source], grid: Grid) -> NDArray[np.bool_] | None:
    union = np.zeros(grid.shape, dtype=bool)
    for source in masks:
        image = _open(source)
        if len(image.shape) == 4 and image.shape[3] != 1:
            raise ValueError(f"{source}: a mask of shape {image.shape}. Expected (X, Y, Z)")
        _check_grid(source, _grid(source, image), grid, "as the group's first file has")
        union |= _read(source, image).reshape(grid.shape) > 0
    return union if masks else None
