"""When a connectivity matrix fits the regions that it connects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["matrix_fault"]


def matrix_fault(shape: Sequence[int], blocs: Sequence[int] | None, labels: NDArray[np.integer] | None) -> str | None:
    """Why a matrix of this shape does not fit its blocs or its (X, Y, Z) labels, in words; None where it fits.

    Rows are blocs, or labels: all labels in rising order, with the background 0 or without, or else labels that are
    numbers of rows, from 1.
    """
    if len(shape) != 2 or shape[0] != shape[1]:
        return f"a matrix of shape {tuple(shape)}. Expected a square one"
    if blocs is not None and shape[0] != np.prod(blocs):
        text = " x ".join(map(str, blocs))
        return f"a matrix of {shape[0]} rows. Expected {np.prod(blocs)}, one for each of {text} blocs"
    if labels is not None:
        found = np.unique(labels[labels > 0])
        if len(found) == 0:
            return "labels without any region: all voxels are 0"
        num_labels = len(np.unique(labels))  # the background too, as dwi_ml counts
        if shape[0] not in (len(found), num_labels) and found[-1] > shape[0]:
            return f"a matrix of {shape[0]} rows. Expected {len(found)}, one for each label (up to {found[-1]})"
    return None
