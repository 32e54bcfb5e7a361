"""The plain attributes of a module, put back after each call: what changed in them is what no state holds."""

from __future__ import annotations

import copy
from functools import partial
from operator import call, is_
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ABSENT", "IN_PLACE", "Attributes"]

_INTERNAL = frozenset(nn.Module().__dict__) | {"_flat_weights", "_flat_weight_refs", "forward"}
_CONTAINERS = (list, dict, set)
ABSENT = object()
"""An attribute that is not there."""

IN_PLACE = object()
"""An attribute that was changed in place."""


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
