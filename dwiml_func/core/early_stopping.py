"""The best epoch and early stopping, as values.

The best epoch is part of the training state, so a checkpoint commits it together with the latest epoch. To stop by
another rule, leave the `for` loop over `train_and_validate`.

To build a rule in: what it remembers is a field of `Best` with a default, which `to_fields` leaves out while it has it,
so that old checkpoints are read; `update_best` counts and `should_stop` decides. Its option stands beside `patience` in
`LoopOptions`, `train_and_validate`, `run_epoch`, their twin of ensembles and `experiment/training_config.py`; its name
is one more of `EpochReport.stop`, which `LoopOptions.judge` sets and `cli/_summary.py` and `experiment/page/page.py`
put into words. `grep -rnE 'should_stop|"patience"' dwiml_func` lists the other places.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

__all__ = ["Best", "Mode", "should_stop", "update_best"]


Mode = Literal["min", "max"]
"""Whether a lower or a higher value of the monitored metric is better."""


class Best(NamedTuple):
    """The best epoch so far.

    Args:
        value: the monitored metric of the best epoch, by default the loss; infinite while there is none.
        epoch: the best epoch (1 is the first); None while there is none.
        num_bad_epochs: validations since then; without validation, epochs.
        batch: where the best state is within `epoch`, the number of its batches done; 0 at the epoch's end.

    Example:
        >>> Best()
        Best(value=inf, epoch=None, num_bad_epochs=0, batch=0)
    """

    value: float = math.inf
    epoch: int | None = None
    num_bad_epochs: int = 0
    batch: int = 0

    def to_fields(self) -> dict[str, Any]:
        """The fields by name, for JSON; `batch` only where it is not 0, as in what was written before it existed."""
        return {name: value for name, value in self._asdict().items() if name != "batch" or value}


def update_best(
    best: Best, value: float, epoch: int, *, patience_delta: float = 1e-6, mode: Mode = "min", batch: int = 0
) -> Best:
    """Compare an epoch with the best one.

    The first finite value is the best. A later one must be better by more than `patience_delta`, so a tie keeps the
    earlier epoch. NaN and infinity count as bad epochs.

    Args:
        best: the best epoch so far.
        value: the epoch's monitored metric.
        epoch: number of epochs done, including this one.
        patience_delta: least improvement that counts.
        mode: "max" where a higher value is better.
        batch: number of batches done in the epoch; 0 at its end.

    Returns:
        The new best, or the old one with one more bad epoch.

    Example:
        >>> update_best(Best(0.5, 1), 0.4, 2)
        Best(value=0.4, epoch=2, num_bad_epochs=0, batch=0)
        >>> update_best(Best(0.5, 1), float("nan"), 2)
        Best(value=0.5, epoch=1, num_bad_epochs=1, batch=0)
    """
    is_better = value < best.value - patience_delta if mode == "min" else value > best.value + patience_delta
    improved = math.isfinite(value) and (best.epoch is None or is_better)
    if improved:
        return Best(value, epoch, 0, batch)
    return best._replace(num_bad_epochs=best.num_bad_epochs + 1)


def should_stop(best: Best, patience: int | None) -> bool:
    """Whether there were `patience` bad epochs in a row.

    Args:
        best: the best epoch so far.
        patience: bad epochs allowed in a row; None never stops.

    Returns:
        True when the run should end.

    Example:
        >>> should_stop(Best(0.5, 1, num_bad_epochs=3), patience=3)
        True
    """
    return patience is not None and best.num_bad_epochs >= patience
