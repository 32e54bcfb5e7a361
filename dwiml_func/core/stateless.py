"""A module as a pure function: run with tensors that are handed in, and left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import call, is_
from typing import Any

import torch
from torch import Tensor, nn

from dwiml_func._checks import listed
from dwiml_func._transforms import is_transformed
from dwiml_func.core.autocast import autocast_forward

__all__ = [
    "ABSENT",
    "IN_PLACE",
    "StatelessModule",
    "copy_structure",
]

_INTERNAL = frozenset(nn.Module().__dict__) | {"_flat_weights", "_flat_weight_refs", "forward"}
_CONTAINERS = (list, dict, set)
ABSENT = object()
"""An attribute that is not there."""

IN_PLACE = object()
"""An attribute that was changed in place."""


class StatelessModule:
    """A private copy of a module's structure, run with tensors that are handed in.

    It does what `torch.func.functional_call` does, with the look-up of names done once: on a small model that call
    costs as much as the forward pass. Submodules that are in evaluation mode while the module is not stay in it.
    """

    def __init__(self, module: nn.Module, *, train: bool, autocast: torch.dtype | None) -> None:
        _check_no_hooks(module)
        self._module = copy_structure(module)
        self._module.train(train)
        if module.training:
            for own, given in zip(self._module.modules(), module.modules(), strict=True):
                own.training &= given.training
        if autocast is not None:
            self._module.forward = autocast_forward(self._module, autocast)
        self._slots = [
            *_slots(self._module, "_parameters", self._module.named_parameters()),
            *_slots(self._module, "_buffers", self._module.named_buffers()),
        ]
        self._originals = [slot[leaf] for _, slot, leaf in self._slots]
        self._names = {name for name, _, _ in self._slots}
        self.buffer_names = {name for name, _ in self._module.named_buffers()}
        self._of_parameters = [each for each in self._slots if each[0] not in self.buffer_names]
        self._of_buffers = [each for each in self._slots if each[0] in self.buffer_names]
        self._none_slots = [
            (submodule._buffers, leaf)
            for submodule in self._module.modules()
            for leaf, tensor in submodule._buffers.items()
            if tensor is None
        ]
        self._attributes = Attributes(self._module)
        hooked = [m for m in self._module.modules() if m._backward_hooks or m._backward_pre_hooks]
        self._hooked = type(hooked[0]).__name__ if hooked else None
        self.changed: dict[str, Any] = {}
        self._is_held = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Leave the tensors of a call in the module until the end of the block.

        Code that runs while the gradient is taken then finds them: hooks, and blocks that
        `torch.utils.checkpoint` computes again.
        """
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self._restore()
            self._attributes.restore()

    def __call__(self, tensors: dict[str, Tensor], function: Callable[[Any, Any], Any], batch: Any) -> Any:
        """Run `function(module, batch)`; `tensors` has the new buffers afterwards."""
        if tensors.keys() != self._names:
            raise ValueError(
                f"Parameters and buffers do not fit the module. Missing: {listed(self._names - tensors.keys())}. "
                f"Unexpected: {listed(tensors.keys() - self._names)}."
            )
        is_plain = not is_transformed()
        if self._hooked and not is_plain and not torch.compiler.is_compiling():
            raise ValueError(
                f"The module {self._hooked} has a backward hook, which torch.func passes over: it would not act in an "
                f"ensemble, nor with backend='func'. Remove it, or train with train_step and backend='autograd'."
            )
        has_versions = is_plain and not torch.is_inference_mode_enabled()
        versions = [tensors[name]._version for name, _, _ in self._of_parameters] if has_versions else []
        try:
            for name, slot, leaf in self._slots:
                slot[leaf] = tensors[name]
            result = function(self._module, batch)
            if has_versions:
                self._check_unwritten(tensors, versions)
            for name, slot, leaf in self._of_buffers:
                tensors[name] = slot[leaf]  # a module may assign a buffer instead of changing it in place
            if filled := [leaf for slot, leaf in self._none_slots if slot[leaf] is not None]:
                raise ValueError(
                    f"The model filled the buffers {listed(filled)}, which are None in the module. "
                    f"Register them with a value, so that the state holds them."
                )
            return result
        finally:
            if not self._is_held:
                self._restore()
            if not torch.compiler.is_compiling():
                self.changed = self._attributes.restore()

    def rerun(self, values: dict[str, Any], *call: Any) -> Any:
        """Run once with other values of plain attributes; `ABSENT` takes one away."""
        self._attributes.put(values)
        return self(*call)

    def _check_unwritten(self, tensors: dict[str, Tensor], versions: list[int]) -> None:
        for (name, slot, leaf), version in zip(self._of_parameters, versions, strict=True):
            if (tensor := tensors[name])._version != version or slot[leaf] is not tensor:
                raise ValueError(
                    f"The model's forward writes into the parameter {name}. Expected a forward that leaves parameters "
                    f"as they are: compute the changed value and use it, or constrain parameters by a transformation "
                    f"of the update."
                )

    def _restore(self) -> None:
        for (_, slot, leaf), original in zip(self._slots, self._originals, strict=True):
            slot[leaf] = original
        for slot, leaf in self._none_slots:
            slot[leaf] = None


class Attributes:
    """The plain attributes of a module and its submodules, which no state holds."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = {name: submodule.__dict__ for name, submodule in module.named_modules()}
        self._names = {path: set(attributes) for path, attributes in self._modules.items()}
        kinds = ("_parameters", "_buffers", "_modules")
        self._registered = [
            (path, own[kind], set(own[kind]))
            for path, own in self._modules.items()
            for kind in kinds
            if isinstance(own[kind], dict)  # TorchScript has another kind, which no forward extends
        ]
        self._registries = [each for _, each, _ in self._registered]
        self._count = sum(map(len, self._registries))
        self._places = [
            (attributes, name, f"{path}.{name}".lstrip("."))
            for path, attributes in self._modules.items()
            for name in attributes
            if name not in _INTERNAL
        ]
        self._values = [attributes[name] for attributes, name, _ in self._places]
        self._getters = [partial(attributes.get, name, ABSENT) for attributes, name, _ in self._places]
        self._marks = [
            (path, value, mark)
            for (*_, path), value in zip(self._places, self._values, strict=True)
            if (mark := _mark(value)) is not None
        ]

    def restore(self) -> dict[str, Any]:
        """Put every attribute back; return what those that had changed were."""
        changed: dict[str, Any] = {}
        found = list(map(call, self._getters))
        if not all(map(is_, found, self._values)):
            for (attributes, name, path), new, value in zip(self._places, found, self._values, strict=True):
                if new is not value:
                    changed[path], attributes[name] = new, value
        for path, value, mark in self._marks:
            if path not in changed and not mark.holds(value):
                changed[path] = mark.undo(value)
        for path, attributes in self._modules.items():
            if len(attributes) != len(self._names[path]):
                for name in attributes.keys() - self._names[path]:
                    changed[f"{path}.{name}".lstrip(".")] = attributes.pop(name)
        if sum(map(len, self._registries)) != self._count:  # a forward registered a buffer or a layer
            for path, registry, names in self._registered:
                for name in registry.keys() - names:
                    changed[f"{path}.{name}".lstrip(".")] = registry.pop(name)
        return changed

    def put(self, values: dict[str, Any]) -> None:
        """Set attributes by their paths; `ABSENT` takes one away."""
        for path, value in values.items():
            module, _, name = path.rpartition(".")
            if value is ABSENT:
                self._modules[module].pop(name, None)
            else:
                self._modules[module][name] = value


class _Mark:
    """What tells that a value was changed in place: a tensor's version, a container's elements."""

    def __init__(self, value: Any) -> None:
        self._mark, self._content = self._look(value), copy.copy(value) if isinstance(value, _CONTAINERS) else None

    def holds(self, value: Any) -> bool:
        return self._look(value) == self._mark

    def undo(self, value: Any) -> Any:
        """Put a container's content back and return a copy of what it was; `IN_PLACE` for other values."""
        if self._content is None:
            return IN_PLACE
        changed = copy.copy(value)
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(self._content)
        return changed

    @staticmethod
    def _look(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value._version
        if isinstance(value, torch.Generator):
            return value.get_state().numpy().tobytes()
        if isinstance(value, dict):
            return [(id(key), id(element)) for key, element in value.items()]
        return [id(element) for element in value]


def _mark(value: Any) -> _Mark | None:
    is_mutable = isinstance(value, (*_CONTAINERS, torch.Generator)) or (
        isinstance(value, Tensor) and not value.is_inference()
    )
    return _Mark(value) if is_mutable else None


def copy_structure(module: nn.Module) -> nn.Module:
    """A copy that shares the tensors, which are never read through it, and with them which of them are tied."""
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    for submodule in module.modules():  # what pruning and weight normalisation compute before each forward
        for value in submodule.__dict__.values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                shared[id(value)] = value.detach()
    return copy.deepcopy(module, memo=shared)


def _check_no_hooks(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"The parameter {name} has a gradient hook. Hooks of a module's parameters do not act on the tensors "
                f"of a state. Remove it, and change gradients by a transformation before the optimizer."
            )


def _slots(module: nn.Module, kind: str, named: Any) -> list[tuple[str, dict[str, Tensor], str]]:
    """Every place that holds a tensor, with the name of the tensor; tied tensors have several places and one name."""
    name_of = {id(tensor): name for name, tensor in named}
    return [
        (name_of[id(tensor)], getattr(submodule, kind), leaf)
        for submodule in module.modules()
        for leaf, tensor in getattr(submodule, kind).items()
        if tensor is not None
    ]
