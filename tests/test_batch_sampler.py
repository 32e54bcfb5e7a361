from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwiml_func.data.batch_sampler import SamplerSpec, sample_epoch
from dwiml_func.data.dataset import DatasetIndex
from dwiml_func.rng import Key, Stream, fold_in

KEY = fold_in(Key(1234), Stream.TRAIN_PLAN)


def make_index(num_total: int) -> DatasetIndex:
    first = num_total // 3
    return DatasetIndex(("a", "b"), np.array([first, num_total - first]))


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 60), st.integers(0, 5))
def test_every_streamline_comes_exactly_once_an_epoch(num_total, batch_size, epoch):
    plan = sample_epoch(make_index(num_total), SamplerSpec(batch_size=batch_size, max_batches=None), KEY, epoch)
    batches = [plan[i] for i in range(len(plan))]
    assert sorted(id_ for batch in batches for id_ in batch.tolist()) == list(range(num_total))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 10))
def test_a_limit_cuts_the_epoch_and_changes_nothing_before(num_total, batch_size, max_batches):
    index = make_index(num_total)
    whole = sample_epoch(index, SamplerSpec(batch_size=batch_size, max_batches=None), KEY, 0)
    cut = sample_epoch(index, SamplerSpec(batch_size=batch_size, max_batches=max_batches), KEY, 0)
    assert len(cut) == min(max_batches, len(whole))
    assert all(np.array_equal(cut[i], whole[i]) for i in range(len(cut)))
    assert len(cut.ids) == sum(len(cut[i]) for i in range(len(cut)))


def test_the_plan_is_a_function_of_key_and_epoch():
    index, spec = make_index(100), SamplerSpec(batch_size=10)
    plan = sample_epoch(index, spec, KEY, 3)
    assert np.array_equal(plan.ids, sample_epoch(index, spec, KEY, 3).ids)
    assert not np.array_equal(plan.ids, sample_epoch(index, spec, KEY, 4).ids)
    assert not np.array_equal(plan.ids, sample_epoch(index, spec, fold_in(Key(1234), Stream.VALID_PLAN), 3).ids)
    assert not np.array_equal(plan.ids, sample_epoch(index, spec, fold_in(Key(1235), Stream.TRAIN_PLAN), 2).ids)


def test_the_batch_size_cuts_the_same_order():
    index = make_index(100)
    small, large = (sample_epoch(index, SamplerSpec(batch_size=size), KEY, 0) for size in (7, 30))
    assert np.array_equal(small.ids, large.ids)


def test_streamlines_of_all_subjects_are_mixed():
    index = make_index(300)
    plan = sample_epoch(index, SamplerSpec(batch_size=100), KEY, 0)
    assert all(set(index.subject_of(plan[i]).tolist()) == {0, 1} for i in range(len(plan)))


def test_planning_leaves_the_global_random_states_alone():
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    sample_epoch(make_index(100), SamplerSpec(), KEY, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


def test_a_plan_cannot_be_changed_through_a_batch():
    plan = sample_epoch(make_index(10), SamplerSpec(batch_size=5), KEY, 0)
    with pytest.raises(ValueError, match="read-only"):
        plan[0][0] = 7


@pytest.mark.parametrize("batch", [-1, 2])
def test_a_batch_out_of_range_is_refused(batch):
    plan = sample_epoch(make_index(10), SamplerSpec(batch_size=5), KEY, 0)
    with pytest.raises(IndexError, match=f"between 0 and 1. Received: {batch}"):
        plan[batch]


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused_by_value(batch_size):
    with pytest.raises(ValueError, match=f"batch size of at least 1 streamline. Received: {batch_size}$"):
        SamplerSpec(batch_size=batch_size)


@pytest.mark.parametrize("max_batches", [0, -1])
def test_a_limit_below_one_is_refused_by_value(max_batches):
    with pytest.raises(ValueError, match=f"at least 1 batch an epoch, or no limit. Received: {max_batches}$"):
        SamplerSpec(max_batches=max_batches)
