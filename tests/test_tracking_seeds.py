"""Seeds, and the random numbers of single lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dwiml_func.core.rng import Key
from dwiml_func.tracking import seeds_in_mask
from dwiml_func.tracking.random_numbers import philox, uniforms
from dwiml_func.tracking.seeds import load_seeds

MASK = torch.zeros(5, 6, 7)
MASK[1:4, 2, 3:6] = 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of Random123's kat_vectors for philox4x32-10
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    first, second = (int(word, 16) for word in key.split())
    counters = torch.tensor([[int(word, 16)] for word in counter.split()])
    assert [f"{word:08x}" for word in philox(counters, (first, second))[:, 0].tolist()] == expected.split()


def test_a_row_of_random_numbers_depends_on_its_address_alone():
    from scipy import stats

    rows, steps = torch.arange(300) % 30, torch.arange(300) // 30
    whole = uniforms(Key(3), rows, steps)
    assert torch.equal(uniforms(Key(3), rows[17:18], steps[17:18]), whole[17:18])
    assert len(whole.unique()) == 1200  # no number twice
    assert (whole * 2**32 % 1 == 0.5).all()  # the middle of an interval: neither 0 nor 1
    assert not torch.equal(uniforms(Key(4), rows, steps), whole)
    assert stats.kstest(whole.flatten().numpy(), "uniform").pvalue > 1e-3


def test_every_voxel_has_one_seed_before_any_has_two():
    seeds = seeds_in_mask(MASK, npv=3, key=Key(1))
    assert len(seeds) == 27
    voxels = seeds.floor().long()
    for start in (0, 9, 18):
        assert len(voxels[start : start + 9].unique(dim=0)) == 9
    assert all(MASK[tuple(voxel)] == 1 for voxel in voxels)
    assert voxels[:9].tolist() == voxels[9:18].tolist() == voxels[18:].tolist()  # seed k lies in voxel k modulo 9
    assert voxels[:9].tolist() != sorted(voxels[:9].tolist())
    assert voxels[:9].tolist() != seeds_in_mask(MASK, npv=1, key=Key(2)).floor().tolist()


def test_every_voxel_above_zero_is_of_the_mask():
    assert torch.equal(
        seeds_in_mask(0.01 * MASK - (MASK == 0).float(), nt=30, key=Key(1)), seeds_in_mask(MASK, nt=30, key=Key(1))
    )


def test_seeds_are_those_of_other_versions():
    expected = torch.tensor([[2.360332727, 2.554450512, 4.66421032], [1.990300894, 2.656359911, 5.447561741]])
    torch.testing.assert_close(seeds_in_mask(MASK, nt=2, key=Key(1)), expected, rtol=0, atol=1e-6)


def test_a_seed_is_the_same_however_many_are_asked_for():
    whole = seeds_in_mask(MASK, nt=1000, key=Key(1))
    assert torch.equal(seeds_in_mask(MASK, nt=10, key=Key(1)), whole[:10])
    assert torch.equal(seeds_in_mask(MASK, nt=10, first=500, key=Key(1)), whole[500:510])
    assert not torch.equal(seeds_in_mask(MASK, nt=10, key=Key(2)), whole[:10])


def test_seeds_are_uniform_within_their_voxels():
    from scipy import stats

    inside = seeds_in_mask(MASK, nt=9000, key=Key(1)).double()
    inside -= inside.floor()
    for axis in range(3):
        assert stats.kstest(inside[:, axis].numpy(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(inside.numpy().T) - np.eye(3)).max() < 0.05


def test_masks_without_voxels_and_counts_of_nothing_are_refused():
    with pytest.raises(ValueError, match="The seeding mask has no voxel above 0"):
        seeds_in_mask(torch.zeros(3, 3, 3), nt=5, key=Key(1))
    with pytest.raises(ValueError, match="Expected one of npv and nt"):
        seeds_in_mask(MASK, key=Key(1))
    with pytest.raises(ValueError, match="nt: expected a finite number at least 1"):
        seeds_in_mask(MASK, nt=0, key=Key(1))


def test_seeds_of_a_file_come_as_float32(tmp_path):
    np.save(tmp_path / "seeds.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    seeds = load_seeds(tmp_path / "seeds.npy")
    assert seeds.dtype == torch.float32
    assert seeds.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("array", "received"),
    [
        (np.ones((4, 2)), r"float64 of shape \(4, 2\)"),
        (np.ones(3), r"float64 of shape \(3,\)"),
        (np.ones((1, 3, 1)), r"float64 of shape \(1, 3, 1\)"),
        (np.ones((2, 3), dtype=bool), r"bool of shape \(2, 3\)"),
        (np.ones((2, 3), dtype=complex), r"complex128 of shape \(2, 3\)"),
    ],
)
def test_a_file_without_seeds_is_refused(tmp_path, array, received):
    np.save(tmp_path / "seeds.npy", array)
    with pytest.raises(ValueError, match=rf"expected numbers of shape \(S, 3\)\. Received: {received}"):
        load_seeds(tmp_path / "seeds.npy")


def test_a_file_that_is_no_array_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="The file of seeds does not exist"):
        load_seeds(tmp_path / "none.npy")
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(ValueError, match="It cannot be read"):
        load_seeds(tmp_path / "text.npy")
    np.savez(tmp_path / "several.npz", a=np.ones((2, 3)))
    with pytest.raises(ValueError, match="Received: several arrays"):
        load_seeds(tmp_path / "several.npz")
