"""How well a model predicts directions, beside two baselines that need no training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.streamlines import directions
from dwiml_func.models.baselines import angular_error, keep_straight, principal_direction

__all__ = ["Evaluation", "evaluate_directions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Mean angular errors, in degrees, all on the same points: those that have a previous and a next direction.

    Args:
        model: of the model's predictions.
        keep_straight: of going on in the previous direction.
        principal_direction: of following the diffusion tensor's principal direction; None when the input volume is not
            known to hold spherical harmonics of the signal.
        num_points: number of points.
        num_streamlines: number of streamlines.

    Example:
        >>> Evaluation(model=10.0, keep_straight=4.0, principal_direction=None, num_points=7, num_streamlines=1).model
        10.0
    """

    model: float
    keep_straight: float
    principal_direction: float | None
    num_points: int
    num_streamlines: int


def evaluate_directions(
    predict: Callable[[StreamlineBatch], Tensor],
    batches: Iterable[StreamlineBatch],
    input_attributes: Mapping[str, Any],
    *,
    num_features: int | None = None,
) -> Evaluation:
    """Compare predicted directions with the streamlines' own.

    Args:
        predict: gives (N, 3) directions in voxel space, for the N points of a batch that have a next direction.
        batches: what to evaluate on.
        input_attributes: attributes of the dataset's input group, see `principal_direction`.
        num_features: how many of the inputs' columns, from the first on, are the volume at the point itself; the rest
            are its neighbours. None: all.

    Returns:
        The errors; NaN when no point counts.

    Example:
        >>> evaluate_directions(model, batches, dataset.input_attributes).model  # doctest: +SKIP
    """
    totals = {"model": 0.0, "keep_straight": 0.0, "principal_direction": 0.0}
    num_points, num_streamlines, has_principal = 0, 0, True
    for batch in batches:
        targets = directions(batch.points, batch.offsets)
        straight, valid = keep_straight(batch)
        with torch.no_grad():
            predictions = {"model": predict(batch), "keep_straight": straight}
        at_the_point = replace(batch, inputs=batch.inputs[:, :num_features])
        principal = principal_direction(at_the_point, input_attributes)
        if principal is None:
            has_principal = False
        else:
            predictions["principal_direction"] = principal[0]
        for name, predicted in predictions.items():
            totals[name] += angular_error(predicted[valid], targets[valid]).sum(dtype=torch.float64).item()
        num_points += int(valid.sum())
        num_streamlines += len(batch)
    means = {name: total / num_points if num_points else float("nan") for name, total in totals.items()}
    return Evaluation(
        model=means["model"],
        keep_straight=means["keep_straight"],
        principal_direction=means["principal_direction"] if has_principal else None,
        num_points=num_points,
        num_streamlines=num_streamlines,
    )
