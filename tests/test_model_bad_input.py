"""Claims about models that cannot be: one clear line that names what is wrong, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from dwiml_func.checkpoint.manifest import manifest_checksum
from dwiml_func.data.config import BatchConfig
from dwiml_func.experiment.config import RunConfig
from dwiml_func.models.config import ModelConfig
from dwiml_func.models.direction_getters import DIRECTION_GETTERS

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
GETTER_OPTIONS = {  # on the command line, and the getters that they belong to
    "--add-entropy-to-gauss": {"gaussian"},
    "--dg-nb-gaussians": {"gaussian-mixture"},
    "--dg-nb-clusters": {"fisher-von-mises-mixture"},
    "--dg-sphere": {"sphere-classification", "smooth-sphere-classification"},
    "--normalize-targets": {
        *("cosine-regression", "l2-regression", "cosine-plus-l2-regression", "gaussian", "gaussian-mixture"),
    },
    "--normalize-outputs": {"cosine-regression", "l2-regression", "cosine-plus-l2-regression"},
}
COMPRESSIBLE = {"l2-regression", "gaussian", "gaussian-mixture"}
GRID = ["--neighborhood-type", "grid", "--neighborhood-radius", "1", "--neighborhood-resolution", "1"]
CNN = ["--input-embedding-key", "cnn_embedding", "--nb-cnn-filters", "4"]


@pytest.fixture
def refused(cli, tmp_path: Path) -> Callable[..., None]:
    """Check that `train` refuses options, and writes nothing."""
    (tmp_path / "experiments").mkdir()

    def check(options: list[str], *named: str, data: Path = PHANTOM) -> None:
        cli("train", tmp_path / "experiments", "new", data, *options).check_refusal(*named)
        assert not any((tmp_path / "experiments").iterdir())

    return check


@pytest.mark.parametrize("option", GETTER_OPTIONS)
def test_an_option_of_another_getter_is_an_error(refused, option):
    value = "repulsion100" if option == "--dg-sphere" else "2"
    for key in DIRECTION_GETTERS:
        if key not in GETTER_OPTIONS[option]:
            name = option[2:].replace("-", "_")
            refused(["--dg-key", key, option, value], f"{name}: {key} has no such option. Leave it out or")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dg-key", "sphere-classification", "--add-eos", "--eos-weight", "2"], ["eos_weight", "one class of all"]),
        (
            ["--dg-key", "smooth-sphere-classification", "--add-eos", "--eos-weight", "0"],
            ["eos_weight", "received 0.0"],
        ),
        (["--eos-weight", "2"], ["eos_weight: requires add_eos, received 2.0"]),
        (["--add-eos", "--eos-weight", "-1"], ["eos_weight", "received -1.0"]),
        (["--dg-key", "cosine"], ["--dg-key", "'cosine'", "cosine-regression"]),
        (["--dg-key", "sphere-classification", "--dg-sphere", "round"], ["dg_sphere", "'round'", "symmetric724"]),
        (["--dg-key", "gaussian-mixture", "--dg-nb-gaussians", "0"], ["dg_nb_gaussians", "received 0"]),
        (["--normalize-targets", "0"], ["normalize_targets", "received 0.0"]),
        (["--normalize-outputs", "inf"], ["normalize_outputs", "received inf"]),
        (["--dg-dropout", "1"], ["dg_dropout", "received 1.0"]),
        (
            ["--input-embedding-key", "nn_embedding"],
            ["nn_embedding requires input_embedded_size, received none"],
        ),
        (["--input-embedded-size", "4"], ["input_embedded_size", "received no_embedding"]),
        (["--nb-cnn-filters", "4", "--kernel-size", "3"], ["nb_cnn_filters, kernel_size", "received no_embedding"]),
        ([*CNN, "--kernel-size", "3"], ["cnn_embedding requires neighborhood_type grid, received none"]),
        ([*CNN, *GRID], ["nb_cnn_filters, kernel_size: cnn_embedding requires both", "[4] and []"]),
        ([*CNN, *GRID, "--kernel-size", "3", "2"], ["one of each for every layer", "[4] and [3, 2]"]),
        ([*CNN, *GRID, "--kernel-size", "4"], ["kernel_size", "3 points a side", "received [4]"]),
        (["--neighborhood-type", "axes"], ["expected all three or none"]),
        ([*GRID, "--neighborhood-resolution", "0"], ["neighborhood_resolution", "0"]),
        (["--normalize-prev-dirs"], ["normalize_prev_dirs: require nb_previous_dirs of at least 1, received 0"]),
        (
            ["--nb-previous-dirs", "1", "--prev-dirs-embedding-key", "nn_embedding"],
            ["nn_embedding requires prev_dirs_embedded_size"],
        ),
        (["--step-rule", "up"], ["--step-rule", "'up'", "'nearest', 'dwi_ml'"]),
    ],
    ids=lambda value: " ".join(value)[-50:],
)
def test_options_that_make_no_model_are_refused(refused, options, named):
    refused(options, *named)


@pytest.mark.parametrize(
    ("options", "batches", "message"),
    [
        ({"model": "tts", "position_encoding": "relational"}, {}, "there is no relational encoding. Use sinusoidal"),
        ({"model": "tts", "sos_token_type": "repulsion100"}, {}, "^sos_token_type, .*: require model tto or ttst, r"),
        ({"model": "tts", "target_embedding_key": "no_embedding"}, {}, "target_embedding_key: require model tto or"),
        ({"model": "tts", "rnn_key": "gru"}, {}, "^rnn_key: requires --model learn2track, received tts"),
        ({"nheads": 1, "max_len": 9}, {}, "^max_len, nheads: requires --model a transformer, received learn2track"),
        ({"first_channels": 2}, {}, "^first_channels: requires --model autoencoder, received learn2track"),
        (
            {"model": "autoencoder", "add_eos": True, "dg_dropout": 0.1},
            {},
            "^add_eos, dg_dropout: requires --model that tracks, received autoencoder",
        ),
        ({"model": "autoencoder"}, {"step_size": 1.0}, "^step_size: an autoencoder reads .* Use nb_points .256 by"),
        ({"model": "autoencoder"}, {"compress": 0.1}, "^compress: an autoencoder reads"),
        (
            {"input_embedding_key": "cnn_embedding", "input_embedded_size": 4, "nb_cnn_filters": (2,)},
            {},
            "^input_embedded_size: requires input_embedding_key nn_embedding, received cnn_embedding",
        ),
        (
            {"nb_previous_dirs": 1, "prev_dirs_embedded_size": 4, "prev_dirs_embedding_key": "no_embedding"},
            {},
            "^prev_dirs_embedded_size: requires prev_dirs_embedding_key nn_embedding, received no_embedding",
        ),
        ({"model": "tts", "input_embedded_size": 8, "nheads": 3}, {}, "nheads"),
        ({}, {}, None),
        ({"model": "tto", "input_embedded_size": 8, "sos_token_type": "repulsion100"}, {}, None),
        ({"model": "autoencoder", "latent_space_dims": 2}, {"nb_points": 99}, None),
    ],
)
def test_options_of_other_models_are_refused_in_words(options, batches, message):
    arguments: dict[str, Any] = {"hdf5_file": "", "batches": BatchConfig(**batches)}
    if message is None:
        assert RunConfig(model=ModelConfig(**options), **arguments).model.model == options.get("model", "learn2track")
        return
    with pytest.raises(ValueError, match=message):
        RunConfig(model=ModelConfig(**options), **arguments)


@pytest.mark.parametrize("key", sorted(set(DIRECTION_GETTERS) - COMPRESSIBLE))
def test_compressed_streamlines_are_refused_for_getters_that_cannot_use_them(refused, tmp_path, key):
    able = "l2-regression, gaussian, gaussian-mixture"
    refused(["--dg-key", key, "--compress", "0.01"], "compress: ", key, "cannot learn from compressed", able)
    data = Path(shutil.copy(PHANTOM, tmp_path / "compressed.hdf5"))
    with h5py.File(data, "r+") as file:
        file.attrs["compress"], file.attrs["step_size"] = 0.01, "Not defined by user"
    refused(["--dg-key", key], str(data), "was compressed when it was made", key, able, data=data)


@pytest.mark.parametrize("kind", ["axes", "grid"])
def test_voxels_that_are_no_cubes_are_refused_with_neighbourhoods(cli, refused, tmp_path, kind):
    data = Path(shutil.copy(PHANTOM, tmp_path / "long.hdf5"))
    with h5py.File(data, "r+") as file:
        for subject in ("subj0", "subj1", "subj2"):
            file[f"{subject}/input"].attrs["voxres"] = [1.0, 1.0, 2.0]
            file[f"{subject}/streamlines"].attrs["voxel_sizes"] = [1.0, 1.0, 2.0]
            for group in ("input", "streamlines"):
                affine: Any = file[f"{subject}/{group}"].attrs["affine"]
                affine[2, 2] = 2.0
                file[f"{subject}/{group}"].attrs["affine"] = affine
    options = ["--neighborhood-type", kind, "--neighborhood-radius", "1", "--neighborhood-resolution", "1"]
    refused(options, "needs cubic voxels", "1 x 1 x 2 mm", "subj0", data=data)
    # A model that was trained on cubes is not evaluated on them either.
    name = {"axes": "smooth_eos_axes_nn", "grid": "sphere_eos_cnn"}[kind]
    assert cli("import-dwi-ml", PHANTOM.parent / "parity" / name, tmp_path / "model").code == 0
    cli("evaluate", tmp_path / "model", data).check_refusal("needs cubic voxels", "1 x 1 x 2 mm", "subj2")


def rewrite(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and make its checksum that of the change."""
    manifest = json.loads((model / "model.json").read_text())
    del manifest["checksum"]
    change(manifest)
    (model / "model.json").write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))


@pytest.fixture
def model(cli, tmp_path: Path) -> Path:
    assert cli("import-dwi-ml", PHANTOM.parent / "cos", tmp_path / "model").code == 0
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.pop("options"), ["options"]),
        (lambda m: m.pop("nb_features"), ["nb_features"]),
        (lambda m: [m.pop("interpolation"), m.pop("step_size")], ["lacks interpolation, step_size"]),
        (lambda m: m["options"].update(colour=1), ["options", "colour"]),
        (lambda m: m["options"].update(dg_key="gaussian", normalize_outputs=1.0), ["normalize_outputs"]),
        (lambda m: m.update(nb_features=-3), ["nb_features"]),
        (
            lambda m: m["options"].update(rnn_layer_sizes=[16, 10]),
            ["direction_getter.layers.0.bias", "layers.0.weight", "layers.1.weight", "and 4 more"],
        ),
        (lambda m: m["options"].update(nb_previous_dirs=2), ["rnn_model.rnn_0.weight_ih_l0", "(64, 9)", "(64, 12)"]),
        (
            lambda m: m["options"].update(use_layer_normalization=True),
            ["rnn_model.layer_norm_0.bias", "layer_norm_0.weight", "layer_norm_1.bias", "and 1 more"],
        ),
    ],
    ids=[
        "no options",
        "no features",
        "no facts",
        "unknown",
        "foreign",
        "negative",
        "sizes",
        "inputs",
        "missing tensors",
    ],
)
def test_a_model_directory_that_does_not_hold_together_is_refused_with_what_is_wrong(cli, model, change, named):
    rewrite(model, change)
    cli("evaluate", model, PHANTOM).check_refusal(str(model), *named)


def test_a_folder_of_something_else_is_no_model(cli, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "model.json").write_text("not JSON")
    for command in (
        ("evaluate", tmp_path / "text", PHANTOM),
        ("export-dwi-ml", tmp_path / "text", tmp_path / "out"),
    ):
        cli(*command).check_refusal(str(tmp_path / "text"))
    assert not (tmp_path / "out").exists()
