"""What a model has to beat: keeping straight, and following the principal direction of the diffusion tensor.

Both predict at every point that has a previous direction, which is all points except the first and the last of each
streamline. Diffusion has no sign; the previous direction chooses it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.spherical_harmonics import HARMONICS, half_sphere_directions, harmonics_fault, sh_matrix
from dwiml_func.data.streamlines import directions, input_offsets, previous_directions

__all__ = ["angular_error", "keep_straight", "principal_direction"]

_NUM_DIRECTIONS = {"signal": 100, "fodf": 500}  # where it is read: for the tensor fit, or as candidates 6 degrees apart
_MOST_CLIMBS = 16  # of 6 degrees: no peak is further than 90 degrees away
_LEAST_SIGNAL = 1e-3  # the logarithm needs a positive signal; noise and SH ringing may give less


def angular_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """The angle (N,) in degrees between directions (N, 3) of any length, exact to rounding also near 0 and 180 degrees.

    It is 90 if a direction has no length or is not finite: no direction is as good as a wrong one half of the time.

    Source: W. Kahan, "How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?", 2006, section
        12: the angle is 2 atan2(|u - v|, |u + v|) of the unit vectors.
    """
    u, v = _unit(predictions), _unit(targets)
    angles = torch.rad2deg(2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))
    has_directions = (u.norm(dim=-1) > 0) & (v.norm(dim=-1) > 0)  # False also for not-a-number
    return torch.where(has_directions, angles, torch.full_like(angles, 90.0))


def keep_straight(batch: StreamlineBatch) -> tuple[Tensor, Tensor]:
    """Predict the previous direction again: (N, 3) along the voxel axes, and which points have one, (N,) bool.

    The N points are those with a next direction. Predictions have the previous step's length, and are zero elsewhere.
    """
    dir_offsets = input_offsets(batch.offsets)
    previous = previous_directions(directions(batch.points, batch.offsets), dir_offsets, 1)
    valid = torch.ones(batch.num_directions, dtype=torch.bool, device=batch.points.device)
    starts, ends = dir_offsets[:-1], dir_offsets[1:]
    valid[starts[starts < ends]] = False  # a streamline of one point has no row
    return previous, valid


def principal_direction(batch: StreamlineBatch, input_attributes: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Follow the principal direction of the diffusion tensor, or of an fODF, on the side of the previous direction.

    The tensor is the log-linear least squares fit (Basser, Mattiello and Le Bihan, 1994) to the interpolated signal,
    read from its SH at 100 directions. The b-value only scales the tensor and is not needed. The SH are assumed to lie
    along the voxel axes. Of an fODF it is the peak, among 500 directions, that is reached by climbing from the
    previous direction, as in MRtrix's SD_STREAM (Tournier et al., 2012); where there is none, the highest.

    `batch.inputs` are the SH coefficients of the signal divided by the unweighted signal, or of an fODF, standardised.
    `input_attributes` are `sh_order` and optionally `sh_basis` (default "descoteaux07"), `sh_legacy` (False) and
    `sh_of` ("signal" or "fodf"), the same for all subjects, and `standardization_mean` (0) and `standardization_std`
    (1), or a row of each per subject.

    Returns unit vectors (N, 3) along the voxel axes and which points have one, as `keep_straight`, or None without
    `sh_order`.
    Raises ValueError if the number of features is not that of the SH order, or the SH are unknown.
    """
    num = batch.inputs.shape[1]
    if "sh_order" not in input_attributes:
        return None
    fault = harmonics_fault({name: input_attributes[name] for name in HARMONICS if name in input_attributes}, num)
    if fault is not None:
        raise ValueError(f"{fault}.")
    of = str(input_attributes.get("sh_of", "signal"))
    g, basis = _directions_and_basis(
        _NUM_DIRECTIONS[of],
        int(np.asarray(input_attributes["sh_order"]).item()),
        str(input_attributes.get("sh_basis", "descoteaux07")),
        bool(input_attributes.get("sh_legacy", False)),
    )

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=batch.inputs.device)

    def of_points(values: Any) -> Tensor:
        """One value, one a feature, or a row of either for each subject."""
        values = tensor(values)
        if values.ndim < 2:
            return values
        return values[batch.subject].repeat_interleave(input_offsets(batch.offsets).diff(), dim=0)

    std = of_points(input_attributes.get("standardization_std", 1.0))
    mean = of_points(input_attributes.get("standardization_mean", 0.0))
    amplitudes = (batch.at_directions(batch.inputs) * std + mean) @ tensor(basis).T
    previous, valid = keep_straight(batch)
    principal = _peak(amplitudes, previous, tensor(g)) if of == "fodf" else _tensor_axis(amplitudes)
    backwards = (principal * previous).sum(dim=1, keepdim=True) < 0
    return torch.where(backwards, -principal, principal) * valid[:, None], valid


@functools.cache  # a tracker asks at each of its steps
def _directions_and_basis(num: int, order: int, basis: str, legacy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Directions (num, 3), and the SH there (num, F)."""
    directions = half_sphere_directions(num)
    return directions, sh_matrix(directions, order, basis=basis, legacy=legacy)


def _peak(amplitudes: Tensor, previous: Tensor, g: Tensor) -> Tensor:
    """The peaks (N, 3) of amplitudes (N, G) at axes (G, 3) that are uphill of previous directions (N, 3)."""
    neighbours = (g @ g.T).abs().topk(9, dim=1).indices  # an axis and the eight around it
    nearest = (previous @ g.T).abs().argmax(dim=1)
    place = torch.where(previous.norm(dim=1) > 0, nearest, amplitudes.argmax(dim=1))
    for _ in range(_MOST_CLIMBS):
        around = neighbours[place]
        place = around.gather(1, amplitudes.gather(1, around).argmax(dim=1, keepdim=True))[:, 0]
    return g[place]


@functools.cache
def _tensor_fit() -> np.ndarray:
    """The least squares fit (6, G): -log S = g' D g, linear in D's six entries (xx, yy, zz, xy, xz, yz) with b = 1."""
    x, y, z = half_sphere_directions(_NUM_DIRECTIONS["signal"]).T
    return np.linalg.pinv(np.stack([x * x, y * y, z * z, 2 * x * y, 2 * x * z, 2 * y * z], axis=1))


def _tensor_axis(signal: Tensor) -> Tensor:
    """The first eigenvectors (N, 3) of the tensors fitted to a signal (N, G) at directions (G, 3)."""
    fit = torch.as_tensor(_tensor_fit(), dtype=torch.float32, device=signal.device)
    entries = -signal.clamp(min=_LEAST_SIGNAL).log() @ fit.T
    diffusion = entries[:, [0, 3, 4, 3, 1, 5, 4, 5, 2]].reshape(-1, 3, 3)
    return torch.linalg.eigh(diffusion).eigenvectors[:, :, 2]  # eigenvalues rise


def _unit(vectors: Tensor) -> Tensor:
    """Unit vectors; dividing by the largest component first prevents over- and underflow of squares."""
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, torch.ones_like(largest))
    norms = scaled.norm(dim=-1, keepdim=True)
    return scaled / torch.where(norms > 0, norms, torch.ones_like(norms))
