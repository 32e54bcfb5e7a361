from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.core.rng import Key
from dwiml_func.data.augmentation import (
    Augmentation,
    Kind,
    normal_noise,
    reverse_streamlines,
    rng_of,
    split_streamlines,
)
from dwiml_func.data.streamlines import Streamlines, directions

KEY = Key(1234, (3,))
seeds = st.integers(0, 2**32)
ratios = st.floats(0, 1)


@st.composite
def streamlines(draw) -> Streamlines:
    lengths = draw(st.lists(st.integers(2, 40), min_size=0, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return Streamlines.from_list([rng.uniform(0, 50, (length, 3)) for length in lengths])


def lengths_of(lines: Streamlines) -> list[float]:
    return [directions(line, torch.tensor([0, len(line)])).norm(dim=1).sum().item() for line in lines.to_list()]


@given(streamlines(), ratios, seeds)
def test_splitting_keeps_every_point_segment_and_end_and_says_where_halves_come_from(lines, ratio, seed):
    halves, origin = split_streamlines(lines, ratio, np.random.default_rng(seed))
    parts, wholes = halves.to_list(), lines.to_list()
    assert len(parts) == len(origin)
    assert sorted(set(origin.tolist())) == list(range(len(wholes)))
    assert origin.tolist() == sorted(origin.tolist())
    for number, whole in enumerate(wholes):
        of_whole = [part for part, from_ in zip(parts, origin.tolist(), strict=True) if from_ == number]
        if len(of_whole) == 1:
            assert torch.equal(of_whole[0], whole)
        else:
            first, second = of_whole
            assert min(len(first), len(second)) >= 6
            assert torch.equal(first[-1], second[0])
            assert torch.equal(torch.cat([first, second[1:]]), whole)
    assert sum(lengths_of(halves)) == pytest.approx(sum(lengths_of(lines)), rel=1e-5)
    assert len(halves.points) - len(halves) == len(lines.points) - len(lines)  # no target is lost


@given(streamlines(), seeds)
def test_all_streamlines_that_are_long_enough_split_and_short_ones_are_kept(lines, seed):
    _, origin = split_streamlines(lines, 1.0, np.random.default_rng(seed))
    times = torch.bincount(origin, minlength=len(lines))
    assert times.tolist() == [2 if length >= 11 else 1 for length in lines.lengths.tolist()]


def test_a_split_may_fall_on_every_point_that_leaves_six_on_both_sides():
    lines = Streamlines.from_list([np.arange(15.0)[:, None].repeat(3, axis=1)])
    cuts = {int(split_streamlines(lines, 1.0, np.random.default_rng(seed))[0].lengths[0]) for seed in range(300)}
    assert cuts == {6, 7, 8, 9, 10}


@given(streamlines(), ratios, seeds)
def test_reversing_turns_whole_streamlines_around_and_nothing_else(lines, ratio, seed):
    turned = reverse_streamlines(lines, ratio, np.random.default_rng(seed))
    assert torch.equal(turned.offsets, lines.offsets)
    num_turned = 0
    for line, before in zip(turned.to_list(), lines.to_list(), strict=True):
        if not torch.equal(line, before):
            assert torch.equal(line, before.flip(0))
            num_turned += 1
    assert abs(num_turned - ratio * len(lines)) < 1


def test_the_share_is_met_on_average_also_in_a_batch_of_one():
    lines = Streamlines.from_list([[[0, 0, 0], [1, 0, 0]]])
    turned = [reverse_streamlines(lines, 0.3, np.random.default_rng(seed)).points[0, 0].item() for seed in range(3000)]
    assert 0.27 < np.mean(turned) < 0.33


@given(st.floats(1e-3, 10), seeds)
def test_noise_has_its_clip_and_its_standard_deviation(size, seed):
    noise = normal_noise(20_000, size, np.random.default_rng(seed))
    assert noise.abs().max().item() <= 2 * np.float32(size) * (1 + 1e-6)
    assert (noise.abs() > 1.99 * size).float().mean().item() == pytest.approx(0.0466, abs=0.006)  # the clipped tails
    assert noise.std().item() == pytest.approx(0.9594 * size, rel=0.015)
    assert abs(noise.mean().item()) < 0.02 * size


def test_each_epoch_batch_and_kind_has_a_stream_of_its_own():
    places = [(epoch, batch, kind) for epoch in range(5) for batch in range(5) for kind in Kind]
    samples = [rng_of(KEY, *place).random() for place in places]
    assert len(set(samples)) == len(samples)
    assert samples == [rng_of(KEY, *place).random() for place in places]


def test_the_kinds_keep_their_numbers_so_that_old_runs_replay():
    assert {kind.name: kind.value for kind in Kind} == {"SPLIT": 0, "REVERSE": 1, "NOISE_FORWARD": 2, "NOISE_LOSS": 3}


def test_whether_a_streamline_splits_and_where_depends_on_no_other_ones_length():
    """The short ones among them take random numbers too."""
    lines = [np.arange(30.0)[:, None].repeat(3, axis=1)] * 4
    whole, mixed = Streamlines.from_list(lines), Streamlines.from_list([lines[0], lines[0][:5], *lines[2:]])
    cuts = [split_streamlines(each, 1.0, np.random.default_rng(3))[0].lengths.tolist() for each in (whole, mixed)]
    assert cuts[0][:2] + cuts[0][4:] == cuts[1][:2] + cuts[1][3:]


def test_noise_of_targets_that_may_turn_a_step_around_is_described():
    too_large = Augmentation(noise_gaussian_size_forward=0.2, noise_gaussian_size_loss=0.3).too_large_for(1.0)
    assert too_large is not None
    assert too_large.startswith("noise_gaussian_size_loss 0.3: ")
    assert Augmentation(noise_gaussian_size_forward=1.0, noise_gaussian_size_loss=0.25).too_large_for(1.0) is None


@pytest.mark.parametrize("name", ["noise_gaussian_size_forward", "noise_gaussian_size_loss"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_noise_that_is_no_size_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a finite number at least 0, received {value}\.$"):
        Augmentation(**{name: value})


@pytest.mark.parametrize("name", ["split_ratio", "reverse_ratio"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_ratio_that_is_no_share_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* Received: {value}$"):
        Augmentation(**{name: value})
