"""Volumes of a new dataset: joined and standardised as the reference does it, without its rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
from creation_cases import AFFINE, SHAPE, make_subject, save_lines, save_volume, some_lines
from nibabel.streamlines.trk import header_2_dtype

from dwiml_func.data.creation.config import Standardization, StreamlineGroup
from dwiml_func.data.creation.connectivity import load_connectivity, read_connectivity, write_connectivity
from dwiml_func.data.creation.files import GroupFiles, Source
from dwiml_func.data.creation.tractograms import load_streamlines
from dwiml_func.data.creation.volumes import Volume, load_labels, load_volume, standardize
from dwiml_func.data.grid import Grid
from dwiml_func.data.tractogram_writers import write_trk


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


def test_voxels_whose_header_says_no_place_nor_size_are_refused(subject):
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.float32), np.eye(4)), subject / "map.nii")
    content = bytearray((subject / "map.nii").read_bytes())
    content[252:256] = bytes(4)  # no qform and no sform: the affine is made of pixdim
    content[80:84] = np.float32(np.nan).tobytes()
    (subject / "map.nii").write_bytes(content)
    with pytest.raises(ValueError, match=r"map.nii: the header's affine does not turn voxels into mm"):
        load(subject, ["map.nii"], "none")


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
@pytest.mark.parametrize("others", [[], ["fa.nii.gz"]])
def test_small_changes_of_large_values_are_kept(subject, kind, others):
    data = 10**9 + np.random.default_rng(0).integers(-50, 50, (*SHAPE, 2))  # float32 has steps of 64 there
    save_volume(subject / "map.nii.gz", data.astype(kind))
    volume = load(subject, [*others, "map.nii.gz"], "independent")
    measured = data.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(volume.data[..., -2:], (data - measured.mean(0)) / measured.std(0), atol=1e-5)


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


def test_whatever_is_above_zero_is_in_a_mask(subject):
    mask = raw(subject, "mask.nii.gz")[..., 0]
    save_volume(subject / "part.nii.gz", (0.25 * mask - (mask == 0)).astype(np.float32))
    volumes = [load(subject, FILES, "all", (name,)) for name in ("mask.nii.gz", "part.nii.gz")]
    np.testing.assert_array_equal(volumes[0].data, volumes[1].data)
    assert volumes[0].data.dtype == np.float32


def test_a_mask_may_have_one_feature_and_no_more(subject):
    mask = raw(subject, "mask.nii.gz").astype(np.float32)
    save_volume(subject / "one.nii.gz", mask)
    found, expected = (load(subject, FILES, "all", (name,)).data for name in ("one.nii.gz", "mask.nii.gz"))
    np.testing.assert_array_equal(found, expected)
    save_volume(subject / "two.nii.gz", np.concatenate([mask, mask], axis=-1))
    with pytest.raises(ValueError, match=r"two.nii.gz: a mask of shape \(12, 10, 9, 2\). Expected \(X, Y, Z\)"):
        load(subject, FILES, "all", ("two.nii.gz",))
    save_volume(subject / "nan.nii.gz", np.where(mask > 0, mask, np.nan).astype(np.float32))
    with pytest.raises(ValueError, match=r"nan.nii.gz: 864 of 1080 values are NaN"):
        load(subject, FILES, "all", ("nan.nii.gz",))


def test_labels_that_the_header_scales_are_scaled(subject):
    place = Source("s1", "streamlines", subject / "labels.nii")
    image = nib.Nifti1Image(np.full(SHAPE, 3, np.int16), np.eye(4))
    image.header.set_slope_inter(2, 1)
    nib.save(image, place.path)
    content = bytearray(place.path.read_bytes())
    content[112:120] = np.array([2, 1], "<f4").tobytes()  # nibabel writes the values, not the scale
    place.path.write_bytes(content)
    assert (load_labels(place, None) == 7).all()


@pytest.mark.parametrize(("last", "labels"), [(-1.0, None), (0.0, [0, 7, 9]), (np.nan, None)])
def test_a_matrix_connects_where_it_is_above_zero_and_is_finite_to_its_end(tmp_path, last, labels):
    values = np.array([[1.0, 0.5], [0.5, last]])
    np.save(tmp_path / "m.npy", values)
    matrix, at = Source("s1", "s", tmp_path / "m.npy"), Source("s1", "s", tmp_path / "labels.nii")
    keys: Any = {"connectivity_nb_blocs": (2, 1, 1)} if labels is None else {"connectivity_labels": "labels.nii"}
    group = StreamlineGroup(files=("a",), connectivity_matrix="m.npy", **keys)
    if labels is not None:
        save_volume(at.path, np.resize(np.array(labels, np.int16), SHAPE))
    found = GroupFiles((), matrix=matrix, labels=None if labels is None else at)
    if np.isnan(last):
        with pytest.raises(ValueError, match="the matrix holds NaN or infinite values"):
            load_connectivity(group, found, None)
        return
    connectivity = load_connectivity(group, found, None)
    assert connectivity is not None
    assert connectivity.matrix.tolist() == [[True, True], [True, False]]
    with h5py.File("any", "w", driver="core", backing_store=False) as file:
        write_connectivity(file, connectivity)  # pyright: ignore[reportArgumentType]
        kept = read_connectivity(file)  # pyright: ignore[reportArgumentType]
        assert file.attrs["connectivity_matrix_type"] == ("from_blocs" if labels is None else "from_labels")
    assert kept is not None
    if labels is None:
        assert kept.blocs == (2, 1, 1)
        assert kept.matrix.tolist() == connectivity.matrix.tolist()
    else:  # the background has a row too
        assert kept.matrix.tolist() == [[False, False, False], [False, True, True], [False, True, False]]
    assert load_connectivity(group, GroupFiles(()), None) is None
    missing = StreamlineGroup(files=("a",), connectivity_matrix="m.npy", connectivity_labels="labels.nii")
    assert load_connectivity(missing, GroupFiles((), matrix=matrix), None) is None


def test_rows_of_a_matrix_are_numbers_of_labels_where_there_are_as_many():
    with h5py.File("any", "w", driver="core", backing_store=False) as file:
        file["connectivity_matrix"] = np.arange(25).reshape(5, 5) == 23  # labels 5 and 4
        file["connectivity_label_volume"] = np.array([[[0, 2, 4, 5]]])
        found = read_connectivity(file)  # pyright: ignore[reportArgumentType]
    assert found is not None
    assert np.argwhere(found.matrix).tolist() == [[3, 2]]  # among 0, 2, 4, 5


def swap_bytes(path: Path) -> None:
    """A TRK in the other byte order."""
    content, kind = path.read_bytes(), header_2_dtype
    header = np.frombuffer(content[:1000], kind.newbyteorder("<"))[0].astype(kind.newbyteorder(">"))
    path.write_bytes(header.tobytes() + np.frombuffer(content[1000:], "<u4").byteswap().tobytes())


def test_a_trk_of_either_byte_order_is_read_to_its_end_with_its_data(tmp_path):
    lines, weights = some_lines(4), np.arange(8, dtype=np.float32).reshape(4, 2)
    source = Source("s1", "s", tmp_path / "a.trk")
    save_lines(source.path, lines, per_streamline={"w": weights})
    before = load_streamlines([source], dps_keys=["w"])
    swap_bytes(source.path)
    after = load_streamlines([source], dps_keys=["w"])
    for found in (before, after):
        assert found.per_streamline["w"].tolist() == weights.tolist()
        assert np.diff(found.offsets).tolist() == [len(line) for line in lines]
    assert before.points.tobytes() == after.points.tobytes()
    with source.path.open("ab") as file:
        file.write(bytes(4))
    with pytest.raises(ValueError, match="the header promises 4 streamlines, the file continues after them"):
        load_streamlines([source])
    grid = Grid(np.diag([2.0, 2.0, 2.0, 1.0]), SHAPE)
    points, offsets = np.ones((5, 3), np.float32), np.array([0, 5])
    points[:, 0] = np.arange(5)
    write_trk(source.path, grid, points, offsets, {"a": np.ones((5, 1), np.float32), "b": np.ones((5, 3), np.float32)})
    np.testing.assert_allclose(load_streamlines([source]).points, points, atol=1e-6)


@pytest.mark.parametrize(("beyond", "leaves"), [(0.0, False), (9e-4, False), (2e-3, True)])
@pytest.mark.parametrize("side", [0, 1])
def test_points_may_leave_the_grid_by_a_thousandth_of_a_voxel(tmp_path, beyond, leaves, side):
    source, grid = Source("s1", "s", tmp_path / "a.tck"), Grid(np.diag([2.0, 1.5, 3.0, 1.0]), SHAPE)
    place = np.array([1.0, 2.0, (SHAPE[2] + beyond) if side else -beyond])  # voxel space, corner origin
    save_lines(source.path, [(np.array([[1.0, 1, 1], place]) - 0.5) * [2.0, 1.5, 3.0]])
    if leaves:
        with pytest.raises(ValueError, match=r"1 outside the volume of 12 x 10 x 9 voxels\. Correct the file"):
            load_streamlines([source], expected=grid)
    else:
        np.testing.assert_allclose(load_streamlines([source], expected=grid).points[1], place, atol=1e-5)


@pytest.mark.parametrize("independent", [False, True])
def test_values_of_very_different_sizes_are_standardised_together(independent):
    data = np.array([1e-300, 1e300, 2e300, 3e300]).reshape(4, 1, 1, 1)
    mask, source = np.ones((4, 1, 1), bool), Source("s", "g", Path("f"))
    mean, std = standardize(data, mask, independent=independent, source=source)
    np.testing.assert_allclose([np.ravel(mean)[0], np.ravel(std)[0]], [1.5e300, np.sqrt(1.25) * 1e300], rtol=1e-12)
    np.testing.assert_allclose(data.ravel(), np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25), rtol=1e-12)
