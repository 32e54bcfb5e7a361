from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.streamlines import (
    Streamlines,
    directions,
    input_offsets,
    input_rows,
    offsets_of,
    previous_directions,
)

lengths_lists = st.lists(st.integers(1, 6), max_size=8)


def make_lines(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [rng.standard_normal((length, 3)).astype(np.float32) for length in lengths]


def join(arrays: list[np.ndarray], num_columns: int) -> np.ndarray:
    return np.concatenate([np.empty((0, num_columns), dtype=np.float32), *arrays])


@settings(max_examples=50, deadline=None)
@given(lengths_lists)
def test_a_list_comes_back_from_the_flat_set_as_it_went_in(lengths):
    arrays = make_lines(lengths)
    lines = Streamlines.from_list(arrays)
    back = lines.to_list()
    assert len(lines) == len(back) == len(arrays)
    assert lines.lengths.tolist() == lengths
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(arrays, back, strict=True))
    assert lines.points.dtype == torch.float32
    assert lines.offsets.dtype == torch.int64


def test_from_list_copies_also_a_single_and_a_read_only_array():
    array = np.ones((2, 3), dtype=np.float32)
    array.flags.writeable = False
    lines = Streamlines.from_list([array])
    lines.points[0] = 5
    assert array[0, 0] == 1


def test_from_list_refuses_what_is_not_a_list_of_3d_points():
    with pytest.raises(ValueError, match=r"Expected streamlines of shape \(N, 3\)\. Received: \(4, 2\) at 1"):
        Streamlines.from_list([np.zeros((5, 3)), np.zeros((4, 2))])


@settings(max_examples=50, deadline=None)
@given(lengths_lists.filter(len), st.data())
def test_select_gathers_in_the_order_asked_for_with_repeats(lengths, data):
    arrays = make_lines(lengths)
    ids = data.draw(st.lists(st.integers(0, len(arrays) - 1), max_size=10))
    lines = Streamlines.from_list(arrays)
    for asked in (ids, np.array(ids, dtype=np.int32), torch.tensor(ids, dtype=torch.int64)):
        picked = lines.select(asked)
        assert np.array_equal(picked.points.numpy(), join([arrays[i] for i in ids], 3))
        assert picked.lengths.tolist() == [lengths[i] for i in ids]


def test_select_refuses_an_id_out_of_range():
    for number in (1, -1):
        with pytest.raises(IndexError):
            Streamlines.from_list([np.zeros((2, 3))]).select([number])


def test_select_gives_memory_of_its_own():
    lines = Streamlines.from_list([np.zeros((2, 3))])
    lines.select([0]).points.fill_(1)
    assert lines.points.sum() == 0


@settings(max_examples=50, deadline=None)
@given(lengths_lists)
def test_directions_are_differences_inside_each_streamline(lengths):
    arrays = make_lines(lengths)
    lines = Streamlines.from_list(arrays)
    found = directions(lines.points, lines.offsets)
    assert np.array_equal(found.numpy(), join([np.diff(array, axis=0) for array in arrays], 3))


@settings(max_examples=50, deadline=None)
@given(lengths_lists)
def test_input_rows_and_offsets_address_all_points_but_the_last(lengths):
    arrays = make_lines(lengths)
    lines = Streamlines.from_list(arrays)
    rows = input_rows(lines.offsets, len(lines.points))
    inputs = lines.points[rows].numpy()
    assert np.array_equal(inputs, join([array[:-1] for array in arrays], 3))
    offsets = input_offsets(lines.offsets)
    assert offsets[0] == 0
    assert offsets.diff().tolist() == [length - 1 for length in lengths]


@settings(max_examples=50, deadline=None)
@given(lengths_lists, st.integers(0, 5))
def test_previous_directions_are_those_behind_each_point_and_zeros_before_the_start(lengths, num):
    arrays = make_lines(lengths)
    lines = Streamlines.from_list(arrays)
    dirs = directions(lines.points, lines.offsets)
    found = previous_directions(dirs, input_offsets(lines.offsets), num)

    expected = []
    for array in arrays:
        own = np.diff(array, axis=0)
        for i in range(len(own)):
            behind = [own[i - k] if i - k >= 0 else np.zeros(3, dtype=np.float32) for k in range(1, num + 1)]
            expected.append(np.concatenate([np.empty(0, dtype=np.float32), *behind]))
    assert found.shape == (len(dirs), 3 * num)
    assert np.array_equal(found.numpy(), np.array(expected, dtype=np.float32).reshape(found.shape))


def test_a_nan_direction_does_not_leak_into_the_next_streamline():
    dirs = torch.tensor([[float("nan")] * 3, [1.0, 2.0, 3.0]])
    assert previous_directions(dirs, torch.tensor([0, 1, 2]), 1)[1].tolist() == [0, 0, 0]


def test_a_negative_number_of_previous_directions_is_refused():
    with pytest.raises(ValueError, match="Received: -1"):
        previous_directions(torch.zeros(1, 3), torch.tensor([0, 1]), -1)


def test_short_integer_lengths_do_not_overflow():
    lengths = torch.full((1000,), 200, dtype=torch.int16)
    assert offsets_of(lengths)[-1] == 200_000


def make_batch() -> StreamlineBatch:
    lines = Streamlines.from_list(make_lines([3, 2]))
    numbers = torch.arange(2)
    return StreamlineBatch(
        points=lines.points, offsets=lines.offsets, subject=numbers, ids=numbers + 5, inputs=torch.ones(3, 4)
    )


def test_a_batch_counts_streamlines_and_the_points_that_have_a_target():
    batch = make_batch()
    assert len(batch) == 2
    assert batch.num_points == 3 == len(batch.inputs)


def test_a_batch_moves_whole():
    batch = make_batch()
    moved = batch.to("meta")
    for name in ("points", "offsets", "subject", "ids", "inputs"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape


def test_a_batch_survives_pickling():
    batch = make_batch()
    back = pickle.loads(pickle.dumps(batch))
    assert torch.equal(back.points, batch.points)
    assert torch.equal(back.inputs, batch.inputs)


def test_flat_functions_run_on_an_accelerators_kind_of_device_without_reading_back():
    # The meta device has no data: an operation that must look at values to know a shape fails on it.
    offsets = torch.tensor([0, 3, 5])
    dirs = previous_directions(torch.zeros(3, 3, device="meta"), input_offsets(offsets).to("meta"), 2)
    assert dirs.shape == (3, 6)
    assert directions(torch.zeros(5, 3, device="meta"), offsets.to("meta")).shape == (3, 3)


MASK = np.array([False, True, True])


@pytest.mark.parametrize(
    "ids", [MASK, torch.from_numpy(MASK), MASK.tolist(), [1.0, 2.0], np.array([1.9]), torch.ones(1)]
)
@pytest.mark.parametrize("is_lazy", [False, True])
def test_masks_and_fractions_are_no_ids(ids, is_lazy):
    lines = Streamlines.from_list([[[0, 0, 0]], [[1, 1, 1]], [[2, 2, 2]]])
    if is_lazy:
        lines = open_dataset(Path(__file__).parent / "data" / "phantom.hdf5", lazy=True).streamlines
    with pytest.raises(TypeError, match="Expected integers as numbers of streamlines"):
        lines.select(ids)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint64, np.int64])
def test_ids_may_be_any_integers_and_none(kind):
    lines = Streamlines.from_list([[[0, 0, 0]], [[1, 1, 1]], [[2, 2, 2]]])
    assert lines.select(np.array([2, 1], kind)).points[:, 0].tolist() == [2, 1]
    assert len(lines.select([])) == len(lines.select(np.array([]))) == 0


@pytest.mark.parametrize("ids", [[-1], [0, -2], [2], np.array([1, -1]), torch.tensor([-1]), torch.tensor([0, 2])])
def test_ids_that_are_negative_or_too_large_are_refused(ids):
    lines = Streamlines.from_list([np.zeros((2, 3)), np.ones((3, 3))])
    with pytest.raises((IndexError, RuntimeError)):
        lines.select(ids)
