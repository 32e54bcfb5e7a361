"""MRtrix's tckgen as one who tracks in the benchmark, where it is installed.

Its fibre orientations come from constrained spherical deconvolution (Tournier et al., NeuroImage 2007) of the signal
that a model reads, with a response estimated from it (Tournier et al., NMR in Biomedicine 2013). It tracks by iFOD2
(probabilistic; Tournier et al., ISMRM 2010) and by SD_STREAM (deterministic; Tournier et al., International Journal of
Imaging Systems and Technology 2012). All options are MRtrix's defaults, but for the benchmark's lengths and mask.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dwiml_func.data.spherical_harmonics import half_sphere_directions, sh_matrix
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.tracking.case import TrackingCase
from dwiml_func.tracking.protocols import Tracker

__all__ = ["MRTRIX", "has_mrtrix", "mrtrix_trackers"]

MRTRIX = {"MRtrix iFOD2": "iFOD2", "MRtrix SD_STREAM": "SD_STREAM"}
"""Who tracks as `mrtrix_trackers`, and their algorithms."""

_COMMANDS = ("dwi2response", "dwi2fod", "tckgen")
_B_VALUE = 1000.0  # s/mm^2, of the example data
_SEED = "1"  # of tckgen's random numbers, which repeat on one thread
_RADIUS_MM = 1e-3


def has_mrtrix() -> bool:
    """Whether MRtrix's commands can be run."""
    return all(shutil.which(command) for command in _COMMANDS)


def mrtrix_trackers(case: TrackingCase, folder: Path, *, nb_directions: int) -> dict[str, Tracker]:
    """Fit fibre orientations to the signal of the example data, and give those who track in them, by name.

    Args:
        case: who is tracked in; its volume holds spherical harmonics, its mask the white matter.
        folder: an empty folder, for MRtrix's files.
        nb_directions: of the example data: the signal is sampled there again.

    Raises:
        OSError: a command of MRtrix failed; the error holds what it printed.
    """
    assert case.mask is not None
    _write_signal(case, folder, nb_directions)
    gradients = ("-grad", "gradients.txt")
    _run(folder, "dwi2response", "tournier", "signal.nii", "response.txt", *gradients, "-mask", "mask.nii")
    _run(folder, "dwi2fod", "csd", "signal.nii", "response.txt", "fod.nii", *gradients, "-mask", "mask.nii")
    return {name: _tracker(case, folder, algorithm) for name, algorithm in MRTRIX.items()}


def _tracker(case: TrackingCase, folder: Path, algorithm: str) -> Tracker:
    to_mm = case.grid.affine[:3, :3]
    origin = case.grid.affine[:3, 3] - to_mm @ np.full(3, 0.5)  # of the corner, where voxel space begins

    def tracked(seeds: NDArray[np.float64], *options: str) -> list[NDArray[np.float32]]:
        spheres = []
        for x, y, z in seeds @ to_mm.T + origin:
            spheres += ["-seed_sphere", f"{x:.5f},{y:.5f},{z:.5f},{_RADIUS_MM}"]
        number = ("-seeds", str(len(seeds)), "-select", "0")
        common = ("fod.nii", "lines.tck", "-algorithm", algorithm, "-mask", "mask.nii")
        _run(folder, "tckgen", *common, *number, *options, *spheres)
        lines = nib.streamlines.load(folder / "lines.tck").streamlines
        return [((line - origin) @ np.linalg.inv(to_mm).T).astype(np.float32) for line in lines]

    def from_seeds(seeds: Tensor) -> Streamlines:
        spec = case.spec
        lengths = ("-minlength", str(spec.min_length), "-maxlength", str(spec.max_length))
        return Streamlines.from_list(tracked(seeds.double().numpy(), *lengths))

    def ahead(given: Streamlines, distance: float) -> Streamlines:
        added = []
        for number in range(len(given)):
            points = given.points[given.offsets[number] : given.offsets[number + 1]].double().numpy()
            x, y, z = to_mm @ (points[-1] - points[-2])
            toward = ("-seed_unidirectional", "-seed_direction", f"{x:.6f},{y:.6f},{z:.6f}")
            lines = tracked(points[-1:], *toward, "-minlength", "0", "-maxlength", str(distance))
            followed = lines[0][1:] if lines else np.empty((0, 3), np.float32)
            added.append(np.concatenate([points[-1:].astype(np.float32), followed]))
        return Streamlines.from_list(added)

    return Tracker(ahead, from_seeds)


def _write_signal(case: TrackingCase, folder: Path, nb_directions: int) -> None:
    """The signal relative to the unweighted one, an image of ones before it, in the scheme of the example data."""
    attributes = case.attributes
    directions = half_sphere_directions(nb_directions)
    matrix = sh_matrix(directions, int(attributes["sh_order"]), basis=str(attributes["sh_basis"]))
    coefficients = case.space.volume.double().numpy() * float(attributes["standardization_std"])
    weighted = (coefficients + float(attributes["standardization_mean"])) @ matrix.T
    signal = np.concatenate([np.ones((*weighted.shape[:3], 1)), weighted], axis=-1).clip(min=0)
    assert case.mask is not None
    for name, values in (("signal", signal.astype(np.float32)), ("mask", case.mask.numpy().astype(np.uint8))):
        nib.Nifti1Image(values, case.grid.affine).to_filename(folder / f"{name}.nii")
    scheme = np.column_stack([directions, np.full(nb_directions, _B_VALUE)])
    np.savetxt(folder / "gradients.txt", np.vstack([np.zeros(4), scheme]))


def _run(folder: Path, *arguments: str) -> None:
    command = [*arguments, "-quiet", "-force", "-nthreads", "0"]
    environment = {**os.environ, "MRTRIX_RNG_SEED": _SEED}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"MRtrix's {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
