"""README and guides are true: their scripts and commands run as they stand there, and do what they say."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from creation_cases import make_folder
from experiment_cases import latest_digest
from preloaded import TORCHRUN, finished, run_command, run_program, start_command

from dwiml_func.experiment.comparison.runs import list_runs

ROOT = Path(__file__).parents[1]
PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
SHORT = ("--skip-window-lag", "--skip-figures")  # the streamlines of the phantom are too short for a window lag


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(language: str, heading: str) -> list[str]:
    (text,) = (page.read_text() for page in PAGES if f"\n## {heading}\n" in page.read_text())
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def _run_script(script: str, folder: Path) -> str:
    """Run a script in a process of its own, where warnings are errors."""
    start = "import torch, warnings\ntorch.set_num_threads(1)\nwarnings.simplefilter('error')\n"
    return run_program(start + script, folder=folder)


def test_the_script_of_an_ensemble_runs(tmp_path: Path) -> None:
    (script,) = _blocks("python", "Many models at once")
    last = _run_script(script, tmp_path).splitlines()[-1]
    assert re.fullmatch(r"10 \{0: \d[^ ]*, 1: \d[^ ]*, 2: \d[^ ]*\}", last)


def test_the_script_trains_to_the_bits_of_the_command(tmp_path: Path) -> None:
    (script,), (pieces,) = _blocks("python", "Compose your own loop"), _blocks("python", "The pieces")
    assert len([line for line in script.splitlines() if line.strip()]) <= 30
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    shutil.copy(PHANTOM, experiments / "example_data.hdf5")
    printed = _run_script(script, tmp_path)
    again = _run_script(script, tmp_path)
    command = ("train", "experiments", "command", "experiments/example_data.hdf5")
    run_command(*command, "--max-epochs", 3, "--nb-previous-dirs", 1, "--skip-figures", folder=tmp_path)

    assert re.fullmatch(r"\d+ batches; \d+ streamlines in the first; \(5, 6\)\n", _run_script(pieces, tmp_path))
    assert [line.split()[0] for line in printed.splitlines()] == ["1", "2", "3"]
    assert again == ""  # the run is restored, and has no epoch left
    digests = [latest_digest(experiments / name) for name in ("my_loop", "command")]
    assert digests[0] == digests[1]
    assert [(run.name, run.state) for run in list_runs(experiments)] == [
        (name, "finished") for name in ("command", "my_loop")
    ]


def test_a_model_of_ones_own_is_short_and_learns(tmp_path: Path) -> None:
    (script,) = _blocks("python", "Bring your own model")
    own = re.search(r"^class .*?(?=^def batches_of)", script, flags=re.MULTILINE | re.DOTALL)
    assert own is not None
    assert len([line for line in own[0].splitlines() if line.strip()]) <= 20  # the module and its loss
    (tmp_path / "experiments").mkdir()
    shutil.copy(PHANTOM, tmp_path / "experiments" / "example_data.hdf5")
    epochs = [line.split() for line in _run_script(script, tmp_path).splitlines()]
    assert [epoch for epoch, _, _ in epochs] == ["1", "2", "3", "4", "5"]
    assert float(epochs[-1][1]) < 0.9 * float(epochs[0][1])  # of the training
    assert float(epochs[-1][2]) < float(epochs[0][2])  # of the validation


def test_two_commands_do_all_the_set_up() -> None:
    blocks = _blocks("sh", "Set up")
    assert [len(block.splitlines()) for block in blocks] == [1, 1]
    assert "dwiml-func train" in blocks[0]
    assert "pytest" in blocks[1]


def test_every_command_has_its_line_in_the_guide() -> None:
    from dwiml_func.cli.main import COMMANDS

    text = (ROOT / "docs" / "commands.md").read_text()
    missing = [command for command in COMMANDS if f"dwiml-func {command}" not in text]
    assert missing == []


def test_the_example_of_gradients_through_training_gives_gradients(tmp_path: Path) -> None:
    [script] = _blocks("python", "Gradients through training")
    printed = _run_script(script, tmp_path).split()
    assert len(printed) == 2
    assert all(abs(float(number)) > 0 for number in printed)


def test_the_commands_that_reproduce_and_verify_run_as_they_stand(tmp_path: Path) -> None:
    (block,) = _blocks("sh", "Compare and verify")
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    shutil.copy(PHANTOM, experiments / "example_data.hdf5")
    run_command("train", "experiments", "first_run", "--max-epochs", 2, *SHORT, folder=tmp_path)
    printed = ""
    for line in block.replace("--max-epochs 62", "--max-epochs 3").splitlines():
        command, _, fails = line.partition(" || ")  # `|| true`: diff found a difference
        program, *arguments = shlex.split(command)
        assert (program, fails) in (("dwiml-func", ""), ("dwiml-func", "true"))
        done = finished(start_command(*arguments, folder=tmp_path))
        assert done.returncode == (1 if fails else 0), done.err
        printed += done.out
    assert "epoch 2, replayed from checkpoint 1, is bitwise identical to the recorded epoch" in printed
    assert "training.learning_rate" in printed  # what differs
    assert re.search(r"^slower +finished +3/3 ", printed, flags=re.MULTILINE)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_the_commands_that_go_on_and_that_start_several_processes_run_as_they_stand(tmp_path: Path) -> None:
    (go_on,) = (block for block in _blocks("", "The first run") if block.startswith("dwiml-func resume"))
    (several,) = _blocks("", "Train with several processes")
    assert " ".join(several.split()) in " ".join((ROOT / "README.md").read_text().split())  # it has the same
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    shutil.copy(PHANTOM, experiments / "example_data.hdf5")
    run_command("train", "experiments", "first_run", "--max-epochs", 1, *SHORT, folder=tmp_path)
    arguments = shlex.split(go_on.replace("80", "2"))[1:]
    assert "Finished after 2 epochs" in run_command(*arguments, folder=tmp_path)
    program, *arguments = shlex.split(several)
    assert program == "torchrun"
    arguments += ["--max-epochs", "1", *SHORT]
    printed = run_program(TORCHRUN, *arguments, environment={"OMP_NUM_THREADS": "1"}, folder=tmp_path)
    assert "Finished after 1 epoch" in printed


def test_the_commands_for_data_of_ones_own_run_as_they_stand(tmp_path: Path) -> None:
    (commands,) = _blocks("", "Your data")
    make_folder(tmp_path)
    for name in ("training", "validation"):
        (tmp_path / f"{name[:5]}.txt").rename(tmp_path / f"{name}.txt")
    (tmp_path / "experiments").mkdir()
    printed = ""
    for line in commands.splitlines():
        more = ("--max-epochs", "1", "--rnn-layer-sizes", "4", *SHORT) if " train " in line else ()
        printed = run_command(*shlex.split(line)[1:], *more, folder=tmp_path)
    assert "Finished after 1 epoch" in printed
    assert (tmp_path / "data.png").stat().st_size > 10_000


def test_the_example_of_a_creation_config_can_be_read(tmp_path: Path) -> None:
    from dwiml_func.data.creation.config import read_groups_config

    (block,) = _blocks("json", "Bring your own data")
    (tmp_path / "config.json").write_text(block)
    assert sorted(read_groups_config(tmp_path / "config.json")) == ["input", "streamlines"]


TRAINING_OPTIONS_OF_DWI_ML = (  # of l2t_train_model and l2t_resume_training_from_checkpoint
    *("add_a_tracking_validation_phase", "add_entropy_to_gauss", "add_eos", "batch_size_training", "batch_size_units"),
    *("batch_size_validation", "cache_size", "clip_grad", "comet_project", "comet_workspace", "compress", "cycles"),
    *("dg_dropout", "dg_key", "dg_nb_clusters", "dg_nb_gaussians", "dropout", "eos_weight", "hdf5_file"),
    *("input_embedded_size", "input_embedding_key", "kernel_size", "lazy", "learning_rate"),
    *("max_batches_per_epoch_training", "max_batches_per_epoch_validation", "max_epochs", "nb_cnn_filters"),
    *("nb_points", "nb_previous_dirs", "nb_streamlines_per_chunk", "nb_subjects_per_batch", "neighborhood_radius"),
    *("neighborhood_resolution", "neighborhood_type", "new_max_epochs", "new_patience", "noise_gaussian_size_forward"),
    *("noise_gaussian_size_loss", "normalize_outputs", "normalize_prev_dirs", "normalize_targets", "optimizer"),
    *("patience", "patience_delta", "prev_dirs_embedded_size", "prev_dirs_embedding_key", "processes"),
    *("reverse_ratio", "rng", "rnn_key", "rnn_layer_sizes", "split_ratio", "step_size", "tracking_mask"),
    *("tracking_phase_frequency", "tracking_phase_nb_segments_init", "use_gpu", "use_layer_normalization"),
    *("use_skip_connection", "weight_decay"),
)


def test_every_training_option_of_dwi_ml_is_ours_or_in_the_table(cli) -> None:
    helps = cli("train", "--help").out + cli("resume", "--help").out
    ours = {name.lower().replace("-", "_") for name in re.findall(r"--([a-z0-9-]+)|HDF5_FILE", helps)}
    table = (ROOT / "docs" / "dwi_ml.md").read_text()
    assert [name for name in TRAINING_OPTIONS_OF_DWI_ML if name not in ours and name not in table] == []


def test_a_torch_dataloader_is_a_source_and_the_weights_go_back(tmp_path: Path) -> None:
    (script,) = _blocks("python", "Bring your own data source")
    losses = [float(line.split()[1]) for line in _run_script(script, tmp_path).splitlines()]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]


def _names_in_tables() -> list[str]:
    """What stands in backticks in the tables of pieces, with the module of its row."""
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", (ROOT / "docs" / "compose.md").read_text(), flags=re.MULTILINE)
    names = []
    for first, second in rows:
        module = re.fullmatch(r"`(dwiml_func\.\w+)`", first)
        cells, prefix = (second, module[1]) if module else (first + second, "dwiml_func")
        names += [f"{prefix}.{name}" for name in re.findall(r"`(\w+)(?:\(.*?\))?`", cells)]
    right = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "docs" / "dwi_ml.md").read_text(), flags=re.MULTILINE)
    known = re.findall(r"`([a-zA-Z][\w.]*)(?:\(.*?\))?`", "".join(cell for cell in right if "dwiml-func" not in cell))
    return names + [f"dwiml_func.{name.removeprefix('dwiml_func.')}" for name in known]


@pytest.mark.parametrize("name", sorted(set(_names_in_tables())))
def test_every_name_in_the_tables_can_be_imported_as_written(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), name


def test_what_names_elsewhere_are_called_here_is_there() -> None:
    cells = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "docs" / "names.md").read_text(), flags=re.MULTILINE)
    code = [part for cell in cells for part in re.findall(r"`([^`]+)`", cell)]
    called = {name for part in code for name in re.findall(r"(?<![\w.])([A-Za-z_]\w+)\(", part)}
    named = {part for part in code if re.fullmatch(r"\w+", part)} - {"lr", "update", "DataLoader"}
    places = [importlib.import_module(f"dwiml_func{room}") for room in ("", ".data", ".tracking")]
    assert len(called | named) > 30
    assert [name for name in called | named if not any(hasattr(place, name) for place in places)] == []
    whole = [part for part in code if re.fullmatch(r"[a-z_]+\(.*\)", part) and "..." not in part]
    space = {**vars(places[0]), **vars(importlib.import_module("dwiml_func.optim")), "torch": torch}
    space |= {"model": torch.nn.Linear(1, 1), "loss": len, "step": len, "loss_fn": len, "make_loader": list}
    space |= {"optimizer": space["adam"](), "jit_step": importlib.import_module("dwiml_func.compiled").jit_step}
    space |= {"from_loader": importlib.import_module("dwiml_func").from_loader, "key": space["Key"](0), "number": 1}
    assert len(whole) > 10
    for part in whole:
        eval(part, space)  # each can be called as it stands there


def test_the_scripts_that_save_and_that_log_run(tmp_path: Path) -> None:
    (saves,), (logs,) = _blocks("python", "Save and restore in a script"), _blocks("python", "Log in a script")
    assert [_run_script(saves, tmp_path) for _ in range(2)] == ["1 1\n", "2 2\n"]  # the second restores
    assert _run_script(logs, tmp_path).splitlines()[-1] == "4 steps logged"


def test_the_tables_name_the_pieces() -> None:
    assert {"dwiml_func.jit_step", "dwiml_func.writers.Comet", "dwiml_func.models.load_model"} <= set(
        _names_in_tables()
    )


def _anchors(page: Path) -> set[str]:
    """What GitHub and the site call the headings of a page in its links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_commands_that_track_are_those_of_the_notebook_which_runs() -> None:
    (block,) = _blocks("", "Track and look")
    text = (ROOT / "docs" / "notebooks" / "first_run.ipynb").read_text()
    assert [line for line in block.splitlines() if line not in text] == []


def test_the_citation_has_the_version() -> None:
    from dwiml_func import __version__

    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_recipes_run_one_after_the_other(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 16
    checks = "assert state.epoch >= 2 and 0 < report.train['loss'] < 0.75\n"
    script = "\n".join(block + (checks if "run(" in block.splitlines()[-1] else "") for block in blocks)
    _run_script(script + "assert torch.equal(model[0].weight, state.params['0.weight'])\n", tmp_path)
