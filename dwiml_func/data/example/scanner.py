"""The example data's signal as a scanner would acquire it, simulated by the package trxscan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dwiml_func.data.example.settings import B_VALUE, NUM_B0, VOXEL_MM, ExampleSettings
from dwiml_func.data.spherical_harmonics import half_sphere_directions

if TYPE_CHECKING:
    import trxscan

    from dwiml_func.data.example.signal import Fibres

__all__ = ["scan"]

_FINER = 2  # points of the object along each side of a voxel, in the plane: edges ring as in k-space
_READOUT_MS = 50.0
_FIELD_HZ = 20.0  # times the readout: one voxel of distortion at most, as correction leaves it
_FIELD_MM = 25.0  # standard deviation of the field's error
_FIELD_CENTRE = (0.5, 0.8, 0.3)  # of the grid: in front and below, above the sinuses


def scan(
    fibres: Fibres,
    tissue: np.ndarray,
    settings: ExampleSettings,
    rng: np.random.Generator,
    *,
    nb_unweighted: int = NUM_B0,
) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes in the N voxels of `tissue` (X, Y, Z): unweighted images (N, U) and weighted ones (N, G).

    A single-shot EPI acquisition of the voxels' fibres and of grey matter around them, line of k-space by line: decay
    by T2, distortion by a smooth error of the field (at most one voxel), ringing at edges, noise of k-space. The SNR
    is that of an unweighted image in white matter. The same generator gives the same values, whatever the number of
    threads.

    Raises:
        ModuleNotFoundError: trxscan is not installed.
    """
    try:
        import trxscan
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--simulator trxscan: expected the package trxscan. Install it: pip install trxscan"
        ) from error

    white = np.zeros(tissue.shape)
    white.reshape(-1)[fibres.voxels] = fibres.fractions.sum(axis=1)
    finer = [np.repeat(np.repeat(part, _FINER, axis=0), _FINER, axis=1) for part in (white, tissue - white)]
    held = trxscan.objects.from_arrays(
        *finer,
        oversample=_FINER,
        voxel_mm=VOXEL_MM,
        fibers=_finer_fibres(fibres, tissue.shape),
        fieldmap=_field(finer[0].shape, (VOXEL_MM / _FINER, VOXEL_MM / _FINER, VOXEL_MM)),
    )
    protocol = trxscan.Protocol.DEFAULT.replace(voxel_mm=VOXEL_MM, readout_ms=_READOUT_MS)
    brightness = protocol.signal_scale * np.exp(-protocol.te_ms / protocol.tissue.t2_fiber)
    artifacts = trxscan.Artifacts(noise=float(brightness / settings.snr) ** 2, seed=int(rng.integers(2**31)))
    directions = half_sphere_directions(settings.nb_directions)
    scheme = (
        np.concatenate([np.zeros(nb_unweighted), np.full(len(directions), B_VALUE)]),
        np.concatenate([np.zeros((nb_unweighted, 3)), directions]),
    )
    images = held.simulate(scheme, protocol, artifacts, clean_b0=False, kspace=False).magnitude
    magnitudes = np.asarray(images.dataobj, dtype=np.float64)[tissue]
    return magnitudes[:, :nb_unweighted], magnitudes[:, nb_unweighted:]


def _finer_fibres(fibres: Fibres, shape: tuple[int, ...]) -> trxscan.Fibers:
    """Those of each voxel in all its points; trxscan counts points with x fastest."""
    import trxscan

    x, y, z = np.unravel_index(fibres.voxels, shape)
    rows, bundles = np.nonzero(fibres.fractions)
    width, height = shape[0] * _FINER, shape[1] * _FINER
    points = [
        x * _FINER + right + width * (y * _FINER + up + height * z) for right in range(_FINER) for up in range(_FINER)
    ]
    copies = len(points)
    return trxscan.Fibers(
        np.concatenate([point[rows] for point in points]),
        np.tile(fibres.directions[rows, bundles], (copies, 1)),
        np.tile(fibres.fractions[rows, bundles], copies),
    )


def _field(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Hz at each point of a grid."""
    squares = [
        (((np.arange(size) + 0.5) - centre * size) * spacing / _FIELD_MM) ** 2
        for size, centre, spacing in zip(shape, _FIELD_CENTRE, spacing_mm, strict=True)
    ]
    x, y, z = np.meshgrid(*squares, indexing="ij", sparse=True)
    return _FIELD_HZ * np.exp(-(x + y + z) / 2)
