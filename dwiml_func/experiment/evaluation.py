"""A model's loss and angular error, compared with two baselines that need no training, and the file `evaluation.json`.

`evaluate_best_model` judges a run's best model on its validation batches, at the end of the training;
`write_evaluation` records that. `evaluate_model` judges any model on a whole subset of a dataset.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwiml_func._checks import one_line
from dwiml_func.core.metrics import add_metrics, read_means, weighted_sum
from dwiml_func.core.report import EpochReport
from dwiml_func.core.rng import Key
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.streamlines import directions
from dwiml_func.experiment.batches import check_usable, whole_batches
from dwiml_func.experiment.model_store import LoadedModel
from dwiml_func.experiment.reconstruction import EVALUATION_FILE, Reconstruction, read_reconstruction
from dwiml_func.experiment.setup import RunParts
from dwiml_func.experiment.tracking.lag_validation import measure_window_lag, run_windows, space_of_subject
from dwiml_func.files.json import read_checked, write_checked
from dwiml_func.models.baselines import angular_error, keep_straight, principal_direction
from dwiml_func.models.tractography_model import TractographyModel
from dwiml_func.types import Metrics

__all__ = [
    "Evaluation",
    "ModelEvaluation",
    "evaluate_best_model",
    "evaluate_directions",
    "evaluate_model",
    "is_evaluated",
    "read_evaluation",
    "write_evaluation",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Mean angular errors in degrees, all at the same points: those that have a previous and a next direction.

    `keep_straight` predicts the previous direction, `principal_direction` follows the diffusion tensor; the latter is
    None when the input volume is not known to hold spherical harmonics of the signal. `first_points` is the model's
    error at the first points, which have no previous direction; None if it is not known.
    """

    model: float
    keep_straight: float
    principal_direction: float | None
    num_points: int
    num_streamlines: int
    first_points: float | None = None


def evaluate_directions(
    predict: Callable[[StreamlineBatch], Tensor],
    batches: Iterable[StreamlineBatch],
    input_attributes: Mapping[str, Any],
    *,
    num_features: int | None = None,
) -> Evaluation:
    """Compare predicted directions with the streamlines' own, and with the baselines; NaN if no point counts.

    `predict` maps a batch to directions (N, 3) along the voxel axes at its N points with a next direction. The first
    `num_features` input columns (None: all) are the volume at the point itself, the others that at its neighbours.
    """
    totals = {"model": 0.0, "keep_straight": 0.0, "principal_direction": 0.0}
    num_points, num_streamlines, has_principal = 0, 0, True
    first_total, num_first = 0.0, 0
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
        first_total += angular_error(predictions["model"][~valid], targets[~valid]).sum(dtype=torch.float64).item()
        num_points, num_first = num_points + int(valid.sum()), num_first + int((~valid).sum())
        num_streamlines += len(batch)
    means = {name: total / num_points if num_points else float("nan") for name, total in totals.items()}
    return Evaluation(
        model=means["model"],
        keep_straight=means["keep_straight"],
        principal_direction=means["principal_direction"] if has_principal else None,
        num_points=num_points,
        num_streamlines=num_streamlines,
        first_points=first_total / num_first if num_first else None,
    )


def evaluate_best_model(model: TractographyModel, parts: RunParts) -> Evaluation:
    """Compare a run's best model, on the CPU, with the baselines on its validation batches, or else on training's."""
    dataset, key = parts.data.evaluation, Key(parts.config.training.rng)
    batches = (batch.to(torch.device("cpu")) for batch in parts.evaluation(key, 0, 0))
    return evaluate_directions(model.directions, batches, dataset.input_attributes, num_features=dataset.num_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEvaluation:
    """A model's results on a whole subset of a dataset.

    loss: mean over `num_points`, those that have a next direction and, with EOS, the last ones.
    angular_error: mean angle in degrees to the true direction, over all points that have a next direction.
    compared: the same and the baselines, at the points where the baselines have a direction too.
    window_lag: mean distance in mm from the real streamline, where the model reads up to 60 mm of it and continues
        alone for 20 mm; None where no streamline is long enough.
    """

    loss: float
    num_points: int
    num_streamlines: int
    angular_error: float
    compared: Evaluation
    window_lag: float | None = None


def evaluate_model(model: LoadedModel, dataset: StreamlineDataset, *, batch_size: int = 100) -> ModelEvaluation:
    """Run a model on all streamlines of a dataset, read and resampled as for its training, without augmentation.

    `batch_size` streamlines run at a time; it affects only the rounding. Raises ValueError if the dataset has no
    streamlines or the model cannot use it.
    """
    module = model.tracker
    batches = whole_batches(dataset, model.config, batch_size=batch_size)
    if dataset.num_features != module.nb_features:
        raise ValueError(
            f"{dataset.path}: expected input volumes with {module.nb_features} features, as the model's, "
            f"received {dataset.num_features}. Evaluate on the volumes it was trained on (see --input-group-name)."
        )
    check_usable(dataset, model.config)
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
    means, windows = read_means(sums), run_windows(model.config, dataset, module)
    return ModelEvaluation(
        loss=means["loss"],
        num_points=int(sums["loss"].weight),
        num_streamlines=compared.num_streamlines,
        angular_error=means["angular_error"],
        compared=compared,
        window_lag=None
        if windows is None
        else measure_window_lag(module, windows, space_of=space_of_subject(model.config, dataset, module)),
    )


def write_evaluation(
    directory: str | Path,
    evaluation: Evaluation | Reconstruction,
    *,
    epoch: int,
    subset: str,
    num_epochs: int | None = None,
) -> None:
    """Write the evaluation of a run's best model, of a best epoch of `num_epochs`, on the "validation" or "training"
    subset."""
    facts = {"epoch": epoch, "num_epochs": num_epochs, "subset": subset}
    write_checked(Path(directory) / EVALUATION_FILE, {**facts, **asdict(evaluation)})


def is_evaluated(directory: str | Path, history: Sequence[EpochReport]) -> bool:
    """Whether the folder has the evaluation of the best model after these epochs."""
    if read_evaluation(directory) is None and read_reconstruction(directory) is None:
        return False
    values = read_checked(Path(directory) / EVALUATION_FILE) or {}
    num_epochs = values.get("num_epochs", history[-1].epoch)  # earlier versions did not write it
    return (values.get("epoch"), num_epochs) == (history[-1].best.epoch, history[-1].epoch)


def read_evaluation(directory: str | Path) -> Evaluation | None:
    """The recorded evaluation; None if there is none or the file is corrupt, which is warned of."""
    import pydantic

    try:
        values = read_checked(Path(directory) / EVALUATION_FILE)
        if values is None:
            return None
        angles = {name: math.nan if values[name] is None else values[name] for name in ("model", "keep_straight")}
        known = {name: values[name] for name in ("principal_direction", "num_points", "num_streamlines")}
        known["first_points"] = values.get("first_points")  # earlier versions did not write it
        return pydantic.TypeAdapter(Evaluation).validate_json(json.dumps({**angles, **known}), strict=True)
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).warning("%s Make it again with dwiml-func evaluate --write.", one_line(error))
    except (LookupError, TypeError):  # that of an autoencoder
        pass
    return None
