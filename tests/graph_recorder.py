"""What a CUDA graph does, on the CPU: the operations of one call are recorded, and repeated on the same memory.

As in a graph, nothing else is repeated: a number that Python computed at the capture stays as it was, and the capture
leaves no trace in memory. Reading a number fails where `may_read` is False, as waiting for a device does in a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dwiml_func.ensemble import captured as members

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
_standing_in = members._standing_in
_DRAWING: list[torch.Generator] = []
_RECORDERS: list[_Recorder] = []


@contextmanager
def noted(own: torch.Generator) -> Iterator[None]:
    """In place of `_standing_in`: a graph follows the generator, so that its replays draw from it again."""
    _DRAWING.append(own)
    if _RECORDERS:
        _RECORDERS[-1].note(own)
    try:
        with _standing_in(own):
            yield
    finally:
        _DRAWING.pop()


class _Recorder(TorchDispatchMode):
    def __init__(self, may_read: bool) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any, torch.Generator | None]] = []
        self._may_read = may_read
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._states = {torch.default_generator: torch.default_generator.get_state()}

    def note(self, generator: torch.Generator) -> None:
        self._states.setdefault(generator, generator.get_state())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _READS:
            if not self._may_read:
                raise RuntimeError(f"a number was read within a capture, by {name}")
            return func(*args, **kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in func._schema.arguments[len(args) :]:
            self._keep(argument, kwargs.get(argument.name))
        out = func(*args, **kwargs)
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        self._made |= {_storage(tensor) for tensor in _tensors(out)} - given
        self.calls.append((func, args, kwargs, out, _DRAWING[-1] if _DRAWING else None))
        return out

    def _keep(self, argument: Any, value: Any) -> None:
        """What a call writes into, as it was, unless it was made within the capture."""
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in _tensors(value):
            if (own := _storage(tensor)) not in self._made and own not in self._before:
                flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[own] = flat, flat.clone()

    def undo(self) -> None:
        for flat, before in self._before.values():
            flat.copy_(before)
        for generator, state in self._states.items():
            generator.set_state(state)


def recorded(step: Callable[[], None], *, may_read: bool = True) -> Callable[[], None]:
    """A `Capture`: what repeats the operations of a call."""
    recorder = _Recorder(may_read)
    _RECORDERS.append(recorder)
    try:
        with recorder:
            step()
    finally:
        _RECORDERS.pop()
        recorder.undo()

    @torch.no_grad()
    def replay() -> None:
        for func, args, kwargs, out, generator in recorder.calls:
            is_drawn = generator is not None and torch.Tag.nondeterministic_seeded in func.tags
            with _standing_in(generator) if generator is not None and is_drawn else nullcontext():
                new = func(*args, **kwargs)
            given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
            for old, now in zip(_tensors(out), _tensors(new), strict=True):
                if _storage(old) not in given:
                    old.copy_(now)

    return replay


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
