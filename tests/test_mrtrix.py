"""Claims about what the benchmark asks of MRtrix and reads from it, with its commands played by a function."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_func.benchmark import mrtrix
from dwiml_func.data.bundles import Bundles
from dwiml_func.data.grid import Grid
from dwiml_func.data.spherical_harmonics import half_sphere_directions, sh_matrix
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.tracking.case import TrackingCase
from dwiml_func.tracking.space import TrackingSpace
from dwiml_func.tracking.spec import TrackingSpec

AFFINE = np.array([[0.0, -2, 0, 10], [1, 0, 0, -20], [0, 0, 4, 30], [0, 0, 0, 1]])  # turned, and of uneven voxels
RASMM = AFFINE[:3, :3], AFFINE[:3, 3]
NB_DIRECTIONS = 7
END = ["-quiet", "-force", "-nthreads", "0"]
EMPTY = Streamlines.from_list([])


def to_mm(points: Any) -> np.ndarray:
    """From voxel space, corner origin."""
    return (np.asarray(points, dtype=float) - 0.5) @ RASMM[0].T + RASMM[1]


@pytest.fixture
def case() -> TrackingCase:
    volume = torch.randn(3, 4, 2, 6, generator=torch.Generator().manual_seed(0))
    return TrackingCase(
        subject="anna",
        real=EMPTY,
        in_mm=EMPTY,
        bundles=Bundles((), np.zeros(0, dtype=np.int64)),
        references=(),
        space=TrackingSpace(volume=volume, voxel_sizes=(1.0, 2.0, 4.0)),
        spec=TrackingSpec(step_size=1.0, min_length=7.5, max_length=90.0),
        mask=torch.arange(24).reshape(3, 4, 2) % 2 == 0,
        grid=Grid(AFFINE, (3, 4, 2)),
        attributes={
            "sh_order": 2,
            "sh_basis": "tournier07",
            "standardization_mean": 0.5,
            "standardization_std": 2.0,
        },
    )


class Commands:
    """Plays `subprocess.run`: notes the commands, and writes the next of `answers`, lines in mm, for each tckgen."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.given, self.answers = folder, list[list[str]](), list[list[Any]]()
        self.fails = ""

    def run(self, command: list[str], *, cwd: Path, env: dict[str, str], **options: Any) -> SimpleNamespace:
        assert options == {"capture_output": True, "text": True, "check": False}
        assert (cwd, env) == (self.folder, {**os.environ, "MRTRIX_RNG_SEED": "1"})
        self.given.append(command)
        if command[0] == "tckgen":
            lines = [np.asarray(line, dtype=np.float32) for line in self.answers.pop(0)]
            nib.streamlines.save(nib.streamlines.Tractogram(lines, affine_to_rasmm=np.eye(4)), cwd / "lines.tck")
        failed = command[0] == self.fails
        return SimpleNamespace(returncode=3 if failed else 0, stderr=" no licence\n" if failed else "")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    played = Commands(tmp_path)
    monkeypatch.setattr(mrtrix, "subprocess", played)
    return played


def test_the_orientations_are_fitted_to_the_signal_of_the_example_data(case: TrackingCase, commands: Commands) -> None:
    trackers = mrtrix.mrtrix_trackers(case, commands.folder, nb_directions=NB_DIRECTIONS)
    assert mrtrix.MRTRIX == {"MRtrix iFOD2": "iFOD2", "MRtrix SD_STREAM": "SD_STREAM"}
    assert list(trackers) == list(mrtrix.MRTRIX)
    common = ["-grad", "gradients.txt", "-mask", "mask.nii", *END]
    assert commands.given == [
        ["dwi2response", "tournier", "signal.nii", "response.txt", *common],
        ["dwi2fod", "csd", "signal.nii", "response.txt", "fod.nii", *common],
    ]
    signal: Any = nib.load(commands.folder / "signal.nii")
    mask: Any = nib.load(commands.folder / "mask.nii")
    directions = half_sphere_directions(NB_DIRECTIONS)
    harmonics = case.space.volume.double().numpy() * 2.0 + 0.5
    weighted = np.einsum("xyzc,dc->xyzd", harmonics, sh_matrix(directions, 2, basis="tournier07"))
    assert (weighted < 0).any()  # which no signal is
    found = signal.get_fdata()
    assert (signal.get_data_dtype(), mask.get_data_dtype()) == (np.float32, np.uint8)
    assert found.shape == (3, 4, 2, 1 + NB_DIRECTIONS)
    assert (found[..., 0] == 1).all()
    np.testing.assert_allclose(found[..., 1:], np.maximum(weighted, 0), rtol=1e-6)
    assert case.mask is not None
    np.testing.assert_array_equal(mask.get_fdata(), case.mask.numpy())
    for image in (signal, mask):
        np.testing.assert_array_equal(image.affine, AFFINE)
    scheme = np.loadtxt(commands.folder / "gradients.txt")
    np.testing.assert_allclose(scheme[:, :3], [[0, 0, 0], *directions], atol=1e-12)
    assert scheme[:, 3].tolist() == [0] + [1000] * NB_DIRECTIONS


@pytest.mark.parametrize(("name", "algorithm"), mrtrix.MRTRIX.items())
def test_lines_from_seeds_go_there_and_back_between_voxels_and_mm(
    case: TrackingCase, commands: Commands, name: str, algorithm: str
) -> None:
    tracker = mrtrix.mrtrix_trackers(case, commands.folder, nb_directions=NB_DIRECTIONS)[name]
    lines = [[[0.25, 1, 1.5], [1.25, 1, 1.5], [2.25, 2, 1.5]], [[1, 1, 1], [1, 2, 1]]]
    commands.answers = [[to_mm(line) for line in lines]]
    found = tracker.from_seeds(torch.tensor([[0.5, 0.5, 0.5], [1.25, 2, 1.5]]))
    assert found.lengths.tolist() == [3, 2]
    assert found.points.dtype == torch.float32
    np.testing.assert_allclose(found.points, np.concatenate(lines), atol=1e-6)
    spheres = ["-seed_sphere", "10.00000,-20.00000,30.00000,0.001", "-seed_sphere", "7.00000,-19.25000,34.00000,0.001"]
    assert commands.given[-1] == [
        *("tckgen", "fod.nii", "lines.tck", "-algorithm", algorithm, "-mask", "mask.nii", "-seeds", "2"),
        *("-select", "0", "-minlength", "7.5", "-maxlength", "90.0", *spheres, *END),
    ]


def test_what_goes_ahead_begins_at_the_end_of_what_is_given(case: TrackingCase, commands: Commands) -> None:
    tracker = mrtrix.mrtrix_trackers(case, commands.folder, nb_directions=NB_DIRECTIONS)["MRtrix iFOD2"]
    given = Streamlines.from_list([[[0, 0, 0], [0.5, 1.5, 0], [1.5, 2.5, 0.5]], [[2, 1, 1], [1.5, 1, 1.25]]])
    followed = [[1.5625, 2.5, 0.5], [2, 3, 1], [2.5, 3, 1.5]]
    commands.answers = [[to_mm(followed)], []]
    found = tracker.ahead(given, 20.0)
    assert found.lengths.tolist() == [3, 1]
    np.testing.assert_allclose(found.points, [[1.5, 2.5, 0.5], *followed[1:], [1.5, 1, 1.25]], atol=1e-6)
    places = to_mm([[1.5, 2.5, 0.5], [1.5, 1, 1.25]])
    for command, place, way in zip(commands.given[-2:], places, ("-2.0,1.0,2.0", "0.0,-0.5,1.0"), strict=True):
        toward = ",".join(f"{float(part):.6f}" for part in way.split(","))
        x, y, z = place
        assert command == [
            *("tckgen", "fod.nii", "lines.tck", "-algorithm", "iFOD2", "-mask", "mask.nii", "-seeds", "1"),
            *("-select", "0", "-seed_unidirectional", "-seed_direction", toward, "-minlength", "0"),
            *("-maxlength", "20.0", "-seed_sphere", f"{x:.5f},{y:.5f},{z:.5f},0.001", *END),
        ]


def test_a_command_that_fails_is_an_error_with_its_words(case: TrackingCase, commands: Commands) -> None:
    commands.fails = "dwi2fod"
    with pytest.raises(OSError, match=r"^MRtrix's dwi2fod ended with 3: no licence$"):
        mrtrix.mrtrix_trackers(case, commands.folder, nb_directions=NB_DIRECTIONS)


def test_mrtrix_is_there_where_all_its_commands_are(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"dwi2response", "dwi2fod", "tckgen"}
    monkeypatch.setattr(mrtrix, "shutil", SimpleNamespace(which=lambda command: command if command in there else None))
    assert mrtrix.has_mrtrix()
    there.remove("dwi2fod")
    assert not mrtrix.has_mrtrix()
