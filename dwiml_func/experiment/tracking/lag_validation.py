"""The window lag of a run's validations: one more batch, of windows, after the validation's own, and its step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dwiml_func.core.batch_source import Batches
from dwiml_func.core.metrics import weighted_sum
from dwiml_func.core.rng import Key, Stream, fold_in
from dwiml_func.core.state import TrainState
from dwiml_func.core.weights import load_into
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.prefetch import SizedBatches
from dwiml_func.ensemble.state import EnsembleState, member
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.training_config import WINDOW_LAG
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.window_lag import LagWindows, choose_windows, window_lags
from dwiml_func.types import Metrics, Optimizer, Sum

__all__ = ["Followed", "measure_window_lag", "run_windows", "space_of_subject", "with_window_lag", "without_window_lag"]

_WINDOWS = 0x1A6  # of the tracking stream's random numbers


def with_window_lag(
    valid: Batches, evaluate: Any, *, config: RunConfig, dataset: StreamlineDataset, model: Any, optimizer: Optimizer
) -> tuple[Batches, Any]:
    """Validation batches followed by one of windows, and the step that measures the lag there, of a run or an ensemble.

    The same where no window can be chosen, or the model cannot track.
    """
    if not hasattr(model, "run_step"):
        return valid, evaluate
    tracker = copy.deepcopy(model).eval()
    windows = functools.cache(lambda: run_windows(config, dataset, model))

    def batches(key: Key, epoch: int, start_batch: int) -> Any:
        own: Any = valid(key, epoch, start_batch)
        return own if windows() is None else Followed(own, windows())

    def lag_of(state: TrainState, batch: LagWindows) -> float:
        load_into(tracker, state, optimizer=optimizer)
        return measure_window_lag(tracker, batch, space_of=space_of_subject(config, dataset, tracker))

    def step(state: TrainState | EnsembleState, batch: Any) -> Metrics:
        if not isinstance(batch, LagWindows):
            return evaluate(state, batch)
        if isinstance(state, TrainState):
            return {WINDOW_LAG: weighted_sum(lag_of(state, batch), len(batch))}
        active = state.active.tolist()
        lags = [lag_of(member(state, number), batch) if active[number] else 0.0 for number in range(len(state))]
        weights = torch.full((len(lags),), float(len(batch)), dtype=torch.float64)
        return {WINDOW_LAG: Sum(torch.tensor(lags, dtype=torch.float64) * weights, weights)}

    return batches, step


def run_windows(config: RunConfig, dataset: StreamlineDataset, model: Any) -> LagWindows | None:
    """The windows on which a run is judged: the same for all runs on the same data that are sampled alike."""
    key = fold_in(Key(0), Stream.TRACK, _WINDOWS)
    max_points = getattr(model, "max_len", None)  # of a transformer
    return choose_windows(dataset, key=key, resampling=config.batches.resampling, max_points=max_points)


def measure_window_lag(model: Any, windows: LagWindows, *, space_of: Callable[[int], TrackingSpace]) -> float:
    """The mean lag in mm of a model in evaluation mode."""
    return float(window_lags(model, windows, space_of).mean())


def space_of_subject(
    config: RunConfig, dataset: StreamlineDataset, model: torch.nn.Module
) -> Callable[[int], TrackingSpace]:
    """Gives a subject's volume on the model's device, read as in the training."""
    device = next(model.parameters()).device

    def space(row: int) -> TrackingSpace:
        x, y, z = dataset.voxel_sizes[row].tolist()
        return TrackingSpace(
            volume=dataset.volumes[row].to(device),
            voxel_sizes=(x, y, z),
            interpolation=config.data.interpolation,
            neighborhood=config.data.neighborhood,
        )

    return space


def without_window_lag(config: RunConfig) -> RunConfig:
    """The config of the same training, whose validations have no window lag."""
    return replace(config, training=replace(config.training, skip_window_lag=True))


class Followed:
    """Batches and one more; they can be counted."""

    def __init__(self, batches: SizedBatches[Any], last: Any) -> None:
        self._batches, self._last = batches, last

    def __len__(self) -> int:
        return len(self._batches) + 1

    def __iter__(self) -> Iterator[Any]:
        yield from self._batches
        yield self._last
