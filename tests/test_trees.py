"""Claims about `dwiml_func._trees` and `dwiml_func._transforms`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwiml_func._transforms import beneath_vmap, is_transformed, read_number
from dwiml_func._trees import choose, given

YES = {"a": torch.tensor([1.0, 2.0]), "deep": {"count": torch.tensor(3)}}
NO = {"a": torch.tensor([5.0, 6.0]), "b": torch.tensor(7.0)}


def test_a_bool_gives_one_of_the_trees_itself() -> None:
    assert choose(True, YES, NO) is YES
    assert choose(False, YES, NO) is NO


def test_a_leaf_that_one_tree_lacks_is_zero_there() -> None:
    for condition, a, b, count in ((True, [1.0, 2.0], 0.0, 3), (False, [5.0, 6.0], 7.0, 0)):
        chosen = choose(torch.tensor(condition), YES, NO)
        assert chosen["a"].tolist() == a
        assert (chosen["b"].item(), chosen["deep"]["count"].item()) == (b, count)


def test_a_condition_for_each_member_chooses_whole_members() -> None:
    members = choose(torch.tensor([True, False]), {"w": torch.ones(2, 3)}, {"w": torch.zeros(2, 3)})
    assert members["w"].tolist() == [[1.0] * 3, [0.0] * 3]
    rows = choose(torch.tensor([True, False]), {"a": torch.ones(2)}, {"b": torch.full((2,), 7.0)})
    assert (rows["a"].tolist(), rows["b"].tolist()) == ([1.0, 0.0], [0.0, 7.0])


def test_what_both_trees_share_stays_as_it_is_and_gradients_that_are_none_are_left_out() -> None:
    shared, grad = torch.ones(2), torch.ones(1)
    assert choose(torch.tensor(True), {"a": shared}, {"a": shared})["a"] is shared
    assert given({"a": grad, "b": None}) == {"a": grad}


def test_a_number_is_read_where_it_has_one_value_and_nothing_waits() -> None:
    seen: list[Any] = []

    def mapped(x: Tensor) -> Tensor:
        seen.append((is_transformed(), read_number(x) is x, read_number(3) == 3))
        return x

    torch.func.vmap(mapped)(torch.ones(2))
    torch.func.grad(mapped)(torch.ones(()))
    assert seen == [(True, True, True)] * 2
    assert not is_transformed()
    assert read_number(torch.tensor(2)) == 2
    assert type(read_number(torch.tensor(2))) is int
    for tensor in (torch.ones((), requires_grad=True), torch.ones((), device="meta")):
        assert read_number(tensor) is tensor


def test_beneath_a_vmap_a_function_is_called_once_with_all_members() -> None:
    shapes: list[Any] = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        shapes.append((is_transformed(), *(tuple(each.shape) for each in (x, y))))
        return x * y

    def call(x: Tensor, y: Tensor) -> Tensor:
        result = beneath_vmap(product, x, y)
        assert result is not None
        return result

    x, y = torch.arange(6.0).reshape(2, 3), torch.tensor([1.0, 10.0])
    assert torch.equal(torch.func.vmap(call, in_dims=(1, None))(x, y), x.T * y)
    assert torch.equal(torch.func.vmap(call, in_dims=(0, None))(x.T, y), x.T * y)
    twice = torch.func.vmap(torch.func.vmap(call, in_dims=(0, None)), in_dims=(1, None))(x, torch.tensor(2.0))
    assert torch.equal(twice, 2 * x.T)
    assert shapes[:2] == [(False, (3, 2), (3, 2))] * 2
    assert shapes[2][0]  # the outer vmap maps this one too


def test_without_a_vmap_of_the_tensors_nothing_is_beneath() -> None:
    def nothing(x: Tensor) -> Tensor:
        assert beneath_vmap(torch.neg, x) is None
        return x

    other = torch.ones(3)
    nothing(other)
    torch.func.grad(nothing)(torch.ones(()))
    torch.func.vmap(lambda x: x + nothing(other))(torch.ones(2))
