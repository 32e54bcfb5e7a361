"""Shards of a batch: whole streamlines, in order, with nearly equal numbers of points."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.shards import cut_batch
from dwiml_func.data.streamlines import Streamlines, input_rows


def _batch(lengths: list[int], add_eos: bool = False, noise: bool = False) -> StreamlineBatch:
    rng = np.random.default_rng(sum(lengths))
    lines = Streamlines.from_list([rng.random((length, 3)) for length in lengths])
    inputs = torch.arange(len(lines.points), dtype=torch.float32)[:, None]  # each row tells its point
    return StreamlineBatch(
        points=lines.points,
        offsets=lines.offsets,
        subject=torch.arange(len(lengths)) % 3,
        ids=torch.arange(len(lengths)) + 100,
        inputs=inputs if add_eos else inputs[input_rows(lines.offsets, len(lines.points))],
        noisy_points=lines.points + 1 if noise else None,
        noisy_targets=lines.points + 2 if noise else None,
    )


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 14), st.booleans(), st.booleans())
def test_put_together_the_shards_are_the_batch(lengths: list[int], num_shards: int, add_eos: bool, noise: bool) -> None:
    batch = _batch(lengths, add_eos, noise)
    cut = cut_batch(batch, num_shards)
    shards = [shard for shard in cut if shard is not None]
    assert len(cut) == num_shards
    assert len(shards) == min(num_shards, len(lengths))
    assert cut.shards[: len(shards)] == tuple(shards)
    assert cut.ids is batch.ids
    for name in ("points", "subject", "ids", "inputs", "noisy_points", "noisy_targets"):
        whole = getattr(batch, name)
        parts = [getattr(shard, name) for shard in shards]
        assert parts == [None] * len(shards) if whole is None else torch.equal(torch.cat(parts), whole)
    assert torch.cat([shard.offsets.diff() for shard in shards]).tolist() == lengths
    for shard in shards:
        assert shard.offsets[0] == 0
        assert shard.has_last_points == add_eos
        assert shard.points.data_ptr() >= batch.points.data_ptr()  # no copy


@given(st.lists(st.integers(2, 30), min_size=8, max_size=40), st.sampled_from([2, 4, 8]))
def test_no_shard_is_off_its_fair_part_by_more_than_a_streamline(lengths: list[int], num_shards: int) -> None:
    shards = [shard for shard in cut_batch(_batch(lengths), num_shards) if shard is not None]
    fair = sum(lengths) / num_shards
    if len(lengths) >= 4 * num_shards:
        assert all(abs(len(shard.points) - fair) <= max(lengths) for shard in shards)
    assert all(len(shard) >= 1 for shard in shards)


def test_batches_and_shards_are_pinned_moved_and_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU asks of them, in the place of its own functions of tensors."""
    pinned, moved, kept = [], [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor + 0)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, non_blocking: moved.append(non_blocking) or tensor + 0)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((tensor, stream)))
    batch, stream = _batch([5, 1, 4], noise=True), object()
    cut = cut_batch(batch, 3)
    for copied in (batch.pin_memory(), batch.to("cpu", non_blocking=True)):
        for field in fields(batch):
            value = getattr(batch, field.name)
            assert (
                getattr(copied, field.name) is value
                if value is None
                else torch.equal(getattr(copied, field.name), value)
            )
    assert (len(pinned), moved) == (7, [True] * 7)
    for copied in (cut.pin_memory(), cut.to("cpu", non_blocking=True)):
        assert copied.ids is cut.ids
        assert [shard and shard.points.tolist() for shard in copied] == [
            shard and shard.points.tolist() for shard in cut
        ]
    assert moved == [True] * 21
    for each in (batch, cut):
        kept.clear()
        each.record_stream(stream)  # type: ignore[arg-type]
        assert len(kept) == (7 if each is batch else 14)
        assert all(of is stream for _, of in kept)


def test_streamlines_of_one_point_make_no_shard_of_their_own() -> None:
    cut = cut_batch(_batch([5, 1, 4]), 3)
    assert [shard and len(shard.points) for shard in cut] == [5, 4, None]


def test_nothing_to_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"streamlines of two points or more\. Received: none"):
        cut_batch(_batch([1, 1]), 2)
    with pytest.raises(ValueError, match="at least 1"):
        cut_batch(_batch([3]), 0)
