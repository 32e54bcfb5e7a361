"""Every option of a training takes effect: it changes the batches, the model or the first steps, or is listed here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dwiml_func.core.metrics import read_means
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig

PARTS = {"model": ModelConfig, "data": DataConfig, "batches": BatchConfig, "training": TrainingConfig}
HELD_ELSEWHERE = {
    *(
        "processes",
        "use_gpu",
        "num_threads",
        "compile",
        "num_shards",
        "matmul_precision",
        "pad_batches",
        "device_data",
    ),  # test_parallel, test_compiled_runs, test_matmul_precision, test_padding, test_device_data, ...
    *("max_len", "position_encoding"),  # test_transformers, test_config
    *(
        "max_epochs",
        "patience",
        "patience_delta",
        "monitor",
        "monitor_mode",
        "validate_every",
        "learning_rate",
        "skip_window_lag",
        "add_a_tracking_validation_phase",
        "tracking_phase_frequency",
        "tracking_phase_nb_segments_init",
        "tracking_mask",
    ),  # test_run, test_loop, test_schedule, test_window_lag_runs, test_tracking_phase, test_monitor
}
WITHOUT_EFFECT = {"lazy": True, "cache_size": "1MB"}

NN = {"input_embedding_key": "nn_embedding", "input_embedded_size": 4}
AXES: dict[str, Any] = {"neighborhood_type": "axes", "neighborhood_radius": 1, "neighborhood_resolution": 0.5}
CNN: dict[str, Any] = AXES | {
    "neighborhood_type": "grid",
    "input_embedding_key": "cnn_embedding",
    "nb_cnn_filters": (4,),
    "kernel_size": (2,),
}
PREVIOUS: dict[str, Any] = {"nb_previous_dirs": 1}
PREVIOUS_NN = PREVIOUS | {"prev_dirs_embedding_key": "nn_embedding", "prev_dirs_embedded_size": 4}
LENGTHS = {"batch_size_units": "length_mm", "batch_size_training": 300}
SPHERE = {"dg_key": "sphere-classification", "dg_sphere": "repulsion100"}
TTS: dict[str, Any] = {"model": "tts", "input_embedded_size": 8, "nheads": 2, "n_layers_e": 1}
AUTOENCODER: dict[str, Any] = {"model": "autoencoder", "nb_points": 40, "latent_space_dims": 4, "first_channels": 2}
TTST = TTS | {"model": "ttst", "target_embedded_size": 4}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # other options, and what is changed
    "input_embedding_key": ({}, NN),
    "input_embedded_size": (NN, {"input_embedded_size": 5}),
    "nb_cnn_filters": (CNN, {"nb_cnn_filters": (5,)}),
    "kernel_size": (CNN, {"kernel_size": (3,)}),
    "nb_previous_dirs": (PREVIOUS, {"nb_previous_dirs": 2}),
    "prev_dirs_embedding_key": (PREVIOUS, PREVIOUS_NN),
    "prev_dirs_embedded_size": (PREVIOUS_NN, {"prev_dirs_embedded_size": 5}),
    "normalize_prev_dirs": (PREVIOUS, {"normalize_prev_dirs": True}),
    "rnn_key": ({}, {"rnn_key": "gru"}),
    "rnn_layer_sizes": ({}, {"rnn_layer_sizes": (8, 6)}),
    "use_skip_connection": ({}, {"use_skip_connection": True}),
    "use_layer_normalization": ({}, {"use_layer_normalization": True}),
    "dropout": (PREVIOUS, {"dropout": 0.5}),
    "dg_key": ({}, {"dg_key": "l2-regression"}),
    "dg_dropout": ({}, {"dg_dropout": 0.5}),
    "dg_sphere": (SPHERE, {"dg_sphere": "repulsion200"}),
    "add_entropy_to_gauss": ({"dg_key": "gaussian"}, {"add_entropy_to_gauss": 0.5}),
    "dg_nb_gaussians": ({"dg_key": "gaussian-mixture"}, {"dg_nb_gaussians": 2}),
    "dg_nb_clusters": ({"dg_key": "fisher-von-mises-mixture"}, {"dg_nb_clusters": 2}),
    "normalize_targets": ({"dg_key": "l2-regression"}, {"normalize_targets": 2.0}),
    "normalize_outputs": ({"dg_key": "l2-regression"}, {"normalize_outputs": 2.0}),
    "add_eos": ({}, {"add_eos": True}),
    "eos_weight": ({"add_eos": True}, {"eos_weight": 2.0}),
    "model": ({}, TTS),
    "nheads": (TTS, {"nheads": 4}),
    "n_layers_e": (TTS, {"n_layers_e": 2}),
    "n_layers_d": (TTS | {"model": "tto"}, {"n_layers_d": 2}),
    "ffnn_hidden_size": (TTS, {"ffnn_hidden_size": 7}),
    "dropout_rate": (TTS, {"dropout_rate": 0.3}),
    "activation": (TTS, {"activation": "gelu"}),
    "norm_first": (TTS, {"norm_first": True}),
    "sos_token_type": (TTST, {"sos_token_type": "repulsion100"}),
    "target_embedding_key": (TTST, {"target_embedding_key": "no_embedding", "target_embedded_size": None}),
    "target_embedded_size": (TTST, {"target_embedded_size": 6}),
    "latent_space_dims": (AUTOENCODER, {"latent_space_dims": 5}),
    "first_channels": (AUTOENCODER, {"first_channels": 3}),
    "raw_coordinates": (AUTOENCODER, {"raw_coordinates": True}),
    "reconstruction_loss": (AUTOENCODER, {"reconstruction_loss": "sum"}),
    "input_group_name": ({}, {"input_group_name": "wm_mask"}),
    "streamline_group_name": ({}, {"streamline_group_name": "others"}),
    "interpolation": ({}, {"interpolation": "nearest"}),
    "neighborhood_type": (AXES, {"neighborhood_type": "grid"}),
    "neighborhood_radius": (AXES, {"neighborhood_radius": 2}),
    "neighborhood_resolution": (AXES, {"neighborhood_resolution": 0.25}),
    "batch_size_training": ({}, {"batch_size_training": 6}),
    "batch_size_validation": ({}, {"batch_size_validation": 6}),
    "batch_size_units": ({}, LENGTHS),
    "nb_streamlines_per_chunk": (LENGTHS | {"nb_subjects_per_batch": 2, "cycles": 1}, {"nb_streamlines_per_chunk": 4}),
    "nb_subjects_per_batch": ({}, {"nb_subjects_per_batch": 1}),
    "cycles": ({"nb_subjects_per_batch": 1}, {"cycles": 1}),
    "max_batches_per_epoch_training": ({}, {"max_batches_per_epoch_training": 3}),
    "max_batches_per_epoch_validation": ({}, {"max_batches_per_epoch_validation": 3}),
    "step_size": ({}, {"step_size": 0.7}),
    "step_rule": ({"step_size": 0.7}, {"step_rule": "dwi_ml"}),
    "nb_points": ({}, {"nb_points": 12}),
    "compress": ({"dg_key": "l2-regression"}, {"compress": 0.1}),
    "noise_gaussian_size_forward": (PREVIOUS, {"noise_gaussian_size_forward": 0.1}),
    "noise_gaussian_size_loss": ({}, {"noise_gaussian_size_loss": 0.1}),
    "split_ratio": ({}, {"split_ratio": 0.5}),
    "reverse_ratio": ({}, {"reverse_ratio": 0.5}),
    "optimizer": ({}, {"optimizer": "SGD"}),
    "momentum": ({"optimizer": "SGD"}, {"momentum": 0.9}),
    "rule": ({}, {"rule": ("*bias*: lr=0.1",)}),
    "accumulate": ({}, {"accumulate": 2}),
    "ema": ({}, {"ema": 0.5}),
    "skip_not_finite": ({}, {"skip_not_finite": 1}),
    "skip_batches": ({}, {"skip_batches": ("1:1",)}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "clip_grad": ({}, {"clip_grad": 1e-3}),
    "rng": ({"data_rng": 3}, {"rng": 7}),
    "data_rng": ({}, {"data_rng": 3}),
    "precision": ({}, {"precision": "bf16"}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom, with a second group of streamlines."""
    path = shutil.copy(Path(__file__).parent / "data" / "phantom.hdf5", tmp_path_factory.mktemp("data"))
    with h5py.File(path, "r+") as file:
        for subject in ("subj0", "subj1", "subj2"):
            file.copy(f"{subject}/streamlines", f"{subject}/others")
            points: Any = file[f"{subject}/others/data"]
            points[...] = np.asarray(points) + np.float32(0.125)
    return Path(path)


def first_steps(data: Path, options: dict[str, Any]) -> tuple[Any, ...]:
    """The start of a run: the plan of its batches, losses of two training and one validation batch, the parameters."""
    small: dict[str, Any] = {"batch_size_training": 8, "batch_size_validation": 8}
    if "model" not in options:
        small["rnn_layer_sizes"] = (8,)
    options = small | options

    def part(description: Any) -> Any:
        names = {field.name for field in fields(description)}
        return description(**{name: value for name, value in options.items() if name in names})

    run = prepare(RunConfig(hdf5_file=str(data), **{name: part(PARTS[name]) for name in PARTS}))
    assert run.valid is not None
    state, losses = run.first_state(), []
    validation: Any = run.valid(state.key, 0, 0)
    plan = []
    for number, batch in enumerate(run.train(state.key, 0, 0)):
        plan.append((batch.subject.tolist(), batch.ids.tolist()))
        if number < 2:
            state, metrics = run.step(state, batch, lr=0.01)
            losses.append(read_means(metrics))
    losses += [read_means(run.eval_step(state, batch)) for batch in islice(validation, 1)]
    return plan, len(validation), losses, [parameter.sum().item() for parameter in state.params.values()]


def test_every_option_is_listed() -> None:
    known = {field.name for description in PARTS.values() for field in fields(description)}
    listed = [*CHANGES, *WITHOUT_EFFECT, *HELD_ELSEWHERE]
    assert sorted(listed) == sorted(known)


@pytest.fixture(scope="module")
def unchanged(data: Path) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """`first_steps` of options with which many others are compared."""
    found: dict[str, tuple[Any, ...]] = {}

    def steps(options: dict[str, Any]) -> tuple[Any, ...]:
        if repr(options) not in found:
            found[repr(options)] = first_steps(data, options)
        return found[repr(options)]

    return steps


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_takes_effect(data: Path, unchanged: Callable[[dict[str, Any]], tuple[Any, ...]], name: str) -> None:
    others, changed = CHANGES[name]
    assert name in changed
    assert first_steps(data, others | changed) != unchanged(others)


def test_the_same_options_give_the_same_run(data: Path) -> None:
    assert first_steps(data, {}) == first_steps(data, {})


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_options_of_the_memory_change_nothing(data: Path, name: str) -> None:
    lazy = {"lazy": True} if name == "cache_size" else {}
    assert first_steps(data, lazy | {name: WITHOUT_EFFECT[name]}) == first_steps(data, lazy)


def test_forward_noise_reaches_the_previous_directions_alone(data: Path) -> None:
    """Without previous directions the model does not see the forward points."""
    noise = {"noise_gaussian_size_forward": 0.1}
    assert first_steps(data, noise) == first_steps(data, {})
