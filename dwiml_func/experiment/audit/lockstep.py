"""Two trainings side by side, batch by batch: the first batch, tensor and operation in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dwiml_func.checkpoint.digest import bit_difference, leaf_digest, state_digest, state_leaves
from dwiml_func.core.report import EpochReport
from dwiml_func.core.state import TrainState
from dwiml_func.experiment.audit.verify import train_epochs
from dwiml_func.experiment.comparison.compare import report_differences
from dwiml_func.experiment.setup import RunParts

__all__ = [
    "Difference",
    "Reached",
    "before_batch",
    "first_difference",
    "tensor_differences",
]

_UNFILLED = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"}


Operation = tuple[str, str, tuple[str, ...]]
"""Name, shapes of the results, and their digests; views apart."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two trainings first differ, counted from 1; `batch` is None for what differs after an epoch's batches.

    `leaves` are the tensors of the state that differ after it, `lines` say what differs before and within it.
    """

    epoch: int
    batch: int | None
    leaves: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Traced:
    """One batch of a training: the rate, and digests of the batch and of the state after it."""

    epoch: int
    batch: int
    rate: float
    inputs: Mapping[str, str]
    leaves: Mapping[str, str]


class Reached(Exception):
    """The training has come to the batch that is looked for: the state before it, the batch and the rate."""

    def __init__(self, state: TrainState, batch: Any, rate: float) -> None:
        super().__init__()
        self.state, self.batch, self.rate = state, batch, rate


class _Differs(Exception):
    """The training differs from the other one in this batch."""

    def __init__(self, own: _Traced, other: _Traced | None) -> None:
        super().__init__()
        self.own, self.other = own, other


def first_difference(
    starts: tuple[TrainState, TrainState], parts: tuple[RunParts, RunParts], last_epoch: int
) -> Difference | tuple[str, str]:
    """Train two runs from equal states to the end of an epoch, the second beside the trace of the first.

    Returns the first difference; the digests of the last states where there is none. The states are not changed.
    """
    traces: list[_Traced] = []
    ends = list(_traced(starts[0], parts[0], last_epoch, traces.append))
    first = iter(traces)

    def compare(own: _Traced) -> None:
        other = next(first, None)
        if own != other:
            raise _Differs(own, other)

    epochs, digests = iter(ends), ("", "")
    try:
        for digest, report in _traced(starts[1], parts[1], last_epoch, compare):
            digests = next(epochs, (None, None))
            other, recorded = digests
            if recorded is None or other is None:
                return Difference(report.epoch, report.batch or None, (), ("A has ended before it",))
            lines = report_differences(recorded, report)
            if lines or digest != other:
                return Difference(report.epoch, report.batch or None, (), tuple(lines) or ("numbers of the state",))
            digests = other, digest
    except _Differs as found:
        return _explain(found, starts, parts)
    if (left := next(first, None)) is not None:
        return Difference(left.epoch, left.batch, (), ("B has no such batch",))
    return digests


def _traced(
    state: TrainState, parts: RunParts, last_epoch: int, see: Callable[[_Traced], object]
) -> Iterator[tuple[str, EpochReport]]:
    """The digests and reports of a training, of whose batches `see` gets the traces."""

    def step(state: TrainState, batch: Any, *, lr: float) -> Any:
        inputs = {name: leaf_digest(tensor) for name, tensor in _tensors_of(batch).items()}
        epoch, number = state.epoch + 1, state.batch + 1
        result = parts.step(state, batch, lr=lr)
        leaves = {name: leaf_digest(leaf) for name, leaf in state_leaves(result[0]).items()}
        see(_Traced(epoch, number, float(lr), inputs, leaves))
        return result

    for reached, report in train_epochs(_copied(state), replace(parts, step=step), None, last_epoch):
        yield state_digest(reached), report


def _explain(found: _Differs, starts: tuple[TrainState, TrainState], parts: tuple[RunParts, RunParts]) -> Difference:
    """Train both again up to the batch, and compare what goes into it and what happens in it."""
    own, other = found.own, found.other
    if other is None or (own.epoch, own.batch) != (other.epoch, other.batch):
        return Difference(own.epoch, own.batch, (), ("A has no such batch",))
    leaves = tuple(name for name in other.leaves if other.leaves[name] != own.leaves.get(name))
    a, b = (before_batch(start, part, own.epoch, own.batch) for start, part in zip(starts, parts, strict=True))
    assert a is not None
    assert b is not None
    lines = []
    if a.rate != b.rate:
        lines.append(f"learning rate: {a.rate!r} in A, {b.rate!r} in B")
    lines += tensor_differences(_tensors_of(a.batch), _tensors_of(b.batch), "batch.")
    if not lines:
        of_a, again, of_b = (
            _operations(part.step, at.state, at.batch, at.rate)
            for part, at in ((parts[0], a), (parts[0], a), (parts[1], b))
        )
        is_filled = [one == other for one, other in zip(of_a, again, strict=True)]  # not memory that holds anything
        lines.append(_first_operation(of_a, of_b, is_filled))
    return Difference(own.epoch, own.batch, leaves, tuple(lines))


def before_batch(start: TrainState, parts: RunParts, epoch: int, batch: int) -> Reached | None:
    """Train from a state up to a batch, counted from 1; None where the epoch has no such batch."""

    def step(state: TrainState, given: Any, *, lr: float) -> Any:
        if (state.epoch + 1, state.batch + 1) == (epoch, batch):
            raise Reached(state, given, lr)
        return parts.step(state, given, lr=lr)

    try:
        for _ in train_epochs(_copied(start), replace(parts, step=step), None, epoch):
            pass
    except Reached as reached:
        return reached
    return None


def _tensors_of(batch: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a batch by name."""
    if isinstance(batch, Tensor):
        return {name or "batch": batch}
    if is_dataclass(batch):
        parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    elif isinstance(batch, Mapping):
        parts = dict(batch)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        parts = {str(number): part for number, part in enumerate(batch, start=1)}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, part in parts.items():
        found |= _tensors_of(part, f"{name}.{key}" if name else str(key))
    return found


def tensor_differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """The first three of these tensors that differ, with the first value that does."""
    lines = []
    for name in {**a, **b}:
        if name not in a or name not in b:
            lines.append(f"{prefix}{name}: only in {'A' if name in a else 'B'}")
        elif (a[name].shape, a[name].dtype) != (b[name].shape, b[name].dtype):
            lines.append(f"{prefix}{name}: {_shape(a[name])} in A, {_shape(b[name])} in B")
        elif (found := bit_difference(a[name], b[name])) is not None:
            lines.append(
                f"{prefix}{name}: {found.num_different} of {found.num_values} values differ; the first at "
                f"{list(found.first)}: {found.values[0]} in A, {found.values[1]} in B, {found.ulps} ulp apart"
            )
    return [*lines[:3], *([f"{len(lines) - 3} more tensors differ"] if len(lines) > 3 else [])]


def _operations(step: Any, state: TrainState, batch: Any, rate: float) -> list[Operation]:
    """What torch computes in one step: each operation's name, the shapes of its results and their digests."""
    with _Operations() as mode:
        step(_copied(state), batch, lr=rate)
    return mode.rows


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removesuffix(".default")
        if not func.is_view and ".".join(name.split(".")[:2]) not in _UNFILLED:
            made = [leaf for leaf in tree_leaves(args if result is None else result) if isinstance(leaf, Tensor)]
            with torch._C._DisableTorchDispatch():
                digests = tuple(leaf_digest(tensor) for tensor in made)
            self.rows.append((name, ", ".join(map(_shape, made[:3])), digests))
        return result


def _first_operation(a: Sequence[Operation], b: Sequence[Operation], is_filled: Sequence[bool]) -> str:
    """The first operation that differs, from those of A, those of B, and which of A's are comparable."""
    for number, (one, other, counts) in enumerate(zip(a, b, is_filled, strict=False), start=1):
        if one[0] != other[0]:
            return f"operation {number} of the step: {one[0]} in A, {other[0]} in B"
        if one != other and counts:
            shapes = one[1] if one[1] == other[1] else f"{one[1]} in A, {other[1]} in B"
            return f"operation {number} of the step: {one[0]} ({shapes}) has another result"
    if len(a) == len(b):
        return "operation: unknown, the operations of the step have the same results"
    return f"operation {min(len(a), len(b)) + 1} of the step: {len(a)} operations in A, {len(b)} in B"


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _copied(state: TrainState) -> TrainState:
    return tree_map(torch.clone, state)
