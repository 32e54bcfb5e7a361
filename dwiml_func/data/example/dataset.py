"""The built-in example data: real streamlines of five people on a diffusion signal that is simulated along them.

Real: the streamlines (`minimal_bundles`). Simulated: the diffusion signal, and nothing else is known of the five heads.
"""

from __future__ import annotations

import os
import sys

import h5py
import numpy as np

from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.example.bundles import SUBJECTS, load_bundles
from dwiml_func.data.example.settings import DEFAULT_SETTINGS, VOXEL_MM, ExampleSettings
from dwiml_func.data.example.signal import SHELL, paint, simulate
from dwiml_func.data.example.unlabelled import unlabelled_bundles
from dwiml_func.data.grid import Grid
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines, write_volume
from dwiml_func.data.resampling import Resampling

__all__ = ["make_example_data"]

_STEP_MM = 1.0
_KEY = fold_in(Key(0), Stream.EXAMPLE_DATA)
_UNLABELLED = len(SUBJECTS)  # of the stream's random numbers, after the noise of each person


def make_example_data(
    path: str | os.PathLike[str], *, settings: ExampleSettings = DEFAULT_SETTINGS, overwrite: bool = False
) -> None:
    """Write the example dataset: three training subjects, one validation and one testing subject; no network needed.

    Streamlines: three bundles of five people, 150 streamlines each, oriented alike inside each bundle, smoothed,
    resampled to 1 mm, on a 2 mm grid.

    Signal: within one voxel of a streamline (`wm_mask`), one diffusion tensor a bundle along the bundle's mean axis
    there, mixed with isotropic tissue by the number of its points nearby; two voxels further, isotropic tissue alone;
    0 elsewhere, as outside a brain mask. 60 directions at b = 1000 s/mm^2 and 6 unweighted images, Rician noise of
    SNR 20. `input` holds the SH of order 6 (28 features) of the signal divided by the unweighted one, standardised over
    all features. Its attributes say which SH they are and how to undo the standardisation.

    `settings` change noise and directions, add bundles to the signal that are not among the streamlines, and choose who
    tests. The file has the same bytes every time.
    """
    from tqdm import tqdm

    groups_config = {
        "input": {
            "type": "volume",
            "files": ["simulated_sh.nii.gz"],
            "standardization": "all",
            "std_mask": ["simulated_wm_mask.nii.gz"],
        },
        "streamlines": {"type": "streamlines", "files": ["*.trk"]},
        "wm_mask": {"type": "volume", "files": ["simulated_wm_mask.nii.gz"], "standardization": "none"},
    }
    training, validation, testing = settings.subsets
    dataset = new_dataset(
        path,
        training=training,
        validation=validation,
        testing=testing,
        groups_config=groups_config,
        date="Not recorded",  # the time would make each file another one
        resampling=Resampling(step_size=_STEP_MM),
        overwrite=overwrite,
    )
    with dataset as file:
        progress = tqdm(SUBJECTS, desc="Example data", unit="subject", disable=not sys.stderr.isatty())
        for row, subject in enumerate(progress):
            _write_subject(file.create_group(subject), row, settings)


def _write_subject(group: h5py.Group, row: int, settings: ExampleSettings) -> None:
    bundles = load_bundles(SUBJECTS[row], step_size=_STEP_MM)
    grid = _grid(np.concatenate([s for streamlines in bundles.values() for s in streamlines]))
    voxel_bundles = [[_to_voxel(s, grid) for s in streamlines] for streamlines in bundles.values()]

    others = unlabelled_bundles(bundles, settings, subject=row, key=fold_in(_KEY, _UNLABELLED))
    fibres = paint([*voxel_bundles, *([_to_voxel(s, grid) for s in each] for each in others.values())], grid)
    mask = np.zeros(grid.shape, dtype=bool)
    mask.reshape(-1)[fibres.voxels] = True
    coefficients = simulate(fibres, mask, settings, numpy_rng(fold_in(_KEY, row)))
    # Over all features at once: a standardisation feature by feature would blow up the noise of the high orders.
    mean, std = float(coefficients[mask].mean()), float(coefficients[mask].std())

    write_volume(
        group,
        "input",
        (coefficients - mean) / std,
        grid.affine,
        attributes={
            "sh_order": settings.sh_order,
            "sh_basis": "descoteaux07",
            "sh_legacy": False,
            "standardization_mean": mean,
            "standardization_std": std,
        },
        compression=1,
    )
    streamlines = [s for bundle in voxel_bundles for s in bundle]
    write_streamlines(
        group,
        "streamlines",
        np.concatenate(streamlines),
        np.concatenate([[0], np.cumsum([len(s) for s in streamlines])]),
        affine=grid.affine,
        dimensions=grid.shape,
        bundles=Bundles(tuple(bundles), np.repeat(np.arange(len(bundles)), [len(b) for b in voxel_bundles])),
    )
    write_volume(group, "wm_mask", mask[..., None], grid.affine, compression=1)


def _grid(points: np.ndarray) -> Grid:
    """The smallest grid of whole voxels that holds the points and the shell around them, its corner on even mm."""
    first = np.floor(points.min(axis=0) / VOXEL_MM).astype(int) - SHELL
    last = np.floor(points.max(axis=0) / VOXEL_MM).astype(int) + SHELL
    affine = np.diag([VOXEL_MM, VOXEL_MM, VOXEL_MM, 1.0])
    affine[:3, 3] = (first + 0.5) * VOXEL_MM  # the centre of voxel 0
    x, y, z = (last - first + 1).tolist()
    return Grid(affine, (x, y, z))


def _to_voxel(points: np.ndarray, grid: Grid) -> np.ndarray:
    """RAS mm -> voxel space, corner origin: half a voxel more than the affine's inverse, whose integers are centres."""
    return (points - grid.affine[:3, 3]) / VOXEL_MM + 0.5
