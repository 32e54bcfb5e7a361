"""Graphs called with a flat list of tensors: what torch.compile checks and sorts at each call is done once.

The first call of a kind goes through torch.compile. What its graph was given and returned is then found again, by
identity, among the tensors of the batch and the state. Later calls that are alike hand the graph its tensors directly.
Alike are calls with the same names and types, tensors of the same shapes, strides, dtypes and devices, under the same
settings of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from dwiml_func._transforms import is_transformed
from dwiml_func.compiled import _torch_private as private
from dwiml_func.core.non_finite import NonFinite

__all__ = ["DirectCall", "DirectCalls", "Heard", "Leaves", "flatten", "leaves_of"]

_MAX_KINDS = 64  # of calls; batches of ever new sizes go through torch.compile
_CONSTANTS = (bool, int, float, str, bytes, type(None))


class Heard(NamedTuple):
    """A call of a graph: its function, what it was given, what it returned."""

    graph: Callable[..., Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


class DirectCall(NamedTuple):
    """A graph, and where its inputs stand among the leaves of its arguments.

    Attributes:
        graph: the compiled function.
        pick: takes the inputs from a list: leaves of the batch, of the state, the numbers, `constants`.
        constants: inputs that are no leaves: sizes, and tensors that the loss closes over.
        new_state: takes the leaves of the next state from a list: outputs, leaves of the old one; None where the graph
            writes into the old ones.
        values: which output the values are.
        names, policy: of the metrics, and for steps that are not finite.
        has_settings: whether torch's settings are those of the first call.
        accepts_batch, accepts_state: whether leaves are like those of the first call.
    """

    graph: Callable[..., Any]
    pick: Callable[[list[Any]], tuple[Any, ...]]
    constants: tuple[Any, ...]
    new_state: Callable[[list[Any]], tuple[Tensor, ...]] | None
    values: int
    names: tuple[str, ...]
    policy: NonFinite
    has_settings: Callable[[], bool]
    accepts_batch: Callable[..., bool]
    accepts_state: Callable[..., bool]

    def __call__(self, batch: list[Tensor], state: list[Tensor], numbers: Tensor) -> tuple[list[Tensor], Tensor]:
        """The leaves of the next state, and the values."""
        outputs = self.graph(*self.pick([*batch, *state, numbers, *self.constants]))
        if self.new_state is not None:
            state = list(self.new_state([*outputs, *state]))
        return state, outputs[self.values]

    def accepts(self, batch: list[Tensor]) -> bool:
        """Whether the leaves of another batch are like those of the first call, and torch is as it was then."""
        return self.has_settings() and _is_plain() and self.accepts_batch(*batch)


class Leaves(NamedTuple):
    """The tensors of a step's arguments, and what calls must share to be of one kind."""

    batch: list[Tensor]
    state: list[Tensor]
    structures: tuple[Any, Any, Any]
    kind: Any

    def rebuild(self, leaves: Iterable[Tensor]) -> tuple[Any, Any, Any]:
        """Parameters, buffers and optimizer state from the leaves of a state of this structure."""
        tensors, (params, buffers, opt_state) = iter(leaves), self.structures
        return rebuild(params, tensors), rebuild(buffers, tensors), rebuild(opt_state, tensors)


def leaves_of(batch: Any, state: Sequence[Any], more: Any) -> Leaves | None:
    """The leaves of a batch and of (params, buffers, opt_state); None where they hold what is unknown here.

    `more` is what else must be the same for calls of one kind.
    """
    of_batch: list[Tensor] = []
    of_state: list[Tensor] = []
    try:
        structure = flatten(batch, of_batch)
        structures = (flatten(state[0], of_state), flatten(state[1], of_state), flatten(state[2], of_state))
    except TypeError:
        return None
    shapes = tuple([tensor.shape for tensor in of_batch])
    return Leaves(of_batch, of_state, structures, (structure, shapes, structures, more))


class DirectCalls:
    """The direct calls of one function, by their kinds."""

    def __init__(self) -> None:
        self._calls: dict[Any, DirectCall] = {}
        self._seen: dict[Any, list[Any]] = {}

    def find(self, leaves: Leaves) -> DirectCall | None:
        """The direct call for these leaves, if there is one."""
        found = self._calls.get(leaves.kind)
        is_fit = found is not None and found.accepts(leaves.batch) and found.accepts_state(*leaves.state)
        return found if is_fit else None

    def learn(
        self,
        leaves: Leaves,
        new: Leaves,
        numbers: Tensor,
        heard: Heard,
        *,
        values: Tensor,
        names: tuple[str, ...],
        policy: NonFinite,
    ) -> None:
        """Keep a graph for calls of its kind, from the second on, where it is known what it takes and returns.

        Args:
            leaves, numbers: what the function was given.
            new: the leaves after the call.
            heard: the graph that ran.
            values, names: what else the function returned.
            policy: for steps that are not finite.
        """
        if new.structures != leaves.structures or not _is_plain():
            return
        own = [*leaves.batch, *leaves.state, numbers]
        places = _places(own)
        constants = [value for value in heard.inputs if id(value) not in places]
        before = self._seen.get(leaves.kind)
        if before is None:
            if len(self._seen) >= _MAX_KINDS:
                self._seen.clear()
            self._seen[leaves.kind] = constants
            return
        is_constant = len(before) == len(constants) and all(map(_is_same, before, constants))
        results = _places([*heard.outputs, *leaves.state])
        is_known = is_constant and all(id(leaf) in results for leaf in [*new.state, values])
        if not is_known or len(places) < len(own):  # the same tensor twice may be another graph
            return
        places = _places([*own, *constants])
        if len(self._calls) >= _MAX_KINDS:
            self._calls.pop(next(iter(self._calls)))
        self._calls[leaves.kind] = DirectCall(
            graph=heard.graph,
            pick=_getter([places[id(value)] for value in heard.inputs]),
            constants=tuple(constants),
            new_state=None if all(map(is_, new.state, leaves.state)) else _getter([results[id(x)] for x in new.state]),
            values=results[id(values)],
            names=names,
            policy=policy,
            has_settings=private.settings_guard(),
            accepts_batch=private.tensor_guard(leaves.batch),
            accepts_state=private.tensor_guard(leaves.state),
        )


def flatten(value: Any, leaves: list[Any]) -> Any:
    """Append the tensors of a tree to `leaves`; return its structure, which can be hashed.

    TypeError for what is neither a tensor, a constant, nor a container of such.
    """
    kind = type(value)
    if kind is dict:
        kinds = set(map(type, value.values()))
        if len(kinds) == 1 and Tensor in kinds:  # the usual case, and the fastest
            leaves.extend(value.values())
            return tuple(value)
    elif isinstance(value, Tensor):
        leaves.append(value)
        return Tensor
    elif isinstance(value, _CONSTANTS):
        return kind, value
    elif isinstance(value, tuple | list):
        return kind, tuple([flatten(part, leaves) for part in value])
    if kind is dict or isinstance(value, Mapping):
        return kind, tuple(value), tuple([flatten(part, leaves) for part in value.values()])
    if is_dataclass(value):
        return kind, tuple([flatten(getattr(value, field.name), leaves) for field in fields(value)])
    raise TypeError(f"Expected tensors, numbers, texts and containers of such. Received: {kind.__name__}")


def rebuild(structure: Any, leaves: Any) -> Any:
    """The tree of dicts that `flatten` took apart; `leaves` is an iterator over its tensors."""
    if structure is Tensor:
        return next(leaves)
    if structure and structure[0] is dict:
        _, names, parts = structure
        return {name: rebuild(part, leaves) for name, part in zip(names, parts, strict=True)}
    return {name: next(leaves) for name in structure}


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int) and one == other)


def _is_plain() -> bool:
    """Whether a call may pass torch.compile by: no transform is active, and nothing watches operations."""
    return not is_transformed() and not private.is_watched()


def _places(values: list[Any]) -> dict[int, int]:
    return {id(value): place for place, value in reversed(list(enumerate(values)))}


def _getter(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
