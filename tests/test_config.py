"""Claims about configs: one description of a run, read strictly, written without loss."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.sampler import SamplerSpec
from dwiml_func.experiment.config import CheckpointConfig, LoggingConfig, RunConfig, config_from_json
from dwiml_func.experiment.optimizers import OPTIMIZERS
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig

COUNTS = st.integers(1, 2**31 - 1)
FRACTIONS = st.floats(0, 1, exclude_max=True, allow_subnormal=False, width=32)
FLOATS = st.floats(0, allow_infinity=False, allow_subnormal=False, width=32)
RATES = st.floats(2.0**-126, 2.0**127).map(repr)
CONFIGS = st.builds(
    RunConfig,
    hdf5_file=st.text(),
    data=st.builds(
        DataConfig,
        input_group_name=st.text(),
        streamline_group_name=st.text(),
        interpolation=st.sampled_from(["trilinear", "trilinear-corner"]),
    ),
    batches=st.builds(
        BatchConfig,
        batch_size_training=COUNTS,
        batch_size_validation=COUNTS,
        max_batches_per_epoch_training=COUNTS,
        max_batches_per_epoch_validation=COUNTS,
        processes=st.integers(0, 64),
    ),
    model=st.builds(
        ModelConfig,
        rnn_key=st.sampled_from(["lstm", "gru"]),
        rnn_layer_sizes=st.lists(COUNTS, min_size=1, max_size=3).map(tuple),
        nb_previous_dirs=st.integers(0, 10),
        dropout=FRACTIONS,
        dg_dropout=FRACTIONS,
    ),
    training=st.builds(
        TrainingConfig,
        max_epochs=COUNTS,
        patience=st.none() | COUNTS,
        patience_delta=FLOATS,
        optimizer=st.sampled_from(list(OPTIMIZERS)),
        rule=st.sampled_from([(), ("*bias*: weight_decay=0",), ("rnn*: frozen", "*: lr=0.5")]),
        accumulate=COUNTS,
        ema=st.none() | FRACTIONS,
        skip_not_finite=st.none() | COUNTS,
        learning_rate=st.tuples(st.tuples(RATES, st.integers(1, 9)).map(lambda term: f"{term[0]}*{term[1]}"), RATES),
        weight_decay=FLOATS,
        clip_grad=st.none() | st.floats(2.0**-126, 2.0**127),
        rng=st.integers(0, 2**64 - 1),
        use_gpu=st.booleans(),
        compile=st.booleans(),
        precision=st.sampled_from(["float32", "bf16"]),
        num_threads=st.integers(1, 4095),
    ),
)


def edited(*path: str, value: Any) -> str:
    """A default config's JSON text, in which one place holds something else."""
    data = RunConfig(hdf5_file="data.hdf5").to_dict()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(data)


def run_with(**model: Any) -> RunConfig:
    """A run, whose model's options are checked."""
    return RunConfig(hdf5_file="data.hdf5", model=ModelConfig(**model))


def refusal(text: str | bytes) -> str:
    with pytest.raises(ValueError, match=r"^config\.json: ") as raised:
        config_from_json(text)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_the_defaults_are_those_of_dwi_ml():
    config = RunConfig(hdf5_file="data.hdf5")
    assert dataclasses.asdict(config.training) == {
        "max_epochs": 100,
        "patience": None,
        "patience_delta": 1e-6,
        "monitor": "loss",
        "monitor_mode": "min",
        "validate_every": "1epoch",
        "optimizer": "Adam",
        "momentum": None,
        "rule": (),
        "accumulate": 1,
        "ema": None,
        "skip_not_finite": None,
        "skip_batches": (),
        "learning_rate": ("0.001",),
        "weight_decay": 0.01,
        "clip_grad": None,
        "rng": 1234,
        "data_rng": None,
        "use_gpu": False,
        "num_threads": 1,
        "compile": False,
        "precision": "float32",
        "device_data": "auto",
        "pad_batches": "auto",
        "matmul_precision": "highest",
        "skip_window_lag": False,
        "add_a_tracking_validation_phase": False,
        "tracking_phase_frequency": 1,
        "tracking_phase_nb_segments_init": 1,
        "tracking_mask": None,
        "num_shards": 1,
    }
    batches = dataclasses.asdict(config.batches)
    assert batches == batches | {
        "batch_size_training": 100,
        "batch_size_validation": 100,
        "max_batches_per_epoch_training": 1000,
        "max_batches_per_epoch_validation": 1000,
        "processes": 0,
    }
    model = {
        name: value
        for name, value in dataclasses.asdict(config.model).items()
        if value is not None and value is not False
    }
    transformer = {
        "nheads": 8,
        "n_layers_e": 6,
        "dropout_rate": 0.1,
        "activation": "relu",
        "position_encoding": "sinusoidal",
        "sos_token_type": "as_label",
        "target_embedding_key": "nn_embedding",
    }
    autoencoder = {"latent_space_dims": 32, "first_channels": 32, "reconstruction_loss": "mean"}
    assert (config.model.embedding_key, ModelConfig(model="tts").embedding_key) == ("no_embedding", "nn_embedding")
    assert model == transformer | autoencoder | {
        "model": "learn2track",
        "nb_previous_dirs": 0,
        "prev_dirs_embedding_key": "no_embedding",
        "rnn_key": "lstm",
        "rnn_layer_sizes": (100, 100),
        "dropout": 0.0,
        "dg_key": "cosine-regression",
        "dg_dropout": 0.0,
    }
    data = dataclasses.asdict(config.data)
    assert data == data | {
        "input_group_name": "input",
        "streamline_group_name": "streamlines",
        "interpolation": "trilinear",
    }


@given(config=CONFIGS)
def test_a_config_comes_back_from_its_json_as_it_was(config):
    assert config_from_json(config.to_json()) == config
    assert config_from_json(config.to_json().encode()) == config
    assert config_from_json(json.dumps(config.to_dict())) == config


def test_a_part_that_is_left_out_has_its_defaults():
    assert config_from_json('{"hdf5_file": "data.hdf5"}') == RunConfig(hdf5_file="data.hdf5")
    config = config_from_json('{"hdf5_file": "data.hdf5", "training": {"rng": 7, "weight_decay": 1}}')
    assert config.training == TrainingConfig(rng=7, weight_decay=1.0)


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().rng = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (BatchConfig, "processes", -1),
        (run_with, "rnn_layer_sizes", (8, 0)),
        (run_with, "rnn_layer_sizes", ()),
        (run_with, "nb_previous_dirs", -1),
        (run_with, "dropout", 1.0),
        (run_with, "dropout", -0.1),
        (run_with, "dropout", float("nan")),
        (run_with, "dg_dropout", 1.5),
        (TrainingConfig, "max_epochs", 0),
        (TrainingConfig, "max_epochs", 10**400),
        (TrainingConfig, "patience", 0),
        (TrainingConfig, "patience_delta", -1e-9),
        (TrainingConfig, "patience_delta", float("nan")),
        (TrainingConfig, "patience_delta", float("inf")),
        (TrainingConfig, "weight_decay", -0.01),
        (TrainingConfig, "weight_decay", float("inf")),
        (TrainingConfig, "clip_grad", 0.0),
        (TrainingConfig, "clip_grad", float("nan")),
        (TrainingConfig, "rng", -1),
        (TrainingConfig, "rng", 2**64),
        (TrainingConfig, "num_threads", 0),
        (partial(RunConfig, hdf5_file="a.hdf5"), "padded_lengths", (5, 0)),
        (partial(RunConfig, hdf5_file="a.hdf5"), "padded_lengths", ()),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_number_out_of_range_is_refused_with_name_and_value(make, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected") as raised:
        make(**{name: value})
    received = value[-1:] if isinstance(value, tuple) else (value,)
    shown = repr(received[0])[:50] if received else "0"
    assert f"received {shown}" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("phase", ["training", "validation"])
@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("batch_size", "batch_size_{}", 0),
        ("batch_size", "batch_size_{}", -3),
        ("batch_size", "batch_size_{}", 2**31),
        ("max_batches", "max_batches_per_epoch_{}", 0),
    ],
)
def test_a_number_that_the_sampler_refuses_is_refused_for_its_phase(phase, name, option, value):
    with pytest.raises(ValueError, match=f"^{phase} batches: {name}: expected .* received {value}[.]$"):
        BatchConfig(**{option.format(phase): value})


def test_a_number_of_any_length_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"max_epochs: expected .* received a number that is too long to show"):
        TrainingConfig(max_epochs=10**5000)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, False), ({"comet_workspace": "lab"}, True), ({"comet_project": "tracking"}, True), ({"log_every": 1}, False)],
)
def test_a_workspace_or_a_project_asks_for_comet(options, expected):
    assert LoggingConfig(**options).uses_comet == expected


def test_numbers_at_the_edges_are_taken():
    TrainingConfig(max_epochs=1, patience=1, patience_delta=0, weight_decay=0, clip_grad=2.0**-126, rng=2**64 - 1)
    TrainingConfig(rng=0, max_epochs=2**31 - 1)
    run_with(dropout=0.0, rnn_layer_sizes=(1,))
    BatchConfig(batch_size_training=1, processes=0)
    RunConfig(hdf5_file="a.hdf5", padded_lengths=(1, 2))


@pytest.mark.parametrize(
    ("make", "name", "least", "most"),
    [
        *((TrainingConfig, name, 1, None) for name in ("max_epochs", "patience", "accumulate", "skip_not_finite")),
        *((TrainingConfig, f"tracking_phase_{name}", 1, None) for name in ("frequency", "nb_segments_init")),
        *((TrainingConfig, name, 0, (1 << 64) - 1) for name in ("rng", "data_rng")),
        *((TrainingConfig, "num_threads", 1, (1 << 12) - 1), (TrainingConfig, "num_shards", 1, (1 << 16) - 1)),
        *((TrainingConfig, name, 0, None) for name in ("patience_delta", "weight_decay")),
        *((CheckpointConfig, "check_every", 1, None), (LoggingConfig, "log_every", 1, None)),
    ],
)
def test_a_number_may_reach_its_bounds_and_no_further(make, name, least, most):
    for value, beyond in ((least, least - 1), (most, None if most is None else most + 1)):
        if value is not None:
            assert getattr(make(**{name: value}), name) == value
            with pytest.raises(ValueError, match=f"^{name}: expected a finite number at least {least}\\b.*{beyond}"):
                make(**{name: beyond})


@pytest.mark.parametrize(
    "rates", [(), ("",), ("x",), ("-0.1",), ("0",), ("nan",), ("0.1", "0.2"), ("0.1*0",), ("1*x",)]
)
def test_a_learning_rate_that_cannot_be_read_is_refused(rates):
    with pytest.raises(ValueError, match=r"^Learning rate ") as raised:
        TrainingConfig(learning_rate=rates)
    assert " ".join(rates) in str(raised.value)


def test_learning_rates_may_come_in_one_text_or_several():
    for rates in (("0.001*3 0.0001",), ("0.001*3", "0.0001")):
        schedule: Any = TrainingConfig(learning_rate=rates).schedule
        assert [schedule(epoch) for epoch in range(5)] == [0.001] * 3 + [0.0001] * 2


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("colour",), 3, "colour: unexpected keyword argument, received 3"),
        (("training", "colour"), "red", "training.colour: unexpected keyword argument, received 'red'"),
        (("training", "max_epochs"), "3", "training.max_epochs: input should be a valid integer, received '3'"),
        (("training", "max_epochs"), 3.0, "training.max_epochs: input should be a valid integer, received 3.0"),
        (("training", "max_epochs"), True, "training.max_epochs: input should be a valid integer, received True"),
        (("training", "max_epochs"), None, "training.max_epochs: input should be a valid integer, received None"),
        (("training", "max_epochs"), 0, "max_epochs: expected a finite number at least 1"),
        (("training", "max_epochs"), 10**400, "max_epochs: expected a finite number at least 1"),
        (("training", "use_gpu"), 1, "training.use_gpu: input should be a valid boolean, received 1"),
        (("training", "patience_delta"), "1", "training.patience_delta: input should be a valid number, received '1'"),
        (
            ("training", "patience_delta"),
            float("nan"),
            "patience_delta: expected a finite number at least 0, received nan",
        ),
        (("training", "optimizer"), "Foo", "training.optimizer: input should be 'Adam', 'AdamW', 'RAdam', 'SGD', "),
        (("training", "learning_rate"), ["x"], "Learning rate 'x': cannot read 'x'"),
        (
            ("training", "learning_rate"),
            [0.1],
            "training.learning_rate.0: input should be a valid string, received 0.1",
        ),
        (("training",), [1], "training: input should be an object, received [1]"),
        (("model", "rnn_layer_sizes"), "8", "model.rnn_layer_sizes: input should be a valid array, received '8'"),
        (("model", "rnn_layer_sizes"), [8, 0], "rnn_layer_sizes: expected a finite number at least 1"),
        (("batches", "processes"), -1, "processes: expected a finite number at least 0"),
        (("hdf5_file",), None, "hdf5_file: input should be a valid string, received None"),
        (("hdf5_file",), ["x" * 1000], "hdf5_file: input should be a valid string, received ['xxxx"),
    ],
    ids=str,
)
def test_a_wrong_place_is_named_with_its_value(path, value, expected):
    assert expected in refusal(edited(*path, value=value))


def test_the_first_three_wrong_places_are_named_at_once_and_the_others_counted():
    message = refusal('{"data": {"interpolation": 1}, "training": {"rng": "x", "colour": 2}}')
    for name in ("hdf5_file: field required", "data.interpolation", "training.rng", "and 1 more"):
        assert name in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "\x00",
        b"\xff\xfe{}",
        "[" * 100_000,
        '{"data":' * 100_000,
        '{"hdf5_file": "a", "training": {"max_epochs": 1' + "0" * 6000 + "}}",
        '{"hdf5_file": "a", "training": {"patience_delta": 1' + "0" * 6000 + "}}",
        '{"hdf5_file": "\\ud800"}',
    ],
    ids=[
        "empty",
        "half",
        "null",
        "list",
        "text",
        "nul",
        "not_utf8",
        "deep",
        "deeper",
        "huge",
        "huge_float",
        "surrogate",
    ],
)
def test_what_is_no_config_is_refused_in_one_short_line(text):
    refusal(text)


def test_a_long_value_is_shown_by_its_beginning():
    message = refusal(edited("training", "optimizer", value="x" * 10_000))
    assert "received 'xxxx" in message
    assert message.endswith("...")


def test_the_source_is_named():
    with pytest.raises(ValueError, match=r"^over/there: "):
        config_from_json("", source="over/there")


def test_every_option_of_batches_reaches_what_makes_them():
    batches = BatchConfig(
        batch_size_training=20, batch_size_validation=30, batch_size_units="length_mm", nb_streamlines_per_chunk=7,
        nb_subjects_per_batch=2, cycles=3, max_batches_per_epoch_training=4, max_batches_per_epoch_validation=5,
        step_size=0.5, step_rule="dwi_ml", noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.2,
        split_ratio=0.3, reverse_ratio=0.4,
    )  # fmt: skip
    units = {"batch_size_units": "length_mm", "nb_streamlines_per_chunk": 7, "nb_subjects_per_batch": 2, "cycles": 3}
    assert batches.sampler("training") == SamplerSpec(batch_size=20, max_batches=4, **units)
    assert batches.sampler("validation") == SamplerSpec(batch_size=30, max_batches=5, **units)
    assert (batches.resampling.step_size, batches.resampling.step_rule) == (0.5, "dwi_ml")
    assert BatchConfig(nb_points=12).resampling == Resampling(nb_points=12)
    assert BatchConfig(compress=0.1).resampling == Resampling(compress=0.1)
    assert batches.augmentation == Augmentation(
        noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.2, split_ratio=0.3, reverse_ratio=0.4
    )
