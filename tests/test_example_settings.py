"""Claims about the options of the example data: closed forms of the signal, its noise, and what crosses the bundles."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trxscan
from scipy.spatial.transform import Rotation

from dwiml_func.core.rng import Key, numpy_rng
from dwiml_func.data.example.bundles import SUBJECTS, load_bundles
from dwiml_func.data.example.scanner import scan
from dwiml_func.data.example.settings import DEFAULT_SETTINGS, ExampleSettings
from dwiml_func.data.example.signal import ISOTROPIC, Fibres, acquire, paint, simulate
from dwiml_func.data.example.unlabelled import mean_line, rotation, unlabelled_bundles
from dwiml_func.data.grid import Grid
from dwiml_func.data.spherical_harmonics import half_sphere_directions, sh_matrix

CLEAN = ExampleSettings(snr=float("inf"))
SCANNED = [1000965.2496070862, 681208.0966619253]
CROSSED = [
    197594.1601,
    158127.5798,
    178337.1545,
    196916.44,
    223850.0602,
    201557.3764,
    93938.2773,
    231924.9164,
    204797.7064,
    200018.5373,
    149823.7469,
    155930.8642,
    140027.2564,
    197456.9597,
    171522.2943,
]
B, PARALLEL, PERPENDICULAR = 1000.0, 1.5e-3, 3e-4


def in_one_voxel(*fibres: tuple[tuple[float, float, float], float]) -> Fibres:
    directions = np.array([[axis for axis, _ in fibres]])
    return Fibres(np.array([0]), directions, np.array([[fraction for _, fraction in fibres]]))


def acquired(fibres: Fibres, settings: ExampleSettings = CLEAN, num: int = 1) -> tuple[np.ndarray, np.ndarray]:
    return acquire(fibres, np.ones((num, 1, 1), dtype=bool), settings, numpy_rng(Key(7)))


def test_the_signal_of_one_tensor_is_its_closed_form() -> None:
    axis = np.array([2.0, -1.0, 2.0]) / 3
    unweighted, weighted = acquired(in_one_voxel((tuple(axis.tolist()), 1.0)))
    tensor = PERPENDICULAR * np.eye(3) + (PARALLEL - PERPENDICULAR) * np.outer(axis, axis)
    gradients = half_sphere_directions(60)
    np.testing.assert_array_equal(unweighted, np.ones((1, 6)))
    expected = [np.exp(-B * g @ tensor @ g) for g in gradients]
    np.testing.assert_allclose(weighted[0], expected, rtol=1e-12)


def test_the_signal_of_a_crossing_is_the_sum_of_two_tensors_and_of_isotropic_tissue() -> None:
    _, weighted = acquired(in_one_voxel(((1.0, 0.0, 0.0), 0.4), ((0.0, 1.0, 0.0), 0.4)))
    x, y, _ = half_sphere_directions(60).T
    expected = 0.4 * np.exp(-B * (PERPENDICULAR + 1.2e-3 * x**2)) + 0.4 * np.exp(-B * (PERPENDICULAR + 1.2e-3 * y**2))
    np.testing.assert_allclose(weighted[0], expected + 0.2 * np.exp(-B * ISOTROPIC), rtol=1e-12)


@pytest.mark.parametrize(
    ("place", "is_painted"), [((0.9, 2.5), False), ((1.0, 2.5), True), ((2.5, 4.9), True), ((2.5, 5.0), False)]
)
def test_points_paint_the_27_voxels_around_them_where_all_are_in_the_grid(place, is_painted) -> None:
    line = np.array([[2.0, *place], [3.0, *place]])
    fibres = paint([[line]], Grid(np.eye(4), (6, 6, 6)))
    found = np.stack(np.unravel_index(fibres.voxels, (6, 6, 6)), axis=1).tolist()
    first = np.floor(place).astype(int) - 1
    expected = [[x, first[0] + y, first[1] + z] for x in range(1, 5) for y in range(3) for z in range(3)]
    assert found == (expected if is_painted else [])
    axes = np.tile([1.0, 0, 0], (len(found), 1))
    np.testing.assert_allclose(np.abs(fibres.directions[:, 0]), axes, atol=1e-12)


@pytest.mark.parametrize("snr", [10.0, 20.0, 30.0])
def test_the_snr_is_that_of_the_unweighted_images(snr: float) -> None:
    unweighted, _ = acquired(in_one_voxel(((1.0, 0.0, 0.0), 0.5)), ExampleSettings(snr=snr), num=20_000)
    # Rice's distribution has this variance, to the fourth order of sigma (Gudbjartsson and Patz, 1995).
    measured = 1 / np.sqrt(unweighted.var() / (1 - 0.5 / snr**2))
    assert abs(measured / snr - 1) < 5 / np.sqrt(2 * unweighted.size)  # five standard errors


@pytest.mark.parametrize(("num", "order"), [(6, 2), (14, 2), (15, 4), (28, 6), (60, 6)])
def test_harmonics_are_as_many_as_the_directions_determine(num: int, order: int) -> None:
    settings = replace(CLEAN, nb_directions=num)
    mask = np.zeros((3, 3, 3), dtype=bool)
    mask[1, 1, 1] = True
    fibres = in_one_voxel(((0.0, 0.0, 1.0), 0.6))._replace(voxels=np.array([13]))
    coefficients = simulate(fibres, mask, settings, numpy_rng(Key(1)))
    assert coefficients.shape == (3, 3, 3, (order + 1) * (order + 2) // 2)
    fitted = coefficients[0, 0, 0] @ sh_matrix(half_sphere_directions(num), order).T
    np.testing.assert_allclose(fitted, np.exp(-B * ISOTROPIC), atol=1e-9)


def axes_near(points: np.ndarray, lines: list[np.ndarray], *, mm: float) -> np.ndarray:
    """(3, 3): the mean of u u' of the segments of lines near points."""
    middles = np.concatenate([(line[1:] + line[:-1]) / 2 for line in lines])
    steps = np.concatenate([np.diff(line, axis=0) for line in lines])
    near = np.linalg.norm(middles[:, None] - points[None], axis=-1).min(axis=1) < mm
    units = steps[near] / np.linalg.norm(steps[near], axis=1, keepdims=True)
    return units.T @ units / near.sum()


@pytest.fixture(scope="module")
def bundles() -> dict[str, list[np.ndarray]]:
    return load_bundles("sub_2")


@pytest.mark.parametrize("kind", ["crossing", "distractor"])
def test_crossings_meet_their_bundle_at_60_to_90_degrees_and_distractors_run_along_it(
    kind: str, bundles: dict[str, list[np.ndarray]]
) -> None:
    settings = ExampleSettings(crossings=3) if kind == "crossing" else ExampleSettings(distractors=3)
    made = unlabelled_bundles(bundles, settings, subject=1, key=Key(0))
    assert list(made) == [f"{name}_{kind}_{number}" for name in bundles for number in (1, 2, 3)]
    for name, lines in made.items():
        labelled = bundles[name.rsplit("_", 2)[0]]
        assert len(lines) > 40
        both = mean_line(labelled)
        other = np.concatenate(lines)
        meet = both[[np.linalg.norm(other - point, axis=1).min() < 2 for point in both]]
        assert len(meet)
        centre = meet[[len(meet) // 2]]
        u, v = (np.linalg.eigh(axes_near(centre, each, mm=8.0))[1][:, -1] for each in (labelled, lines))
        angle = np.degrees(np.arccos(min(1.0, abs(float(u @ v)))))
        # The bundles fan, and anatomy differs by some degrees.
        assert angle > 45 if kind == "crossing" else angle < 30
        assert np.linalg.norm(other - centre, axis=1).max() < 50


def test_rotations_and_mean_lines_are_those_of_scipy_and_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        axis, degrees = rng.normal(size=3), rng.uniform(-180, 180)
        axis /= np.linalg.norm(axis)
        expected = Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix()
        np.testing.assert_allclose(rotation(axis, degrees), expected, atol=1e-12)
    lines = [np.linspace([0, y, 0], [80, y, 8], num) for y, num in ((0.0, 9), (2.0, 33), (7.0, 2))]
    np.testing.assert_allclose(mean_line(lines), np.linspace([0, 3, 0], [80, 3, 8], 41), atol=1e-12)


@pytest.mark.parametrize("kind", ["crossing", "distractor"])
def test_of_a_straight_bundle_crossings_turn_by_60_to_90_degrees_and_distractors_about_it(kind: str) -> None:
    straight = [np.linspace([-60, y, z], [60, y, z], 241) for y, z in ((0.0, 0.0), (3.0, 0.0), (0.0, 3.0), (3.0, 3.0))]
    settings = ExampleSettings(crossings=8) if kind == "crossing" else ExampleSettings(distractors=8)
    degrees, moved = [], []
    for seed in range(12):
        made = unlabelled_bundles({"a": straight}, settings, subject=0, key=Key(seed))
        for number, lines in enumerate(made.values()):
            assert len(lines) == 4
            along = [line[-1] - line[0] for line in lines]
            assert all(np.linalg.norm(each) > 20 for each in along)
            u = np.mean(along, axis=0) / np.linalg.norm(np.mean(along, axis=0))
            degrees.append(np.degrees(np.arccos(np.clip(abs(u[0]), 0, 1))))
            middle = np.concatenate(lines).mean(axis=0)
            place = 120 * ((number + 0.5) / 8 - 0.5)  # evenly along the bundle; ends are cut there
            moved.append(abs(middle[0] - place))
            assert np.linalg.norm(np.concatenate(lines) - [middle[0], 1.5, 1.5], axis=1).max() < 45
    if kind == "distractor":
        assert max(degrees) < 1e-3
    else:
        assert 48 < min(degrees) < 62  # three standard deviations of 3 degrees below 60
        assert 86 < max(degrees) <= 90
        assert 70 < np.mean(degrees) < 78
    assert np.median(moved) < 8


def test_a_person_has_the_same_crossings_each_time_and_another_person_nearly_so(
    bundles: dict[str, list[np.ndarray]],
) -> None:
    settings = ExampleSettings(crossings=1)
    first, again, other = (
        unlabelled_bundles(bundles, settings, subject=subject, key=Key(0))["AF_L_crossing_1"] for subject in (0, 0, 1)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    moved = np.linalg.norm(np.concatenate(first).mean(axis=0) - np.concatenate(other).mean(axis=0))
    assert 0 < moved < 15


def test_the_people_of_the_subsets_are_all_five_and_the_one_that_was_asked_for_tests() -> None:
    for person in SUBJECTS:
        training, validation, testing = ExampleSettings(test_subject=person).subsets
        assert testing == (person,)
        assert validation == (SUBJECTS[SUBJECTS.index(person) - 1],)  # before the first comes the last
        assert sorted((*training, *validation, *testing)) == list(SUBJECTS)
    assert DEFAULT_SETTINGS.subsets == (SUBJECTS[:3], SUBJECTS[3:4], SUBJECTS[4:])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--snr", "0"), "snr"),
        (("--snr", "nan"), "snr"),
        (("--nb-directions", "5"), "nb_directions"),
        (("--crossings", "9"), "crossings"),
        (("--distractors", "-1"), "distractors"),
        (("--test-subject", "sub_6"), "sub_5"),
    ],
)
def test_what_cannot_be_simulated_is_refused(cli: Any, tmp_path: Path, arguments: tuple[str, ...], named: str) -> None:
    cli("example-data", tmp_path / "x.hdf5", *arguments).check_refusal(named)
    assert list(tmp_path.iterdir()) == []


def scanned(
    snr: float, axis: tuple[float, float, float] = (1.0, 0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unweighted and weighted magnitudes of a block with one fibre in its left half, and where that half is."""
    shape = (8, 8, 3)
    white = np.zeros(shape, dtype=bool)
    white[:4] = True
    voxels = np.flatnonzero(white)
    fibres = Fibres(voxels, np.tile(axis, (len(voxels), 1, 1)), np.full((len(voxels), 1), 0.9))
    settings = ExampleSettings(snr=snr)
    unweighted, weighted = scan(fibres, np.ones(shape, dtype=bool), settings, numpy_rng(Key(5)), nb_unweighted=30)
    inside = np.zeros(shape, dtype=bool)
    inside[1:3, 2:6] = True  # away from edges, which ring
    return unweighted, weighted, inside.reshape(-1)


# trxscan gathers directions in bins of a hemisphere, some degrees wide: the axes of the grid have their own.
@pytest.mark.parametrize(
    ("axis", "within_deg"), [((1.0, 0.0, 0.0), 0.1), ((0.0, 0.0, 1.0), 0.1), ((0.6, 0.0, 0.8), 5.0)]
)
def test_a_scanned_fibre_attenuates_most_along_itself(axis: tuple[float, float, float], within_deg: float) -> None:
    _, weighted, inside = scanned(float("inf"), axis)
    gradients = half_sphere_directions(60)
    squares = np.stack([gradients[:, i] * gradients[:, j] for i in range(3) for j in range(3)], axis=1)
    tensor = np.linalg.lstsq(squares, -np.log(weighted[inside].mean(axis=0)), rcond=None)[0].reshape(3, 3)
    principal = np.linalg.eigh(tensor)[1][:, -1]
    assert np.degrees(np.arccos(min(1.0, abs(principal @ axis)))) < within_deg


def test_a_scan_has_the_snr_asked_and_the_same_bytes() -> None:
    unweighted, _, inside = scanned(20.0)
    sigma = unweighted[inside].std(axis=1, ddof=1)
    measured = unweighted[inside].mean() / np.sqrt((sigma**2).mean())
    assert abs(measured / 20 - 1) < 5 / np.sqrt(2 * 29 * inside.sum())  # five standard errors
    again, _, _ = scanned(20.0)
    np.testing.assert_array_equal(again, unweighted)


def test_a_scan_and_what_crosses_are_those_of_earlier_versions(bundles: dict[str, list[np.ndarray]]) -> None:
    """Data that were made with these options and the same versions stay the same."""
    rng, voxels = np.random.default_rng(0), np.array([3, 20, 21, 46, 50])
    axes = rng.normal(size=(5, 2, 3))
    fractions = np.array([[0.9, 0.0], [0.3, 0.4], [0.0, 0.5], [0.25, 0.5], [0.6, 0.1]])
    fibres = Fibres(voxels, axes / np.linalg.norm(axes, axis=-1, keepdims=True), fractions)
    tissue = rng.random((6, 5, 2)) > 0.3
    tissue.reshape(-1)[voxels] = True
    images = scan(fibres, tissue, ExampleSettings(nb_directions=7), numpy_rng(Key(5)))
    found = [float((image * np.arange(1, image.size + 1).reshape(image.shape)).sum()) for image in images]
    if trxscan.__version__ == "0.3.0":
        np.testing.assert_allclose(found, SCANNED, rtol=1e-6)
    settings = ExampleSettings(crossings=2, distractors=3)
    made = unlabelled_bundles(bundles, settings, subject=3, key=Key(4))
    sums = [sum(float(np.abs(line).sum()) for line in lines) for lines in made.values()]
    np.testing.assert_allclose(sums, CROSSED, rtol=1e-9)


def test_a_simulator_that_is_not_installed_is_named(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trxscan", None)
    cli("example-data", tmp_path / "x.hdf5", "--simulator", "trxscan").check_refusal("pip install trxscan")
    assert list(tmp_path.iterdir()) == []
