"""Claims about `dwiml_func.core.stateless`: a module runs on tensors that are handed in, and keeps none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwiml_func.core.stateless import StatelessModule, copy_structure


def stateless(module: nn.Module, *, train: bool = True, autocast: torch.dtype | None = None) -> StatelessModule:
    return StatelessModule(module, train=train, autocast=autocast)


def own_tensors(module: nn.Module, value: float) -> dict[str, Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: torch.full_like(tensor, value).detach() for name, tensor in named}


def run(module: Any, batch: Any) -> Any:
    return module(batch)


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_call_leaves_the_module_as_it_was_and_a_held_one_does_at_the_end_of_its_block(is_held, fails):
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    own = stateless(module)
    originals = [slot[leaf] for _, slot, leaf in own._slots]

    def function(module: Any, batch: Any) -> Any:
        module.note = 1
        module(batch)
        if fails:
            raise KeyError("no such streamline")
        return [id(tensor) for tensor in module.parameters()]

    def call() -> list[bool]:
        tensors = own_tensors(module, 0.5)
        if fails:
            with pytest.raises(KeyError, match="no such streamline"):
                own(tensors, function, torch.ones(3, 2))
        else:
            assert own(tensors, function, torch.ones(3, 2)) == [
                id(tensors[name]) for name, _ in module.named_parameters()
            ]
        return [slot[leaf] is tensor for (_, slot, leaf), tensor in zip(own._slots, originals, strict=True)]

    if is_held:
        with own.hold():
            assert not any(call())
    for _ in range(2):
        assert all(call())
        assert not hasattr(own._module, "note")


def test_a_block_that_ends_in_an_error_is_over_too():
    module = nn.Linear(2, 1)
    own = stateless(module)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), own.hold():
        own(own_tensors(module, 1.0), run, torch.ones(1, 5))
    assert own._module.weight is module.weight
    tensors = own_tensors(module, 2.0)
    assert own(tensors, run, torch.ones(1, 2)).item() == 6.0
    assert own._module.weight is module.weight


def test_parts_that_are_in_evaluation_mode_stay_in_it_and_all_are_where_the_module_is_not_trained():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[1][0].eval()  # type: ignore[index]

    def modes(own: StatelessModule) -> list[bool]:
        return [each.training for each in own._module.modules()]

    assert modes(stateless(module)) == [True, True, True, False, True]
    assert modes(stateless(module, train=False)) == [False] * 5
    module.eval()  # a module that as a whole is not trained says nothing of its parts
    assert modes(stateless(module)) == [True] * 5
    assert not any(each.training for each in module.modules())


def test_a_parameter_that_is_written_into_or_replaced_is_named_with_and_without_a_gradient():
    module = nn.Linear(2, 1)

    def write(module: Any, batch: Any) -> Any:
        module.bias.add_(1.0)
        return batch

    def replace(module: Any, batch: Any) -> Any:
        module._parameters["weight"] = module.weight + 1
        return batch

    for function, name in ((write, "bias"), (replace, "weight")):
        with pytest.raises(ValueError, match=rf"forward writes into the parameter {name}\."):
            stateless(module)(own_tensors(module, 1.0), function, torch.ones(1, 2))
    with torch.inference_mode():  # tensors have no versions there
        tensors = own_tensors(module, 1.0)
        assert stateless(module)(tensors, run, torch.ones(1, 2)).item() == 3.0
    weights = torch.ones(3, 1, 2)
    outputs = torch.func.vmap(
        lambda weight: stateless(module)({"weight": weight, "bias": torch.ones(1)}, run, torch.ones(1, 2))
    )(weights)
    assert outputs.tolist() == [[[3.0]]] * 3


def test_a_backward_hook_is_refused_under_a_transform_only():
    module = nn.Sequential(nn.Linear(2, 1))
    module[0].register_full_backward_pre_hook(lambda module, gradients: None)
    own = stateless(module)
    assert own(own_tensors(module, 1.0), run, torch.ones(1, 2)).item() == 3.0

    def of(x: Tensor) -> Tensor:
        return own(own_tensors(module, 1.0), run, x)

    with pytest.raises(ValueError, match="The module Linear has a backward hook"):
        torch.func.vmap(of)(torch.ones(3, 1, 2))


def test_buffers_that_are_assigned_are_given_back_and_one_that_is_none_is_not_filled():
    module = nn.Linear(2, 1)
    module.register_buffer("count", torch.zeros(()))
    module.register_buffer("later", None)

    def count(module: Any, batch: Any) -> Any:
        module.count = module.count + 1
        return module(batch)

    def fill(module: Any, batch: Any) -> Any:
        module.later = torch.ones(1)
        return module(batch)

    own, tensors = stateless(module), own_tensors(module, 1.0)
    own(tensors, count, torch.ones(1, 2))
    assert tensors["count"].item() == 2.0
    with pytest.raises(ValueError, match="filled the buffers later, which are None"):
        own(own_tensors(module, 1.0), fill, torch.ones(1, 2))
    assert own._module.later is None
    own(tensors, count, torch.ones(1, 2))
    assert tensors["count"].item() == 3.0


def test_an_error_of_a_tensor_of_another_shape_or_dtype_is_told_by_its_name_and_other_errors_are_raised():
    module = nn.Linear(2, 1)
    tensors = own_tensors(module, 1.0)
    for other in (torch.ones(1, 3), torch.ones(1, 2, dtype=torch.float64)):
        with pytest.raises(
            ValueError, match=r"Received: weight of torch\.float\d\d \(1, \d\) in place of torch\.float32 \(1, 2\)\."
        ):
            stateless(module)({**tensors, "weight": other}, run, torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stateless(module)(tensors, run, torch.ones(1, 5))


def test_tied_tensors_stay_tied_in_a_copy_which_has_the_tensors_themselves():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    copied = copy_structure(module)
    assert copied[0].weight is copied[1].weight is module[0].weight  # type: ignore[index]
    assert copied[0] is not module[0]  # type: ignore[index]
    own = stateless(module)
    assert [name for name, *_ in own._slots] == ["0.weight", "0.bias", "0.weight", "1.bias"]
    tensors = {"0.weight": torch.eye(2), "0.bias": torch.zeros(2), "1.bias": torch.ones(2)}
    assert own(tensors, run, torch.tensor([[2.0, 3.0]])).tolist() == [[3.0, 4.0]]
