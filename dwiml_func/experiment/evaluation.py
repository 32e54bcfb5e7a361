"""How well a model does: its loss, and its angular error beside two baselines that need no training.

`evaluation.json`: how the best model of a training does beside the baselines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwiml_func.core.metrics import add_metrics, read_means, weighted_sum
from dwiml_func.core.rng import Key
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.loader import epoch_batches
from dwiml_func.data.prefetch import Prefetched
from dwiml_func.data.sampler import SamplerSpec
from dwiml_func.data.streamlines import directions
from dwiml_func.experiment.batches import check_usable, loader_spec
from dwiml_func.experiment.model_store import LoadedModel, load_model
from dwiml_func.experiment.setup import RunParts
from dwiml_func.files.atomic import atomic_write
from dwiml_func.models.baselines import angular_error, keep_straight, principal_direction
from dwiml_func.types import Metrics

__all__ = [
    "Evaluation",
    "ModelEvaluation",
    "evaluate_best_model",
    "evaluate_directions",
    "evaluate_model",
    "read_evaluation",
    "write_evaluation",
]


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


def evaluate_best_model(directory: str | Path, parts: RunParts) -> Evaluation:
    """Compare an experiment's best model with the baselines on the batches that are there to judge it.

    Args:
        directory: the experiment.
        parts: its parts.

    Returns:
        The errors, on the validation subjects or, where there are none, on the training subjects.

    Raises:
        ValueError, OSError: there is no best model, or it is corrupt.

    Example:
        >>> evaluate_best_model("experiments/first_run", prepare(config)).model  # doctest: +SKIP
    """
    dataset, key = parts.data.evaluation, Key(parts.config.training.rng)
    model = load_model(Path(directory) / "best_model").module  # on the CPU, wherever it was trained
    batches = (batch.to(torch.device("cpu")) for batch in parts.evaluation(key, 0, 0))
    return evaluate_directions(model.directions, batches, dataset.input_attributes, num_features=dataset.num_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEvaluation:
    """What a model does on a whole subset of a dataset.

    Args:
        loss: mean over `num_points`, of the model's direction getter.
        num_points: points that have a next direction and, with EOS, the last ones.
        num_streamlines: number of streamlines.
        angular_error: mean angle in degrees to the true direction, over all points that have a next direction.
        compared: the same beside the baselines, at the points where those give a direction too.

    Example:
        >>> ModelEvaluation.__slots__[:3]
        ('loss', 'num_points', 'num_streamlines')
    """

    loss: float
    num_points: int
    num_streamlines: int
    angular_error: float
    compared: Evaluation


def evaluate_model(model: LoadedModel, dataset: StreamlineDataset, *, batch_size: int = 100) -> ModelEvaluation:
    """Run a model on all streamlines of a dataset, as it was trained: interpolation, neighbourhood, resampling, EOS.

    Streamlines are not augmented.

    Args:
        model: the model.
        dataset: what to run it on.
        batch_size: streamlines at a time. It changes the last bits at most.

    Returns:
        The means.

    Raises:
        ValueError: the dataset has no streamlines, or the model cannot use it.

    Example:
        >>> evaluate_model(load_model("best_model"), open_dataset("data.hdf5", "testing")).loss  # doctest: +SKIP
    """
    module = model.module
    if dataset.index.num_total == 0:
        raise ValueError(f"{dataset.path} has no streamlines of {dataset.subset} subjects to evaluate on.")
    if dataset.num_features != module.nb_features:
        raise ValueError(
            f"The model reads {module.nb_features} features a voxel, and the input volumes of {dataset.path} have "
            f"{dataset.num_features}. Evaluate on the volumes it was trained on (see --input-group-name)."
        )
    check_usable(dataset, model.config)
    sampler = SamplerSpec(batch_size=batch_size)
    batches = Prefetched(epoch_batches(dataset, sampler, loader_spec(model.config), key=Key(0), epoch=0))
    sums: Metrics = {}

    def predict(batch: StreamlineBatch) -> Tensor:
        nonlocal sums
        outputs, true = module(batch), directions(batch.points, batch.offsets)
        loss = module.direction_getter.loss(outputs, batch.at_inputs(true), batch.is_last)
        predicted = module.direction_getter.directions(batch.at_directions(outputs))
        error = angular_error(predicted, true).mean()
        new = {"loss": weighted_sum(*loss), "angular_error": weighted_sum(error, batch.num_directions)}
        sums = add_metrics(sums, new)
        return predicted

    compared = evaluate_directions(predict, batches, dataset.input_attributes, num_features=dataset.num_features)
    means = read_means(sums)
    return ModelEvaluation(
        loss=means["loss"],
        num_points=int(sums["loss"].weight),
        num_streamlines=compared.num_streamlines,
        angular_error=means["angular_error"],
        compared=compared,
    )


_NAME = "evaluation.json"


def write_evaluation(directory: str | Path, evaluation: Evaluation, *, epoch: int, subset: str) -> None:
    """Write the file.

    Args:
        directory: the experiment.
        evaluation: of its best model; NaN is written as null.
        epoch: the best epoch.
        subset: whose streamlines it was evaluated on, "validation" or "training".

    Raises:
        OSError: the disk is full, or the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> evaluation = Evaluation(
        ...     model=10.0, keep_straight=4.0, principal_direction=None, num_points=7, num_streamlines=1)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_evaluation(directory, evaluation, epoch=3, subset="validation")
        ...     read_evaluation(directory) == evaluation
        True
    """
    values = {name: None if _is_nan(value) else value for name, value in asdict(evaluation).items()}
    atomic_write(Path(directory) / _NAME, json.dumps({"epoch": epoch, "subset": subset, **values}, indent=2) + "\n")


def read_evaluation(directory: str | Path) -> Evaluation | None:
    """Read what was recorded.

    Args:
        directory: the experiment.

    Returns:
        The evaluation; None where there is none, or the file is corrupt.

    Example:
        >>> read_evaluation("/no/such/experiment") is None
        True
    """
    import pydantic

    try:
        values = json.loads((Path(directory) / _NAME).read_bytes())
        angles = {name: math.nan if values[name] is None else values[name] for name in ("model", "keep_straight")}
        known = {name: values[name] for name in ("principal_direction", "num_points", "num_streamlines")}
        return pydantic.TypeAdapter(Evaluation).validate_json(json.dumps({**angles, **known}), strict=True)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
