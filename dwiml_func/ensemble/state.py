"""An ensemble: K runs of one model in one immutable value, whose tensors have a leading member axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten_with_path, tree_map

from dwiml_func._checks import listed
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import Validation
from dwiml_func.core.rng import Key
from dwiml_func.core.state import TrainState, check_not_donated, describe_best, describe_tensors
from dwiml_func.types import Buffers, Metrics, OptState, Params, Plateau, Sum

__all__ = ["EnsembleState", "member", "member_sums", "stack_states"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EnsembleState:
    """K whole runs, data only. Active members are at the same step, epoch and batch.

    A member that is not active has stopped, early or because its loss or gradient was not finite. Its part of every
    tensor stays as it was, at the position in `done`.

    It is a tree for `torch.utils._pytree` and `torch.func`, as a `TrainState` is.

    Args:
        params: trainable tensors by name, each (K, ...).
        buffers: other tensors of the model by name, each (K, ...). Those that all members share, such as frozen
            parameters, are stored once: members are views of the same memory until one of them changes.
        opt_state: optimizer state, each (K, ...).
        keys: each member's root key.
        active: (K,) bool, the members that still train.
        done: (K, 3) int64: steps, epochs, and batches of the current epoch that each member has done.
        step: optimizer updates that the active members have done.
        epoch: epochs that they have finished.
        batch: batches that they have done in the current epoch; 0 between epochs.
        sums: metric sums of the current epoch: totals and weights (K,) float64.
        best: the best epoch so far of each member.
        plateau: what `reduce_on_plateau` depends on, of each member.
        validations: those of each member within the epoch that it is in.

    Example:
        >>> from dwiml_func import init_state, sgd
        >>> ensemble = stack_states([init_state(torch.nn.Linear(2, 1), sgd(), seed=seed) for seed in (7, 8)])
        >>> len(ensemble), ensemble.params["weight"].shape
        (2, torch.Size([2, 1, 2]))
        >>> ensemble
        EnsembleState(members=2, active=2, step=0, epoch=0, batch=0, params=6 float32 on cpu, seeds=[7, 8], best=none)
    """

    params: Params
    buffers: Buffers
    opt_state: OptState
    keys: tuple[Key, ...]
    active: Tensor
    done: Tensor
    step: int = 0
    epoch: int = 0
    batch: int = 0
    sums: Metrics = field(default_factory=dict)
    best: tuple[Best, ...] = ()
    plateau: tuple[Plateau, ...] = ()
    validations: tuple[tuple[Validation, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        position = f"step={self.step}, epoch={self.epoch}, batch={self.batch}"
        params = describe_tensors(self.params.values())
        seeds = ", ".join(str(key.seed) for key in self.keys[:2]) + (", ..." if len(self) > 2 else "")
        best = describe_best(min(self.best, key=lambda best: best.value, default=Best()))
        members = f"members={len(self)}, active={int(self.active.sum())}"
        return f"EnsembleState({members}, {position}, params={params}, seeds=[{seeds}], best={best})"

    def to(self, device: torch.device | str) -> EnsembleState:
        """Move all tensors to a device.

        Args:
            device: where to, e.g. "cuda".

        Returns:
            The ensemble there. Tensors that are there already are shared, not copied.
        """
        return tree_map(lambda tensor: tensor.to(device), self)

    def replace(self, **changes: object) -> EnsembleState:
        """Return a copy with new values for the named fields.

        Args:
            **changes: field names and their new values.

        Returns:
            The new ensemble. Tensors are shared, not copied.
        """
        return replace(self, **changes)  # type: ignore[arg-type]


_TENSORS = ("params", "buffers", "opt_state", "active", "done")
_OTHERS = ("keys", "step", "epoch", "batch", "best", "plateau", "validations")
register_pytree_node(
    EnsembleState,
    lambda ensemble: (
        [*(getattr(ensemble, n) for n in _TENSORS), dict(ensemble.sums)],
        tuple(getattr(ensemble, n) for n in _OTHERS),
    ),
    lambda parts, others: EnsembleState(
        **dict(zip((*_TENSORS, "sums"), parts, strict=True)), **dict(zip(_OTHERS, others, strict=True))
    ),
)


def stack_states(states: Sequence[TrainState], *, active: Sequence[bool] | None = None) -> EnsembleState:
    """Make an ensemble of runs of the same model and optimizer.

    Args:
        states: one for each member, new or from a training. They are not changed.
        active: which members continue to train; these must be at the same step, epoch and batch. None: all.

    Returns:
        The ensemble; `member` gives back each state, bitwise identical.

    Raises:
        ValueError: there is no state, or the states differ in names, shapes, dtypes or devices of tensors, or the
            active ones in position.
        RuntimeError: a state was donated to a step.

    Example:
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(2, 1), sgd(), seed=0)
        >>> stack_states([state, state.replace(step=3)], active=[False, True]).step
        3
    """
    if not states:
        raise ValueError("Expected at least one state. Received: none")
    active = [True] * len(states) if active is None else list(active)
    if len(active) != len(states):
        raise ValueError(f"Expected active with {len(states)} values, one for each state. Received: {len(active)}")
    for number, state in enumerate(states):
        check_not_donated(state)
        _check_alike(state, states[0], number)
    done = [(state.step, state.epoch, state.batch) for state in states]
    positions = {position for position, is_active in zip(done, active, strict=True) if is_active} or {max(done)}
    if len(positions) > 1:
        raise ValueError(
            f"Expected active members at the same (step, epoch, batch). Received: {listed(map(str, positions))}. "
            "Set active=False for members that have stopped."
        )
    ((step, epoch, batch),) = positions
    device = next(iter(states[0].params.values())).device
    return EnsembleState(
        **{part: tree_map(_stack, *(_tensors(state)[part] for state in states)) for part in ("params", "opt_state")},
        buffers=tree_map(_stack_once, *(dict(state.buffers) for state in states)),
        keys=tuple(state.key for state in states),
        active=torch.tensor(active, device=device),
        done=torch.tensor(done, device=device),
        step=step,
        epoch=epoch,
        batch=batch,
        sums=_stack_sums([state.sums for state in states], device),
        best=tuple(state.best for state in states),
        plateau=tuple(state.plateau for state in states),
        validations=tuple(state.validations for state in states),
    )


def member(ensemble: EnsembleState, number: int) -> TrainState:
    """Take a member out of an ensemble, as a state that an ordinary run can continue from. It waits for the device.

    Args:
        ensemble: the ensemble; it is not changed, and shares no memory with the result.
        number: 0 <= number < K.

    Returns:
        The member's state. That of a stopped member is at the position where it stopped.

    Raises:
        IndexError: there is no such member.

    Example:
        >>> from dwiml_func import init_state, sgd
        >>> state = init_state(torch.nn.Linear(2, 1), sgd(), seed=7)
        >>> torch.equal(member(stack_states([state, state]), 1).params["weight"], state.params["weight"])
        True
    """
    if not 0 <= number < len(ensemble):
        raise IndexError(f"Expected a member from 0 to {len(ensemble) - 1}. Received: {number}")
    step, epoch, batch = ensemble.done[number].tolist()
    sums = {name: Sum(*(_own(part, number) for part in pair)) for name, pair in ensemble.sums.items()}
    return TrainState(
        **tree_map(lambda leaf: leaf[number].clone(), _tensors(ensemble)),
        key=ensemble.keys[number],
        step=step,
        epoch=epoch,
        batch=batch,
        sums=sums if batch else {},
        best=ensemble.best[number],
        plateau=ensemble.plateau[number],
        validations=ensemble.validations[number],
    )


def member_sums(sums: Metrics, num_members: int) -> list[dict[str, Sum]]:
    """Separate the metric sums of an ensemble by member. This waits for the device.

    Args:
        sums: totals and weights (K,), from `ensemble_step`.
        num_members: K, since there may be no sums.

    Returns:
        The sums of each member, as floats.

    Example:
        >>> member_sums({"loss": Sum(torch.tensor([6.0, 2.0]), torch.tensor([4.0, 4.0]))}, 2)[1]
        {'loss': Sum(total=2.0, weight=4.0)}
    """
    read = {name: [torch.as_tensor(part).tolist() for part in pair] for name, pair in sums.items()}
    return [{name: Sum(*(part[n] for part in pair)) for name, pair in read.items()} for n in range(num_members)]


def _stack(*leaves: Tensor) -> Tensor:
    return torch.stack(leaves)


def _stack_once(*leaves: Tensor) -> Tensor:
    """Equal leaves, such as a frozen parameter of one pretrained encoder, as K views of one: no member has its own."""
    first, *others = leaves
    if any(own is not first and not torch.equal(own, first) for own in others):
        return torch.stack(leaves)
    return first.clone().expand(len(leaves), *first.shape)


def _tensors(state: TrainState | EnsembleState) -> dict[str, Any]:
    return {"params": dict(state.params), "buffers": dict(state.buffers), "opt_state": dict(state.opt_state)}


def _stack_sums(sums: Sequence[Metrics], device: torch.device) -> dict[str, Sum]:
    def each(parts: Iterable[float | Tensor]) -> Tensor:
        return torch.tensor([float(part) for part in parts], dtype=torch.float64, device=device)

    names = dict.fromkeys(name for own in sums for name in own)
    pairs = {name: [own.get(name, Sum(0.0, 0.0)) for own in sums] for name in names}
    return {name: Sum(each(s.total for s in pair), each(s.weight for s in pair)) for name, pair in pairs.items()}


def _own(part: float | Tensor, number: int) -> float | Tensor:
    """A member's part of a sum, as in a TrainState: a float on the CPU, a tensor elsewhere."""
    if not isinstance(part, Tensor):
        return part
    return part[number].item() if part.device.type == "cpu" else part[number].clone()


def _check_alike(state: TrainState, first: TrainState, number: int) -> None:
    one, other = _table(first), _table(state)
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise ValueError(
                f"Expected states of the same model and optimizer. Received: {name} is {other.get(name, 'missing')} "
                f"in member {number}, {one.get(name, 'missing')} in member 0."
            )


def _table(state: TrainState) -> dict[str, str]:
    groups = {"params": dict(state.params), "buffers": dict(state.buffers), **state.opt_state}
    return {
        "/".join(str(key.key) for key in path): (  # type: ignore[attr-defined]
            f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)} on {leaf.device}"
        )
        for path, leaf in tree_flatten_with_path(groups)[0]
    }
