"""A module as a pure function: run with tensors that are handed in, and left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dwiml_func._checks import at_most_three, listed, one_line
from dwiml_func._transforms import is_transformed
from dwiml_func.core.attributes import Attributes
from dwiml_func.core.precision import autocast_forward

__all__ = ["StatelessModule", "copy_structure"]


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
        except RuntimeError as error:
            self._explain(error, tensors)
            raise
        finally:
            if not self._is_held:
                self._restore()
            if not torch.compiler.is_compiling():
                self.changed = self._attributes.restore()

    def rerun(
        self, tensors: dict[str, Tensor], function: Callable[[Any, Any], Any], batch: Any, values: dict[str, Any]
    ) -> Any:
        """Run on copies of tensors with other values of plain attributes; `ABSENT` (of `attributes`) removes one."""
        self._attributes.put(values)
        return self({name: tensor.detach().clone() for name, tensor in tensors.items()}, function, batch)

    def _explain(self, error: RuntimeError, tensors: dict[str, Tensor]) -> None:
        """Raise a ValueError where tensors do not have the shapes and dtypes of the module's."""
        pairs = [(name, tensors[name], own) for (name, *_), own in zip(self._slots, self._originals, strict=True)]
        others = {
            name: f"{name} of {new.dtype} {tuple(new.shape)} in place of {own.dtype} {tuple(own.shape)}"
            for name, new, own in pairs
            if (new.shape, new.dtype) != (own.shape, own.dtype)
        }
        if others:
            raise ValueError(
                f"The model failed ({one_line(error, max_length=120)}). Expected tensors like the module's. Received: "
                f"{at_most_three(list(others.values()))}."
            ) from error

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
