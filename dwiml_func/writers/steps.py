"""Logs by step: values of single steps beside the reports of epochs, and `logs/steps.jsonl`, which holds them."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dwiml_func.core.metrics import read_means
from dwiml_func.core.non_finite import NON_FINITE
from dwiml_func.core.report import EpochReport, Validation
from dwiml_func.core.state import TrainState
from dwiml_func.files.atomic import atomic_write
from dwiml_func.files.json import null_if_not_finite
from dwiml_func.optim.schedules import value_at
from dwiml_func.types import Metrics, Number, Plateau, Schedule
from dwiml_func.writers.writer import StepWriter

__all__ = ["ScalarLines", "log_steps", "read_scalars", "step_scalars"]


def log_steps(
    write: StepWriter, *, every: int, learning_rate: float | Schedule | None = None
) -> Callable[[TrainState, Metrics | EpochReport], None]:
    """Log the values of every so many steps, for `train_and_validate(on_batch=...)`.

    A value is that of one batch, not a mean since the last row, so a run that is resumed within an epoch writes the
    rows of a run that was never stopped. Steps that are not logged do not wait for the device. The means of validations
    within an epoch are logged with the step before them, as `valid_loss` and so on.

    Args:
        write: a writer with `write_scalars`, such as `jsonl(directory)` or a `fan_out(...)`.
        every: number of steps between two rows, counted from the start of the run.
        learning_rate: that of the run, to log it too.

    Returns:
        A function of the state after a batch and the batch's sums. It logs a validation with the next batch; called
        with the state and the report of a validation, it logs that at once, so that no kill and no end comes before.

    Raises:
        ValueError: `every` is below 1.

    Example:
        >>> import tempfile, torch
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, sgd, train_and_validate, train_step
        >>> from dwiml_func.writers import jsonl
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for state, report in train_and_validate(
        ...         init_state(model, sgd(), seed=0),
        ...         train=lambda key, epoch, start_batch: [torch.zeros(4, 2)] * (5 - start_batch),
        ...         step=partial(train_step, loss_fn=loss_fn, optimizer=sgd()),
        ...         learning_rate=0.1,
        ...         max_epochs=2,
        ...         on_batch=log_steps(jsonl(directory), every=4, learning_rate=0.1),
        ...     ):
        ...         pass
        ...     for row in read_scalars(directory):
        ...         print(row["step"], row["learning_rate"])
        4 0.1
        8 0.1
    """
    if every < 1:
        raise ValueError(f"Expected a number of steps of at least 1 between two rows. Received: {every}")

    seen: tuple[Validation, ...] | None = None  # validations that are logged; those of a resumed state are

    def on_batch(state: TrainState, values: Metrics | EpochReport) -> None:
        nonlocal seen
        if state.validations and state.validations != seen and (seen is not None or isinstance(values, EpochReport)):
            last = state.validations[-1]
            step = state.step - state.batch + last.batch
            write.write_scalars(step, {f"valid_{name}": mean for name, mean in last.means.items()})
        seen = state.validations
        if not isinstance(values, EpochReport) and state.step % every == 0:
            position: dict[str, Any] = {"epoch": state.epoch, "step": state.step - 1, "plateau": state.plateau}
            write.write_scalars(state.step, step_scalars(values, learning_rate, **position))

    return on_batch


def step_scalars(
    metrics: Metrics, learning_rate: float | Schedule | None, *, epoch: int, step: int, plateau: Plateau
) -> dict[str, float]:
    """The means of a batch and the learning rate of its step; the counts are numbers done before it."""
    values = read_means({name: own for name, own in metrics.items() if name != NON_FINITE})
    if learning_rate is not None:
        values["learning_rate"] = value_at(learning_rate, epoch=epoch, step=step, plateau=plateau)
    return values


class ScalarLines:
    """The file `logs/steps.jsonl`: one JSON object a step, in order, each step once."""

    def __init__(self, directory: str | Path) -> None:
        self._path = Path(directory) / "logs" / "steps.jsonl"
        self._last: int | None = None  # the last step in the file, once this has read it

    def __call__(self, step: int, values: Mapping[str, Number]) -> None:
        """Add the values of a step. What the file has of later steps is removed; without values, nothing else."""
        step = operator.index(step)
        if "step" in values:
            raise ValueError("Expected scalars of other names than 'step', which is the row's number.")
        row = null_if_not_finite({"step": step, **{name: float(value) for name, value in values.items()}})
        last, self._last = self._last, None  # after an error the file is read again
        if values:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if last is None or last >= step:
            kept = {own["step"]: own for own in _read(self._path) if own["step"] <= step}
            if values:
                kept[step] = kept.get(step, {}) | row
            content = "".join(json.dumps(own) + "\n" for own in kept.values())
            if content if not self._path.exists() else self._path.read_text(encoding="utf-8") != content:
                atomic_write(self._path, content, flush=False)
            self._last = max(kept, default=-1)
        elif values:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._last = step
        else:
            self._last = last


def read_scalars(directory: str | Path) -> list[dict[str, Any]]:
    """Read `logs/steps.jsonl`.

    Args:
        directory: the experiment.

    Returns:
        A dict for each step that was logged, in order: its number `step`, and its values by name, None for what was not
        finite. Empty where there is no such file.

    Example:
        >>> read_scalars("/no/such/run")
        []
    """
    return _read(Path(directory) / "logs" / "steps.jsonl")


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows up to the first line that was not written completely, or is out of order."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        if rows and row["step"] <= rows[-1]["step"]:
            break
        rows.append(row)
    return rows
