"""Claims about `dwiml_func.ensemble.linear`: members have the products of the definition, all in one operation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dwiml_func.core.rng import Key
from dwiml_func.ensemble.linear import linear
from dwiml_func.ensemble.rng import MemberGenerators, per_member_rng

MEMBERS, INPUTS, OUTPUTS = 3, 4, 2


def _values(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _by_definition(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    products = (x[..., None, :] * weight).sum(-1)
    return products if bias is None else products + bias


def _mapped(function: Any, in_dims: Any = 0) -> Any:
    return torch.func.vmap(function, in_dims)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [(), (5,), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 0), (0, None, 0), (-1, 1, 1), (0, 0, None)], ids=str)
def test_mapped_layers_are_those_of_the_definition_and_so_are_first_and_second_derivatives(
    in_dims: tuple[int | None, ...], rows: tuple[int, ...], has_bias: bool
) -> None:
    shapes = [(*rows, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,)][: 3 if has_bias else 2]
    dims = in_dims[: len(shapes)]
    members = [_values(MEMBERS, *shape) for shape in shapes]
    args = [one[0] if dim is None else one.movedim(0, dim) for one, dim in zip(members, dims, strict=True)]
    function, definition = _mapped(linear, dims), _mapped(_by_definition, dims)
    torch.testing.assert_close(function(*args), definition(*args), rtol=0, atol=1e-12)
    if 0 not in rows:
        args = [one.requires_grad_() for one in args]
        assert gradcheck(function, args, fast_mode=True)
        assert gradgradcheck(function, args, fast_mode=True)


def _total(function: Any) -> Any:
    return lambda *args: function(*args).sin().sum()


def _of_many_rows(function: Any) -> Any:
    return _mapped(lambda x, weight, bias: _mapped(function, (0, None, None))(x[:, None], weight, bias))


TRANSFORMS: dict[str, Any] = {
    "gradient of a map": lambda f: torch.func.grad(_total(_mapped(f)), (0, 1, 2)),
    "map of a gradient": lambda f: _mapped(torch.func.grad(_total(f), (0, 1, 2))),
    "map of a map": _of_many_rows,
    "gradient of a map of a map": lambda f: torch.func.grad(_total(_of_many_rows(f)), (0, 1, 2)),
    "forward mode": lambda f: lambda *args: torch.func.jvp(_mapped(f), args, args),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_it_composes_with_transforms(transform: Any) -> None:
    args = [_values(MEMBERS, *shape) for shape in ((5, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,))]
    actual, expected = (transform(function)(*args) for function in (linear, _by_definition))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


class _Recorded(TorchDispatchMode):
    """The names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_layers_of_all_members_of_an_ensemble_are_one_product_in_the_precision_of_autocast(
    precision: torch.dtype,
) -> None:
    x, weight, bias = (_values(*shape, dtype=torch.float32) for shape in ((5, INPUTS), (3, 2, INPUTS), (3, 2)))
    layer = torch.nn.Linear(INPUTS, OUTPUTS)

    def member(weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        with per_member_rng(MemberGenerators([Key(1)] * MEMBERS), index):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    with torch.autocast("cpu", precision, enabled=precision != torch.float32), _Recorded() as recorded:
        result = torch.func.vmap(member)(weight, bias, torch.arange(MEMBERS))
    assert result.dtype == precision
    torch.testing.assert_close(
        result.float(),
        _by_definition(x, weight[:, None], bias[:, None]),
        rtol=0,
        atol=1e-6 if precision == torch.float32 else 0.05,
    )
    assert recorded.names.count("baddbmm") == 1
    assert not {"mm", "bmm", "addmm", "mul", "add"} & set(recorded.names)
