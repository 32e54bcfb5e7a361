"""Volumes of a new dataset: joined and standardised as the reference does it, without its rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from creation_cases import AFFINE, SHAPE, make_subject, save_volume

from dwiml_func.data.creation.config import Standardization
from dwiml_func.data.creation.files import Source
from dwiml_func.data.creation.volumes import Volume, load_labels, load_volume, standardize


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    return make_subject(tmp_path, "s1")


def load(subject: Path, names: list[str], standardization: Standardization, masks: tuple[str, ...] = ()) -> Volume:
    files, masks_at = ([Source("s1", "input", subject / name) for name in group] for group in (names, masks))
    return load_volume(files, standardization=standardization, masks=masks_at)


def raw(subject: Path, *names: str) -> np.ndarray:
    return load(subject, list(names), "none").data.astype(np.float64)


FILES = ["dwi.nii.gz", "fa.nii.gz", "t1.nii.gz"]


def test_none_joins_files_along_their_features(subject):
    volume = load(subject, FILES, "none")
    assert volume.data.shape == (*SHAPE, 6)
    assert volume.mean is None
    np.testing.assert_array_equal(volume.data[..., 4:5], load(subject, ["fa.nii.gz"], "none").data)
    np.testing.assert_array_equal(volume.data[..., 5:6], load(subject, ["t1.nii.gz"], "none").data)


@pytest.mark.parametrize("masks", [(), ("mask.nii.gz",), ("mask.nii.gz", "gm.nii.gz")])
@pytest.mark.parametrize("standardization", ["all", "independent", "per_file"])
def test_standardised_data_is_that_of_the_definition(subject, standardization, masks):
    data = raw(subject, *FILES)
    union = np.zeros(SHAPE, bool)
    for name in masks:
        union |= raw(subject, name)[..., 0] > 0
    expected = np.empty_like(data)
    parts = {"all": [slice(0, 6)], "per_file": [slice(0, 4), slice(4, 5), slice(5, 6)]}
    for part in parts.get(standardization, [slice(k, k + 1) for k in range(6)]):
        mask = union if masks else (data[..., part] != 0).all(axis=-1)
        if standardization == "independent" and not masks:
            mask = (data != 0).all(axis=-1)
        measured = data[..., part][mask]
        expected[..., part] = (data[..., part] - measured.mean()) / measured.std()
    volume = load(subject, FILES, standardization, masks)
    np.testing.assert_allclose(volume.data, expected, rtol=1e-4, atol=1e-4)
    assert volume.mean is not None
    assert volume.std is not None
    np.testing.assert_allclose(volume.data * volume.std + volume.mean, data, rtol=1e-4, atol=1e-3)


def test_without_a_mask_voxels_with_a_zero_are_not_measured(subject):
    data = raw(subject, "t1.nii.gz").astype(np.float32)
    data[:6] = 0
    save_volume(subject / "t1.nii.gz", data[..., 0])
    volume = load(subject, ["t1.nii.gz"], "all")
    assert abs(volume.data[6:].mean(dtype=np.float64)) < 1e-5
    assert abs(volume.data[6:].std(dtype=np.float64) - 1) < 1e-5


def test_a_constant_feature_is_shifted_and_not_blown_up():
    data = np.random.default_rng(0).normal(size=(4, 4, 4, 2)).astype(np.float32)
    data[..., 1] = 7
    data[0, 0, 0, 1] = 9
    mask = np.ones((4, 4, 4), bool)
    mask[0, 0, 0] = False
    mean, std = standardize(data, mask, independent=True, source=Source("s", "g", Path("f")))
    assert mean[1] == 7
    assert std[1] == 1
    assert data[0, 0, 0, 1] == 2
    assert (data[mask][:, 1] == 0).all()


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("value", [0.1, 1.1, 3.3])
def test_one_value_is_constant_although_its_mean_is_rounded(value, independent):
    data = np.full((10, 10, 10, 1), value)
    assert standardize(data, None, independent=independent, source=Source("s", "g", Path("f")))[1] == 1
    assert np.abs(data).max() < 1e-14
    neighbours = np.ones((10, 10, 10, 1), np.float32)
    neighbours[::2] = np.nextafter(np.float32(1), np.float32(2))
    assert standardize(neighbours, None, independent=independent, source=Source("s", "g", Path("f")))[1] == 1


@pytest.mark.parametrize("turned", [np.diag([1.0, 1, 1, 1]), np.diag([-1.0, 1, 1, 1])])
def test_where_sform_and_qform_differ_the_sform_is_used_and_it_is_said(subject, caplog, turned):
    image: Any = nib.Nifti1Image(raw(subject, "t1.nii.gz")[..., 0].astype(np.float32), AFFINE)
    image.set_qform(AFFINE @ turned, 1)
    nib.save(image, subject / "t1.nii.gz")
    np.testing.assert_allclose(load(subject, ["t1.nii.gz"], "none").grid.affine, AFFINE, atol=1e-5)
    told = f"{subject / 't1.nii.gz'}: its sform and its qform place voxels differently. Used: sform"
    assert (told in caplog.text) == (turned[0, 0] < 0)


def test_means_of_large_values_are_exact():
    data = np.full((60, 60, 60, 1), 16_777_216, np.float32)
    data[::2] += 4
    mean, std = standardize(data, None, independent=False, source=Source("s", "g", Path("f")))
    assert mean == 16_777_218
    assert std == 2


@pytest.mark.parametrize("unit", [1e-300, 1e-40, 1e-12, 1.0, 1e12, 1e200])
@pytest.mark.parametrize("standardization", ["all", "independent", "per_file"])
def test_maps_in_any_unit_have_a_mean_of_0_and_a_std_of_1(subject, unit, standardization):
    data = np.random.default_rng(0).normal(7, 2, (*SHAPE, 2)) * unit
    save_volume(subject / "map.nii.gz", data)
    volume = load(subject, ["map.nii.gz"], standardization)
    assert volume.mean is not None
    expected = (data / unit - 7) / 2
    assert np.abs(volume.data - expected).max() < 0.2
    assert abs(volume.data.mean(dtype=np.float64)) < 1e-6
    assert abs(volume.data.std(dtype=np.float64) - 1) < 0.05
    np.testing.assert_allclose(volume.data * np.asarray(volume.std) + volume.mean, data, rtol=1e-5)


@pytest.mark.parametrize("kind", [np.float64, np.int32])
def test_small_changes_of_large_values_are_kept(subject, kind):
    data = 10**9 + np.random.default_rng(0).integers(-50, 50, (*SHAPE, 2))  # float32 has steps of 64 there
    save_volume(subject / "map.nii.gz", data.astype(kind))
    volume = load(subject, ["map.nii.gz"], "independent")
    measured = data.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(volume.data, (data - measured.mean(0)) / measured.std(0), atol=1e-5)


def test_scaled_integers_are_standardised_as_scaled(subject):
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 999, (*SHAPE, 2)).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(1e-9, 1.0)
    nib.save(image, subject / "map.nii.gz")
    image: Any = nib.load(subject / "map.nii.gz")
    stored = image.get_fdata()
    volume = load(subject, ["map.nii.gz"], "all")
    np.testing.assert_allclose(volume.data, (stored - stored.mean()) / stored.std(), atol=1e-4)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int64, np.float64])
def test_large_labels_keep_their_integers(subject, suffix, kind):
    labels = np.full(SHAPE, 312_782_566, kind)
    labels[5:] = 312_782_574
    place = Source("s1", "streamlines", subject / f"labels{suffix}")
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=kind), place.path)
    assert (load_labels(place, None) == labels).all()


@pytest.mark.parametrize(("kind", "largest"), [(np.float32, 1 << 24), (np.float64, 1 << 53), (np.uint64, 1 << 63)])
def test_labels_that_their_type_cannot_tell_apart_are_refused(subject, kind, largest):
    place = Source("s1", "streamlines", subject / "labels.nii")
    labels = np.zeros(SHAPE, kind)
    labels[0, 0, 0] = largest - 1 if kind != np.uint64 else largest - 1024
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=kind), place.path)
    assert load_labels(place, None).max() == int(labels.max())
    labels[0, 0, 0] = largest
    nib.save(nib.Nifti1Image(labels, np.eye(4), dtype=kind), place.path)
    with pytest.raises(ValueError, match=f"a label of {largest} in {np.dtype(kind).name}"):
        load_labels(place, None)


def test_labels_are_whole_numbers(subject):
    labels = Source("s1", "streamlines", subject / "labels.nii.gz")
    save_volume(labels.path, np.full(SHAPE, 3, np.int16))
    assert load_labels(labels, None).max() == 3
    save_volume(labels.path, np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(ValueError, match=r"subject 's1', group 'streamlines', file .*labels.nii.gz: expected labels"):
        load_labels(labels, None)
    save_volume(labels.path, np.full((*SHAPE, 2), 1, np.int16))
    with pytest.raises(ValueError, match="Expected \\(X, Y, Z\\)"):
        load_labels(labels, None)


@pytest.mark.parametrize("independent", [False, True])
def test_without_a_mask_a_voxel_with_one_feature_of_zero_is_not_measured(independent):
    data = np.random.default_rng(0).normal(5, 1, (4, 4, 4, 2)).astype(np.float32)
    data[:2, ..., 0] = 0  # the other feature is not zero there
    measured = data[2:].reshape(-1, 2).astype(np.float64)
    mean, std = standardize(data, None, independent=independent, source=Source("s", "g", Path("f")))
    axis = 0 if independent else None
    np.testing.assert_allclose(mean, measured.mean(axis=axis), rtol=1e-6)
    np.testing.assert_allclose(std, measured.std(axis=axis), rtol=1e-6)
