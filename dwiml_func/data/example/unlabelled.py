"""Bundles of the example data that are in the signal and not among the labels.

Each is a copy of a labelled bundle of the same person, rotated about a point of that bundle's mean line: about the line
itself, so that both run together there and branch off (a distractor), or about an axis across it (a crossing). Points,
angles and axes are the same in all people, but for a few mm and degrees, as anatomy is.
"""

from __future__ import annotations

import numpy as np

from dwiml_func.core.rng import Key, fold_in, numpy_rng
from dwiml_func.data.example.settings import ExampleSettings

__all__ = ["mean_line", "rotation", "unlabelled_bundles"]

_NUM_POINTS = 41  # of a mean line
_REACH_MM = 30.0  # so far an unlabelled bundle goes from the point where it meets the labelled one
_LEAST_DEG, _MOST_DEG = 60.0, 90.0  # of a crossing
_BRANCH_DEG = (90.0, 270.0)  # of a distractor
_JITTER_MM, _JITTER_DEG = 2.0, 3.0  # standard deviation between people
_KINDS = {"distractor": 1, "crossing": 2}


def unlabelled_bundles(
    bundles: dict[str, list[np.ndarray]], settings: ExampleSettings, *, subject: int, key: Key
) -> dict[str, list[np.ndarray]]:
    """Name -> streamlines (N_i, 3) in mm: one person's distractors and crossings, within 30 mm of where they meet the
    labelled bundle. `subject` is the person's number."""
    made = {}
    for row, (name, streamlines) in enumerate(bundles.items()):
        for kind, count in (("distractor", settings.distractors), ("crossing", settings.crossings)):
            for number in range(count):
                common = numpy_rng(fold_in(key, _KINDS[kind], row, number))
                own = numpy_rng(fold_in(key, _KINDS[kind], row, number, subject))
                where = (number + 0.5 + (0.0 if kind == "crossing" else common.uniform(-0.2, 0.2))) / count
                made[f"{name}_{kind}_{number + 1}"] = _rotated_copy(streamlines, kind, where, common, own)
    return made


def mean_line(streamlines: list[np.ndarray]) -> np.ndarray:
    """(41, 3): the mean of streamlines that run the same way, each sampled at even shares of its points."""
    shares = np.linspace(0, 1, _NUM_POINTS)
    sampled = [
        np.stack([np.interp(shares, np.linspace(0, 1, len(line)), line[:, axis]) for axis in range(3)], axis=1)
        for line in streamlines
    ]
    return np.mean(sampled, axis=0)


def rotation(axis: np.ndarray, degrees: float) -> np.ndarray:
    """(3, 3) matrix that rotates about a unit vector (Rodrigues' formula)."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _rotated_copy(
    streamlines: list[np.ndarray], kind: str, where: float, common: np.random.Generator, own: np.random.Generator
) -> list[np.ndarray]:
    line = mean_line(streamlines)
    row = round(where * (_NUM_POINTS - 1))
    tangent = _unit(line[min(row + 1, _NUM_POINTS - 1)] - line[max(row - 1, 0)])
    centre = line[row] + own.normal(0, _JITTER_MM) * tangent
    across = common.standard_normal(3)
    across = _unit(across - (across @ tangent) * tangent)
    low, high = (_LEAST_DEG, _MOST_DEG) if kind == "crossing" else _BRANCH_DEG
    degrees = common.uniform(low, high) + own.normal(0, _JITTER_DEG)
    turned = rotation(across if kind == "crossing" else tangent, degrees)
    copies = []
    for points in streamlines:
        near = np.linalg.norm(points - centre, axis=1) <= _REACH_MM
        rows = np.flatnonzero(near)
        if len(rows) < 2:
            continue
        # A bundle that bends back comes near again: the copy keeps the stretch around its point.
        middle = int(np.linalg.norm(points - centre, axis=1).argmin())
        outside = np.flatnonzero(~near)
        first = outside[outside < middle].max(initial=-1) + 1
        last = outside[outside > middle].min(initial=len(points))
        if last - first >= 2:
            copies.append((points[first:last] - centre) @ turned.T + centre)
    return copies


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())
