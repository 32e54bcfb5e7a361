from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwiml_func.core.rng import Key, Stream, fold_in
from dwiml_func.data.dataset import DatasetIndex
from dwiml_func.data.sampler import SamplerSpec, sample_epoch

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
    with pytest.raises(ValueError, match=f"^batch_size: .* at least 1 .*received {batch_size}[.]$"):
        SamplerSpec(batch_size=batch_size)


@pytest.mark.parametrize("max_batches", [0, -1])
def test_a_limit_below_one_is_refused_by_value(max_batches):
    with pytest.raises(ValueError, match=f"^max_batches: .* at least 1 .*received {max_batches}[.]$"):
        SamplerSpec(max_batches=max_batches)


# --- lengths in mm, subjects and cycles ---


@st.composite
def indices(draw) -> DatasetIndex:
    numbers = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    lengths = np.random.default_rng(draw(st.integers(0, 99))).uniform(0, 300, sum(numbers))
    return DatasetIndex(tuple(map(str, range(len(numbers)))), np.array(numbers), lengths)


specs = st.builds(
    SamplerSpec,
    batch_size=st.integers(1, 1000),
    batch_size_units=st.sampled_from(["nb_streamlines", "length_mm"]),
    nb_streamlines_per_chunk=st.none() | st.integers(1, 50),
    nb_subjects_per_batch=st.just(2) | st.just(9),
    cycles=st.none() | st.integers(1, 3),
    max_batches=st.none() | st.integers(1, 8),
) | st.builds(
    SamplerSpec,
    batch_size=st.integers(1, 1000),
    batch_size_units=st.just("length_mm"),
    max_batches=st.none() | st.integers(1, 8),
)


@settings(max_examples=300)
@given(indices(), specs, st.integers(0, 3))
def test_every_plan_covers_what_it_should_without_repetition_in_batches_of_the_right_size(index, spec, epoch):
    plan = sample_epoch(index, spec, KEY, epoch)
    batches = [plan[i] for i in range(len(plan))]
    ids = [id_ for batch in batches for id_ in batch.tolist()]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= set(range(index.num_total))
    assert all(len(batch) > 0 for batch in batches)
    if spec.max_batches is None:
        assert len(ids) == index.num_total
    else:
        assert len(plan) <= spec.max_batches
        assert len(plan) == spec.max_batches or len(ids) == index.num_total
    for batch in batches:
        size = index.lengths_mm[batch].sum() if spec.batch_size_units == "length_mm" else len(batch)
        assert size <= spec.batch_size or len(batch) == 1
        if spec.nb_subjects_per_batch is not None:
            assert len(set(index.subject_of(batch).tolist())) <= spec.nb_subjects_per_batch
    again = sample_epoch(index, spec, KEY, epoch)
    assert np.array_equal(again.ids, plan.ids)
    assert np.array_equal(again.batch_offsets, plan.batch_offsets)


@settings(max_examples=50)
@given(indices(), st.integers(1, 2000))
def test_batches_in_mm_take_all_that_fits_next(index, batch_size):
    spec = SamplerSpec(batch_size=batch_size, batch_size_units="length_mm", max_batches=None)
    plan = sample_epoch(index, spec, KEY, 0)
    for first, second in zip(range(len(plan)), range(1, len(plan)), strict=False):
        assert index.lengths_mm[plan[first]].sum() + index.lengths_mm[plan[second][0]] > batch_size - 1e-3


def test_a_streamline_longer_than_a_batch_makes_a_batch_of_its_own():
    index = DatasetIndex(("a",), np.array([4]), np.array([10.0, 5000.0, 10.0, 10.0]))
    spec = SamplerSpec(batch_size=100, batch_size_units="length_mm")
    plan = sample_epoch(index, spec, KEY, 0)
    assert [1] in [plan[i].tolist() for i in range(len(plan))]
    assert sorted(plan.ids.tolist()) == [0, 1, 2, 3]


def test_a_batch_may_be_smaller_than_its_number_of_subjects():
    index = DatasetIndex(("a", "b", "c"), np.array([5, 5, 5]))
    plan = sample_epoch(index, SamplerSpec(batch_size=2, nb_subjects_per_batch=3, cycles=1), KEY, 0)
    assert sorted(plan.ids.tolist()) == list(range(15))


def test_subjects_change_after_their_cycles():
    index = DatasetIndex(tuple("abcdefgh"), np.full(8, 1000))
    plan = sample_epoch(index, SamplerSpec(batch_size=50, nb_subjects_per_batch=2, cycles=3), KEY, 0)
    subjects = [frozenset(index.subject_of(plan[i]).tolist()) for i in range(60)]
    groups = [subjects[i : i + 3] for i in range(0, 60, 3)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) > 5


def test_without_cycles_the_same_subjects_stay_until_they_have_no_more():
    index = DatasetIndex(tuple("abcd"), np.full(4, 100))
    plan = sample_epoch(index, SamplerSpec(batch_size=10, nb_subjects_per_batch=2), KEY, 0)
    first = set(index.subject_of(plan.ids[:200]).tolist())
    assert len(first) == 2
    assert not first & set(index.subject_of(plan.ids[200:]).tolist())
    for subject in range(4):  # each one's streamlines are shuffled, and so are those of two subjects in a batch
        own = plan.ids[index.subject_of(plan.ids) == subject]
        assert 30 < np.count_nonzero(np.diff(own) > 0) < 69
    assert all(set(index.subject_of(plan[i]).tolist()) == first for i in range(15))


def test_subjects_are_drawn_with_weights_of_what_is_left():
    index = DatasetIndex(("small", "large"), np.array([100, 300]))
    spec = SamplerSpec(batch_size=10, nb_subjects_per_batch=1, cycles=1, max_batches=1)
    first = [index.subject_of(sample_epoch(index, spec, KEY, epoch).ids)[0] for epoch in range(2000)]
    assert 0.70 < np.mean(first) < 0.80  # 0.75 with a standard error of 0.01
    both = SamplerSpec(batch_size=40, nb_subjects_per_batch=2, cycles=1, max_batches=1)
    shares = [index.subject_of(sample_epoch(index, both, KEY, epoch).ids).mean() for epoch in range(500)]
    assert 0.74 < np.mean(shares) < 0.76  # standard error 0.003


@pytest.mark.parametrize(
    "spec",
    [
        SamplerSpec(),
        SamplerSpec(nb_subjects_per_batch=2, cycles=1, max_batches=2),
        SamplerSpec(batch_size=500, batch_size_units="length_mm"),
    ],
)
def test_no_two_of_100_seeds_and_20_epochs_have_the_same_plan(spec):
    index = DatasetIndex(("a", "b", "c"), np.array([20, 30, 10]), np.full(60, 25.0))
    keys = [fold_in(Key(seed), Stream.TRAIN_PLAN) for seed in range(100)]
    plans = {sample_epoch(index, spec, key, epoch).ids.tobytes() for key in keys for epoch in range(20)}
    assert len(plans) == 100 * 20


def test_lengths_are_rounded_up_so_that_no_batch_is_above_its_size():
    index = DatasetIndex(("a",), np.array([3]), np.full(3, 10 / 3 + 2e-7))
    plan = sample_epoch(index, SamplerSpec(batch_size=10, batch_size_units="length_mm"), KEY, 0)
    assert [len(plan[number]) for number in range(len(plan))] == [2, 1]


def test_lengths_in_mm_do_not_overflow():
    index = DatasetIndex(("a",), np.array([70_000]), np.full(70_000, 150.0))
    plan = sample_epoch(index, SamplerSpec(batch_size=15_000, batch_size_units="length_mm", max_batches=None), KEY, 0)
    assert len(plan) == 700
    whole = SamplerSpec(batch_size=2**31 - 1, batch_size_units="length_mm")
    assert len(sample_epoch(index, whole, KEY, 0)) == 1


def test_batches_in_mm_need_lengths():
    with pytest.raises(ValueError, match=r"nb_streamlines$"):
        sample_epoch(make_index(10), SamplerSpec(batch_size_units="length_mm"), KEY, 0)


@pytest.mark.parametrize("name", ["nb_streamlines_per_chunk", "nb_subjects_per_batch"])
def test_numbers_of_subjects_and_chunks_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: .*, received 0[.]$"):
        SamplerSpec(**{name: 0})  # pyright: ignore[reportArgumentType]


def test_cycles_need_a_number_of_subjects():
    with pytest.raises(ValueError, match=r"^cycles: requires nb_subjects_per_batch\.$"):
        SamplerSpec(cycles=3)


def test_unknown_units_are_refused_by_name():
    with pytest.raises(ValueError, match=r"nb_streamlines, length_mm, received 'km'\.$"):
        SamplerSpec(batch_size_units="km")  # pyright: ignore[reportArgumentType]


@settings(max_examples=60)
@given(indices(), st.integers(1, 2000), st.integers(1, 3), st.integers(1, 3), st.none() | st.integers(1, 20))
def test_batches_in_mm_of_a_few_subjects_take_all_that_fits_next(index, batch_size, num_subjects, cycles, chunk):
    spec = SamplerSpec(
        batch_size=batch_size,
        batch_size_units="length_mm",
        nb_subjects_per_batch=num_subjects,
        cycles=cycles,
        nb_streamlines_per_chunk=chunk,
        max_batches=None,
    )
    plan = sample_epoch(index, spec, KEY, 0)
    left = index.num_streamlines.copy()
    for number in range(len(plan)):
        chosen = np.unique(index.subject_of(plan[number]))
        np.subtract.at(left, index.subject_of(plan[number]), 1)
        if left[chosen].sum() > 0:  # more was there to take: whatever came next did not fit
            assert index.lengths_mm[plan[number]].sum() + index.lengths_mm.max() > batch_size - 1e-3


PLANS = {
    "all": "a5927c0da4d1ad6a",
    "mm": "a91d4a38205b527a",
    "subjects": "2a115af897fa8b20",
    "cycles": "72152bb08a990490",
    "mm of subjects": "8f3b4fba563c84c5",
    "mm of whole subjects": "704080deea47344d",
    "mm of two subjects": "aa6d5355e59ffff9",
}
"""SHA-256 of the ids and offsets of plans of earlier versions: their runs are resumed with the same batches."""


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_those_of_earlier_versions(name):
    lengths = np.random.default_rng(0).uniform(20, 200, 600)
    index = DatasetIndex(tuple("abcd"), np.array([50, 300, 150, 100]), lengths)
    mm: dict[str, Any] = {"batch_size": 2000, "batch_size_units": "length_mm"}
    options: dict[str, dict[str, Any]] = {
        "all": {"batch_size": 40},
        "mm": mm,
        "subjects": {"batch_size": 40, "nb_subjects_per_batch": 2, "max_batches": None},
        "cycles": {"batch_size": 40, "nb_subjects_per_batch": 3, "cycles": 2, "max_batches": 9},
        "mm of subjects": {**mm, "nb_subjects_per_batch": 2, "cycles": 1, "nb_streamlines_per_chunk": 8},
        "mm of whole subjects": {**mm, "nb_subjects_per_batch": 2, "nb_streamlines_per_chunk": 8, "max_batches": None},
        "mm of two subjects": {**mm, "nb_subjects_per_batch": 2, "cycles": 3, "max_batches": 10},
    }
    digest = hashlib.sha256()
    for epoch in (0, 3):
        plan = sample_epoch(index, SamplerSpec(**options[name]), KEY, epoch)
        digest.update(plan.ids.astype("<i8").tobytes() + plan.batch_offsets.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == PLANS[name]
