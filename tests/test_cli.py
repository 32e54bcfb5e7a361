"""Claims about the commands: what they print and what they leave."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from experiment_cases import latest_digest

from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.cli import _training, bisect, evaluate, page, resume, send_to_comet, train
from dwiml_func.cli.main import COMMANDS
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.experiment.config import LoggingConfig, RunConfig, config_from_json
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.sweep import member_configs, sweep_configs
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.autoencoder.config import AutoencoderOptions
from dwiml_func.models.config import ModelConfig
from dwiml_func.models.transformers.config import TransformerOptions

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
TINY = ("--rnn-layer-sizes", "8", "--batch-size-training", "40", "--max-epochs", "1", "--skip-figures")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of experiments; one of them has no checkpoint yet."""
    path = tmp_path / "experiments"
    (path / "there").mkdir(parents=True)
    (path / "there" / "config.json").write_text(RunConfig(hdf5_file=str(PHANTOM)).to_json())
    return path


def test_digest_prints_one_line_and_nothing_else(cli, stopped_early):
    outcome = cli("digest", stopped_early / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(r"[0-9a-f]{64}\n", outcome.out)
    assert outcome.out.strip() == latest_digest(stopped_early / "run")


def test_after_a_new_patience_the_run_continues(cli, experiments):
    outcome = cli("resume", experiments, "run", "--new_patience", "3")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split()[1] for line in outcome.out.splitlines() if line.startswith("Epoch ")]
    assert lines == ["4/9", "5/9"]
    assert "Stopped early after 5 epochs" in outcome.out
    assert list_checkpoints(experiments / "run") == ["2", "4", "5"]
    cli("resume", experiments, "run").check_refusal("patience 3")


def test_an_experiment_without_a_checkpoint_starts_from_the_beginning(cli, folder):
    (folder / "there" / "config.json").write_text(
        RunConfig(
            hdf5_file=str(PHANTOM),
            model=ModelConfig(rnn_layer_sizes=(8,)),
            batches=BatchConfig(batch_size_training=40),
            training=TrainingConfig(max_epochs=1),
        ).to_json()
    )
    assert cli("resume", folder, "there").code == 0
    assert cli("train", folder, "new", PHANTOM, *TINY).code == 0
    assert latest_digest(folder / "there") == latest_digest(folder / "new")
    cli("resume", folder, "there").check_refusal("the maximum is 1", "--new-max-epochs of at least 2")
    cli("resume", folder, "there", "--new-max-epochs", 1).check_refusal("the maximum is 1")


def test_hyphens_and_underscores_are_the_same(cli, folder):
    options = ["--batch-size-training=40", "--rnn-layer-sizes", "8", "4", "--max-epochs=1", "--nb-previous-dirs=2"]
    assert cli("train", folder, "hyphens", PHANTOM, *options).code == 0
    assert cli("train", folder, "underscores", PHANTOM, *[option.replace("-", "_") for option in options]).code == 2
    underscores = [re.sub(r"(?<=\w)-", "_", option) for option in options]
    assert "--nb_previous_dirs=2" in underscores
    assert cli("train", folder, "underscores", PHANTOM, *underscores).code == 0
    assert read_config(folder / "hyphens") == read_config(folder / "underscores")
    assert latest_digest(folder / "hyphens") == latest_digest(folder / "underscores")


def test_config_json_holds_every_option(cli, folder, monkeypatch):
    options = {
        "max-epochs": "1",
        "patience": "3",
        "patience-delta": "0.5",
        "monitor": "angular_error",
        "monitor-mode": "max",
        "validate-every": "1epochs",
        "optimizer": "SGD",
        "momentum": "0.5",
        "rule": "*bias*: weight_decay=0",
        "accumulate": "2",
        "ema": "0.75",
        "skip-not-finite": "4",
        "learning-rate": "0.001*3 0.0001",
        "weight-decay": "0.125",
        "clip-grad": "0.25",
        "rng": str(2**64 - 1),
        "data-rng": "7",
        "num-threads": "1",
        "num-shards": "2",
        "precision": "bf16",
        "rnn-key": "gru",
        "rnn-layer-sizes": "7",
        "nb-previous-dirs": "1",
        "dropout": "0.1",
        "dg-key": "cosine-regression",
        "dg-dropout": "0.2",
        "batch-size-training": "500",
        "batch-size-validation": "300",
        "batch-size-units": "length_mm",
        "nb-streamlines-per-chunk": "64",
        "nb-subjects-per-batch": "1",
        "cycles": "3",
        "max-batches-per-epoch-training": "2",
        "max-batches-per-epoch-validation": "1",
        "processes": "0",
        "step-size": "0.75",
        "noise-gaussian-size-forward": "0.02",
        "noise-gaussian-size-loss": "0.03",
        "split-ratio": "0.3",
        "reverse-ratio": "0.4",
        "input-group-name": "wm_mask",
        "streamline-group-name": "streamlines",
        "interpolation": "trilinear-corner",
        "neighborhood-type": "axes",
        "neighborhood-radius": "1",
        "neighborhood-resolution": "0.5",
        "cache-size": "1GB",
        "comet-workspace": "lab",
        "comet-project": "tracking",
        "log-every": "1",
    }
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    flat = [part for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.chdir(PHANTOM.parent)
    assert cli("train", folder, "new", "phantom.hdf5", *flat, "--lazy", "--tensorboard", "--skip-figures").code == 0
    config = read_config(folder / "new")
    assert config == RunConfig(
        hdf5_file=str(PHANTOM),  # absolute, wherever the command was given
        data=DataConfig(
            input_group_name="wm_mask",
            interpolation="trilinear-corner",
            neighborhood_type="axes",
            neighborhood_radius=1,
            neighborhood_resolution=0.5,
            lazy=True,
            cache_size="1GB",
        ),
        batches=BatchConfig(
            batch_size_training=500,
            batch_size_validation=300,
            batch_size_units="length_mm",
            nb_streamlines_per_chunk=64,
            nb_subjects_per_batch=1,
            cycles=3,
            step_size=0.75,
            noise_gaussian_size_forward=0.02,
            noise_gaussian_size_loss=0.03,
            split_ratio=0.3,
            reverse_ratio=0.4,
            max_batches_per_epoch_training=2,
            max_batches_per_epoch_validation=1,
        ),
        model=ModelConfig(rnn_key="gru", rnn_layer_sizes=(7,), nb_previous_dirs=1, dropout=0.1, dg_dropout=0.2),
        training=TrainingConfig(
            max_epochs=1,
            patience=3,
            patience_delta=0.5,
            monitor="angular_error",
            monitor_mode="max",
            validate_every="1epochs",
            optimizer="SGD",
            momentum=0.5,
            rule=("*bias*: weight_decay=0",),
            accumulate=2,
            ema=0.75,
            skip_not_finite=4,
            learning_rate=("0.001*3 0.0001",),
            weight_decay=0.125,
            clip_grad=0.25,
            rng=2**64 - 1,
            data_rng=7,
            num_shards=2,
            precision="bf16",
        ),
        logging=LoggingConfig(
            comet_workspace="lab", comet_project="tracking", tensorboard=True, log_every=1, skip_figures=True
        ),
    )
    parts = (config.data, config.batches, config.model, config.training, config.logging)
    fields = {field.name for part in parts for field in dataclasses.fields(part)}
    excluded = {"use_gpu", "nb_points", "compress", "compile"}  # no device here; each goes without another option
    excluded |= {  # they go with other models than this one
        *("input_embedding_key", "input_embedded_size", "nb_cnn_filters", "kernel_size", "use_skip_connection"),
        *("prev_dirs_embedding_key", "prev_dirs_embedded_size", "normalize_prev_dirs", "use_layer_normalization"),
        *("dg_sphere", "add_entropy_to_gauss", "dg_nb_gaussians", "dg_nb_clusters", "add_eos", "eos_weight"),
        *("normalize_targets", "normalize_outputs", "step_rule"),
        *("model", *(f.name for kind in (TransformerOptions, AutoencoderOptions) for f in dataclasses.fields(kind))),
        *("skip_window_lag", "add_a_tracking_validation_phase", "tracking_mask"),
        *("tracking_phase_frequency", "tracking_phase_nb_segments_init", "skip_batches"),
        *("matmul_precision", "pad_batches", "device_data"),  # test_matmul_precision, test_padding, test_device_data
    }
    assert {name.replace("-", "_") for name in options} | {
        "lazy",
        "tensorboard",
        "skip_figures",
    } | excluded == fields  # none was left out above

    manifest = json.loads((folder / "new" / "checkpoint" / "1" / "manifest.json").read_text())
    assert config_from_json(json.dumps(manifest["config"])) == config
    assert manifest["history"][0]["num_batches"] == 2


def test_without_a_file_the_example_data_that_is_there_is_taken(cli, folder):
    dry = ("train", folder, "new", *TINY, "--monitor", "loss", "--dry-run")
    assert cli(*dry).err == f"{folder / 'example_data.hdf5'} would be made.\n"
    shutil.copy(PHANTOM, folder / "example_data.hdf5")
    assert f"{folder / 'new'}: 96 streamlines of 2 training subjects, " in cli(*dry).err
    given = ("--learning-rate", "0.125", "--skip-window-lag")  # the phantom's streamlines are too short for one
    outcome = cli("train", folder, "new", *TINY, *given)
    assert (outcome.code, outcome.err) == (0, "")
    kept = outcome.out.splitlines()[0]
    assert kept.startswith("Example data, with --ema 0.998 --weight-decay 0 --clip-grad 1 --nb-previous-dirs 1 ")
    config = read_config(folder / "new")
    assert config.hdf5_file == str(folder / "example_data.hdf5")
    assert (config.training.max_epochs, config.training.learning_rate) == (1, ("0.125",))
    assert (folder / "example_data.hdf5").read_bytes() == PHANTOM.read_bytes()


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(cli, folder):
    diverging = ("--optimizer", "SGD", "--learning-rate", "0.01*1 1e38", "--max-epochs", "3")
    outcome = cli("train", folder, "new", PHANTOM, *TINY, *diverging)
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert re.match(r"dwiml-func train: The .* in epoch 2, batch \d \(step \d\), ids \d+, ", line)
    assert list_checkpoints(folder / "new") == ["1"]
    assert "Epoch 1/3" in outcome.out
    again = cli("resume", folder, "new")
    assert (again.code, again.err) == (1, line.replace("train", "resume") + "\n")
    assert list_checkpoints(folder / "new") == ["1"]

    first = cli("train", folder, "first", PHANTOM, *TINY, "--optimizer", "SGD", "--learning-rate", "1e38")
    assert first.code == 1
    assert "in epoch 1, " in first.err
    assert list_checkpoints(folder / "first") == []


def test_ctrl_c_ends_in_one_line(cli, folder, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dwiml_func.cli._training.run_experiment", interrupted)
    outcome = cli("train", folder, "new", PHANTOM, *TINY)
    assert outcome.code == 130
    assert outcome.err == "dwiml-func train: interrupted. The last checkpoint is kept.\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_purpose_options_defaults_and_an_example(cli, command):
    outcome = cli(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"usage: dwiml-func {command}" in outcome.out
    assert f"\n\nExample: dwiml-func {command} " in outcome.out
    assert "-h, --help " in outcome.out
    assert len(outcome.out.split("\n\n")[1]) > 40  # the purpose


def test_help_of_train_lists_every_option_with_its_default(cli):
    text = " ".join(cli("train", "--help").out.replace("│", " ").split())
    for part in (TrainingConfig, BatchConfig, ModelConfig, DataConfig):
        for field in dataclasses.fields(part):
            assert f"--{field.name.replace('_', '-')}" in text
    for default in (
        "(default: 100)",
        "(default: 1e-06)",
        "(default: 0.001)",
        "(default: Adam)",
        "(default: 1234)",
    ):
        assert default in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_program_lists_its_commands(cli, arguments):
    outcome = cli(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    for command, purpose in COMMANDS.items():
        words = r"\s+".join(re.escape(word) for word in purpose.split())  # long ones go over two lines
        assert re.search(rf"• {command} +{words}", outcome.out.replace("│", " "))
    assert "\nExample: dwiml-func train " in outcome.out
    for code in (0, 1, 2, 130, 143):
        assert re.search(rf"^- {code}: \w", outcome.out.split("Exit codes:")[1], flags=re.MULTILINE)


def test_each_command_is_a_module_with_its_options():
    import dwiml_func.cli

    folder = Path(dwiml_func.cli.__path__[0])
    modules = {path.stem for path in folder.glob("[!_]*.py")} - {"main"}
    assert modules == {command.replace("-", "_") for command in COMMANDS}
    for name in modules:
        module = importlib.import_module(f"dwiml_func.cli.{name}")
        assert {"Options", "run"} <= set(module.__all__)


def test_the_version_is_the_packages(cli):
    import dwiml_func

    outcome = cli("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{dwiml_func.__version__}\n", "")
    assert cli("--version", "train").out == outcome.out


Calls = list[tuple[str, tuple[object, ...], dict[str, object]]]


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, **results: Any) -> Calls:
    """The calls of a command to these functions of its module, which give these results."""
    calls: Calls = []

    def replacement(name: str, result: Any) -> Any:
        return lambda *given, **options: calls.append((name, given, options)) or result

    for name, result in results.items():
        monkeypatch.setattr(module, name, replacement(name, result))
    return calls


def names_of(calls: Calls) -> list[str]:
    return [name for name, _, _ in calls]


CONTEXTS = {"join_process_group": nullcontext("group"), "train_with_progress": None}
TRAINED = {
    **CONTEXTS,
    "new_run": nullcontext(("parts", "state", "history")),
    **dict.fromkeys(("check_same_run", "check_same_ensemble", "check_sweep", "train_members", "resume_members")),
    "train_sweep": 7,
    "prepare": "parts",
    "describe_run": "the data",
    "describe_sweep": None,
    "describe_members": "the members",
}


def of_run(folder: Path) -> dict[str, Any]:
    return {"experiments_path": str(folder), "experiment_name": "run", "hdf5_file": "data.hdf5"}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("use_gpu", [False, True])
def test_train_makes_one_run_or_checks_that_it_is_the_same(monkeypatch, tmp_path, exists: bool, use_gpu: bool) -> None:
    calls = recorded(monkeypatch, train, **TRAINED)
    monkeypatch.setattr(train.Options, "deadline", lambda _: 5.0)
    options = train.Options(**of_run(tmp_path), init_from="m", training=TrainingConfig(use_gpu=use_gpu))
    directory, config = tmp_path / "run", options.to_config("data.hdf5")
    if exists:
        directory.mkdir()
    assert train.run(options) == 0
    assert calls == [
        *([("check_same_run", (directory, config), {"init_from": "m"})] if exists else []),
        ("join_process_group", ("cuda" if use_gpu else "cpu",), {}),
        ("new_run", (str(tmp_path), "run", config, "group"), {"init_from": "m"}),
        ("train_with_progress", (directory, "parts", "state", "history", 5.0), {}),
    ]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("sweep", [(), ("rng=1,2",), ("dropout=0,0.5", "rng=1,2")])
def test_train_makes_or_resumes_several_models(monkeypatch, tmp_path, capsys, exists: bool, sweep) -> None:
    calls = recorded(monkeypatch, train, **TRAINED)
    monkeypatch.setattr(train.Options, "deadline", lambda _: 5.0)
    options = train.Options(**of_run(tmp_path), sweep=sweep, num_models=1 if sweep else 2)
    directory, config = tmp_path / "run", options.to_config("data.hdf5")
    if exists:
        directory.mkdir()
    swept = sweep_configs(config, sweep=sweep) if len(sweep) > 1 else {}
    members = member_configs(config, num_models=options.num_models, sweep=sweep)
    assert train.run(options) == (7 if swept else 0)
    if swept:
        sweeping = ("train_sweep", (directory, swept, sweep), {"deadline": 5.0})
        assert calls == [("check_sweep", (directory, swept), {}), sweeping]
    elif exists:
        again = {"may_have_ended": True, "given": members, "deadline": 5.0}
        assert calls == [("check_same_ensemble", (directory, members), {}), ("resume_members", (directory,), again)]
        assert capsys.readouterr().out == f"{directory} exists, with these configs: resuming it.\n"
    else:
        assert calls == [("train_members", (str(tmp_path), "run", members, 5.0), {})]
    with pytest.raises(ValueError, match=r"^--init-from: expected one model to train"):
        train.run(dataclasses.replace(options, init_from="m"))

    calls.clear()
    assert train.run(dataclasses.replace(options, dry_run=True)) == 0
    printed = capsys.readouterr()
    assert not {"train_sweep", "train_members", "resume_members"} & set(names_of(calls))
    if swept:
        assert calls[-1] == ("describe_sweep", (directory, swept), {})
        assert (printed.out, printed.err) == ("", "the data\n")
    else:
        assert json.loads(printed.out) == [member.to_dict() for member in members]
        assert printed.err == "the members\nthe data\n"
    assert [given for name, given, _ in calls if name == "describe_run"] == [(directory, "parts")]


def test_train_makes_the_example_data_where_no_data_are_given(monkeypatch, tmp_path, capsys) -> None:
    calls = recorded(monkeypatch, train, **TRAINED, _make_example_data=None)
    options = train.Options(experiments_path=str(tmp_path), experiment_name="run")
    example = tmp_path / "example_data.hdf5"
    assert train.run(dataclasses.replace(options, dry_run=True)) == 0
    assert capsys.readouterr().err == f"{example} would be made.\n"
    assert calls == []
    assert train.run(options) == 0
    assert calls[0] == ("_make_example_data", (example,), {})
    assert calls[2][1][2] == options.to_config(example)
    example.touch()
    assert train.run(dataclasses.replace(options, dry_run=True)) == 0
    assert capsys.readouterr().err == "the data\n"


CHANGES: dict[str, Any] = {
    "new_max_epochs": 9,
    "new_patience": 3,
    "hdf5_file": "a.hdf5",
    "processes": 2,
    "num_threads": 4,
    "checkpoint_every": "2epochs",
    "keep": "all",
    "accept": ("dropout",),
    "skip": ("1:2",),
}


@pytest.mark.parametrize("of_members", [True, False])
@pytest.mark.parametrize("is_whole", [True, False])
def test_resume_passes_on_what_changes(monkeypatch, tmp_path, of_members: bool, is_whole: bool) -> None:
    results = {**CONTEXTS, "resume_members": None, "resumed_run": nullcontext(("parts", "state", "history"))}
    config = SimpleNamespace(training=SimpleNamespace(use_gpu=is_whole))
    calls = recorded(monkeypatch, resume, **results, is_ensemble=of_members, is_whole=is_whole, read_config=config)
    monkeypatch.setattr(resume.Options, "deadline", lambda _: 5.0)
    for where in ((tmp_path, "run"), (tmp_path / "run", None)):
        calls.clear()
        given: dict[str, Any] = {"experiments_path": str(where[0]), "experiment_name": where[1]}
        assert resume.run(resume.Options(**given, **CHANGES)) == 0
        directory = tmp_path / "run"
        if of_members:
            assert calls[1:] == [("resume_members", (directory,), {"deadline": 5.0, **CHANGES})]
        else:
            assert calls[2:] == [
                ("join_process_group", ("cuda" if is_whole else "cpu",), {}),
                ("is_whole", (directory,), {}),
                ("resumed_run", (directory, "group"), {"may_have_ended": not is_whole, **CHANGES}),
                ("train_with_progress", (directory, "parts", "state", "history", 5.0), {}),
            ]


@pytest.mark.parametrize("address", [None, "https://comet"])
def test_logs_are_sent_with_the_names_that_were_given(monkeypatch, capsys, address) -> None:
    history = [("one", "two"), ()]
    sent: list[object] = []
    comet = SimpleNamespace(send=lambda *reports: sent.append(reports) or address)
    checkpoint = SimpleNamespace(history=history[0])
    calls = recorded(monkeypatch, send_to_comet, read_config="config", newest=checkpoint, experiment_comet=comet)
    options = send_to_comet.Options(experiment_dir="run", comet_project="p")
    assert send_to_comet.run(options) == (address is None)
    assert calls[2:] == [
        ("experiment_comet", (Path("run"), "config"), {"offline": False, "patience": 600.0, "project": "p"})
    ]
    assert sent == [("one", "two")]
    assert capsys.readouterr().out == ("" if address is None else f"{address}\n")
    for nothing in (None, SimpleNamespace(history=())):
        monkeypatch.setattr(send_to_comet, "newest", lambda _, nothing=nothing: nothing)
        with pytest.raises(ValueError, match="run has no saved epoch yet"):
            send_to_comet.run(options)


@pytest.mark.parametrize(("problems", "different", "code"), [((), None, 0), (("epoch 2",), (1, 0), 1)])
def test_bisect_tells_where_runs_differ_by_its_exit_code(monkeypatch, capsys, problems, different, code: int) -> None:
    found = SimpleNamespace(different=different)
    results = {"bisect_record": (problems, 4), "bisect_runs": found, "format_bisection": "the text"}
    calls = recorded(monkeypatch, bisect, **results, kept_checkpoints=nullcontext())
    assert bisect.run(bisect.Options(dir_a="a")) == code
    told = "epoch 2" if code else "a: this machine computes what was recorded, in all 4 epochs"
    assert capsys.readouterr().out == f"{told}\n"
    assert calls == [("kept_checkpoints", ("a",), {}), ("bisect_record", ("a",), {})]
    calls.clear()
    assert bisect.run(bisect.Options(dir_a="a", dir_b="b")) == code
    assert capsys.readouterr().out == "A: a\nB: b\nthe text\n"
    kept = [("kept_checkpoints", (name,), {}) for name in "ab"]
    assert calls == [*kept, ("bisect_runs", ("a", "b"), {}), ("format_bisection", (found,), {})]


@pytest.mark.parametrize(
    ("problems", "replayed", "code"), [((), (1,), 0), (("epoch 2",), (1,), 1), ((), (), 1), (None, None, 0)]
)
def test_a_page_has_what_its_audit_found(monkeypatch, tmp_path, capsys, problems, replayed, code: int) -> None:
    audit = SimpleNamespace(problems=problems, replayed=replayed)
    results = {"audit_experiment": audit, "format_audit": "one\ntwo", "run_page": "the page é", "check_no_links": None}
    calls = recorded(monkeypatch, page, **results)
    sample, run = None if problems is None else 2, tmp_path / "run"
    monkeypatch.setattr(page, "kept_checkpoints", lambda _: nullcontext())
    run.mkdir()
    for out in (None, str(tmp_path / "new" / "a.HTM")):
        calls.clear()
        assert page.run(page.Options(experiment_dir=str(run), out=out, sample=sample)) == code
        path = run / "page.html" if out is None else Path(out)
        assert path.read_bytes() == "the page é".encode()
        assert capsys.readouterr().out == f"{path}\n"
        audited = [("audit_experiment", (run,), {"sample": 2}), ("format_audit", (audit, "run"), {})]
        lines = None if sample is None else ["one", "two"]
        checked = [("check_no_links", (run,), {})] if out is None else []
        assert calls == [*(audited if sample else []), ("run_page", (run,), {"audit": lines}), *checked]
    with pytest.raises(ValueError, match=r"ends in \.html\. Received: 'a\.txt'"):
        page.run(page.Options(experiment_dir=str(run), out="a.txt"))


@pytest.mark.parametrize("of_members", [True, False])
def test_evaluations_are_written_as_a_trainings_end_writes_them(monkeypatch, of_members: bool) -> None:
    parts: Any = SimpleNamespace(data="data", config=SimpleNamespace(hdf5_file="h"))
    calls = recorded(
        monkeypatch, evaluate, is_ensemble=of_members, member_folders=[Path("run/0"), Path("run/1")], read_config=None,
        experiment_lock=nullcontext(), resume_experiment=(parts, None, ("report",)), print_end=None,
        data_in_background=lambda: None,
    )  # fmt: skip
    assert evaluate.run(evaluate.Options(model_dir="run", hdf5_file="other", write=True)) == 0
    folders = [Path("run/0"), Path("run/1")] if of_members else [Path("run")]
    assert calls[2 if of_members else 1 :] == [
        call
        for folder in folders
        for call in (
            ("read_config", (folder,), {}),
            ("experiment_lock", (folder,), {}),
            ("resume_experiment", (folder,), {"may_have_ended": True, "hdf5_file": "other"}),
            ("data_in_background", (folder, "data", "h"), {}),
            ("print_end", (folder, parts, ("report",)), {}),
        )
    ]
    monkeypatch.setattr(evaluate, "resume_experiment", lambda *_, **__: (parts, None, ()))
    with pytest.raises(ValueError, match="has no finished epoch yet"):
        evaluate.run(evaluate.Options(model_dir="run", write=True))


@pytest.mark.parametrize("reports", [(), ("c",), ("c", "d")])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_training_shows_where_it_is_and_is_ended_by_the_first(monkeypatch, capsys, reports, rank, is_quiet) -> None:
    shown: list[object] = []

    class Bars:
        on_batch, track = "on_batch", "track"

        def __init__(self, max_epochs: int) -> None:
            assert max_epochs == 9

        def __enter__(self) -> None:
            shown.append("begin")

        def __exit__(self, *_: object) -> None:
            shown.append("end")

        def __call__(self, report: object) -> None:
            shown.append(report)

    config = SimpleNamespace(training=SimpleNamespace(max_epochs=9))
    parts: Any = SimpleNamespace(config=config, process_group=SimpleNamespace(rank=rank))
    state: Any = SimpleNamespace(epoch=2, batch=0)
    history: Any = ("a", "b")
    results = {"describe_run": "the run", "describe_start": "resuming", "print_end": None, "run_experiment": reports}
    calls = recorded(monkeypatch, _training, **results, _print_compilation=None)
    checked: list[str] = []
    monkeypatch.setattr(_training, "Progress", Bars)
    monkeypatch.setattr(_training, "is_quiet", lambda: is_quiet)
    monkeypatch.setattr(_training, "print_progress", print)
    monkeypatch.setattr(_training, "one_an_epoch", tuple)
    monkeypatch.setattr(_training, "same_folder", lambda _: nullcontext(lambda: checked.append("same")))
    monkeypatch.setattr(_training, "stop_on_signals", lambda group, *, at_second, deadline: nullcontext(deadline))
    _training.train_with_progress(Path("run"), parts, state, history, 5.0)
    bars = {} if is_quiet else {"on_batch": "on_batch", "track": "track"}
    expected = [("describe_run", (Path("run"), parts), {}), ("describe_start", (2, 0), {})]
    training = {"state": state, "history": history, "stop": 5.0, **bars}
    expected += [("run_experiment", (Path("run"), parts), training)]
    expected += [("_print_compilation", (parts,), {})] * len(reports)
    expected += [("print_end", (Path("run"), parts, (*history, *reports)), {})] * (rank == 0)
    assert calls == expected
    assert shown == ([] if is_quiet else ["begin", *reports, "end"])
    assert checked == ["same"] * (rank == 0)
    left = "Nothing is left to train.\n" if rank == 0 and not reports else ""
    assert capsys.readouterr().out == f"the run\nresuming\n{left}"
    for epoch, batch, is_told in ((0, 0, False), (0, 3, True), (9, 0, False), (8, 3, True)):
        calls.clear()
        own: Any = SimpleNamespace(epoch=epoch, batch=batch)
        _training.train_with_progress(Path("run"), parts, own, history)
        assert ("describe_start" in names_of(calls)) is is_told
