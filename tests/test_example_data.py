"""The built-in example data. The first person's are made here too, and in a process with three threads."""

import hashlib
import os
import subprocess
import sys
from typing import Any

import h5py
import numpy as np
import pytest
import scipy
from scipy.ndimage import binary_dilation, map_coordinates

from dwiml_func.data.example import dataset
from dwiml_func.data.example.bundles import SUBJECTS, load_bundles
from dwiml_func.data.example.dataset import make_example_data

MAKE = """
import socket, sys
def refuse(*args): raise AssertionError("asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
from dwiml_func.data.example import dataset
dataset.SUBJECTS = dataset.SUBJECTS[:1]
dataset.make_example_data(sys.argv[1])
"""
ARRAYS = "a5b5e95dfbd60fe462ef0434a4f2d181089e6d9cc1a0dad37544b5cb82b9aaa4"
SUMS = {  # of a person's coefficients, without their signs, and of the points
    "sub_1": (1738276.732081, 2101945.161712),
    "sub_2": (1923648.888954, 2043228.502731),
    "sub_3": (2115375.519098, 2031072.603673),
    "sub_4": (1769584.647941, 2026106.949896),
    "sub_5": (1928646.849643, 2147002.680656),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    (folder / "home").mkdir()
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, "HOME": str(folder / "home"), **dict.fromkeys(variables, "3")}
    command = [sys.executable, "-W", "error", "-c", MAKE, str(folder / "first.hdf5")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar where stderr is no terminal
    return folder


@pytest.fixture(scope="module")
def file(example_hdf5):
    with h5py.File(example_hdf5) as file:
        yield file


def coefficients(group: Any) -> np.ndarray:
    """SH coefficients of the signal, with the standardisation undone by what the attributes say."""
    return group["data"][:] * group.attrs["standardization_std"] + group.attrs["standardization_mean"]


def test_the_arrays_are_those_of_earlier_versions(example_hdf5):
    """Experiments that trained on the example data name its hash; options of the data must not change the default."""
    with h5py.File(example_hdf5) as opened:
        file: Any = opened
        for subject, expected in SUMS.items():
            coefficients, points = file[subject]["input/data"][:], file[subject]["streamlines/data"][:]
            sums = np.abs(coefficients).sum(dtype=np.float64), points.sum(dtype=np.float64)
            np.testing.assert_allclose(sums, expected, rtol=1e-9)
        if not (np.__version__.startswith("2.4.") and scipy.__version__.startswith("1.17.")):
            return  # they round otherwise
        digest = hashlib.sha256()
        for subject in SUBJECTS:
            for name in ("input/data", "streamlines/data", "streamlines/lengths", "wm_mask/data"):
                digest.update(file[subject][name][:].tobytes())
        assert digest.hexdigest() == ARRAYS


def test_the_bytes_are_the_same_each_time_and_for_any_number_of_threads(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SUBJECTS", SUBJECTS[:1])
    make_example_data(tmp_path / "first.hdf5")
    digests = [hashlib.sha256((path / "first.hdf5").read_bytes()).hexdigest() for path in (folder, tmp_path)]
    assert digests[0] == digests[1]


def test_nothing_else_is_written_also_not_into_the_home_folder(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["first.hdf5", "home"]
    assert list((folder / "home").iterdir()) == []


def test_three_subjects_train_one_validates_one_tests(file):
    assert list(file.attrs["training_subjs"]) == ["sub_1", "sub_2", "sub_3"]
    assert list(file.attrs["validation_subjs"]) == ["sub_4"]
    assert list(file.attrs["testing_subjs"]) == ["sub_5"]
    assert list(file) == list(SUBJECTS)
    assert file.attrs["step_size"] == 1.0


@pytest.mark.parametrize("subject", SUBJECTS)
def test_groups_have_the_layout(file, subject):
    shape = file[subject]["input/data"].shape
    assert list(file[subject]) == ["input", "streamlines", "wm_mask"]
    assert shape[3] == file[subject]["input"].attrs["nb_features"] == 28
    assert file[subject]["wm_mask/data"].shape == (*shape[:3], 1)
    assert file[subject]["streamlines"].attrs["dimensions"].tolist() == list(shape[:3])
    assert file[subject]["streamlines/lengths"].shape == (150,)
    for group in file[subject].values():
        np.testing.assert_array_equal(group.attrs["affine"], file[subject]["input"].attrs["affine"])
    expected = {"sh_order": 6, "sh_basis": "descoteaux07", "sh_legacy": False}
    assert {name: file[subject]["input"].attrs[name] for name in expected} == expected


@pytest.mark.parametrize("subject", SUBJECTS)
def test_voxel_centres_at_a_half_give_back_the_streamlines_in_mm(file, subject):
    group = file[subject]["streamlines"]
    affine = group.attrs["affine"]
    points = (group["data"][:] - 0.5) @ affine[:3, :3].T + affine[:3, 3]
    expected = np.concatenate([line for bundle in load_bundles(subject).values() for line in bundle])
    np.testing.assert_allclose(points, expected, atol=1e-4)


def test_the_file_says_which_bundle_each_streamline_is_of(file):
    for subject in SUBJECTS:
        group = file[subject]["streamlines"]
        assert list(group.attrs["bundle_names"]) == ["AF_L", "CC_ForcepsMajor", "CST_R"]
        sizes = [len(lines) for lines in load_bundles(subject).values()]
        assert group["bundle_ids"][:].tolist() == np.repeat([0, 1, 2], sizes).tolist()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_all_voxels_that_interpolation_reads_are_white_matter(file, subject):
    mask = file[subject]["wm_mask/data"][..., 0]
    assert set(np.unique(mask)) == {0.0, 1.0}
    points = file[subject]["streamlines/data"][:]
    assert map_coordinates(mask, (points - 0.5).T, order=1).min() > 1 - 1e-6


@pytest.mark.parametrize("subject", SUBJECTS)
def test_white_matter_reaches_one_voxel_and_tissue_three_voxels_around_the_streamlines(file, subject):
    mask = file[subject]["wm_mask/data"][..., 0] > 0
    visited = np.zeros_like(mask)
    visited[tuple(np.floor(file[subject]["streamlines/data"][:]).astype(int).T)] = True
    tissue = np.abs(coefficients(file[subject]["input"])).sum(axis=-1) > 1e-3
    cube = np.ones((3, 3, 3))
    np.testing.assert_array_equal(mask, binary_dilation(visited, cube))
    np.testing.assert_array_equal(tissue, binary_dilation(visited, cube, iterations=3))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_input_is_standardised_over_the_white_matter(file, subject):
    values = file[subject]["input/data"][:][file[subject]["wm_mask/data"][..., 0] > 0].astype(np.float64)
    assert abs(values.mean()) < 1e-6
    assert abs(values.std() - 1) < 1e-6


def test_the_signal_is_strongest_where_the_streamlines_are_not_half_a_voxel_away(file):
    anisotropic = (coefficients(file["sub_1/input"])[..., 1:6] ** 2).sum(axis=-1)
    points = file["sub_1/streamlines/data"][:] - 0.5

    def mean_at(shift):
        return map_coordinates(anisotropic, (points + shift).T, order=1).mean()

    for axis in range(3):
        for sign in (-0.5, 0.5):
            assert mean_at(np.zeros(3)) > 1.02 * mean_at(sign * np.eye(3)[axis])


def test_the_signal_is_weakest_along_the_streamlines(file):
    from dwiml_func.data.spherical_harmonics import sh_matrix

    group = file["sub_4/streamlines"]
    lengths, points = group["lengths"][:], group["data"][:]
    inside = np.diff(np.repeat(np.arange(len(lengths)), lengths)) == 0
    tangents = np.diff(points, axis=0)[inside]
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    middles = (points[:-1] + points[1:])[inside] / 2
    volume = coefficients(file["sub_4/input"])
    sh = np.stack([map_coordinates(volume[..., k], (middles - 0.5).T, order=1) for k in range(28)], axis=1)
    along = (sh * sh_matrix(tangents, 6)).sum(axis=1)
    across = np.roll(tangents, 1, axis=1)
    across -= (across * tangents).sum(axis=1, keepdims=True) * tangents
    across = (sh * sh_matrix(across / np.linalg.norm(across, axis=1, keepdims=True), 6)).sum(axis=1)
    assert (along < across - 0.1).mean() > 0.98


def test_the_tissue_around_is_isotropic_with_noise_of_snr_20(file):
    volume = coefficients(file["sub_5/input"])
    held = np.abs(volume).sum(axis=-1) > 1e-3
    tissue = held & (file["sub_5/wm_mask/data"][..., 0] == 0)
    assert tissue.sum() > 10_000
    signal = volume[tissue] / np.sqrt(4 * np.pi)  # the constant harmonic is 1 / sqrt(4 pi)
    assert abs(signal[:, 0].mean() - np.exp(-0.8)) < 0.01
    # An orthonormal coefficient fitted to 60 even directions has the noise of one of them, times sqrt(4 pi / 60).
    sigma = volume[tissue][:, 1:].std() / np.sqrt(4 * np.pi / 60)
    assert abs(sigma - 1 / 20) < 0.005


def test_an_existing_file_and_a_missing_folder_are_refused(tmp_path):
    path = tmp_path / "example.hdf5"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"The file exists: .*example\.hdf5"):
        make_example_data(path)
    assert path.read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=r"does not exist: .*nowhere"):
        make_example_data(tmp_path / "nowhere" / "example.hdf5")
    assert list(tmp_path.iterdir()) == [path]
