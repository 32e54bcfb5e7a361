"""The plain attributes of a module, put back after each call: what changed in them is what no state holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from operator import call, is_
from typing import Any

import torch
from torch import Tensor, nn

from dwiml_func._checks import listed
from dwiml_func._transforms import is_transformed
from dwiml_func.core.rng import Key, torch_rng

__all__ = ["ABSENT", "IN_PLACE", "AttributeCheck", "Attributes", "is_same_loss"]

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


class AttributeCheck:
    """Refuses models that keep something between batches in plain attributes.

    An attribute that a forward writes is harmless where the model runs without it, as with caches, attention weights
    kept for inspection, or what weight normalisation recomputes. It is state where the model reads what it kept.
    """

    def __init__(self) -> None:
        self._seen: dict[bool, set[str]] = {True: set(), False: set()}
        self._written: set[str] = set()

    def check(
        self, train: bool, changed: dict[str, Any], *, rerun: Callable[[dict[str, Any]], Any], loss: Tensor, key: Key
    ) -> None:
        """Raise ValueError where the loss depends on attributes that a batch, in training or not, has changed.

        `rerun(values)` runs the batch again, with other values of attributes, and returns the loss first.
        """
        seen = self._seen[train]
        new = (changed.keys() | self._written) - seen
        if not new or is_transformed():
            return
        seen |= new
        self._written |= changed.keys()
        without = {name: ABSENT for name in new if not isinstance(changed.get(name), list | dict | set)}
        carried = {name: changed[name] for name in new if name in changed and changed[name] is not IN_PLACE}

        def changes_loss(values: dict[str, Any]) -> bool:
            try:
                with torch.no_grad(), torch_rng(key):
                    return not is_same_loss(loss, rerun(values)[0])
            except AttributeError:  # the model reads what it kept
                return True

        in_place = [name for name in new if changed.get(name) is IN_PLACE]
        if in_place or changes_loss(without) or changes_loss(carried):
            raise ValueError(
                f"The model keeps something between batches in {listed(in_place or new)}, outside the training state: "
                f"a step would not be reproducible, and checkpoints would lose it. Register it as a buffer."
            )


def is_same_loss(old: Tensor, new: Tensor) -> bool:
    """Whether two losses () are equal, NaN included; up to rounding on devices that sum in any order."""
    if old.device.type == "meta":  # no values
        return True
    return torch.allclose(old, new, rtol=0.0 if old.device.type == "cpu" else 1e-3, atol=0.0, equal_nan=True)
