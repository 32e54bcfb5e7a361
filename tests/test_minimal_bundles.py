"""The real streamlines of the example data."""

import io
import zipfile
from importlib.resources import files

import nibabel as nib
import numpy as np
import pytest

from dwiml_func.data.example import bundles as minimal_bundles
from dwiml_func.data.example.bundles import BUNDLES, SUBJECTS, load_bundles


@pytest.fixture(scope="module")
def bundles():
    return {subject: load_bundles(subject) for subject in SUBJECTS}


def stored(subject: str, bundle: str) -> list[np.ndarray]:
    archive = files("dipy") / "data" / "files" / "minimal_bundles.zip"
    with zipfile.ZipFile(io.BytesIO(archive.read_bytes())) as content:
        tractogram = nib.streamlines.load(io.BytesIO(content.read(f"{subject}/{bundle}.trk")))
    return list(tractogram.streamlines)


def all_streamlines(bundles):
    return [s for subject in bundles.values() for bundle in subject.values() for s in bundle]


def test_five_people_have_three_bundles_of_fifty(bundles):
    assert [[len(s) for s in subject.values()] for subject in bundles.values()] == [[50, 50, 50]] * 5


def test_steps_are_one_millimetre(bundles):
    for streamline in all_streamlines(bundles):
        steps = np.linalg.norm(np.diff(streamline, axis=0), axis=1)
        assert abs(steps.mean() - 1) < 0.01
        assert np.ptp(steps) < 0.05  # chords of evenly spaced arcs


def test_streamlines_stay_near_the_stored_points():
    for bundle, lines in load_bundles("sub_2").items():
        for points, line in zip(stored("sub_2", bundle), lines, strict=True):
            distances = np.linalg.norm(points[:, None] - line[None], axis=-1).min(axis=1)
            assert np.sqrt((distances**2).mean()) < 1.1  # 1 mm of smoothing, and up to half a step


def test_smoothing_takes_out_the_zigzag(bundles):
    turns = []
    for line in all_streamlines(bundles):
        u = np.diff(line, axis=0)
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        turns.append(np.degrees(np.arccos(np.clip((u[1:] * u[:-1]).sum(axis=1), -1, 1))))
    assert np.concatenate(turns).mean() < 2.5  # degrees a mm; 3.2 for a spline through the stored points


def test_all_streamlines_of_a_bundle_travel_the_same_way_in_all_people(bundles):
    for subject in bundles.values():
        for name, axis in BUNDLES.items():
            assert all(line[-1, axis] > line[0, axis] for line in subject[name])
            thin = np.array([line[np.linspace(0, len(line) - 1, 12).round().astype(int)] for line in subject[name]])
            mean = thin.mean(axis=0)
            along = np.linalg.norm(thin - mean, axis=-1).mean(axis=1)
            against = np.linalg.norm(thin[:, ::-1] - mean, axis=-1).mean(axis=1)
            assert (along < against).all()


def test_the_stored_streamlines_do_not_travel_the_same_way():
    """If dipy's file changes in this, turning them is no longer needed."""
    forwards = [line[-1, 2] > line[0, 2] for line in stored("sub_1", "CST_R")]
    assert 10 < sum(forwards) < 40


def test_another_step_size_is_kept():
    steps = np.linalg.norm(np.diff(load_bundles("sub_1", step_size=4.0)["AF_L"][0], axis=0), axis=1)
    assert abs(steps.mean() - 4) < 0.1


def test_bad_values_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of sub_1, .*, sub_5, received 'sub_6'"):
        load_bundles("sub_6")
    for step in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"above 0 mm. Received: {step}"):
            load_bundles("sub_1", step_size=step)
    monkeypatch.setattr(minimal_bundles, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no .*minimal_bundles\.zip"):
        load_bundles("sub_1")
