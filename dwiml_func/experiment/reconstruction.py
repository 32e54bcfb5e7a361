"""How well an autoencoder reconstructs streamlines, in mm, beside two baselines that need no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwiml_func.core.rng import Key
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.neighborhood import direction_units
from dwiml_func.experiment.batches import sampled_batch, whole_batches
from dwiml_func.experiment.model_store import LoadedModel
from dwiml_func.experiment.setup import RunParts
from dwiml_func.files.json import read_checked
from dwiml_func.models.autoencoder.autoencoder import Autoencoder

__all__ = [
    "EVALUATION_FILE",
    "Reconstruction",
    "evaluate_reconstruction",
    "read_reconstruction",
    "reconstruction_of_subset",
    "to_mm",
]

EVALUATION_FILE = "evaluation.json"
"""In an experiment's folder."""

_Reconstruct = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """Distances in mm between points of streamlines and their reconstructions.

    model: mean over all points. median, percentile_95: of the streamlines' own means.
    mean_streamline: of the mean of the training streamlines in place of each. principal_components: of as many
        principal components of the training streamlines, `num_components`, as the latent space has values. Both are
        None where the training streamlines are not at hand.
    """

    model: float
    median: float
    percentile_95: float
    mean_streamline: float | None = None
    principal_components: float | None = None
    num_components: int | None = None
    num_points: int
    num_streamlines: int


def evaluate_reconstruction(model: Autoencoder, parts: RunParts) -> Reconstruction:
    """Reconstruct the streamlines of a run's validation batches; without any, those of training batches."""
    training = sampled_batch(parts.data.training, parts.config).points.unflatten(0, (-1, model.nb_points))
    mean, components = _principal_components(training, model.fc1.out_features)
    baselines: dict[str, _Reconstruct] = {
        "mean_streamline": lambda points: mean.expand_as(points),
        "principal_components": lambda points: _project(points, mean, components),
    }
    batches = (batch.to("cpu") for batch in parts.evaluation(Key(parts.config.training.rng), 0, 0))
    return _evaluate(model, batches, parts.data.evaluation, baselines, num_components=len(components))


def reconstruction_of_subset(
    model: LoadedModel, dataset: StreamlineDataset, *, batch_size: int = 100
) -> Reconstruction:
    """Reconstruct all streamlines of a dataset; ValueError if it has none."""
    batches = whole_batches(dataset, model.config, batch_size=batch_size)
    assert isinstance(model.module, Autoencoder)
    return _evaluate(model.module, batches, dataset, {})


def to_mm(dataset: StreamlineDataset, subject: Tensor) -> Tensor:
    """(S, 1, 3): factors from a batch's units, voxels or mm along the voxel axes, to mm."""
    return (dataset.voxel_sizes / direction_units(dataset.voxel_sizes))[subject][:, None]


def read_reconstruction(directory: str | Path) -> Reconstruction | None:
    """The recorded evaluation; None if there is none, or not of an autoencoder, or the file is corrupt."""
    import pydantic

    try:
        values = read_checked(Path(directory) / EVALUATION_FILE) or {}
        known: dict[str, Any] = {name: values[name] for name in Reconstruction.__slots__}
        return pydantic.TypeAdapter(Reconstruction).validate_json(json.dumps(known), strict=True)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _evaluate(
    model: Autoencoder,
    batches: Iterable[StreamlineBatch],
    dataset: StreamlineDataset,
    baselines: dict[str, _Reconstruct],
    **facts: Any,
) -> Reconstruction:
    errors: dict[str, list[Tensor]] = {name: [] for name in ("model", *baselines)}
    ways: dict[str, _Reconstruct] = {"model": lambda points: model.decode(model.encode(points)), **baselines}
    for batch in batches:
        points = batch.points.unflatten(0, (-1, model.nb_points))
        factors = to_mm(dataset, batch.subject)
        with torch.no_grad():
            for name, reconstruct in ways.items():
                distances = ((reconstruct(points) - points) * factors).norm(dim=2)
                errors[name].append(distances.mean(dim=1, dtype=torch.float64))
    by_streamline = {name: torch.cat(parts).numpy() for name, parts in errors.items()}
    own = by_streamline["model"]
    return Reconstruction(
        median=float(np.median(own)),
        percentile_95=float(np.percentile(own, 95)),
        num_points=len(own) * model.nb_points,
        num_streamlines=len(own),
        **{name: float(values.mean()) for name, values in by_streamline.items()},  # all have as many points
        **facts,
    )


def _principal_components(points: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The mean streamline (n, 3), and at most so many principal components (K, 3 n), float64."""
    mean = points.double().mean(0)
    _, values, components = torch.linalg.svd((points.double() - mean).flatten(1), full_matrices=False)
    return mean, components[: min(most, int((values > 0).sum()))]


def _project(points: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    weights = (points - mean).flatten(1) @ components.T
    return mean + (weights @ components).reshape(points.shape)
