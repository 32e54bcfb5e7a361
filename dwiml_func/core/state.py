"""The training state: one immutable value that holds everything a run is.

In this package `step`, `epoch` and `batch` always mean "number done", which is also the index of the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from dwiml_func.core.early_stopping import Best
from dwiml_func.core.rng import Key, fold_in
from dwiml_func.types import Buffers, Metrics, OptState, Params

if TYPE_CHECKING:
    from dwiml_func.optim.optimizers import Optimizer

__all__ = ["TrainState", "init_state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """A run, whole. It holds data only: no functions, modules, files or devices.

    Args:
        params: trainable tensors, by name.
        buffers: other tensors of the model, by name.
        opt_state: moments of the optimizer.
        key: root of all randomness; it never changes during a run.
        step: optimizer updates done.
        epoch: epochs finished.
        batch: batches done in the epoch under way; 0 at an epoch's boundary.
        sums: metric sums of the epoch under way; empty at a boundary.
        best: the best epoch so far.

    Example:
        >>> from dwiml_func.optim import sgd
        >>> state = init_state(torch.nn.Linear(2, 1), sgd(), seed=0)
        >>> state.step, state.epoch, sorted(state.params)
        (0, 0, ['bias', 'weight'])
    """

    params: Params
    buffers: Buffers
    opt_state: OptState
    key: Key
    step: int = 0
    epoch: int = 0
    batch: int = 0
    sums: Metrics = field(default_factory=dict)
    best: Best = field(default_factory=Best)

    def replace(self, **changes: object) -> TrainState:
        """Return a copy in which the named fields have new values.

        Args:
            **changes: field names and their new values.

        Returns:
            The new state; tensors are shared, not copied.
        """
        return replace(self, **changes)  # type: ignore[arg-type]


def init_state(module: torch.nn.Module, optimizer: Optimizer, *, seed: int | Key) -> TrainState:
    """Make the first state of a run from a module's present values.

    Args:
        module: any module. Its tensors are copied, so training never changes it. Parameters that do not require a
            gradient go to the buffers and stay as they are.
        optimizer: an init/update pair, see `dwiml_func.optim`.
        seed: the run's seed, or its root key.

    Returns:
        A state at step 0, epoch 0.

    Raises:
        ValueError: the module has nothing to train, or the seed is out of range.

    Example:
        >>> from dwiml_func.optim import adam
        >>> state = init_state(torch.nn.BatchNorm1d(2), adam(), seed=0)
        >>> sorted(state.params), sorted(state.buffers), sorted(state.opt_state)
        (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'], ['exp_avg', 'exp_avg_sq'])
    """
    key = fold_in(seed if isinstance(seed, Key) else Key(seed))  # checked, and of Python's own integers, as JSON takes
    named = dict(module.named_parameters())
    params = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in named.items() if not p.requires_grad}
    if not params:
        raise ValueError(
            f"Expected a module with at least one parameter that requires a gradient. "
            f"Received: {type(module).__name__} with {len(frozen)} frozen parameters."
        )
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    return TrainState(params=params, buffers=frozen | buffers, opt_state=optimizer.init(params), key=key)


class _Donated(Mapping[str, Tensor]):
    """Stands where a donated state's tensors were, and says so to whoever looks."""

    def __init__(self, step: int) -> None:
        self._step = step

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError(_donated_message(self._step))

    __getitem__ = __iter__ = __len__ = __contains__ = keys = values = items = get = _refuse

    def __repr__(self) -> str:
        return "<donated>"


def _donated_message(step: int) -> str:
    return (
        f"This state was donated to the update after step {step}, which reused its memory. "
        f"Use the state that the update returned, or pass donate=False to keep both."
    )


def check_not_donated(state: TrainState) -> None:
    """Raise an error when a state's memory was donated, also through another state that shared its dicts.

    Args:
        state: the state about to be used.

    Raises:
        RuntimeError: it was donated.
    """
    if not state.params:  # a state has parameters (`init_state` sees to it) until `mark_donated` takes them away
        raise RuntimeError(_donated_message(state.step))


def mark_donated(state: TrainState) -> None:
    """Make every later use of a state's tensors an error that names the step.

    The dicts are emptied too, for states that share them (`state.replace(...)` copies no tensor): see `check_not_donated`.

    Args:
        state: the state whose memory an update has reused.
    """
    old = (state.params, state.opt_state)
    for name in ("params", "buffers", "opt_state"):
        object.__setattr__(state, name, _Donated(state.step))
    for mapping in old:
        if isinstance(mapping, dict):
            mapping.clear()
