"""Claims about where the options of a run come from: the command line, --config, and what suits the data."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import latest_digest

from dwiml_func.cli._parsing import parse
from dwiml_func.cli._run_options import RunOptions, example_options, kept_example_options
from dwiml_func.data.config import BatchConfig
from dwiml_func.experiment.config import Origin, config_from_json
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
SHORT = ("--skip-window-lag",)  # the streamlines of the phantom are too short for a window lag


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "experiments"
    path.mkdir()
    return path


def test_a_run_is_trained_again_from_its_config_alone(cli, experiments: Path) -> None:
    outcome = cli("train", experiments, "again", "--config", experiments / "run" / "config.json")
    assert outcome.code == 0
    assert read_config(experiments / "again") == read_config(experiments / "run")
    assert latest_digest(experiments / "again") == latest_digest(experiments / "run")


def test_the_command_line_overrides_the_config_and_the_config_overrides_the_defaults(cli, folder: Path) -> None:
    part = folder.parent / "part.json"
    options = {"training": {"max_epochs": 7, "rng": 5}, "batches": {"nb_subjects_per_batch": 2}, "origin": None}
    part.write_text(json.dumps(options))
    arguments = ("--config", part, "--max-epochs", "3", "--cycles", "4")
    config = config_from_json(cli("train", folder, "new", PHANTOM, *arguments, "--dry-run").out)
    assert (config.training.max_epochs, config.training.rng, config.training.weight_decay) == (3, 5, 0.01)
    assert (config.batches.nb_subjects_per_batch, config.batches.cycles) == (2, 4)
    example = config_from_json(cli("train", folder, "new", *arguments, "--dry-run").out)
    assert (example.training.max_epochs, example.training.rng, example.training.weight_decay) == (3, 5, 0.0)
    assert example.hdf5_file == str(folder / "example_data.hdf5")


def test_the_example_options_apply_before_the_others_are_checked(cli, folder: Path) -> None:
    config = config_from_json(cli("train", folder, "new", "--normalize-prev-dirs", "--dry-run").out)
    assert config.model.nb_previous_dirs == 1
    cli("train", folder, "new", PHANTOM, "--normalize-prev-dirs").check_refusal("nb_previous_dirs")


def test_the_dataset_of_a_config_is_where_the_command_found_it(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunOptions().to_config("data.hdf5").hdf5_file == str(tmp_path / "data.hdf5")


RATE = "0.002*24 0.001*14 0.0005*10 0.0002*8 0.0001"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (
            [],
            f"--max-epochs 60 --monitor tracking_window_lag --ema 0.998 --learning-rate '{RATE}' --weight-decay 0 "
            "--clip-grad 1",
        ),
        (
            ["--learning-rate", "0.1", "--weight-decay=0.5"],
            "--max-epochs 60 --monitor tracking_window_lag --ema 0.998 --clip-grad 1",
        ),
    ],
)
def test_only_example_options_that_are_not_overridden_are_printed(given: list[str], kept: str) -> None:
    options = parse(RunOptions, given, "", default=example_options())
    assert (
        shlex.join(kept_example_options(options))
        == f"{kept} --nb-previous-dirs 1 --batch-size-training 10 --step-size 2 --noise-gaussian-size-forward 1 "
        "--reverse-ratio 0.5"
    )
    assert kept_example_options(RunOptions()) == []


@pytest.mark.parametrize("given", [["--rule", "*bias*: lr=0.5"], ["--rule=*bias*: lr=0.5"], ["--rng", "3"]])
def test_rules_of_the_command_line_replace_those_of_a_config(given: list[str]) -> None:
    base = RunOptions(training=TrainingConfig(rule=("*weight*: lr=0.25",)))
    options = parse(RunOptions, given, "", default=RunOptions(**base.for_command_line(given)))
    assert options.training.rule == (base.training.rule if given[0] == "--rng" else ("*bias*: lr=0.5",))


def test_a_flag_of_the_example_options_is_printed_without_a_value() -> None:
    example = example_options("sphere-classification")
    options = replace(example, model=replace(example.model, dg_key="sphere-classification"))
    assert kept_example_options(options) == [
        *("--max-epochs", "30", "--monitor", "tracking_window_lag", "--learning-rate", "0.005*20 0.001"),
        *("--weight-decay", "0", "--clip-grad", "1", "--nb-previous-dirs", "1", "--use-skip-connection"),
        *("--batch-size-training", "10", "--step-size", "2", "--reverse-ratio", "0.5"),
    ]


def test_parameters_that_a_rule_freezes_are_not_counted(cli, folder: Path) -> None:
    def num_parameters(*options: str) -> int:
        found = re.search(r"6 features, (\d+) parameters$", cli(*train, *options).err.strip())
        assert found is not None
        return int(found[1])

    train = ("train", folder, "new", PHANTOM, "--dry-run", "--rnn-layer-sizes", "2", "--rule")
    lstm = 4 * 2 * (6 + 2 + 2)  # two biases
    head = (2 + 1) * 1 + (1 + 1) * 3
    assert num_parameters("none") == lstm + head
    assert num_parameters("*weight_ih*: frozen") == lstm - 4 * 2 * 6 + head


def test_classification_on_the_example_data_has_its_own_options_below_the_given_ones(cli, tmp_path: Path) -> None:
    arguments = ("train", tmp_path, "new", "--dry-run", "--dg-key", "sphere-classification")
    plain = config_from_json(cli(*arguments[:4]).out)
    classes = config_from_json(cli(*arguments).out)
    given = config_from_json(cli(*arguments, "--learning-rate", "0.25").out)
    assert not plain.model.use_skip_connection
    assert classes.model.use_skip_connection
    assert given.model.use_skip_connection
    assert classes.training.learning_rate != plain.training.learning_rate
    assert given.training.learning_rate == ("0.25",)


def test_a_dry_run_prints_the_config_and_writes_nothing(cli, experiments: Path) -> None:
    before = sorted(experiments.rglob("*"))
    run = experiments / "run" / "config.json"
    outcome = cli("train", experiments, "new", "--config", run, "--dry-run")
    assert outcome.code == 0
    assert outcome.out == run.read_text()
    assert outcome.err.startswith(f"{experiments / 'new'}: 96 streamlines of 2 training subjects, 48 of 1 validation")
    example = cli("train", experiments, "new", "--dry-run")
    assert (example.code, example.err) == (0, f"{experiments / 'example_data.hdf5'} would be made.\n")
    cli("train", experiments, "run", "--config", run, "--rng", "7", "--dry-run").check_refusal(
        "'run' exists", "training.rng"
    )
    assert sorted(experiments.rglob("*")) == before


def test_a_dry_run_of_a_sweep_prints_the_config_of_every_member(cli, folder: Path) -> None:
    outcome = cli("train", folder, "new", PHANTOM, "--sweep", "rng=3,5", "weight-decay=0,0.1", "--dry-run")
    configs = [config_from_json(json.dumps(config)) for config in json.loads(outcome.out)]
    assert [(config.training.rng, config.training.weight_decay) for config in configs] == [
        (3, 0),
        (3, 0.1),
        (5, 0),
        (5, 0.1),
    ]
    assert "  2: learning rate 0.001, weight decay 0, rng 5\n" in outcome.err
    assert list(folder.iterdir()) == []


def test_a_new_run_has_no_origin(cli, folder: Path) -> None:
    path = folder.parent / "config.json"
    shutil.copy(PHANTOM, folder / "example_data.hdf5")
    origin = Origin(experiment="experiments/a", checkpoint="3", digest="0" * 64, start_digest="0" * 64)
    path.write_text(json.dumps({"origin": vars(origin)}))
    assert config_from_json(cli("train", folder, "new", "--config", path, "--dry-run", *SHORT).out).origin is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is not JSON"),
        ("[1]", "Expected a JSON object"),
        ('{"training": {"rng": 1, "rng": 2}}', "duplicate key 'rng'"),
        (" " * (1 << 20) + "{}", "larger than any config"),
        ('{"colour": 3}', "colour: unexpected keyword argument, received 3"),
        ('{"training": {"max_epoch": 3}}', "training.max_epoch: unexpected keyword argument"),
        ('{"training": 3}', "training"),
        ('{"training": {"max_epochs": "3"}}', "training.max_epochs"),
        ('{"training": {"max_epochs": 0}}', "received 0"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(cli, folder: Path, text: str, named: str) -> None:
    path = folder.parent / "bad.json"
    path.write_text(text)
    cli("train", folder, "new", PHANTOM, "--config", path).check_refusal("--config", named)
    cli("train", folder, "new", PHANTOM, "--config", folder).check_refusal("--config", "not a file")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "model", "own"),
    [
        (
            ("sphere-classification",),
            {"nb_previous_dirs": 1, "use_skip_connection": True},
            {"max_epochs": 30, "learning_rate": ("0.005*20 0.001",)},
        ),
        (
            ("cosine-regression", "autoencoder"),
            {"model": "autoencoder", "first_channels": 16},
            {"learning_rate": ("cosine 0.001 60",)},
        ),
        (
            ("gaussian", "ttst", "loss"),
            {"model": "ttst", "input_embedded_size": 64, "target_embedded_size": 64, "n_layers_e": 3},
            {"learning_rate": ("0.002*24 0.001*14 0.0005*10 0.0002*8 0.0001",), "ema": 0.998, "clip_grad": 1.0},
        ),
    ],
    ids=["sphere", "autoencoder", "ttst"],
)
def test_other_models_have_recipes_of_their_own_on_the_example_data(
    arguments: tuple[str, ...], model: dict[str, Any], own: dict[str, Any]
) -> None:
    """Beside the command that is printed for the first run."""
    own = {"max_epochs": 60, "weight_decay": 0.0} | own
    batches: dict[str, Any] = {"batch_size_training": 10}
    if arguments[1:] != ("autoencoder",):
        batches |= {"step_size": 2.0, "reverse_ratio": 0.5}
    if arguments[0] == "sphere-classification":
        own |= {"clip_grad": 1.0, "monitor": "tracking_window_lag"}
    elif arguments[1:] != ("autoencoder",):
        batches["noise_gaussian_size_forward"] = 1.0
    expected = RunOptions(training=TrainingConfig(**own), model=ModelConfig(**model), batches=BatchConfig(**batches))
    assert example_options(*arguments) == expected
