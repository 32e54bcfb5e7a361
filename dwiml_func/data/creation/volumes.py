"""From NIfTI files to the volume of one group of one subject: joined, checked, standardised."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import one_line
from dwiml_func.data.creation.config import Standardization
from dwiml_func.data.creation.files import Source
from dwiml_func.data.grid import Grid, grid_difference, grid_of
from dwiml_func.files.archive import is_bomb

__all__ = ["Volume", "load_grid", "load_labels", "load_volume", "standardize"]

_FLOAT32_LABELS = 1 << 24  # above it float32 leaves whole numbers out


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
    `forbid_masks`, a file of one feature that is zero or one other value is an error.
    """
    images = [_open(source) for source in files]
    grid = _grid(files[0], images[0])
    for source, image in zip(files, images, strict=True):
        _check_grid(source, _grid(source, image), grid, "as the group's first file has")
        if expected is not None:
            _check_grid(source, grid, expected, "as the subject's first volume group has")
    widths = [1 if len(image.shape) == 3 else image.shape[3] for image in images]
    mask = _union(masks, grid)
    # Standardised are the values of the file: float32 would round those of other types first.
    is_exact = standardization == "none" or all(_fits_float32(image) for image in images)
    data = np.empty((*grid.shape, sum(widths)), dtype=np.float32 if is_exact else np.float64)
    measured: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for source, image, end, width in zip(files, images, np.cumsum(widths), widths, strict=True):
        part = data[..., end - width : end]
        with np.errstate(over="ignore"):  # told below
            part[...] = _read(source, image, data.dtype).reshape(part.shape)
        _check_finite(source, part)
        if forbid_masks and width == 1 and ((part == 0) | (part == part.max())).all():
            raise ValueError(
                f"{source}: a mask (zero and one other value) as a model's input. Expected a diffusion or "
                "anatomical volume. A mask belongs in std_mask, or in another group with standardization 'none'"
            )
        if standardization == "per_file":
            mean, std = standardize(part, mask, independent=False, source=source)
            measured.append((np.repeat(mean, width), np.repeat(std, width)))
    if standardization == "none":
        return Volume(data.astype(np.float32, copy=False), grid)
    if standardization == "per_file":
        mean, std = (np.concatenate(values) for values in zip(*measured, strict=True))
    else:
        mean, std = standardize(data, mask, independent=standardization == "independent", source=files[0])
    with np.errstate(over="ignore"):  # values outside the mask may be too large
        standardized = data.astype(np.float32, copy=False)
    _check_finite(files[0], standardized)
    return Volume(standardized, grid, mean, std)


def load_grid(source: Source) -> Grid:
    """The grid of a NIfTI file."""
    return _grid(source, _open(source))


def load_labels(source: Source, expected: Grid | None) -> NDArray[np.int64]:
    """The (X, Y, Z) labels of a 3-D NIfTI file of whole numbers, on the expected grid."""
    image = _open(source)
    if len(image.shape) != 3:
        raise ValueError(f"{source}: labels of shape {image.shape}. Expected (X, Y, Z)")
    if expected is not None:
        _check_grid(source, _grid(source, image), expected, "as the subject's volumes have")
    data = _read(source, image, None)
    if not (np.isfinite(data) & (data >= 0) & (data == np.rint(data))).all():
        raise ValueError(f"{source}: expected labels, whole numbers of at least 0. Received others")
    exact_below = {"float16": 1 << 11, "float32": _FLOAT32_LABELS, "float64": 1 << 53}.get(data.dtype.name, 1 << 63)
    if (largest := int(data.max())) >= exact_below:
        raise ValueError(
            f"{source}: a label of {largest} in {data.dtype.name}, which cannot hold all whole numbers from "
            f"{exact_below} on. Expected labels as integers"
        )
    return data.astype(np.int64)


def standardize(
    data: NDArray[np.floating], mask: NDArray[np.bool_] | None, *, independent: bool, source: Source
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Subtract a mean from all voxels, and divide them by a standard deviation, in place; returns both, () or (F,).

    Both are measured inside the mask, or else in voxels whose features are all other than zero, and all arithmetic is
    in float64. A feature of one value, or whose standard deviation is no more than the rounding of its largest, is
    only shifted. Source: dwi_ml, `standardize_data` (general/data/processing/dwi/dwi.py), which instead divides by 1e-6
    at least: maps in small units (m2/s) would stay all but zero.
    """
    measured = data[np.all(data != 0, axis=-1) if mask is None else mask]
    if len(measured) == 0:
        what = "no voxel whose features are all other than zero" if mask is None else "no voxel in its std_mask"
        raise ValueError(f"{source}: {what}, so there is nothing to standardise by. Give another std_mask")
    axis = 0 if independent else None
    largest = np.abs(measured).max(axis=axis).astype(np.float64)
    _, exponent = np.frexp(largest)  # by a power of two, as the squares of very large or small values leave float64
    scaled = np.ldexp(measured.astype(np.float64), -exponent)
    mean = np.ldexp(scaled.mean(axis=axis), exponent)
    std = np.ldexp(scaled.std(axis=axis), exponent)
    is_one_value = measured.max(axis=axis) == measured.min(axis=axis)  # whose mean may be rounded
    std = np.where(is_one_value | (std <= np.finfo(data.dtype).eps / 2 * largest), 1.0, std)
    for slab in data:  # no float64 copy of the whole
        slab[...] = (slab.astype(np.float64) - mean) / std
    return mean, std


def _open(source: Source) -> Any:
    import nibabel as nib

    if not source.path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{source}: expected a NIfTI file, .nii or .nii.gz")
    try:
        with _without_log():
            image: Any = nib.load(source.path)
            transforms = (image.get_sform(coded=True), image.get_qform(coded=True))
            grids = [grid_of(affine, image.shape) for affine, code in transforms if code > 0]
            unit = {1: "metres", 3: "micrometres"}.get(int(image.header["xyzt_units"]) & 7)
    except Exception as error:  # nibabel raises of many kinds about corrupt files
        raise ValueError(f"{source}: cannot be read as NIfTI ({_reason(error)})") from error
    if len(image.shape) not in (3, 4) or 0 in image.shape:
        raise ValueError(f"{source}: a volume of shape {image.shape}. Expected (X, Y, Z) or (X, Y, Z, features)")
    if image.get_data_dtype().kind not in "biuf":
        kind = {"c": "complex numbers", "V": "colours"}.get(image.get_data_dtype().kind, str(image.get_data_dtype()))
        raise ValueError(f"{source}: a volume of {kind}. Expected real numbers: save magnitude or real part")
    if len(grids) == 2 and grid_difference(*grids):
        logging.getLogger(__name__).warning("%s: its sform and its qform place voxels differently. Used: sform", source)
    if unit is not None:
        raise ValueError(f"{source}: the header gives lengths in {unit}. Expected mm: correct xyzt_units or the affine")
    stored = source.path.stat().st_size
    num_bytes = int(np.prod(image.shape, dtype=object)) * image.get_data_dtype().itemsize
    if is_bomb(num_bytes, stored):
        raise ValueError(f"{source}: it unpacks to {num_bytes} bytes, from {stored}. Store it without compression")
    return image


@contextmanager
def _without_log() -> Iterator[None]:
    """nibabel logs what it corrects in a header, and then may raise the same; so one sentence is enough."""
    logger = logging.getLogger("nibabel.global")
    was_off, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_off


def _fits_float32(image: Any) -> bool:
    """Whether float32 holds every value that the file may hold."""
    is_scaled = (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0)
    return not is_scaled and np.can_cast(image.get_data_dtype(), np.float32)


def _read(source: Source, image: Any, dtype: Any) -> NDArray[Any]:
    """All values, as `dtype` or (None) as stored. The file is read to its end, where gzip has its checksum."""
    try:
        with gzip.open(source.path) if source.path.name.endswith(".gz") else source.path.open("rb") as file:
            with _without_log():
                whole: Any = type(image).from_stream(file).dataobj
            data = whole.get_unscaled() if dtype is None and (whole.slope, whole.inter) == (1.0, 0.0) else whole
            data = np.asanyarray(data, dtype=dtype)
            file.seek(int(whole.offset) + int(np.prod(image.shape)) * image.get_data_dtype().itemsize)
            if file.read(1):
                raise ValueError("the file continues after the values that its header promises")
            return data
    except Exception as error:
        raise ValueError(f"{source}: cannot be read as NIfTI ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__


def _grid(source: Source, image: Any) -> Grid:
    try:
        return grid_of(image.affine, image.shape)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _check_grid(source: Source, received: Grid, expected: Grid, as_where: str) -> None:
    difference = grid_difference(received, expected)
    if difference is not None:
        raise ValueError(f"{source}: {difference}, {as_where}")


def _check_finite(source: Source, data: NDArray[np.floating]) -> None:
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
        data = _read(source, image, None)
        _check_finite(source, data)
        union |= data.reshape(grid.shape) > 0
    return union if masks else None
