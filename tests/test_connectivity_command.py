"""`dwiml-func connectivity` and `dwiml-func extract`, beside cases counted by hand and dipy's `connectivity_matrix`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
from creation_cases import AFFINE, save_lines
from nibabel.affines import apply_affine
from trx.trx_file_memmap import load as trx_load

from dwiml_func.cli._connectivity import read_matrix
from dwiml_func.data.creation.connectivity import read_connectivity
from dwiml_func.data.hdf5.consistency import matrix_fault

SHAPE = (12, 9, 6)
PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"


def write_labels(path: Path, labels: np.ndarray) -> Path:
    nib.Nifti1Image(labels.astype(np.int32), AFFINE).to_filename(path)
    return path


def world(lines: list[Any]) -> list[np.ndarray]:
    """From voxel space, the corner of the first voxel at 0."""
    return [apply_affine(AFFINE, np.asarray(line, dtype=np.float64) - 0.5) for line in lines]


def save(path: Path, lines: list[Any]) -> Path:
    save_lines(path, world(lines), affine=AFFINE, shape=SHAPE)
    return path


# Ends in the corners a, b, c of three blocs of (2, 2, 2): 0, 4 and 7.
A, B, C = [1.5, 1.5, 1.5], [10.5, 1.5, 1.5], [10.5, 8.5, 5.5]
LINES = [[A, [4, 4, 3], B], [B, A], [A, [1.7, 1.7, 1.7]], [C, A]]


@pytest.mark.parametrize("suffix", ["trk", "tck", "trx"])
def test_blocs_are_counted_as_by_hand(cli, tmp_path, suffix):
    tractogram = save(tmp_path / f"a.{suffix}", LINES)
    grid = ["--reference", write_labels(tmp_path / "grid.nii.gz", np.ones(SHAPE))] if suffix == "tck" else []
    outcome = cli("connectivity", tractogram, tmp_path / "new" / "m.npy", "--nb-blocs", 2, *grid)
    assert (outcome.code, outcome.err) == (0, "")
    assert "4 streamlines, 3 connections between 8 regions" in outcome.out
    expected = np.zeros((8, 8), dtype=np.int64)
    expected[0, 4], expected[0, 0], expected[0, 7] = 2, 1, 1
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "m.npy"), expected)
    assert cli("connectivity", tractogram, tmp_path / "one.npy", "--nb-blocs", 1, "--binary", *grid).code == 0
    assert np.load(tmp_path / "one.npy").tolist() == [[1.0]]
    binary = cli("connectivity", tractogram, tmp_path / "b.npy", "--nb-blocs", 2, 2, 2, "--binary", *grid)
    assert binary.code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), expected > 0)
    outside = save(tmp_path / f"outside.{suffix}", [*LINES, [A, [30, 1, 1]]])
    command = ("connectivity", outside, tmp_path / "o.npy", "--nb-blocs", 2, *grid)
    assert cli(*command).code == 2
    assert cli(*command, "--remove-invalid").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected)


def test_streamlines_of_entries_and_blocs_are_written(cli, tmp_path):
    tractogram = save(tmp_path / "a.trk", [*LINES[:2], LINES[1], LINES[3], LINES[3]])  # empty entries come first
    outs = ["--save-biggest", tmp_path / "big.trk", "--save-smallest", tmp_path / "small.tck"]
    blocs = ["--save-blocs", tmp_path / "blocs.nii.gz"]
    assert cli("connectivity", tractogram, tmp_path / "m.npy", "--nb-blocs", 2, *outs, *blocs).code == 0
    biggest, smallest = (nib.streamlines.load(tmp_path / name).streamlines for name in ("big.trk", "small.tck"))
    for found, expected in ((biggest, [*LINES[:2], LINES[1]]), (smallest, [LINES[3]] * 2)):
        assert len(found) == len(expected)
        for line, other in zip(found, world(expected), strict=True):
            np.testing.assert_allclose(line, other, atol=1e-4)
    assert (tmp_path / "blocs.nii.gz").read_bytes()[4:8] == bytes(4)  # no time: the same bytes each time
    image: Any = nib.load(tmp_path / "blocs.nii.gz")
    values = np.asarray(image.dataobj)
    assert np.unique(values).tolist() == list(range(1, 9))
    assert (values[1, 1, 1], values[10, 1, 1], values[11, 8, 5]) == (1, 5, 8)
    assert (values == 1).sum() == 6 * 4 * 3  # of 9 voxels the middle one's centre belongs to the second bloc
    # The same matrix, by these labels: no voxel of it is 0.
    assert cli("connectivity", tractogram, tmp_path / "l.npy", "--labels", tmp_path / "blocs.nii.gz").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "l.npy"), np.load(tmp_path / "m.npy"))


def test_where_no_connection_is_left_the_files_of_entries_are_empty(cli, tmp_path):
    tractogram, volume = save(tmp_path / "a.trk", LINES), write_labels(tmp_path / "l.nii.gz", np.ones(SHAPE))
    outs = ["--save-biggest", tmp_path / "big.trk", "--save-rejected", tmp_path / "out.trk"]
    outcome = cli("connectivity", tractogram, tmp_path / "m.npy", "--labels", volume, "--hide-background", 1, *outs)
    assert (outcome.code, np.load(tmp_path / "m.npy").tolist()) == (0, [[0]])
    assert [len(nib.streamlines.load(tmp_path / name).streamlines) for name in ("big.trk", "out.trk")] == [0, 4]


def test_labels_are_counted_as_dipy_counts_them(cli, tmp_path):
    from dipy.tracking.utils import connectivity_matrix

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, size=SHAPE)
    lines = [rng.uniform(0.01, np.array(SHAPE) - 0.01, size=(4, 3)) for _ in range(200)]
    tractogram, volume = save(tmp_path / "a.trk", lines), write_labels(tmp_path / "l.nii.gz", labels)
    assert cli("connectivity", tractogram, tmp_path / "m.npy", "--labels", volume).code == 0
    found = np.load(tmp_path / "m.npy")
    theirs: Any = connectivity_matrix(world(lines), AFFINE, labels, symmetric=False)
    np.testing.assert_array_equal(found, np.triu(theirs) + np.tril(theirs, -1).T)
    assert found.sum() == 200
    assert (tmp_path / "m_labels.txt").read_text() == "0 = 0\n1 = 1\n2 = 2\n3 = 3\n4 = 4\n"


def test_the_background_can_be_left_out(cli, tmp_path):
    labels = np.zeros(SHAPE, dtype=np.int32)
    labels[1, 1, 1], labels[10, 8, 5] = 30, 70
    tractogram, volume = save(tmp_path / "a.trk", LINES), write_labels(tmp_path / "l.nii.gz", labels)
    options = ["--labels", volume, "--hide-background", 0, "--save-rejected", tmp_path / "out.trk"]
    outcome = cli("connectivity", tractogram, tmp_path / "m.npy", *options)
    assert outcome.code == 0
    assert "2 streamlines, 2 connections between 3 regions, 2 streamlines of label 0 left out" in outcome.out
    LEFT = np.load(tmp_path / "m.npy")
    assert LEFT.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert len(nib.streamlines.load(tmp_path / "out.trk").streamlines) == 2
    assert (tmp_path / "m_labels.txt").read_text() == "0 = 0\n1 = 30\n2 = 70\n"


# Labels of the voxels along a line, and the rows of its ends by hand; 3 is "not found".
@pytest.mark.parametrize(
    ("profile", "ends"),
    [
        ([0, 1, 0, 2, 0, 2], (1, 2)),  # what lies between does not count
        ([1, 0, 0, 1], (1, 1)),
        ([0, 2, 2, 0, 1, 0], (1, 2)),  # ends beside regions
        ([1, 1, 2, 2], (3, 3)),  # never leaves the regions
        ([1, 2, 2, 0], (3, 3)),  # the background only at the end
        ([1, 2, 0, 0], (3, 3)),  # the regions are neighbours
        ([1, 1, 2, 0, 0], (1, 2)),
        ([0, 0, 0], (3, 3)),
        ([1], (3, 3)),
    ],
)
def test_the_longest_segment_joins_the_first_and_the_last_region(cli, tmp_path, profile, ends):
    labels = np.zeros((len(profile) + 3, 2, 2), dtype=np.int32)
    labels[: len(profile)] = np.array(profile)[:, None, None]
    labels[-3:] = np.array([0, 1, 2])[:, None, None]  # no line comes here
    line = [[0.4, 0.5, 0.5], [0.6, 0.5, 0.5], [len(profile) - 0.5, 0.7, 0.5]]
    save_lines(tmp_path / "a.trk", world([line]), affine=AFFINE, shape=labels.shape)
    options = ["--labels", write_labels(tmp_path / "l.nii.gz", labels), "--use-longest-segment"]
    figure = ["--figure", tmp_path / "m.png"] if len(profile) == 1 else []
    assert cli("connectivity", tmp_path / "a.trk", tmp_path / "m.npy", *options, *figure).code == 0
    expected = np.zeros((4, 4), dtype=np.int64)
    expected[ends] = 1
    np.testing.assert_array_equal(np.load(tmp_path / "m.npy"), expected)
    assert (tmp_path / "m_labels.txt").read_text() == "0 = 0\n1 = 1\n2 = 2\n3 = not found\n"
    assert (tmp_path / "m.png").exists() == bool(figure)


@pytest.mark.parametrize(
    ("counts", "real", "squares"),
    [
        ((3, 1), (1, 0), "mean square of the difference 1.25, of shares of all streamlines 0.03125\n"),
        ((1, 1), (2, 0), "mean square of the difference 0.5, of shares of all streamlines 0.125\n"),
        ((1, 1), (1, 0), ""),  # without counts
        ((0, 0), (2, 0), ""),
        ((2, 0), (0, 0), ""),
    ],
)
def test_matrices_are_compared(cli, tmp_path, counts, real, squares):
    np.save(tmp_path / "a.npy", np.array([[0, counts[0]], [0, counts[1]]]))
    np.save(tmp_path / "real.npy", np.array([[0, real[0]], [0, real[1]]]))
    outcome = cli("connectivity", tmp_path / "a.npy", "--real", tmp_path / "real.npy")
    assert (outcome.code, outcome.err) == (0, "")
    false, missing, *more = outcome.out.splitlines(keepends=True)
    share = (counts[0] * (not real[0]) + counts[1]) / sum(counts) if any(counts) else np.nan
    lost = float(not counts[0]) if any(real) else np.nan
    assert false == f"false connections {share:.4f} of the streamlines, beside {tmp_path / 'real.npy'}\n"
    assert missing == f"missing connections {lost:.4f} of the real ones\n"
    assert "".join(more) == squares


def test_what_does_not_fit_is_refused_and_leaves_nothing(cli, tmp_path):
    cli("connectivity").check_refusal("Expected TRACTOGRAM and OUT.npy", "Received: nothing.")
    tractogram, tck = save(tmp_path / "a.trk", LINES), save(tmp_path / "a.tck", LINES)
    shutil.copy(tck, large := tmp_path / "large.TCK")
    other = tmp_path / "other.nii.gz"
    nib.Nifti1Image(np.ones((4, 4, 4), dtype=np.int32), AFFINE).to_filename(other)
    np.save(tmp_path / "two.npy", np.zeros((2, 2)))
    np.save(tmp_path / "three.npy", np.zeros((3, 3)))
    (tmp_path / "text.npy").write_text("no matrix")
    out = tmp_path / "new.npy"
    cases = {
        (tractogram, out): "Expected regions: --nb-blocs or --labels",
        (tractogram, out, "--nb-blocs", 2, "--labels", other): "Expected regions",
        (tractogram, out, "--nb-blocs", 2, 2): "nb_blocs: expected one number or three",
        (tractogram, out, "--nb-blocs", 2, 0, 2): "nb_blocs: expected one number or three, each at least 1",
        (tractogram, out, "--nb-blocs", 0): "nb_blocs: expected one number or three",
        (tractogram, out, "--nb-blocs", 50): "expected at most 20000 blocs",
        (tractogram, out, "--labels", other): "a grid of 12 x 9 x 6 voxels, expected 4 x 4 x 4",
        (large, out, "--nb-blocs", 2): "reference: a TCK file has no grid",
        (tck, out, "--nb-blocs", 2): "reference: a TCK file has no grid",
        (tractogram, out, "--nb-blocs", 2, "--hide-background", 0): "hide_background: requires --labels",
        (tractogram, out, "--nb-blocs", 2, "--use-longest-segment"): "use_longest_segment: requires --labels",
        (tractogram, out, "--nb-blocs", 2, "--figure", tmp_path / "m.txt"): "expected a name that ends in .png",
        (tractogram, tmp_path / "new.txt", "--nb-blocs", 2): "Expected TRACTOGRAM and OUT.npy",
        (tmp_path / "no.trk", out, "--nb-blocs", 2): "The file does not exist",
        (tractogram, tmp_path / "two.npy", "--nb-blocs", 2): "The file exists",
        (tractogram, out, "--nb-blocs", 2, "--real", tmp_path / "two.npy"): "expected a matrix of 8 rows, received 2",
        (tractogram, out, "--nb-blocs", 2, "--real", tmp_path / "text.npy"): "cannot be read as a matrix",
        (tmp_path / "two.npy",): "real: requires one matrix",
        (tmp_path / "two.npy", "--real", tmp_path / "three.npy"): "expected a matrix of 2 rows, received 3",
    }
    before = sorted(tmp_path.iterdir())
    for arguments, text in cases.items():
        cli("connectivity", *arguments).check_refusal(text)
        assert sorted(tmp_path.iterdir()) == before, arguments


def test_groups_of_a_dataset_are_extracted(cli, tmp_path):
    with h5py.File(PHANTOM) as file:
        group: Any = file["subj0"]
        volume, affine = group["input/data"][()], group["input"].attrs["affine"]
        points = group["streamlines/data"][()]
    assert cli("extract", PHANTOM, "subj0", "input", tmp_path / "new" / "a.nii.gz").code == 0
    image: Any = nib.load(tmp_path / "new" / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), volume.astype(np.float32))
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    assert cli("extract", PHANTOM, "subj0", "streamlines", tmp_path / "a.tck").code == 0
    lines = nib.streamlines.load(tmp_path / "a.tck").streamlines
    np.testing.assert_allclose(lines.get_data(), apply_affine(affine, points - 0.5), atol=1e-4)
    cli("extract", PHANTOM, "subj0", "streamlines", tmp_path / "a.tck").check_refusal("The file exists")
    cases = {
        ("subj9", "input", "b.nii.gz"): "expected a subject among",
        ("subj0", "no", "b.nii.gz"): "Received: no such group, 'no'",
        ("subj0", "input", "b.trk"): "Expected a file .nii or .nii.gz for the volume 'input'",
        ("subj0", "streamlines", "b.nii"): "Expected a file .trk or .tck or .trx for the streamlines",
        ("subj0", "streamlines", "b.npy", "--save-connectivity"): "has no connectivity matrix",
    }
    for (subject, name, out, *more), text in cases.items():
        cli("extract", PHANTOM, subject, name, tmp_path / out, *more).check_refusal(text)
        assert not (tmp_path / out).exists()


def test_data_per_streamline_are_extracted(cli, tmp_path):
    data = Path(shutil.copy(PHANTOM, tmp_path / "data.hdf5"))
    with h5py.File(data, "r+") as file:
        group: Any = file["subj0/streamlines"]
        num = len(group["lengths"])
        tables = {"weight": np.arange(num)[:, None] / 4, "a/colour": np.arange(3 * num).reshape(num, 3)}
        for key, values in tables.items():
            group.require_group("data_per_streamline")[key] = values
        group["bundle_ids"], group.attrs["bundle_names"] = np.arange(num) % 2, ["CST", "AF"]
    expected = {"weight": tables["weight"], "a_colour": tables["a/colour"], "bundle_ids": np.arange(num)[:, None] % 2}
    for kind in ("trk", "trx", "tck"):
        assert cli("extract", data, "subj0", "streamlines", tmp_path / f"a.{kind}").code == 0
    trk = nib.streamlines.load(tmp_path / "a.trk").tractogram
    trx: Any = trx_load(str(tmp_path / "a.trx"))
    for found in (trk.data_per_streamline, trx.data_per_streamline):
        assert set(found) == set(expected)
        for key, values in expected.items():
            np.testing.assert_array_equal(np.asarray(found[key]), values)
    trx.close()
    for number, wrong in enumerate((np.zeros(num), np.zeros((num + 1, 1)), np.full((num, 1), b"a"))):
        with h5py.File(data, "r+") as file:
            file[f"subj0/streamlines/data_per_streamline/name{number}"] = wrong
        cli("extract", data, "subj0", "streamlines", tmp_path / "b.trk").check_refusal(
            f"data per streamline 'name{number}'", f"of shape {wrong.shape}"
        )
        with h5py.File(data, "r+") as file:
            del file[f"subj0/streamlines/data_per_streamline/name{number}"]
    assert not (tmp_path / "b.trk").exists()


def test_a_matrix_of_labels_goes_into_a_dataset_and_out_again(cli, tmp_path):
    labels = np.zeros((2, 2, 2), dtype=np.int64)
    labels[0, 0, 0], labels[1, 1, 1] = 20, 30
    for matrix, expected in (
        (np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0]]), [[1, 0, 1], [0, 0, 1], [0, 0, 0]]),  # with the background
        (np.array([[0, 1], [0, 0]]), [[0, 0, 0], [0, 0, 1], [0, 0, 0]]),
    ):
        assert matrix_fault(matrix.shape, None, labels) is None
        with h5py.File(tmp_path / "a.hdf5", "w") as file:
            group = file.create_group("anna/lines")
            group.attrs["type"] = "streamlines"
            group["connectivity_matrix"], group["connectivity_label_volume"] = matrix, labels
            known = read_connectivity(group)
        assert known is not None
        assert known.matrix.astype(int).tolist() == expected
        options = ["--save-connectivity", "--overwrite"]
        assert cli("extract", tmp_path / "a.hdf5", "anna", "lines", tmp_path / "m.npy", *options).code == 0
        np.testing.assert_array_equal(np.load(tmp_path / "m.npy"), matrix)
    assert "rows" in (matrix_fault((5, 5), None, labels) or "")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((3, 4)), r"expected a square matrix\. Received the shape \(3, 4\)"),
        (np.ones(4), r"expected a square matrix\. Received the shape \(4,\)"),
        (np.ones((3, 3), dtype=complex), "expected a matrix of numbers"),
        (np.diag([1.0, -1]), "expected finite numbers of at least 0"),
        (np.diag([1.0, np.nan]), "expected finite numbers of at least 0"),
    ],
)
def test_what_is_no_matrix_is_refused(tmp_path, matrix, message):
    np.save(tmp_path / "m.npy", matrix)
    with pytest.raises(ValueError, match=message):
        read_matrix(str(tmp_path / "m.npy"))
