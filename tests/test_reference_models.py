"""Models of dwi_ml: imported, they give the losses that it reported; exported, they are what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"
MODELS = ("cos", "sphere_eos", "gauss_eos")


@pytest.fixture
def imported(cli, request, tmp_path) -> Path:
    assert cli("import-reference", DATA / request.param, tmp_path / "model").code == 0
    return tmp_path / "model"


@pytest.mark.parametrize(("imported", "name"), [(name, name) for name in MODELS], indirect=["imported"])
def test_the_loss_is_the_one_that_dwi_ml_reported(cli, imported, name):
    outcome = cli("evaluate", imported, DATA / "phantom.hdf5", "--subset", "validation", "--json")
    result = json.loads(outcome.out)
    expected = json.loads((DATA / "expected_losses.json").read_text())[name]
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    assert (result["num_streamlines"], result["num_points"]) == (48, 1949 if name == "cos" else 1997)


@pytest.mark.parametrize(("imported", "name"), [(name, name) for name in MODELS], indirect=["imported"])
def test_export_gives_back_what_was_imported(cli, imported, name, tmp_path):
    assert cli("export-reference", imported, tmp_path / "exported").code == 0
    for file in ("parameters.json", "model_type.txt"):
        before, after = (DATA / name / file).read_text(), (tmp_path / "exported" / file).read_text()
        assert (json.loads(before) == json.loads(after)) if file.endswith("json") else (before.strip() == after.strip())
    before, after = (
        torch.load(folder / "model_state.pkl", weights_only=True) for folder in (DATA / name, tmp_path / "exported")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_is_no_model_of_dwi_ml_is_refused(cli, tmp_path):
    cli("import-reference", tmp_path / "nothing", tmp_path / "out").check_refusal(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    cli("import-reference", tmp_path / "empty", tmp_path / "out").check_refusal("parameters.json")
    assert not (tmp_path / "out").exists()
