"""Claims about digests: equal for equal states, whatever holds them, and different for any difference."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwiml_func import Key, TrainState, adam, init_state, sgd
from dwiml_func.checkpoint.digest import (
    BitDifference,
    bit_difference,
    is_starting_count,
    leaf_digest,
    numbers_to_fields,
    state_digest,
    state_from_leaves,
    state_leaves,
    state_numbers,
    tensor_bytes,
)
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import Validation
from dwiml_func.core.state import mark_donated
from dwiml_func.types import Plateau, Sum


def make_state() -> TrainState:
    """A state with a bit of everything, made of no random number."""
    return TrainState(
        params={"weight": torch.arange(6.0).reshape(2, 3) / 7, "bias": torch.tensor(-0.0)},
        buffers={"count": torch.tensor(3), "flags": torch.tensor([True, False]), "none": torch.zeros(0, 4)},
        opt_state={"exp_avg": {"weight": torch.full((2, 3), 0.5, dtype=torch.bfloat16), "bias": torch.tensor(1e-300)}},
        key=Key(2**64 - 1, (2, 7)),
        step=2**40,
        epoch=3,
        batch=50,
        sums={"loss": Sum(0.1, 3.0), "grad_norm": Sum(math.inf, 1.0)},
        best=Best(0.25, 2, 1),
    )


def test_the_digest_is_the_same_in_every_process_on_every_day():
    assert state_digest(make_state()) == "d207f9c9c5b2a508b224d9d3e5fa03139cb145872c197fd6519dd3f3b66ef684"


def test_equal_states_have_equal_digests_whatever_the_order_of_their_dicts():
    state = make_state()

    def turned(mapping):
        return {name: mapping[name] for name in reversed(mapping)}

    other = state.replace(
        params=turned(state.params),
        buffers=turned(state.buffers),
        opt_state={kind: turned(tensors) for kind, tensors in state.opt_state.items()},
        sums=turned(state.sums),
    )
    assert list(other.params) != list(state.params)
    assert state_digest(other) == state_digest(state)
    assert list(state_leaves(other)) != list(state_leaves(state))

    two_kinds = state.replace(opt_state={"a": {"weight": torch.zeros(1)}, "b": {"weight": torch.ones(1)}})
    assert state_digest(two_kinds.replace(opt_state=turned(two_kinds.opt_state))) == state_digest(two_kinds)


@pytest.mark.parametrize("name", sorted(state_leaves(make_state())))
def test_every_bit_of_every_leaf_counts(name):
    state = make_state()
    leaf = state_leaves(state)[name]
    before, seen = state_digest(state), set()
    memory = tensor_bytes(leaf).reshape(-1).view("uint8")  # shares the tensor's memory
    for place in range(len(memory)):
        for bit in range(8 if leaf.dtype != torch.bool else 1):
            memory[place] ^= 1 << bit
            seen.add(state_digest(state))
            memory[place] ^= 1 << bit
    assert state_digest(state) == before
    assert before not in seen
    assert len(seen) == leaf.numel() * (1 if leaf.dtype == torch.bool else 8 * leaf.element_size())


@pytest.mark.parametrize(
    "change",
    [
        {"key": Key(2**64 - 2, (2, 7))},
        {"key": Key(2**64 - 1, (2, 7, 0))},
        {"key": Key(2**64 - 1, (7, 2))},
        {"step": 2**40 + 1},
        {"epoch": 4},
        {"batch": 51},
        {"epoch": 50, "batch": 3},
        {"sums": {}},
        {"sums": {"loss": Sum(math.nextafter(0.1, 1), 3.0), "grad_norm": Sum(math.inf, 1.0)}},
        {"sums": {"loss": Sum(0.1, 4.0), "grad_norm": Sum(math.inf, 1.0)}},
        {"sums": {"loss": Sum(3.0, 0.1), "grad_norm": Sum(math.inf, 1.0)}},
        {"sums": {"lost": Sum(0.1, 3.0), "grad_norm": Sum(math.inf, 1.0)}},
        {"sums": {"loss": Sum(0.1, 3.0), "grad_norm": Sum(math.nan, 1.0)}},
        {"best": Best(math.nextafter(0.25, 1), 2, 1)},
        {"best": Best(0.25, 1, 1)},
        {"best": Best(0.25, 2, 0)},
        {"best": Best(0.25, None, 1)},
        {"best": Best(math.inf, 2, 1)},
        {"best": Best(0.25, 2, 1, batch=3)},
        {"plateau": Plateau(num_reductions=1)},
        {"plateau": Plateau(best=0.5)},
        {"plateau": Plateau(num_bad=1)},
        {"plateau": Plateau(cooldown=1)},
        {"validations": (Validation(10, {"loss": 0.5}, 0.1),)},
    ],
    ids=str,
)
def test_every_number_counts(change):
    assert state_digest(make_state().replace(**change)) != state_digest(make_state())


def test_names_shapes_dtypes_and_places_count():
    state = make_state()
    weight, bias = state.params["weight"], state.params["bias"]
    variants = [
        state,
        state.replace(params={"weights": weight, "bias": bias}),
        state.replace(params={"weight": bias, "bias": weight}),
        state.replace(params={"weight": weight.reshape(3, 2), "bias": bias}),
        state.replace(params={"weight": weight.reshape(6), "bias": bias}),
        state.replace(params={"weight": weight.view(torch.int32), "bias": bias}),
        state.replace(params={"weight": weight.double(), "bias": bias}),
        state.replace(params={"weight": weight, "bias": bias.reshape(1)}),
        state.replace(params={"weight": weight}, buffers={**state.buffers, "bias": bias}),
        state.replace(buffers={**state.buffers, "none": torch.zeros(4, 0)}),
        state.replace(buffers={name: leaf for name, leaf in state.buffers.items() if name != "none"}),
        state.replace(opt_state={"exp_avg_sq": state.opt_state["exp_avg"]}),
        state.replace(opt_state={**state.opt_state, "more": {"weight": torch.zeros(0)}}),
    ]
    assert len({state_digest(variant) for variant in variants}) == len(variants)


def test_the_sign_of_zero_counts_and_all_sums_that_are_nan_are_equal():
    assert leaf_digest(torch.tensor(0.0)) != leaf_digest(torch.tensor(-0.0))
    state = make_state()
    assert state_digest(state.replace(sums={"a": Sum(0.0, 1.0)})) != state_digest(
        state.replace(sums={"a": Sum(-0.0, 1.0)})
    )
    nans = [state.replace(sums={"a": Sum(nan, 1.0)}) for nan in (math.nan, -math.nan, torch.tensor(math.nan))]
    assert len({state_digest(variant) for variant in nans}) == 1


@pytest.mark.parametrize(
    ("view", "copy"),
    [
        (torch.arange(12.0).reshape(3, 4).T, torch.arange(12.0).reshape(3, 4).T.contiguous()),
        (torch.arange(12.0)[::3], torch.tensor([0.0, 3.0, 6.0, 9.0])),
        (torch.tensor(2.0).expand(5), torch.full((5,), 2.0)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
        (torch.ones(3, requires_grad=True), torch.ones(3)),
    ],
    ids=["transposed", "strided", "expanded", "conjugate", "negative", "requires_grad"],
)
def test_the_memory_layout_does_not_count(view: Tensor, copy: Tensor):
    assert leaf_digest(view) == leaf_digest(copy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_the_device_does_not_count():
    assert leaf_digest(torch.arange(5.0, device="cuda")) == leaf_digest(torch.arange(5.0))


def test_the_plateau_and_the_validations_come_back_from_json_as_they_were():
    plateau = Plateau(num_reductions=3, best=0.5, num_bad=2, cooldown=1)
    validations = (Validation(10, {"loss": 0.5}, 0.1), Validation(20, {"loss": 0.25, "size": 2.0}, 0.05))
    state = make_state().replace(plateau=plateau, validations=validations, best=Best(0.25, 4, 1, batch=20))
    fields = numbers_to_fields(json.loads(json.dumps(state_numbers(state))))
    assert {name: getattr(state, name) for name in fields} == fields


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**80),
    sums=st.dictionaries(st.text(), st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False))),
    best=st.tuples(st.floats(allow_nan=False), st.none() | st.integers(1), st.integers(0)),
)
def test_numbers_come_back_from_json_as_they_were(seed, step, sums, best):
    state = make_state().replace(
        key=Key(seed), step=step, sums={name: Sum(*pair) for name, pair in sums.items()}, best=Best(*best)
    )
    fields = numbers_to_fields(json.loads(json.dumps(state_numbers(state))))
    assert {name: getattr(state, name) for name in fields} == fields
    assert state_digest(state.replace(**fields)) == state_digest(state)


def test_sums_on_a_device_are_numbers_too():
    state = make_state()
    on_device = state.replace(sums={"loss": Sum(torch.tensor(0.1, dtype=torch.float64), torch.tensor(3.0))})
    assert state_digest(on_device) == state_digest(state.replace(sums={"loss": Sum(0.1, 3.0)}))


def test_leaves_are_the_states_own_tensors_under_one_name_each():
    state = init_state(torch.nn.BatchNorm1d(2), adam(), seed=0)
    leaves = state_leaves(state)
    assert leaves["params/weight"] is state.params["weight"]
    assert leaves["buffers/running_mean"] is state.buffers["running_mean"]
    assert leaves["opt_state/exp_avg/bias"] is state.opt_state["exp_avg"]["bias"]
    assert len(leaves) == 2 + 3 + 4


def test_moments_whose_names_could_collide_are_refused():
    state = make_state().replace(opt_state={"a": {"b/c": torch.zeros(1)}, "a/b": {"c": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"without a slash.*'a/b'"):
        state_digest(state)


def test_a_donated_state_has_no_digest():
    state = init_state(torch.nn.Linear(1, 1), sgd(), seed=0)
    mark_donated(state)
    with pytest.raises(RuntimeError, match="donated"):
        state_digest(state)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bool, "bool"),
        (torch.float16, "float16"),
        (torch.bfloat16, "int16"),
        (torch.float8_e4m3fn, "int8"),
        (torch.uint16, "uint16"),
        (torch.complex32, "int32"),
        (torch.complex64, "complex64"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_dtype_that_numpy_lacks_becomes_integers_of_its_width(dtype, stored):
    tensor = torch.tensor([1.0, 0.0]).to(dtype)
    array = tensor_bytes(tensor)
    assert array.dtype == stored
    assert array.tobytes() == bytes(tensor.view(torch.uint8).tolist())


@pytest.mark.parametrize(
    ("a", "b", "ulps"),
    [
        (torch.tensor(-1e-45), torch.tensor(1e-45), 2),
        (torch.tensor(-0.0), torch.tensor(1e-45), 1),
        (torch.tensor(1.0), torch.tensor(1.0 + 2**-22), 2),
        (torch.tensor(-1.0), torch.tensor(-1.0 - 2**-22), 2),
        (torch.tensor(-1), torch.tensor(1), 2),
    ],
)
def test_the_distance_in_ulps_counts_the_numbers_between(a, b, ulps):
    difference = bit_difference(a, b)
    assert difference is not None
    assert difference.ulps == ulps


def test_a_difference_tells_how_many_values_where_the_first_and_the_largest():
    a = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0, 3.5], [4.0, 5.25, 2.0]], dtype=torch.float64)
    assert bit_difference(a, b) == BitDifference(6, 3, 4.0, (0, 2), ("3.0", "3.5"), 1 << 50)
    assert bit_difference(a, a.clone()) is None
    assert bit_difference(torch.tensor(0.0), torch.tensor(-0.0)) == BitDifference(1, 1, 0.0, (), ("0.0", "-0.0"), 0)
    nan = torch.tensor([1.0, math.nan])
    assert bit_difference(nan, nan.clone()) is None
    found = bit_difference(nan, torch.tensor([1.0, 2.0]))
    assert found is not None
    assert (math.isnan(found.largest), found.first, found.values) == (True, (1,), ("nan", "2.0"))
    found = bit_difference(torch.tensor([1 + 2j, 3 + 4j]), torch.tensor([1 + 2j, 3 + 5j]))
    assert found is not None
    assert (found.num_different, found.largest, found.first, found.values) == (1, 1.0, (1, 1), ("4.0", "5.0"))
    for other in (a[:1], a.float()):
        with pytest.raises(ValueError, match="of the same shape and dtype"):
            bit_difference(a, other)


def test_a_count_of_a_part_of_a_chain_is_a_starting_count_and_a_parameter_of_its_name_is_not():
    zero = torch.tensor(0)
    names = ("opt_state/missed/w", "opt_state/0/missed/w", "opt_state/0/1/unused/w")
    assert all(is_starting_count(name, zero) for name in names)
    others = ("opt_state/exp_avg/missed", "opt_state/missed", "params/missed/w", "opt_state/0/exp_avg/w")
    assert not any(is_starting_count(name, zero) for name in others)
    assert not is_starting_count("opt_state/missed/w", torch.zeros(1))


def test_parameters_whose_names_end_alike_keep_their_moments():
    params = {"a/b": torch.zeros(1), "0/a/b": torch.ones(1)}
    state = make_state().replace(params=params, opt_state={"exp_avg": {name: p + 2 for name, p in params.items()}})
    rebuilt = state_from_leaves(state_leaves(state), numbers_to_fields(state_numbers(state)))
    assert state_digest(rebuilt) == state_digest(state)
    assert sorted(rebuilt.opt_state["exp_avg"]) == sorted(params)
