"""The packed time-major layout."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from dwiml_func.models.rnn.packing import packed_layout


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@given(st.lists(st.integers(0, 6), max_size=8))
def test_rows_come_time_step_by_time_step_longest_sequence_first(lengths: list[int]) -> None:
    layout = packed_layout(_offsets(lengths))

    starts = [sum(lengths[:sequence]) for sequence in range(len(lengths))]
    by_length = sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])  # sorted() is stable
    steps = [
        [starts[sequence] + time for sequence in by_length if time < lengths[sequence]]
        for time in range(max(lengths, default=0))
    ]
    assert layout.rows.tolist() == [row for step in steps for row in step]
    assert layout.batch_sizes == [len(step) for step in steps]


def test_sequences_of_equal_length_keep_their_order() -> None:
    # Enough of them for an unstable sort to show.
    assert packed_layout(torch.arange(101)).rows.tolist() == list(range(100))
    odd_ones_longer = packed_layout(_offsets([1, 2] * 50))
    assert odd_ones_longer.rows[:50].tolist() == list(range(1, 150, 3))
    assert odd_ones_longer.rows[50:100].tolist() == list(range(0, 150, 3))


@given(st.lists(st.integers(0, 6), max_size=8))
def test_unpacking_undoes_packing(lengths: list[int]) -> None:
    layout = packed_layout(_offsets(lengths))
    flat = torch.arange(3 * sum(lengths)).reshape(-1, 3)
    assert torch.equal(layout.unpack(layout.pack(flat)), flat)
    assert torch.equal(layout.pack(layout.unpack(flat)), flat)


def test_the_layout_is_that_of_torch() -> None:
    lengths = [4, 1, 7, 3]
    flat = torch.rand(sum(lengths), 2)
    packed = pack_sequence(list(flat.split(lengths)), enforce_sorted=False)
    layout = packed_layout(_offsets(lengths))
    assert torch.equal(layout.pack(flat), packed.data)
    assert layout.batch_sizes == packed.batch_sizes.tolist()


def test_batch_sizes_never_increase_and_count_every_row() -> None:
    lengths = [2, 9, 9, 1, 5]
    batch_sizes = packed_layout(_offsets(lengths)).batch_sizes
    assert sum(batch_sizes) == sum(lengths)
    assert all(now <= before for before, now in pairwise(batch_sizes))


@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_gradients_follow_the_rows(direction: str) -> None:
    layout = packed_layout(_offsets([2, 5, 1]))
    rows = torch.rand(8, 3, requires_grad=True)
    weights = torch.rand(8, 3)
    there, back = (layout.pack, layout.unpack) if direction == "pack" else (layout.unpack, layout.pack)
    (gradient,) = torch.autograd.grad((there(rows) * weights).sum(), rows)
    assert torch.equal(gradient, back(weights))
