"""Models of dwi_ml: imported, they give the losses that it reported; exported, they are what they were.

The models in `data/parity` were made by dwi_ml's own classes at commit a1ee02d, on torch 2.13: its `Learn2TrackModel`
with the options in each `parameters.json`, 40 steps of `torch.optim.Adam` (learning rate 0.005, 16
streamlines of subject subj0 a step, batches from its `DWIMLBatchLoaderOneInput`), then its `save_params_and_state`. The
recorded losses are its `compute_loss(average_results=True)` of all streamlines of subj2, the validation subject of
`phantom.hdf5`, in one batch of that loader, in evaluation mode.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.dwi_ml.autoencoder import autoencoder_config, autoencoder_parameters
from dwiml_func.dwi_ml.models import _kind, shift_warning, write_dwi_ml_model
from dwiml_func.dwi_ml.parameters import check_whole_grid, config_of, parameters_of
from dwiml_func.dwi_ml.transformers import DEFAULT_MAX_LEN, MODEL_TYPES, joined_state, split_state
from dwiml_func.dwi_ml.upgrade import _neighborhood, upgraded_parameters
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.model_store import LoadedModel
from dwiml_func.experiment.training_facts import TRAINED_ON
from dwiml_func.models.config import ModelConfig, build_model

DATA = Path(__file__).parent / "data"
PARITY = DATA / "parity"
MODELS = [DATA / name for name in ("cos", "sphere_eos", "gauss_eos")] + sorted(
    folder for parent in (PARITY, DATA / "transformers") for folder in parent.iterdir() if folder.is_dir()
)
by_name = pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_state.pkl", weights_only=True)


def evaluated(cli, model: Path) -> dict[str, Any]:
    outcome = cli("evaluate", model, DATA / "phantom.hdf5", "--subset", "validation", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


@by_name
def test_the_loss_is_the_one_that_dwi_ml_reported(cli, folder, tmp_path):
    outcome = cli("import-dwi-ml", folder, tmp_path / "model")
    parameters = json.loads((folder / "parameters.json").read_text())
    kind = parameters["dg_key"] + " with EOS" * parameters["dg_args"]["add_eos"]
    num_parameters = sum(tensor.numel() for name, tensor in read_state(folder).items() if "position_enc" not in name)
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'model'}: {kind}, {num_parameters} parameters\n")
    result = evaluated(cli, tmp_path / "model")
    expected = json.loads((folder.parent / "expected_losses.json").read_text())[folder.name]
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    num_points = 1997 if parameters["step_size"] in (0.5, None) else 1006  # the file has steps of 0.5 mm
    last_points = 0 if parameters["dg_args"]["add_eos"] else 48
    assert (result["num_streamlines"], result["num_points"]) == (48, num_points - last_points)


@by_name
def test_export_gives_back_what_was_imported(cli, folder, tmp_path):
    assert cli("import-dwi-ml", folder, tmp_path / "model").code == 0
    assert cli("export-dwi-ml", tmp_path / "model", tmp_path / "exported").code == 0
    for file in ("parameters.json", "model_type.txt"):
        assert (tmp_path / "exported" / file).read_text() == (folder / file).read_text()
    before, after = read_state(folder), read_state(tmp_path / "exported")
    assert list(before) == list(after)  # in dwi_ml's order too
    assert all(torch.equal(before[key], after[key]) for key in before)


OTHERS: dict[str, Any] = {
    "dropout": 0.25,
    "use_layer_normalization": True,
    "use_skip_connection": False,
    "rnn_key": "gru",
    "max_len": 77,
    "n_layers_e": 3,
    "n_layers_d": 4,
    "dropout_rate": 0.3,
    "activation": "gelu",
    "norm_first": True,
    "nheads": 1,
    "ffnn_hidden_size": 12,
    "step_size": None,
    "nb_features": 5,
    "experiment_name": "another",
}


@by_name
def test_a_config_gives_back_the_parameters_that_it_was_made_of(folder):
    """As for a model that was trained here, which has no parameters of dwi_ml's."""
    parameters, kind = json.loads((folder / "parameters.json").read_text()), _kind(folder)
    sampled = {"step_size": None, "nb_points": 40}  # instead of a step
    changes = [{}, sampled, *({name: value} for name, value in OTHERS.items() if name in parameters)]
    if parameters["dg_key"] in ("l2-regression", "gaussian"):
        changes.append({"step_size": None, "compress_lines": 0.02})
    if parameters.get("nb_previous_dirs") == 0:
        changes.append({"nb_previous_dirs": 2, "prev_dirs_embedding_key": "no_embedding", "prev_dirs_embedded_size": 6})
    for change in changes:
        expected = parameters | change
        config, nb_features = config_of(expected, model=kind, source="parameters.json")
        name = expected["experiment_name"]
        written = json.dumps(parameters_of(config, nb_features=nb_features, experiment_name=name))
        assert list(json.loads(written).items()) == list(expected.items())


def copied(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A model of dwi_ml with other parameters."""
    shutil.copytree(DATA / name, folder)
    parameters = json.loads((folder / "parameters.json").read_text())
    change(parameters)
    (folder / "parameters.json").write_text(json.dumps(parameters))
    return folder


@pytest.mark.parametrize(
    "absent",
    [
        ["nb_points"],
        ["neighborhood_type", "neighborhood_radius", "neighborhood_resolution"],
        ["nb_points", "neighborhood_type", "neighborhood_radius", "neighborhood_resolution"],
    ],
)
def test_keys_that_dwi_ml_can_do_without_may_be_absent_and_stay_so(cli, absent, tmp_path):
    folder = copied(tmp_path / "cos", "cos", lambda parameters: [parameters.pop(name) for name in absent])
    assert cli("import-dwi-ml", folder, tmp_path / "model").code == 0
    assert evaluated(cli, tmp_path / "model")["loss"] == pytest.approx(0.9573483467102051, rel=1e-5)
    assert cli("export-dwi-ml", tmp_path / "model", tmp_path / "exported").code == 0
    written = json.loads((tmp_path / "exported" / "parameters.json").read_text())
    assert written == json.loads((folder / "parameters.json").read_text())


def make_old(parameters: dict[str, Any]) -> None:
    """What older versions wrote, by the script with which dwi_ml brings them up to date."""
    parameters["input_embedding_size"] = parameters.pop("input_embedded_size")
    parameters["prev_dirs_embedding_size"] = parameters.pop("prev_dirs_embedded_size")
    parameters["input_embedding_size_ratio"] = None
    parameters["start_from_copy_prev"] = False
    parameters["neighborhood_radius"] = [0.5, 1.0]
    parameters["dg_args"] |= {"compress_loss": False, "compress_eps": 0.001, "weight_loss_with_angle": False}
    for name in ("neighborhood_resolution", "nb_cnn_filters", "kernel_size", "nb_points"):
        del parameters[name]


def test_a_model_of_an_older_dwi_ml_is_imported_and_exported_for_the_present_one(cli, tmp_path):
    name = "smooth_eos_axes_nn"
    folder = copied(tmp_path / "old", f"parity/{name}", make_old)
    state = {key.replace("embedding_layer.", "embedding."): value for key, value in read_state(folder).items()}
    assert any(key.startswith("input_embedding.") for key in state)
    torch.save(state, folder / "model_state.pkl")
    assert cli("import-dwi-ml", folder, tmp_path / "model").code == 0
    expected = json.loads((PARITY / "expected_losses.json").read_text())[name]
    assert evaluated(cli, tmp_path / "model")["loss"] == pytest.approx(expected, rel=1e-5)
    assert cli("export-dwi-ml", tmp_path / "model", tmp_path / "exported").code == 0
    present = json.loads((PARITY / name / "parameters.json").read_text())
    del present["nb_points"]
    assert json.loads((tmp_path / "exported" / "parameters.json").read_text()) == present
    assert list(read_state(tmp_path / "exported")) == list(read_state(PARITY / name))


def test_parameters_of_the_present_dwi_ml_are_left_as_they_are():
    for folder in MODELS:
        parameters = json.loads((folder / "parameters.json").read_text())
        assert list(upgraded_parameters(parameters).items()) == list(parameters.items())
    assert upgraded_parameters([1]) == [1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p.update(start_from_copy_prev=True), ["unknown: start_from_copy_prev"]),
        (lambda p: p.update(input_embedding_size_ratio=0.5), ["unknown: input_embedding_size_ratio"]),
        (lambda p: p["dg_args"].update(compress_loss=True), ["unknown: dg_args.compress_loss"]),
        (lambda p: p.update(colour="red", shape=3), ["unknown: colour, shape"]),
        (
            lambda p: [p.pop("rnn_key"), p.pop("dropout"), p.update(colour=1), p["dg_args"].update(flavour=2)],
            ["missing: rnn_key, dropout; unknown: colour, dg_args.flavour"],
        ),
        (lambda p: p["dg_args"].update(nb_gaussians=3), ["nb_gaussians", "cosine-regression has no such option"]),
        (lambda p: p.update(dg_args={"add_eos": False}, dg_key="cosine"), ["dg_key", "'cosine'"]),
        (lambda p: p.update(neighborhood_radius=[0.5, 0.8], neighborhood_type="axes"), ["neighborhood_radius"]),
        (lambda p: p.update(neighborhood_type="axes"), ["neighborhood_radius", "all three or none"]),
        (lambda p: p.update(rnn_layer_sizes=[16, 0]), ["rnn_layer_sizes", "received 0"]),
        (lambda p: p.update(rnn_layer_sizes="16"), ["rnn_layer_sizes", "'16'"]),
        (lambda p: p.update(nb_features=None), ["nb_features", "None"]),
        (lambda p: p.update(nb_features=10**30), ["nb_features", "below 2147483648", "received 1000000"]),
        (
            lambda p: p.update(dg_key="sphere-classification", dg_args={"sphere": "a" * 99}),
            ["dg_sphere: expected one of", "'aaa"],
        ),
        (lambda p: p.update(dg_args=[1]), ["dg_args: expected names and values, received [1]"]),
        (lambda p: p.update(nb_points=20), ["step_size", "nb_points"]),
        (lambda p: p.update(prev_dirs_embedded_size=4), ["prev_dirs_embedded_size: expected 3", "received 4"]),
        (
            lambda p: p.update(step_size=None, compress_lines=0.01),
            ["compress", "cosine-regression cannot learn from compressed streamlines"],
        ),
    ],
)
def test_parameters_that_make_no_model_are_refused_by_name_and_value(cli, change, named, tmp_path):
    folder = copied(tmp_path / "cos", "cos", change)
    outcome = cli("import-dwi-ml", folder, tmp_path / "model")
    outcome.check_refusal(str(folder / "parameters.json"), *named)
    assert not (tmp_path / "model").exists()


def test_the_eos_weight_of_a_classification_is_refused(cli, tmp_path):
    folder = copied(tmp_path / "a", "sphere_eos", lambda p: p["dg_args"].update(eos_weight=0.5))
    cli("import-dwi-ml", folder, tmp_path / "model").check_refusal("eos_weight", "sphere-classification", "0.5")


@pytest.mark.parametrize(
    ("changed", "value", "named"),
    [
        ("surplus", torch.zeros(1), "unexpected surplus"),
        ("rnn_model.rnn_0.weight_ih_l0", torch.zeros(64, 7), "of shape (64, 7), expected (64, 9)"),
        (
            "direction_getter.layers.1.bias",
            torch.zeros(3, dtype=torch.int64),
            "of type torch.int64, expected torch.float",
        ),
        (
            "direction_getter.layers.0.bias",
            1e300 * torch.ones(6, dtype=torch.float64),
            "of type torch.float64, expected",
        ),
        ("direction_getter.layers.1.bias", torch.tensor([0, torch.nan, 0]), "with values that are not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(cli, changed, value, named, tmp_path):
    folder = copied(tmp_path / "cos", "cos", lambda _: None)
    torch.save(read_state(folder) | {changed: value}, folder / "model_state.pkl")
    cli("import-dwi-ml", folder, tmp_path / "model").check_refusal(str(folder / "model_state.pkl"), changed, named)
    assert not (tmp_path / "model").exists()


def test_of_many_tensors_that_do_not_fit_three_are_named(cli, tmp_path):
    folder = copied(tmp_path / "cos", "cos", lambda _: None)
    state = {f"a{name}": tensor for name, tensor in read_state(folder).items()}
    torch.save(state, folder / "model_state.pkl")
    cli("import-dwi-ml", folder, tmp_path / "model").check_refusal(
        *("no rnn_model.rnn_0.weight_ih_l0; no rnn_model.rnn_0.weight_hh_l0; no ", f"and {2 * len(state) - 3} more.")
    )


def grow(parameters: dict[str, Any], radius: int) -> None:
    parameters |= {"neighborhood_type": "grid", "neighborhood_radius": radius, "neighborhood_resolution": 1.0}
    parameters |= {"input_embedding_key": "cnn_embedding", "kernel_size": [3], "nb_cnn_filters": [4]}


@pytest.mark.parametrize("radius", [10**9, 10**30])
def test_a_model_that_no_memory_could_hold_is_refused_without_taking_any(cli, radius, tmp_path):
    folder = copied(tmp_path / "cos", "cos", lambda parameters: grow(parameters, radius))
    outcome = cli("import-dwi-ml", folder, tmp_path / "model")
    outcome.check_refusal(str(folder / "model_state.pkl"), "does not fit the model: No machine can hold a model")


def test_a_flipped_bit_in_a_weight_is_told_which_torch_does_not_see(cli, tmp_path):
    folder = copied(tmp_path / "cos", "cos", lambda _: None)
    weight = read_state(folder)["rnn_model.rnn_1.weight_hh_l0"].numpy().tobytes()
    content = (folder / "model_state.pkl").read_bytes()
    at = content.index(weight)
    (folder / "model_state.pkl").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    read_state(folder)
    cli("import-dwi-ml", folder, tmp_path / "model").check_refusal("model_state.pkl is corrupt", "checksum")


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "change", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, lambda tensor: tensor.to("meta")]
)
def test_tensors_without_a_number_for_each_element_are_refused(cli, change, tmp_path):
    folder = copied(tmp_path / "cos", "cos", lambda _: None)
    state = read_state(folder)
    state["rnn_model.rnn_0.weight_ih_l0"] = change(state["rnn_model.rnn_0.weight_ih_l0"])
    torch.save(state, folder / "model_state.pkl")
    cli("import-dwi-ml", folder, tmp_path / "model").check_refusal("has no named tensors")


def spoil_state(folder: Path) -> None:
    (folder / "model_state.pkl").write_bytes(b"no zip file")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: shutil.rmtree(folder), ["is not a folder", "best_model"]),
        (lambda folder: (folder / "parameters.json").unlink(), ["has no parameters.json."]),
        (lambda folder: [path.unlink() for path in folder.iterdir()], ["no parameters.json and no model_state.pkl"]),
        (lambda folder: (folder / "parameters.json").write_text("{"), ["parameters.json is not JSON"]),
        (lambda folder: (folder / "parameters.json").write_text("[1, 2]"), ["expected names and values", "[1, 2]"]),
        (
            lambda folder: (folder / "model_type.txt").write_text("ModelOfAnother"),
            ["expected a model of type Learn2TrackModel, OriginalTransformerModel", "'ModelOfAnother'"],
        ),
        (spoil_state, ["model_state.pkl cannot be read as named tensors"]),
        (lambda folder: torch.save([1], folder / "model_state.pkl"), ["has no named tensors"]),
        (lambda folder: torch.save({"a": 1}, folder / "model_state.pkl"), ["has no named tensors"]),
    ],
)
def test_what_is_no_model_of_dwi_ml_is_refused(cli, spoil, named, tmp_path):
    shutil.copytree(DATA / "cos", tmp_path / "cos")
    spoil(tmp_path / "cos")
    cli("import-dwi-ml", tmp_path / "cos", tmp_path / "model").check_refusal(str(tmp_path / "cos"), *named)
    assert not (tmp_path / "model").exists()


def test_the_folder_of_the_experiment_is_told_from_that_of_its_best_model(cli, tmp_path):
    shutil.copytree(DATA / "cos", tmp_path / "experiment" / "best_model")
    outcome = cli("import-dwi-ml", tmp_path / "experiment", tmp_path / "model")
    outcome.check_refusal("no parameters.json and no model_state.pkl. ", "Did you mean its folder best_model?")
    (tmp_path / "experiment" / "best_model").rename(tmp_path / "experiment" / "other")
    assert "Did you mean" not in cli("import-dwi-ml", tmp_path / "experiment", tmp_path / "model").err
    (tmp_path / "experiment" / "other" / "parameters.json").unlink()
    outcome = cli("import-dwi-ml", tmp_path / "experiment" / "other", tmp_path / "model")
    outcome.check_refusal("has no parameters.json. Expected")


def test_the_kind_of_a_model_is_the_text_of_its_file_or_that_of_old_versions(tmp_path):
    assert _kind(tmp_path) == "learn2track"
    for kind, name in MODEL_TYPES.items():
        (tmp_path / "model_type.txt").write_text(f"{name}\n")
        assert _kind(tmp_path) == kind
    (tmp_path / "model_type.txt").write_bytes(b"\xff" + b"x" * 99)
    with pytest.raises(ValueError, match=r"expected a model of type Learn2TrackModel, .*, received '\ufffdx{59}'\.$"):
        _kind(tmp_path)


def test_the_parameters_of_an_autoencoder_are_those_of_its_one_size():
    given = {"experiment_name": "a", "step_size": 0.5, "compress_lines": None}
    for nb_points in ({}, {"nb_points": None}, {"nb_points": 256}):
        config = autoencoder_config(given | nb_points, source="a.json")
        assert (config.batches.nb_points, config.batches.step_size) == (256, None)
        assert (config.model.raw_coordinates, config.model.reconstruction_loss) == (True, "sum")
        assert autoencoder_parameters(config, experiment_name="b") == {
            "experiment_name": "b",
            **dict.fromkeys(("step_size", "compress_lines", "nb_points")),
        }
    with pytest.raises(ValueError, match=r"^a.json: nb_points: expected 256 or null, received 128\.$"):
        autoencoder_config(given | {"nb_points": 128}, source="a.json")
    for wrong in ([], {"experiment_name": "a"}, given | {"nb_features": 3}):
        with pytest.raises(
            ValueError, match=r"^a.json: expected the parameters of dwi_ml's ModelAE: experiment_name, "
        ):
            autoencoder_config(wrong, source="a.json")


def test_code_in_a_model_state_is_not_run(cli, tmp_path):
    shutil.copytree(DATA / "cos", tmp_path / "cos")

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"a": Harmful()}, tmp_path / "cos" / "model_state.pkl")
    outcome = cli("import-dwi-ml", tmp_path / "cos", tmp_path / "model")
    outcome.check_refusal("cannot be read as named tensors")
    assert 150 < len(outcome.err.partition("named tensors: ")[2].strip()) <= 200
    assert not (tmp_path / "harm").exists()


def test_an_exported_model_has_the_step_of_the_dataset_that_it_was_trained_on(cli, stopped_early, tmp_path):
    assert cli("export-dwi-ml", stopped_early / "run", tmp_path / "exported").code == 0
    (path,) = (tmp_path / "exported").rglob("parameters.json")
    parameters = json.loads(path.read_text())
    assert (parameters["step_size"], parameters["experiment_name"]) == (0.5, "run")


def test_a_model_for_dwi_ml_has_what_its_tracker_needs_as_in_the_guide(cli, tmp_path, monkeypatch):
    (block,) = re.findall(
        r"```sh\n(dwiml-func train.*?)```", (DATA.parents[1] / "docs" / "dwi_ml.md").read_text(), flags=re.DOTALL
    )
    commands = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("dwiml-func")]
    shutil.copy(DATA / "phantom.hdf5", tmp_path / "data.hdf5")
    (tmp_path / "experiments").mkdir()
    monkeypatch.chdir(tmp_path)
    tiny = ["--max-epochs", "1", "--rnn-layer-sizes", "4", "--skip-window-lag", "--skip-figures"]
    trained, exported = cli(*commands[0], *tiny), cli(*commands[1])
    assert trained.code == exported.code == 0, trained.err + exported.err
    says = "For dwi_ml's tracker, with --interpolation trilinear-corner --step-rule dwi_ml"
    assert trained.out.index(says) < trained.out.index("epoch 1")
    assert not exported.err  # no warning of a shift
    parameters = json.loads((tmp_path / "exported" / "best_model" / "parameters.json").read_text())
    assert parameters["step_size"] == 1
    config = json.loads((tmp_path / "experiments" / "for_dwi_ml" / "config.json").read_text())
    assert (config["data"]["interpolation"], config["batches"]["step_rule"]) == ("trilinear-corner", "dwi_ml")
    refusals = {
        ("--interpolation", "trilinear"): "for_dwi_ml: expected interpolation trilinear-corner",
        ("--step-rule", "nearest"): "for_dwi_ml: expected step_rule dwi_ml",
        ("--dg-key", "gaussian-mixture"): "dwi_ml has gaussian-mixture, but cannot run it",
    }
    for options, text in refusals.items():
        cli("train", "experiments", "refused", "data.hdf5", "--for-dwi-ml", *options).check_refusal(text)
        assert not Path("experiments", "refused").exists()


def written(folder: Path, config: RunConfig, facts: dict[str, Any]) -> dict[str, Any]:
    neighborhood = config.data.neighborhood
    model: Any = build_model(config.model, nb_features=6, neighborhood=neighborhood)
    write_dwi_ml_model(folder, LoadedModel(module=model, config=config, facts=facts), experiment_name="a")
    return json.loads((folder / "parameters.json").read_text())


def test_what_is_written_of_a_model_depends_on_how_its_streamlines_were_sampled(tmp_path):
    model, trained_on = ModelConfig(rnn_layer_sizes=(4,), dg_key="gaussian"), {TRAINED_ON: {"step_size": 0.5}}
    cases: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        ({}, (0.5, None, None)),  # as in the file
        ({"step_size": 0.8}, (0.8, None, None)),
        ({"nb_points": 20}, (None, 20, None)),
        ({"compress": 0.01}, (None, None, 0.01)),
    ]
    assert (
        json.dumps(written(tmp_path / "a", RunConfig(hdf5_file="", model=replace(model, dropout=0)), {})["dropout"])
        == "0.0"
    )
    for number, (batches, expected) in enumerate(cases):
        config = RunConfig(hdf5_file="", model=model, batches=BatchConfig(**batches))
        found = written(tmp_path / str(number), config, trained_on)
        assert tuple(found[name] for name in ("step_size", "nb_points", "compress_lines")) == expected
    own = {"experiment_name": "theirs"}
    for name in ("dwi_ml_parameters", "reference_parameters"):  # the second is that of earlier versions
        assert written(tmp_path / name, RunConfig(hdf5_file="", model=model), {name: own}) == own
    with pytest.raises(OSError, match="not empty"):
        written(tmp_path / "0", RunConfig(hdf5_file="", model=model), {})
    assert json.loads((tmp_path / "0" / "parameters.json").read_text())["step_size"] == 0.5


@pytest.mark.parametrize(("max_len", "num"), [(None, 1000), (77, 77)])
def test_a_transformer_is_written_with_the_parts_of_its_projections_and_a_table_of_positions(tmp_path, max_len, num):
    options: dict[str, Any] = {"model": "tto", "input_embedded_size": 8, "nheads": 2, "n_layers_e": 1}
    config = RunConfig(hdf5_file="", model=ModelConfig(max_len=max_len, dropout_rate=0, **options))
    found = written(tmp_path / "a", config, {})
    assert (found["max_len"], found["n_layers_d"], json.dumps(found["dropout_rate"])) == (num, 1, "0.0")
    state = read_state(tmp_path / "a")
    assert state["position_encoding_layer.pos_emb"].shape == (1, num, 8)
    parts = [name for name in state if name.endswith(("q_proj_weight", "k_proj_weight", "v_proj_weight"))]
    assert len(parts) == 9
    for name in parts:  # no third of a tensor that is written whole
        assert state[name].untyped_storage().nbytes() == 4 * state[name].numel()
    joined = joined_state(state, source="a")
    assert {name for name in joined if name.endswith("in_proj_weight")} == {
        f"{name.rpartition('.')[0]}.in_proj_weight" for name in parts
    }
    table = state["position_encoding_layer.pos_emb"]
    table[0, 0, 1] += 5e-6
    assert joined_state(state, source="a").keys() == joined.keys()
    table[0, 0, 1] += 1e-5  # more than rounding, also beside a 1
    with pytest.raises(ValueError, match="expected the sinusoidal encoding"):
        joined_state(state, source="a")


@pytest.mark.parametrize(
    ("interpolation", "warns"), [("trilinear-corner", False), ("trilinear", True), ("nearest", True)]
)
def test_who_exports_is_warned_of_inputs_that_dwi_ml_shifts(interpolation, warns):
    config = RunConfig(hdf5_file="", data=DataConfig(interpolation=interpolation))
    assert (shift_warning(config) is not None) == warns
    autoencoder = RunConfig(hdf5_file="", model=ModelConfig(model="autoencoder"))
    assert shift_warning(autoencoder) is None


@pytest.mark.parametrize(
    ("name", "key", "arguments", "expected"),
    [
        ("cos", "cosine-regression", {"normalize_outputs": False}, {"normalize_outputs": None}),
        ("cos", "cosine-regression", {"normalize_outputs": 2}, {"normalize_outputs": 2.0}),
        ("gauss_eos", "gaussian", {"entropy_weight": 0.0}, {"add_entropy_to_gauss": None}),
        ("gauss_eos", "gaussian", {"entropy_weight": 0.5}, {"add_entropy_to_gauss": 0.5}),
        ("cos", "cosine-regression", {"eos_weight": 0.5}, {"eos_weight": None, "add_eos": False}),
        ("cos", "cosine-regression", {"eos_weight": 0.5, "add_eos": True}, {"eos_weight": 0.5, "add_eos": True}),
        ("cos", "cosine-regression", {"dropout": None, "eos_weight": None}, {"dg_dropout": 0.0, "eos_weight": None}),
        ("cos", "cosine-regression", None, {"dg_dropout": 0.0, "add_eos": False}),
    ],
)
def test_arguments_of_a_getter_that_are_0_or_false_or_without_effect_are_left_out(name, key, arguments, expected):
    parameters = json.loads((DATA / name / "parameters.json").read_text()) | {"dg_key": key, "dg_args": arguments}
    model = config_of(parameters, source="a.json")[0].model
    assert {name: getattr(model, name) for name in expected} == expected


def test_sampling_of_0_or_false_is_none_and_previous_directions_may_have_no_key():
    parameters = json.loads((DATA / "cos" / "parameters.json").read_text())
    parameters |= {"step_size": 0, "compress_lines": False, "nb_points": 0, "dg_key": "gaussian", "dg_args": None}
    parameters |= {"nb_previous_dirs": 2, "prev_dirs_embedding_key": None, "prev_dirs_embedded_size": None}
    config, nb_features = config_of(parameters, source="a.json")
    sampled = config.batches.step_size, config.batches.compress, config.batches.nb_points
    assert (*sampled, nb_features) == (None, None, None, parameters["nb_features"])
    assert (config.model.prev_dirs_embedding_key, config.model.prev_dirs_embedded_size) == ("no_embedding", None)
    none = config_of(parameters | {"nb_previous_dirs": 0, "prev_dirs_embedded_size": 7}, source="a.json")[0].model
    assert (none.nb_previous_dirs, none.prev_dirs_embedded_size, none.normalize_prev_dirs) == (0, None, False)
    for number, message in ((0, "at least 1 and .*, received 0"), (2.5, "expected a whole number, received 2.5")):
        with pytest.raises(ValueError, match=rf"^a.json: nb_features: .*{message}"):
            config_of(parameters | {"nb_features": number}, source="a.json")


@pytest.mark.parametrize("resolution", [0.1, 0.3, 0.5, 0.7, 1.0, 1.1, 1.3])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_grids_that_dwi_mls_rounding_leaves_empty_are_refused(resolution, radius):
    model = ModelConfig(input_embedding_key="cnn_embedding", nb_cnn_filters=(2,), kernel_size=(2,))
    data = DataConfig(neighborhood_type="grid", neighborhood_radius=radius, neighborhood_resolution=resolution)
    steps = range(-radius, radius + 1)
    fits = [int(np.float32(step * resolution) / np.float32(resolution)) for step in steps] == list(steps)
    with (
        nullcontext() if fits else pytest.raises(ValueError, match="dwi_ml's rounding leaves points of the grid empty")
    ):
        check_whole_grid(RunConfig(hdf5_file="", model=model, data=data), source="a")
    check_whole_grid(RunConfig(hdf5_file="", data=data), source="a")  # without convolutions any grid will do


@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        ([1.5], (1, 1.5)),
        ([0.5, 1.0, 1.5], (3, 0.5)),
        *((other, None) for other in ([], [1.0, 2.5], [1.0, "2"], ["1"], 3, None, "12")),
    ],
)
def test_former_lists_of_distances_are_a_radius_and_a_resolution_where_they_are_even(radius: Any, expected: Any):
    names = ("neighborhood_radius", "neighborhood_resolution")
    assert _neighborhood(radius) == ({} if expected is None else dict(zip(names, expected, strict=True)))


def test_without_a_longest_line_the_table_of_positions_has_that_of_dwi_ml():
    given = {"modified_torch_transformer.encoder.layers.0.self_attn.in_proj_weight": torch.ones(12, 4)}
    found = {tuple(tensor.shape) for name, tensor in split_state(given, max_len=None).items() if "position" in name}
    assert found == {(1, DEFAULT_MAX_LEN, 4)}
