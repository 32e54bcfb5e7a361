"""Claims about `dwiml_func.core.attributes`: what a forward leaves in plain attributes is found, told and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwiml_func import Key
from dwiml_func.core.attributes import ABSENT, IN_PLACE, AttributeCheck, Attributes, is_same_loss


def make_module() -> Any:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    module.count, module.kept = 1, [1, 2]
    inner = module[1]
    inner.cache, inner.names, inner.scale, inner.generator = {"a": 1}, {"a"}, torch.ones(2), torch.Generator()
    return module


CHANGES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "nothing": (lambda module: None, {}),
    "an equal number": (lambda module: setattr(module, "count", 1), {}),
    "a number": (lambda module: setattr(module, "count", 2), {"count": 2}),
    "a list": (lambda module: module.kept.append(3), {"kept": [1, 2, 3]}),
    "a list of as many": (lambda module: module.kept.reverse(), {"kept": [2, 1]}),
    "a dict": (lambda module: module[1].cache.update(a=2, b=3), {"1.cache": {"a": 2, "b": 3}}),
    "a set": (lambda module: module[1].names.add("b"), {"1.names": {"a", "b"}}),
    "a tensor": (lambda module: module[1].scale.add_(1), {"1.scale": IN_PLACE}),
    "a generator": (lambda module: torch.rand(1, generator=module[1].generator), {"1.generator": IN_PLACE}),
    "one that is gone": (lambda module: delattr(module, "count"), {"count": ABSENT}),
    "new ones": (
        lambda module: (setattr(module, "more", 1), setattr(module[1], "more", 2)),
        {"more": 1, "1.more": 2},
    ),
    "a new list in place of one": (lambda module: setattr(module, "kept", [7]), {"kept": [7]}),
    "several": (
        lambda module: (setattr(module, "count", 5), module.kept.clear(), setattr(module[1][0], "note", 1)),
        {"count": 5, "kept": [], "1.0.note": 1},
    ),
}


def content(module: Any) -> Any:
    inner = module[1]
    own = [{name for name in part.__dict__ if not name.startswith("_")} for part in module.modules()]
    return own, module.count, list(module.kept), dict(inner.cache), set(inner.names)


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_every_change_is_told_once_and_all_but_tensors_and_generators_are_put_back(change, expected):
    module = make_module()
    before, places = content(module), (module.kept, module[1].cache, module[1].names)
    attributes = Attributes(module)
    assert attributes.restore() == {}
    change(module)
    assert attributes.restore() == expected
    assert content(module) == before
    assert all(a is b for a, b in zip(places, (module.kept, module[1].cache, module[1].names), strict=True))
    if IN_PLACE not in expected.values():
        assert attributes.restore() == {}
        attributes.put(expected)
        assert attributes.restore() == expected
        assert content(module) == before


def test_what_a_forward_registers_is_taken_away():
    module = make_module()
    attributes = Attributes(module)
    added, late = torch.ones(1), nn.Identity()
    module[1].register_buffer("late", added)
    module.add_module("last", late)
    assert attributes.restore() == {"1.late": added, "last": late}
    assert "late" not in dict(module.named_buffers())
    assert "last" not in dict(module.named_modules())
    assert attributes.restore() == {}


def check(changed: dict[str, Any], loss_of: Callable[[dict[str, Any]], float], checker: AttributeCheck, **train: bool):
    reruns: list[dict[str, Any]] = []

    def rerun(values: dict[str, Any]) -> tuple[Tensor, int]:
        assert not torch.is_grad_enabled()
        reruns.append(values)
        return torch.tensor(loss_of(values)), 1

    checker.check(train.get("train", True), changed, rerun=rerun, loss=torch.tensor(1.0), key=Key(1))
    return reruns


def test_an_attribute_that_the_loss_does_not_need_is_tried_once_in_training_and_once_in_validation():
    checker = AttributeCheck()
    assert check({}, lambda values: 1.0, checker) == []
    assert check({"cache": 3, "seen": [1]}, lambda values: 1.0, checker) == [
        {"cache": ABSENT},
        {"cache": 3, "seen": [1]},
    ]
    assert check({"cache": 4}, lambda values: 0.0, checker) == []
    assert check({}, lambda values: 1.0, checker, train=False) == [{"cache": ABSENT, "seen": ABSENT}, {}]
    assert check({"cache": 4}, lambda values: 0.0, checker, train=False) == []
    assert check({"more": 4}, lambda values: 1.0, checker) == [{"more": ABSENT}, {"more": 4}]


@pytest.mark.parametrize(
    ("changed", "loss_of"),
    [
        ({"cache": 3}, lambda values: 2.0 if values["cache"] is ABSENT else 1.0),
        ({"cache": 3}, lambda values: 2.0 if values["cache"] == 3 else 1.0),
        ({"cache": 3}, lambda values: getattr(nn.Identity(), "cache")),  # noqa: B009
        ({"cache": IN_PLACE}, lambda values: 1.0),
    ],
)
def test_an_attribute_that_changes_the_loss_is_refused(changed, loss_of):
    with pytest.raises(ValueError, match="keeps something between batches in cache, outside the training state"):
        check(changed, loss_of, AttributeCheck())


def test_losses_are_the_same_to_the_bit_and_without_values_always():
    one = torch.tensor(1.0, requires_grad=True)
    assert is_same_loss(one, torch.tensor(1.0))
    assert is_same_loss(torch.tensor(torch.nan), torch.tensor(torch.nan))
    assert not is_same_loss(one, torch.tensor(1.0).nextafter(torch.tensor(2.0)))
    assert is_same_loss(torch.ones((), device="meta"), torch.zeros((), device="meta"))
