"""Random numbers inside `torch.func.vmap` with a generator for each member, as if each ran alone.

`vmap` itself offers the same random numbers for all members, or those of all from one generator. Neither gives a member
the random numbers of its own key.
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
from dwiml_func.ensemble.linear import linear

__all__ = ["MemberGenerators", "per_member_rng"]


def _dropout(input: Tensor, p: float, training: bool, inplace: bool) -> tuple:
    return input, p, training, inplace


# Each multiplies its input by a mask that depends on the input's shape alone.
_MASKS: dict[Any, Callable[..., tuple[Tensor, float, bool, bool]]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropout),
    torch.dropout: lambda input, p, train: (input, p, train, False),
}
_DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.bernoulli}


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad}


class per_member_rng(TorchFunctionMode):
    """Give each member of a `vmap` the random numbers of its own key, in a `with` block inside the mapped function.

    Member `index`, a () tensor mapped from `torch.arange(K)`, gets those of its own among the `generators`. It covers
    dropout (`torch.nn.functional.dropout`, its variants for channels and their modules), `torch.rand`, `randn`,
    `randint`, `randperm`, `rand_like`, `randn_like` and `bernoulli`, without gradient; `vmap` refuses others by
    default. The global generators keep their states.
    """

    def __init__(self, generators: MemberGenerators, index: Tensor) -> None:
        self._generators = generators
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
        if func == _REQUIRES_GRAD:  # torch says False of tensors that vmap maps, and a model may ask
            return _requires_grad(args[0])
        if func in _HOOKS:
            raise ValueError(
                f"The model calls Tensor.{func.__name__}. Hooks of tensors do not act where all members of an ensemble "
                f"train at once. Leave it out, or train the members one after the other."
            )
        if func is F.linear:  # not random, but this mode sees all calls of a model
            return linear(*args, **kwargs)
        if func in _DRAWS and not any(isinstance(value, Tensor | torch.Generator) for value in kwargs.values()):
            return self._draw(lambda *args: func(*args, **kwargs), *args)
        return func(*args, **kwargs)

    def _draw(self, draw: Callable[..., Tensor], *args: Any) -> Tensor:
        return _Draw.apply(_Opaque(self._generators, draw), self._index, *args)  # type: ignore[return-value]


def _requires_grad(tensor: Tensor) -> bool:
    """What a tensor says below the dimensions of vmap, down to a gradient of `torch.func`."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]  # private; torch.func has no public function for it
    while functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _mask(func: Any, shape: torch.Size, p: float, options: Mapping[str, Any]) -> Tensor:
    ones = torch.ones(shape, **options)
    return func(ones, p, True)


class MemberGenerators:
    """The random numbers of each member for one step: those of `torch_rng(fold_in(keys[member], *path))`.

    The states of a member's generators are made at their first use.
    """

    def __init__(self, keys: Sequence[Key], path: Sequence[int] = ()) -> None:
        self._keys = keys
        self._path = path
        self._states: dict[int, list[Tensor]] = {}

    def are_equal(self) -> bool:
        return len(set(self._keys)) == 1

    @contextmanager
    def of(self, *members: int) -> Iterator[None]:
        """Set torch's generators to those of the first of some members, which all have the same."""
        with torch_rng(fold_in(self._keys[members[0]], *self._path)):
            generators = default_generators()
            for generator, state in zip(generators, self._states.get(members[0], ()), strict=False):
                generator.set_state(state)
            yield
            drawn = [generator.get_state() for generator in generators]
            self._states |= dict.fromkeys(members, drawn)


class _Opaque:
    """A value that torch.func's tree functions do not look into."""

    def __init__(self, generators: MemberGenerators, draw: Callable[..., Tensor]) -> None:
        self.generators = generators
        self.draw = draw


class _Draw(Function):
    """Random numbers of (call, index, arguments). A Function because it needs its own rule under `vmap`."""

    @staticmethod
    def forward(call: _Opaque, index: Tensor, *args: Any) -> Tensor:
        with call.generators.of(int(index)):
            return call.draw(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

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
