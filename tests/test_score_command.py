"""`dwiml-func score`: the same scores as loops over streamlines in RAS mm, on a rotated grid of anisotropic voxels."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from creation_cases import AFFINE, save_lines
from nibabel.affines import apply_affine
from test_scores import by_loops, some_bundles, some_tracked

from dwiml_func.data.bundles import Bundles
from dwiml_func.data.hdf5.write import new_dataset, write_streamlines

SHAPE = (90, 90, 90)
MIDDLE = apply_affine(AFFINE, np.array(SHAPE) / 2) - [30, 45, 0]


def to_voxel(lines: list[np.ndarray]) -> list[np.ndarray]:
    return [apply_affine(np.linalg.inv(AFFINE), line) + 0.5 for line in lines]


def write_dataset(path: Path, real: list[np.ndarray], bundles: Bundles | None) -> None:
    with new_dataset(path, training=["anna"], groups_config={}, date="") as file:
        offsets = np.cumsum([0, *map(len, real)])
        points = np.concatenate(to_voxel(real))
        write_streamlines(
            file.create_group("anna"), "lines", points, offsets, affine=AFFINE, dimensions=SHAPE, bundles=bundles
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    real, bundles = some_bundles()
    write_dataset(folder / "data.hdf5", [line + MIDDLE for line in real], bundles)
    write_dataset(folder / "no_bundles.hdf5", [line + MIDDLE for line in real], None)
    tracked = [(line + MIDDLE).astype(np.float32) for line in some_tracked()]
    for suffix in ("trk", "tck", "trx"):
        save_lines(folder / f"tracked.{suffix}", tracked, affine=AFFINE, shape=SHAPE)
    return folder


def score(cli, folder: Path, tractogram: str | Path = "tracked.trk", data: str | Path = "data.hdf5", *options: object):
    arguments = ["--subject", "anna", "--streamline-group", "lines", *options]
    return cli("score", folder / tractogram, folder / data, *arguments)


@pytest.mark.parametrize("suffix", ["trk", "tck", "trx"])
def test_the_scores_are_those_of_loops_in_mm(cli, folder: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "new" / "scores.json"
    outcome = score(cli, folder, f"tracked.{suffix}", "data.hdf5", "--out", out, "--nb-seeds", 100)
    assert (outcome.code, outcome.err) == (0, "")
    real, bundles = some_bundles()
    thresholds, expected = by_loops(some_tracked(), real, bundles)
    found = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["subject"] == "anna"
    received = [(bundle["ends_mm"], bundle["mdf_mm"]) for bundle in found["thresholds"].values()]
    np.testing.assert_allclose(received, thresholds, atol=1e-3)
    kinds = [kind for _, kind in expected]
    for name in ("valid", "wrong path", "wrong connection", "no connection"):
        assert found["scores"]["all"][name.replace(" ", "_")] == pytest.approx(kinds.count(name) / len(kinds))
    assert list(found["scores"]["bundles"]) == list(bundles.names)
    for row, scores in enumerate(found["scores"]["bundles"].values()):
        of_bundle = [kind for bundle, kind in expected if bundle == row]
        assert scores["num_streamlines"] == len(of_bundle)
        assert scores["valid"] == pytest.approx(of_bundle.count("valid") / len(of_bundle))
    shares = {name: found["scores"]["all"][name] * len(kinds) / 100 for name in ("valid", "both_ends")}
    assert found["of_seeds"] == pytest.approx({"num_seeds": 100, **shares})
    assert shares["valid"] == pytest.approx(kinds.count("valid") / 100)
    assert 0.5 < found["ceiling"]["mean"]["valid"] <= 1


def test_the_table_shows_every_bundle_beside_the_ceiling_and_the_thresholds(cli, folder: Path) -> None:
    text = score(cli, folder).out
    assert max(map(len, text.splitlines())) <= 120
    for label in ("arc", "straight", "bend", "mean of bundles", "all streamlines", "ceiling"):
        assert sum(line.startswith(f"  {label} ") for line in text.splitlines()) >= 2
    assert "each left out once" in text


def test_without_bundles_the_scores_that_need_none_are_given(cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    outcome = score(cli, folder, "tracked.trk", "no_bundles.hdf5", "--out", out, "--nb-seeds", 500)
    assert (outcome.code, outcome.err) == (0, "")
    assert "does not say of which bundle" in outcome.out
    assert any(line.startswith("  ceiling ") for line in outcome.out.splitlines())
    found = json.loads(out.read_text())
    assert found["thresholds"] is None
    assert "valid" not in found["scores"]["all"]
    assert "bundles" not in found["scores"]
    assert "of_seeds" not in found
    assert 0.1 < found["scores"]["all"]["overlap"] < found["scores"]["all"]["overlap_2mm"] < 1


def test_what_does_not_fit_is_refused(cli, folder: Path, tmp_path: Path) -> None:
    cli("score", folder / "tracked.trk", folder / "data.hdf5", "--subject", "bob").check_refusal(
        "expected a subject among anna", "'bob'"
    )
    cli("score", folder / "tracked.trk", folder / "data.hdf5", "--subject", "anna").check_refusal("lines (streamlines)")
    score(cli, folder, "none.trk").check_refusal("The tractogram does not exist", "none.trk")
    score(cli, folder, "data.hdf5").check_refusal("expected a tractogram")
    score(cli, folder, "tracked.trk", "data.hdf5", "--nb-seeds", 3).check_refusal("nb_seeds", "received 3")
    save_lines(tmp_path / "small.trk", [some_tracked()[0] + MIDDLE], affine=AFFINE, shape=(9, 9, 9))
    out = tmp_path / "out" / "scores.json"
    score(cli, folder, tmp_path / "small.trk", "data.hdf5", "--out", out).check_refusal("a grid of 9 x 9 x 9 voxels")
    assert not out.parent.exists()


def test_lines_that_leave_the_volume_are_removed_only_when_asked(cli, folder: Path, tmp_path: Path) -> None:
    tracked = [(line + MIDDLE).astype(np.float32) for line in some_tracked()]
    save_lines(tmp_path / "out.trk", [*tracked, tracked[0] + 1000], affine=AFFINE, shape=SHAPE)
    score(cli, folder, tmp_path / "out.trk").check_refusal("1 of 70 streamlines", "--remove-invalid")
    outcome = score(cli, folder, tmp_path / "out.trk", "data.hdf5", "--remove-invalid")
    assert outcome.code == 0
    assert "69 streamlines beside 36 real ones of anna" in outcome.out


def test_a_dataset_whose_bundles_are_corrupt_is_refused(cli, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    path.write_bytes((folder / "data.hdf5").read_bytes())
    with h5py.File(path, "r+") as file:
        file["anna/lines/bundle_ids"][0] = 3  # type: ignore[index]
    score(cli, folder, "tracked.trk", path).check_refusal("1 of 36 streamlines are of a bundle")
