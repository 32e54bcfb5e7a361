"""The real streamlines of the example data: three bundles of five people, as dipy ships them.

dipy's `data/files/minimal_bundles.zip` holds, for each of `sub_1` to `sub_5`, the left arcuate fasciculus, the right
corticospinal tract and the forceps major of the corpus callosum: 50 streamlines of 20 points each.
"""

from __future__ import annotations

import io
import zipfile
from importlib.resources import files
from typing import Any

import nibabel as nib
import numpy as np

from dwiml_func._checks import check_choice

__all__ = ["BUNDLES", "SUBJECTS", "load_bundles"]

SUBJECTS = ("sub_1", "sub_2", "sub_3", "sub_4", "sub_5")
"""The five people, by their folders in the archive."""

BUNDLES = {"AF_L": 1, "CC_ForcepsMajor": 0, "CST_R": 2}
"""Bundle -> the RAS axis (0 left to right, 1 back to front, 2 bottom to top) along which its ends lie furthest apart
in every streamline: temporal to frontal, left to right, brain stem to cortex."""

_SMOOTHING_MM = 1.0  # the spline may pass the stored points, 5 to 10 mm apart, at this root mean square distance
_DENSE = 2001  # spline samples that measure the arc length: a tenth of a mm apart, at most


def load_bundles(subject: str, *, step_size: float = 1.0) -> dict[str, list[np.ndarray]]:
    """One person's bundles, bundle name -> (N_i, 3) float64 arrays in RAS mm: oriented, smoothed and resampled.

    The stored streamlines of a bundle start at either end. Here each ends at the larger coordinate of its bundle's axis
    in `BUNDLES`: at the first point, nothing else tells a model which way to go. A cubic smoothing spline (Dierckx'
    FITPACK, `scipy.interpolate.splprep`) removes the zigzag of the coarse points. The length is divided evenly into
    steps of about `step_size` mm.
    """
    check_choice("subject", subject, SUBJECTS)
    if not step_size > 0:
        raise ValueError(f"Expected a step size above 0 mm. Received: {step_size}")
    archive = files("dipy") / "data" / "files" / "minimal_bundles.zip"
    if not archive.is_file():
        raise FileNotFoundError(f"The installed dipy has no {archive}. Install dipy 1.11 or later from its wheel")
    bundles = {}
    with zipfile.ZipFile(io.BytesIO(archive.read_bytes())) as content:
        for name, axis in BUNDLES.items():
            tractogram = nib.streamlines.load(io.BytesIO(content.read(f"{subject}/{name}.trk")))
            oriented = [_oriented(np.asarray(s, dtype=np.float64), axis) for s in tractogram.streamlines]
            bundles[name] = [_resampled(streamline, step_size) for streamline in oriented]
    return bundles


def _oriented(streamline: np.ndarray, axis: int) -> np.ndarray:
    return streamline if streamline[-1, axis] >= streamline[0, axis] else streamline[::-1]


def _resampled(streamline: np.ndarray, step_size: float) -> np.ndarray:
    from scipy.interpolate import splprep  # half a second to import

    spline, _ = splprep(streamline.T, s=len(streamline) * _SMOOTHING_MM**2)
    dense = np.linspace(0.0, 1.0, _DENSE)
    segments = np.diff(_at(spline, dense), axis=0)
    travelled = np.concatenate([[0.0], np.cumsum(np.sqrt((segments**2).sum(axis=1)))])
    num_steps = max(1, round(travelled[-1] / step_size))
    positions = np.interp(np.linspace(0.0, travelled[-1], num_steps + 1), travelled, dense)
    return _at(spline, positions)


def _at(spline: Any, positions: np.ndarray) -> np.ndarray:
    from scipy.interpolate import splev

    return np.stack([np.asarray(axis, dtype=np.float64) for axis in splev(positions, spline)], axis=1)
