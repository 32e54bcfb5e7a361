"""The tracking phase of validations: where a model's lines end, beside a loop over single lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from test_window_lag_runs import OPTIONS, lines_of, make_data

from dwiml_func.data import open_dataset
from dwiml_func.data.interpolation import interpolate
from dwiml_func.experiment.model_store import load_model

PHASE = ["--add-a-tracking-validation-phase", "--tracking-mask", "mask", "--tracking-phase-nb-segments-init", "3"]
DISTANCE, FALSE, MISSING = (
    f"valid_tracking_{name}" for name in ("mean_final_distance", "connectivity_score", "missing_connections")
)
BLOCS = (4, 2, 2)


def add_mask_and_connectivity(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for number, subject in enumerate(("ann", "bob", "cid")):
            parent: Any = file[subject]
            mask = parent.create_group("mask")
            mask.attrs.update(dict(parent["input"].attrs), nb_features=1)
            values = np.ones((45, 12, 12, 1), np.float32)
            values[:, :, : 2 + number] = 0
            mask["data"] = values
            lines = parent["streamlines"]
            matrix = np.triu(np.random.default_rng(number).random((16, 16)) < 0.5)
            lines["connectivity_matrix"] = matrix
            lines.attrs["connectivity_matrix_type"] = "from_blocs"
            lines.attrs["connectivity_nb_blocs"] = BLOCS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("phase")
    add_mask_and_connectivity(make_data(folder / "data.hdf5"))
    arguments = ["train", str(folder), "run", str(folder / "data.hdf5"), *OPTIONS, "--max-epochs", "3"]
    assert main([*arguments, *PHASE, "--tracking-phase-frequency", "2"]) == 0
    return folder


def followed(model: Any, line: torch.Tensor, volume: torch.Tensor, mask: np.ndarray, longest: float) -> np.ndarray:
    """Read four points, and continue with steps of a voxel (2 mm) while the mask and the longest way allow it."""
    state, outputs = None, torch.zeros(1, 3)
    points = list(line[:4])
    for before, point in zip([points[0], *points[:-1]], points, strict=True):
        outputs, state = model.run_step(interpolate(volume, point[None]), (point - before)[None], state)
    while len(points) < int(longest / 2):
        direction = model.direction_getter.directions(outputs)[0]
        step = direction / direction.norm()
        new = points[-1] + step
        inside = all(0 <= x < size for x, size in zip(new.tolist(), mask.shape, strict=True))
        if not inside or mask[tuple(int(x) for x in new)] < 0.5:
            break
        points.append(new)
        outputs, state = model.run_step(interpolate(volume, new[None]), step[None], state)
    return points[-1].numpy()


def bloc(point: np.ndarray) -> int:
    x, y, z = (min(int(p * n / size), n - 1) for p, n, size in zip(point, BLOCS, (45, 12, 12), strict=True))
    return 4 * x + 2 * y + z


@pytest.mark.parametrize("longest", [200.0, 17.0])
def test_distances_and_connections_are_those_of_a_loop_over_lines(
    cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: float
) -> None:
    monkeypatch.setattr("dwiml_func.experiment.tracking.phase._LONGEST_MM", longest)
    options = [*OPTIONS, "--max-epochs", "1", *PHASE]
    assert cli("train", tmp_path, "run", folder / "data.hdf5", *options).code == 0
    (logged,) = lines_of(tmp_path / "run")
    model: Any = load_model(tmp_path / "run" / "best_model").module.eval()
    dataset = open_dataset(folder / "data.hdf5", "validation")
    distances, false, missing = [], [], []
    num_lines = dataset.index.num_streamlines.tolist()
    with h5py.File(folder / "data.hdf5") as file, torch.no_grad():
        for row, subject in enumerate(dataset.index.subjects):
            parent: Any = file[subject]
            matrix, found = parent["streamlines/connectivity_matrix"][()], np.zeros((16, 16), int)
            for number in np.flatnonzero(dataset.index.subject_of(np.arange(dataset.index.num_total)) == row):
                line = dataset.streamlines.select([number]).points
                last = followed(model, line, dataset.volumes[row], parent["mask/data"][..., 0], longest)
                distances.append(2 * np.linalg.norm(last - line[-1].numpy()))
                pair = sorted([bloc(line[0].numpy()), bloc(last)])
                found[pair[0], pair[1]] += 1
            false.append(found[~matrix].sum() / found.sum())
            missing.append((matrix & (found == 0)).sum() / matrix.sum())
    assert logged[DISTANCE] == pytest.approx(np.mean(distances), rel=1e-3)
    assert logged[FALSE] == pytest.approx(np.average(false, weights=num_lines))
    assert logged[MISSING] == pytest.approx(np.average(missing, weights=num_lines))
    assert 0 < np.mean(false) + np.mean(missing) < 2
    assert len({*num_lines}) > 1


def test_the_phase_comes_at_its_frequency_under_dwi_mls_file_names_and_changes_no_state(cli, folder: Path) -> None:
    assert [DISTANCE in line for line in lines_of(folder / "run")] == [False, True, False]
    array = np.load(folder / "run" / "logs" / "tracking_mean_final_distance_monitor_per_epoch.npy")
    assert np.isfinite(array).tolist() == [False, True, False]
    assert (folder / "run" / "logs" / "tracking_connectivity_score_monitor_per_epoch.npy").exists()
    arguments = ["train", folder, "without", folder / "data.hdf5", *OPTIONS, "--max-epochs", "3"]
    assert cli(*arguments).code == 0
    assert cli("digest", folder / "run").out == cli("digest", folder / "without").out
    assert cli("verify", folder / "run", "--epoch", "2").code == 0


def test_a_phase_without_its_mask_is_refused(cli, folder: Path, tmp_path: Path) -> None:
    arguments = ["train", tmp_path, "new", folder / "data.hdf5", *OPTIONS]
    cli(*arguments, *PHASE[:1]).check_refusal("requires tracking_mask")
    cli(*arguments, *PHASE[:2], "no_such").check_refusal("no_such", "input (volume)")
    cli(*arguments, *PHASE, "--tracking-phase-frequency", 0).check_refusal("tracking_phase_frequency")
    monitor = ["--monitor", "tracking_mean_final_distance"]
    cli(*arguments, *monitor).check_refusal("requires add_a_tracking_validation_phase")
    cli(*arguments, *monitor, *PHASE, "--tracking-phase-frequency", 2).check_refusal("a tracking_phase_frequency of 1")
    assert list(tmp_path.iterdir()) == []


def test_a_phases_metric_can_choose_the_best_epoch(cli, folder: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--max-epochs", "3", *PHASE, "--monitor", "tracking_mean_final_distance"]
    assert cli("train", tmp_path, "run", folder / "data.hdf5", *options).code == 0
    logged = lines_of(tmp_path / "run")
    assert logged[-1]["best_epoch"] == 1 + int(np.argmin([line[DISTANCE] for line in logged]))
