"""Random draws inside `torch.func.vmap`, a generator for each member: what each would draw if it ran alone.

`vmap` itself offers one draw for all members, or one draw of all members' numbers from one generator. Neither gives a
member the numbers of its own key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from dwiml_func.core.rng import Key, default_generators, fold_in, torch_rng

__all__ = ["per_member_rng"]

# Each multiplies its input by a mask that depends on the input's shape alone.
_MASKS: dict[Any, Callable[..., tuple[Tensor, float, bool, bool]]] = {
    F.dropout: lambda input, p=0.5, training=True, inplace=False: (input, p, training, inplace),
    F.dropout1d: lambda input, p=0.5, training=True, inplace=False: (input, p, training, inplace),
    F.dropout2d: lambda input, p=0.5, training=True, inplace=False: (input, p, training, inplace),
    F.dropout3d: lambda input, p=0.5, training=True, inplace=False: (input, p, training, inplace),
    torch.dropout: lambda input, p, train: (input, p, train, False),
}
_DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.bernoulli}


class per_member_rng(TorchFunctionMode):
    """Give each member of a `vmap` the draws of its own key, inside a `with` block in the mapped function.

    It serves dropout (`torch.nn.functional.dropout` and its kin for channels, and the modules made of them),
    `torch.rand`, `randn`, `randint`, `randperm`, `rand_like`, `randn_like` and `bernoulli`; these are without gradient.
    To have others refused, call `vmap` with `randomness="error"`, its default. Where all keys are equal a mask is drawn
    once. The global generators are left as they were.

    Args:
        keys: each member's key.
        index: () tensor, the mapped `torch.arange(len(keys))`.
        path: folded into the keys: member k draws what it would inside `torch_rng(fold_in(keys[k], *path))`.

    Example:
        >>> keys = [Key(1), Key(2)]
        >>> def dropped(index):
        ...     with per_member_rng(keys, index):
        ...         return F.dropout(torch.ones(4))
        >>> both = torch.func.vmap(dropped)(torch.arange(2))
        >>> with torch_rng(keys[1]):
        ...     alone = F.dropout(torch.ones(4))
        >>> torch.equal(both[1], alone)
        True
    """

    def __init__(self, keys: Sequence[Key], index: Tensor, *, path: Sequence[int] = ()) -> None:
        self._generators = _Generators(keys, path)
        self._index = index

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MASKS:
            x, p, training, inplace = _MASKS[func](*args, **kwargs)
            if not training or p == 0 or not x.numel():
                return x
            options = {"dtype": x.dtype, "device": x.device}
            mask = self._draw(lambda: _mask(func, x.shape, p, options))
            return x.mul_(mask) if inplace else x * mask
        if func in _DRAWS and not any(isinstance(value, Tensor | torch.Generator) for value in kwargs.values()):
            return self._draw(lambda *args: func(*args, **kwargs), *args)
        return func(*args, **kwargs)

    def _draw(self, draw: Callable[..., Tensor], *args: Any) -> Tensor:
        return _Draw.apply(_Opaque(self._generators, draw), self._index, *args)  # type: ignore[return-value]


def _mask(func: Any, shape: torch.Size, p: float, options: Mapping[str, Any]) -> Tensor:
    ones = torch.ones(shape, **options)
    return func(ones, p, True)


class _Generators:
    """The states of each member's generators, made when the first number is drawn."""

    def __init__(self, keys: Sequence[Key], path: Sequence[int]) -> None:
        self._keys = keys
        self._path = path
        self._states: dict[int, list[Tensor]] = {}

    def are_equal(self) -> bool:
        return len(set(self._keys)) == 1

    @contextmanager
    def of(self, *members: int) -> Iterator[None]:
        """Draw as one of the members, for all of them: they stand at the same point of the same stream."""
        with torch_rng(fold_in(self._keys[members[0]], *self._path)):
            generators = default_generators()
            for generator, state in zip(generators, self._states.get(members[0], ()), strict=False):
                generator.set_state(state)
            yield
            drawn = [generator.get_state() for generator in generators]
            self._states |= dict.fromkeys(members, drawn)


class _Opaque:
    """What is not a tensor, which torch.func's tree functions do not walk through."""

    def __init__(self, generators: _Generators, draw: Callable[..., Tensor]) -> None:
        self.generators = generators
        self.draw = draw


class _Draw(Function):
    """(draw, index, arguments) to what each member draws. A Function for the sake of its own rule under `vmap`."""

    @staticmethod
    def forward(call: _Opaque, index: Tensor, *args: Any) -> Tensor:
        with call.generators.of(int(index)):
            return call.draw(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int | None]:
        call, tensors, dims = args[0], args[2:], in_dims[2:]
        if call.generators.are_equal() and not any(isinstance(dim, int) for dim in dims):
            with call.generators.of(*range(info.batch_size)):
                return call.draw(*tensors), None
        drawn = []
        for member in range(info.batch_size):
            with call.generators.of(member):
                drawn.append(call.draw(*(_own(arg, dim, member) for arg, dim in zip(tensors, dims, strict=True))))
        return torch.stack(drawn), 0


def _own(arg: Any, dim: Any, member: int) -> Any:
    return arg.select(dim, member) if isinstance(dim, int) else arg
