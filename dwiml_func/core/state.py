"""The training state: one immutable value that holds everything a run is.

In this package `step`, `epoch` and `batch` always mean "number done", which is also the index of the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import (  # the same in torch 2.11 and 2.13
    keystr,
    register_pytree_node,
    tree_flatten_with_path,
    tree_map,
)

from dwiml_func._checks import at_most_three, listed, truncated_repr
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.layout import memory_problems, overlapping
from dwiml_func.core.metrics import add_metrics
from dwiml_func.core.report import Validation
from dwiml_func.core.rng import Key, fold_in
from dwiml_func.optim.chain import check_optimizer
from dwiml_func.types import Buffers, Metrics, Optimizer, OptState, Params, Plateau, Sum

__all__ = [
    "TrainState",
    "advance",
    "check_can_donate",
    "check_not_donated",
    "check_state",
    "describe_best",
    "describe_tensors",
    "init_state",
]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrainState:
    """A whole run. It holds data only: no functions, modules, files or devices.

    It is a tree for `torch.utils._pytree` and `torch.func`: its tensors are the leaves, all else belongs to the
    structure.

    Args:
        params: trainable tensors, by name.
        buffers: other tensors of the model, by name.
        opt_state: optimizer state.
        key: root of all randomness; it never changes during a run.
        step: optimizer updates done.
        epoch: epochs finished.
        batch: batches done in the current epoch; 0 between epochs.
        sums: metric sums of the current epoch; empty between epochs.
        best: the best epoch so far.
        plateau: what `reduce_on_plateau` depends on.
        validations: those within the current epoch; empty between epochs.

    Example:
        >>> from dwiml_func.optim import sgd
        >>> init_state(torch.nn.Linear(2, 1), sgd(), seed=0)
        TrainState(step=0, epoch=0, batch=0, params=3 float32 on cpu, key=Key(seed=0, path=()), best=none)
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
    plateau: Plateau = field(default_factory=Plateau)
    validations: tuple[Validation, ...] = ()

    def replace(self, **changes: object) -> TrainState:
        """Return a copy with new values for the named fields.

        Args:
            **changes: field names and their new values.

        Returns:
            The new state. Tensors are shared, not copied.
        """
        return replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> TrainState:
        """Move all tensors to a device.

        Args:
            device: where to, e.g. "cuda".

        Returns:
            The state there. Tensors that are there already are shared, not copied.
        """
        return tree_map(lambda tensor: tensor.to(device), self)

    def __repr__(self) -> str:
        position = f"step={self.step}, epoch={self.epoch}, batch={self.batch}"
        if isinstance(self.params, _Donated) or not self.params:
            return f"TrainState({position}, donated)"
        params, best = describe_tensors(self.params.values()), describe_best(self.best)
        return f"TrainState({position}, params={params}, key={truncated_repr(self.key)}, best={best})"


def _flatten(state: TrainState) -> tuple[list[Any], Any]:
    sums = {name: [part for part in pair if isinstance(part, Tensor)] for name, pair in state.sums.items()}
    numbers = {name: [None if isinstance(part, Tensor) else part for part in pair] for name, pair in state.sums.items()}
    others = {
        name: getattr(state, name) for name in ("key", "step", "epoch", "batch", "best", "plateau", "validations")
    }
    return [dict(state.params), dict(state.buffers), dict(state.opt_state), sums], (others, numbers)


def _unflatten(parts: Iterable[Any], context: Any) -> TrainState:
    params, buffers, opt_state, tensors = parts
    others, numbers = context
    sums = {}
    for name, pair in numbers.items():
        own = iter(tensors[name])
        sums[name] = Sum(*(next(own) if part is None else part for part in pair))
    return TrainState(params=params, buffers=buffers, opt_state=opt_state, sums=sums, **others)


register_pytree_node(TrainState, _flatten, _unflatten)


def init_state(
    module: torch.nn.Module, optimizer: Optimizer, *, seed: int | Key, params: Mapping[str, Tensor] | None = None
) -> TrainState:
    """Make the first state of a run from a module's current values.

    Args:
        module: any module. Its tensors are copied, so training never changes it. Parameters that do not require a
            gradient become buffers and keep their values.
        optimizer: an init/update pair, see `dwiml_func.optim`.
        seed: the run's seed, or its root key.
        params: values of parameters and buffers to start from, by name, in place of the module's; they take its dtypes
            and devices. Names that are not given keep the module's values.

    Returns:
        A state at step 0, epoch 0.

    Raises:
        ValueError: the module has no trainable parameter, or tensors that are sparse or overlap (tied by `.data` or by
            views, a state would hold two); the seed is out of range; `params` has a name or a shape that the module
            does not have.
        TypeError: the optimizer is one of torch.optim.

    Example:
        >>> from dwiml_func.optim import adam
        >>> state = init_state(torch.nn.BatchNorm1d(2), adam(), seed=0)
        >>> sorted(state.params), sorted(state.buffers), sorted(state.opt_state)
        (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'], ['exp_avg', 'exp_avg_sq'])
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"Expected a torch.nn.Module. Received: {type(module).__name__}")
    check_optimizer("of functions init and update", optimizer)
    key = fold_in(seed if isinstance(seed, Key) else Key(seed))  # checked, as Python integers for JSON
    named, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    if lazy := [name for name, tensor in (named | buffers).items() if is_lazy(tensor)]:
        raise ValueError(
            f"Expected a module whose tensors have shapes. Received: {listed(lazy)} of a lazy module. Call the module "
            f"once on a batch before."
        )
    if problems := list(memory_problems({**named, **buffers})):
        raise ValueError(f"Expected a module of dense tensors with memory of their own: {at_most_three(problems)}.")
    given = _check_given(params or {}, {**named, **buffers})

    def start(name: str, tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        return own.copy_(given[name].detach()) if name in given else own

    trained = {name: start(name, p) for name, p in named.items() if p.requires_grad}
    frozen = {name: start(name, p) for name, p in named.items() if not p.requires_grad}
    if not trained:
        raise ValueError(
            f"Expected a module with at least one parameter that requires a gradient. "
            f"Received: {type(module).__name__} with {len(frozen)} frozen parameters."
        )
    others = {name: start(name, b) for name, b in buffers.items()}
    return TrainState(params=trained, buffers=frozen | others, opt_state=optimizer.init(trained), key=key)


def _check_given(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    problems = [f"unexpected {name}" for name in given if name not in own]
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            problems.append(f"{name} of type {type(tensor).__name__}, expected a tensor")
        elif name in own and tensor.shape != own[name].shape:
            problems.append(f"{name} of shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        elif name in own and tensor.is_complex() and not own[name].is_complex():
            problems.append(f"{name} is complex, expected real values")
    if problems:
        raise ValueError(f"The given params do not fit the module: {at_most_three(problems)}.")
    return given


def advance(
    state: TrainState, params: Params, buffers: Buffers, opt_state: OptState, metrics: Metrics, *, donate: bool
) -> TrainState:
    """The state after one more step; with `donate`, the state before it can no longer be used."""
    if donate:  # an optimizer that skips an update returns the very dicts that `mark_donated` empties
        params, opt_state = dict(params), dict(opt_state)
    new_state = TrainState(
        params=params,
        buffers=buffers,
        opt_state=opt_state,
        key=state.key,
        step=state.step + 1,
        epoch=state.epoch,
        batch=state.batch + 1,
        sums=add_metrics(state.sums, metrics),
        best=state.best,
        plateau=state.plateau,
        validations=state.validations,
    )
    if donate:
        mark_donated(state)
    return new_state


class _Donated(Mapping[str, Tensor]):
    """Placeholder for donated tensors; any access raises."""

    def __init__(self, step: int) -> None:
        self._step = step

    def _raise(self, *_: object) -> NoReturn:
        raise RuntimeError(_donated_message(self._step))

    __getitem__ = __iter__ = __len__ = __contains__ = keys = values = items = get = _raise

    def __repr__(self) -> str:
        return "<donated>"


def _donated_message(step: int) -> str:
    return (
        f"This state was donated to the update after step {step}, which reused its memory. "
        f"Use the state that the update returned, or pass donate=False to keep both."
    )


def check_not_donated(state: TrainState) -> None:
    """Raise a RuntimeError if a state's memory was donated, also through another state that shared its dicts."""
    if not isinstance(state, TrainState):
        raise TypeError(f"Expected a TrainState, from init_state or restore. Received: {type(state).__name__}")
    if not state.params:  # `init_state` makes no state without parameters
        raise RuntimeError(_donated_message(state.step))


def check_can_donate(state: TrainState) -> None:
    """Raise a ValueError where tensors of a state overlap: a step that writes into one would change the other too."""
    leaves = tree_flatten_with_path((state.params, state.buffers, state.opt_state))[0]
    for one, other in overlapping({keystr(path[1:]): tensor for path, tensor in leaves}):
        raise ValueError(
            f"Expected a state whose tensors have memory of their own, which donate=True reuses. Received: {one} "
            f"and {other} overlap. Clone them, or pass donate=False."
        )


def check_state(state: TrainState) -> None:
    """`check_not_donated`, and whether what a script has put into a state can be a part of it."""
    check_not_donated(state)
    wrong = [f"params[{name!r}]" for name, tensor in state.params.items() if not isinstance(tensor, Tensor)]
    wrong += [name for name, kind in (("key", Key), ("best", Best)) if not isinstance(getattr(state, name), kind)]
    for name in ("step", "epoch", "batch"):
        if not hasattr(number := getattr(state, name), "__index__") or number < 0:
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"Expected a state of tensors, a Key, a Best, and counts of at least 0. Received: one with another "
            f"{listed(wrong)}, as by state.replace(...)."
        )


def mark_donated(state: TrainState) -> None:
    """Make every later use of a state's tensors an error.

    It also empties the dicts, which other states may share (`state.replace(...)` copies no tensor).
    """
    old = (state.params, state.opt_state)
    for name in ("params", "buffers", "opt_state"):
        object.__setattr__(state, name, _Donated(state.step))
    for mapping in old:
        if isinstance(mapping, dict):
            mapping.clear()


def describe_tensors(tensors: Iterable[Tensor]) -> str:
    """Number of values, dtype and device, for a repr: "3 float32 on cpu"."""
    tensors = list(tensors)
    kinds = {f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}" for tensor in tensors}
    return f"{sum(tensor.numel() for tensor in tensors):,} {kinds.pop() if len(kinds) == 1 else 'of several kinds'}"


def describe_best(best: Best) -> str:
    """The best epoch, for a repr: "0.5 in epoch 3"."""
    if best.epoch is None:
        return "none"
    return f"{best.value:.6g} in epoch {best.epoch}" + (f", batch {best.batch}" if best.batch else "")
