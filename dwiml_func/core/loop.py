"""The training loop: a run is a generator of epochs.

The generator yields the state and a report after each epoch, until the last epoch or until patience runs out. The
caller's `for` loop acts on them: it writes logs and saves checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import replace

from dwiml_func.core.batch_source import Batches
from dwiml_func.core.early_stopping import Mode, should_stop
from dwiml_func.core.epoch import EvalStep, OnBatch
from dwiml_func.core.loop_options import LoopOptions, Track
from dwiml_func.core.rates import Step
from dwiml_func.core.report import EpochReport
from dwiml_func.core.run_epoch import epoch_events
from dwiml_func.core.state import TrainState, check_state
from dwiml_func.optim.schedules import check_rate, constant
from dwiml_func.types import OnPlateau, PerStep, Schedule

__all__ = ["train_and_validate"]


def train_and_validate(
    state: TrainState,
    *,
    train: Batches,
    step: Step,
    valid: Batches | None = None,
    eval_step: EvalStep | None = None,
    learning_rate: float | Schedule,
    max_epochs: int,
    patience: int | None = None,
    patience_delta: float = 1e-6,
    monitor: str = "loss",
    mode: Mode = "min",
    validate_every: int | str = 1,
    keep_unvalidated: bool = True,
    on_batch: OnBatch | None = None,
    interrupt: Callable[[], bool] | None = None,
    track: Track | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[tuple[TrainState, EpochReport], TrainState | None, None]:
    """Train and validate, epoch by epoch, until `max_epochs` or until patience runs out: a fold of `run_epoch`.

    Args:
        state: where to start: `init_state(...)` or a restored checkpoint, also one from the middle of an epoch.
        train: `train(key, epoch, start_batch)` gives training batches, `key` being the run's root key.
        step: `step(state, batch, lr=...)`, e.g. `partial(train_step, loss_fn=..., optimizer=...)`.
        valid: like `train`, for validation. None: the means over the training decide the best epoch.
        eval_step: `eval_step(state, batch)`; needed with `valid`.
        learning_rate: a number; a function of the number of epochs done; `per_step(f)`, f being a function of the
            number of optimizer steps done; or `reduce_on_plateau(...)`.
        max_epochs: number of epochs at which the run ends, counted from its very start.
        patience: validations in a row without a new best after which the run ends; None never ends it.
        patience_delta: least improvement of the monitored metric that counts.
        monitor: the metric that decides the best epoch: "loss", or the name of an auxiliary metric.
        mode: "min" where a lower value is better, "max" where a higher one is.
        validate_every: validate after every so many epochs, or "500batches": after every 500 batches of an epoch that
            are not its last, and at its end. Best epoch and patience count validations only.
        keep_unvalidated: whether an epoch whose validation fails with an error is yielded, without validation, before
            the error is raised. Otherwise the error is raised at once.
        on_batch: called with the state and the sums after each training batch.
        interrupt: called after each training and each validation batch; True ends the loop with `Interrupted`.
        track: shows progress: `track(batches, label, epoch=..., start_batch=...)` gives back the same batches, see
            `dwiml_func.writers.progress.Progress.track`.
        clock: gives seconds; for tests.

    Yields:
        The state after each epoch, and its report; with `validate_every="500batches"` also after each validation within
        an epoch, when `report.batch` is not 0. If patience runs out there, the run ends there. Nothing is yielded when
        `state` has no epoch left to do. A state that is sent back (`epochs.send(state)`) takes the place of the one
        that was yielded.

    Raises:
        ValueError: at the call, for `valid` without `eval_step` or an option out of range; in an epoch, when it has no
            batch, its learning rate is no finite number of at least 0, there is no metric of the name `monitor`, or
            `train` ignores `start_batch`.
        TypeError: the step does not return a state and its sums.
        NonFiniteError: a training loss or gradient was not finite. The last state that was yielded is valid, unless a
            donating step has reused its memory.
        Interrupted: `interrupt` asked for it.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from dwiml_func import init_state, module_loss, optim, train_step
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
        >>> step = partial(train_step, loss_fn=loss_fn, optimizer=optim.sgd())
        >>> def train(key, epoch, start_batch):
        ...     return [torch.ones(4, 2)] * (3 - start_batch)
        >>> state = init_state(model, optim.sgd(), seed=0)
        >>> for state, report in train_and_validate(state, train=train, step=step, learning_rate=0.1, max_epochs=2):
        ...     print(report.epoch, report.num_batches, report.num_points, report.stop)
        1 3 12.0 None
        2 3 12.0 max_epochs
    """
    check_state(state)
    options = LoopOptions(
        train=train, step=step, valid=valid, eval_step=eval_step, learning_rate=learning_rate, max_epochs=max_epochs,
        patience=patience, patience_delta=patience_delta, monitor=monitor, mode=mode, validate_every=validate_every,
        keep_unvalidated=keep_unvalidated, on_batch=on_batch, interrupt=interrupt, track=track, clock=clock,
    )  # fmt: skip
    if max_epochs is None:
        raise ValueError("Expected max_epochs of at least 1; math.inf trains until patience runs out. Received: None")
    if not (callable(learning_rate) or isinstance(learning_rate, PerStep | OnPlateau)):
        options = replace(options, learning_rate=constant(check_rate(learning_rate)))  # refused here, not in an epoch
    return _epochs(state, options, max_epochs)


def _epochs(
    state: TrainState, options: LoopOptions, max_epochs: int
) -> Generator[tuple[TrainState, EpochReport], TrainState | None, None]:
    while state.epoch < max_epochs and not should_stop(state.best, options.patience):
        state = yield from epoch_events(state, options)
