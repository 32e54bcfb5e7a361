"""Claims about `dwiml_func.core.metrics`: a weighted mean in any grouping, in float64, that waits for no device."""

import math
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.core.metrics import add_metrics, read_means, weighted_sum
from dwiml_func.types import Sum

BATCHES = st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 5000)), min_size=1, max_size=30)


def closed_form(batches: list[tuple[float, int]]) -> float:
    return math.fsum(mean * weight for mean, weight in batches) / math.fsum(weight for _, weight in batches)


@given(BATCHES, st.integers(0, 30))
def test_the_mean_is_weighted_however_the_batches_are_grouped(batches, cut):
    sums = [{"loss": weighted_sum(mean, weight)} for mean, weight in batches]
    one_by_one = reduce(add_metrics, sums, {})
    two_groups = add_metrics(reduce(add_metrics, sums[:cut], {}), reduce(add_metrics, sums[cut:], {}))
    for total in (one_by_one, two_groups):
        assert read_means(total)["loss"] == pytest.approx(closed_form(batches), rel=1e-12, abs=1e-9)
        assert total["loss"].weight == sum(weight for _, weight in batches)


def test_unequal_batches_are_not_averaged_as_equals():
    total = add_metrics({"loss": weighted_sum(1.0, 1)}, {"loss": weighted_sum(4.0, 2)})
    assert read_means(total) == {"loss": 3.0}


def test_totals_are_float64():
    # In float32 the second batch would vanish beside the first.
    total = add_metrics(
        {"loss": weighted_sum(torch.tensor(1.0), 2**25)}, {"loss": weighted_sum(torch.tensor(1.0), torch.tensor(1))}
    )
    assert total["loss"] == Sum(2.0**25 + 1, 2.0**25 + 1)
    assert weighted_sum(torch.tensor(0.1), 3) == Sum(float(torch.tensor(0.1)) * 3, 3.0)


def test_on_the_cpu_sums_are_plain_floats_without_a_graph():
    total, weight = weighted_sum(torch.tensor(0.5, requires_grad=True), torch.tensor(4))
    assert (type(total), type(weight), total, weight) == (float, float, 2.0, 4.0)


@pytest.mark.parametrize("weight", [0, torch.tensor(0), torch.tensor(0.0)])
def test_a_mean_of_nothing_does_not_spoil_the_means_of_other_batches(weight):
    nothing = weighted_sum(torch.tensor(math.nan), weight)
    assert read_means(add_metrics({"error": nothing}, {"error": weighted_sum(2.0, 3)})) == {"error": 2.0}
    assert torch.func.vmap(lambda mean: weighted_sum(mean, torch.zeros(())).total)(torch.tensor([math.nan])) == 0.0
    assert math.isnan(weighted_sum(torch.tensor(math.nan), 1).total)


def test_a_mean_on_a_device_of_a_batch_without_points_counts_nothing():
    assert weighted_sum(torch.ones((), device="meta"), 0) == Sum(0.0, 0.0)
    assert weighted_sum(torch.ones((), device="meta"), 2).total.is_meta  # type: ignore[union-attr]
    assert torch.func.vmap(lambda mean: weighted_sum(mean, 2).total)(torch.tensor([3.0])) == 6.0


def test_a_tensor_on_a_device_is_not_read():
    # A meta tensor has no value: reading it raises an error.
    sums = {"loss": weighted_sum(torch.ones((), device="meta", requires_grad=True), torch.ones((), device="meta"))}
    total = add_metrics(sums, add_metrics(sums, {"loss": Sum(1.0, 2.0)}))
    for value in total["loss"]:
        assert isinstance(value, torch.Tensor)
        assert (value.dtype, value.shape, value.requires_grad) == (torch.float64, (), False)


def test_a_name_in_one_of_two_is_kept_and_neither_is_changed():
    first, second = {"a": Sum(1.0, 1.0)}, {"a": Sum(2.0, 3.0), "b": Sum(5.0, 5.0)}
    assert add_metrics(first, second) == {"a": Sum(3.0, 4.0), "b": Sum(5.0, 5.0)}
    assert first == {"a": Sum(1.0, 1.0)}
    assert second == {"a": Sum(2.0, 3.0), "b": Sum(5.0, 5.0)}


def test_a_mean_over_nothing_is_nan():
    assert math.isnan(read_means({"loss": Sum(0.0, 0.0)})["loss"])
    assert read_means({}) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value):
    total = add_metrics({"loss": weighted_sum(torch.tensor(value), 3)}, {"loss": weighted_sum(1.0, 2)})
    assert str(read_means(total)["loss"]) == str(value)
