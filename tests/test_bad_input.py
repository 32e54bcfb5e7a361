"""Claims about what the user got wrong: one clear line that names it, exit code 2, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from preloaded import finished, start_command

from dwiml_func.cli.main import COMMANDS
from dwiml_func.experiment.config import RunConfig

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of experiments, with one in it that has no checkpoint yet."""
    path = tmp_path / "experiments"
    (path / "there").mkdir(parents=True)
    (path / "there" / "config.json").write_text(RunConfig(hdf5_file=str(PHANTOM)).to_json())
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--optimizer", "Foo"], ["optimizer", "Foo", "'Adam', 'AdamW', 'RAdam', 'SGD'"]),
        (["--learning-rate", "abc"], ["Learning rate 'abc'"]),
        (["--learning-rate", "0.1 0.2"], ["'0.1' has no number of epochs"]),
        (["--learning-rate", "-0.1"], ["Learning rate '-0.1'"]),
        (["--learning-rate=-0.1"], ["Learning rate '-0.1'"]),
        (["--learning-rate", ""], ["Learning rate is empty"]),
        (["--learning-rate"], ["Learning rate is empty"]),
        (["--batch-size-training", "0"], ["training batches: batch_size", "received 0"]),
        (["--batch-size-training", "1.5"], ["batch-size-training", "1.5"]),
        (["--batch_size_validation", "0"], ["validation batches: batch_size", "received 0"]),
        (["--processes", "-1"], ["processes", "received -1"]),
        (["--max-epochs", "1" + "0" * 400], ["max_epochs", "received 1000"]),
        (["--max-epochs", "1" + "0" * 5000], ["max-epochs"]),
        (["--max-epochs"], ["--max-epochs"]),
        (["--rng", "-1"], ["rng", "received -1"]),
        (["--rng", str(2**64)], ["rng", f"received {2**64}"]),
        (["--clip-grad", "nan"], ["clip_grad", "received nan"]),
        (["--clip-grad", "1e-46"], ["clip_grad", "that float32 can hold", "1e-46"]),
        (["--weight-decay", "1e39"], ["weight_decay", "that float32 can hold", "1e+39"]),
        (["--noise-gaussian-size-forward", "1e39"], ["noise_gaussian_size_forward", "that float32 can hold"]),
        (["--learning-rate", "1e39"], ["'1e39' is not a positive finite rate"]),
        (["--learning-rate", "cosine 1e39 5"], ["1e39"]),
        (["--num-shards", "1000000000"], ["num_shards", "below 65536"]),
        (["--step-size", "1e-30"], ["step_size", "would have more than 1000000 points"]),
        (["--patience", "soon"], ["--patience", "soon"]),
        (["--dropout", "1"], ["dropout", "received 1.0"]),
        (["--rnn-key", "rnn"], ["--rnn-key", "'rnn'", "'lstm', 'gru'"]),
        (["--rnn-layer-sizes"], ["rnn_layer_sizes", "received 0"]),
        (["--colour", "red"], ["--colour", "--help"]),
        (["--Max-epochs", "3"], ["--Max-epochs", "--max-epochs"]),
        (["one_argument_too_many"], ["one_argument_too_many"]),
        (["--input-group-name", "signal"], [str(PHANTOM), "'signal'", "'subj0'", "input (volume)"]),
        (["--streamline-group-name", "lines"], [str(PHANTOM), "'lines'", "'subj0'", "streamlines (streamlines)"]),
        (["--input-group-name", "streamlines"], [str(PHANTOM), "'streamlines'", "Expected a group of type 'volume'"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_a_bad_option_is_refused_by_name_and_value(cli, folder, options, named):
    before = contents(folder)
    cli("train", folder, "new", PHANTOM, *options).check_refusal(*named)
    assert contents(folder) == before


def test_a_dropout_without_a_place_to_act_is_named(cli, folder):
    for layers, given, is_named in (("4", (), True), ("4 4", (), False), ("4", ("--nb-previous-dirs", "1"), False)):
        options = ("--dry-run", "--dropout", "0.2", "--rnn-layer-sizes", *layers.split(), *given)
        assert ("--dropout changes nothing" in cli("train", folder, "new", PHANTOM, *options).err) is is_named


def test_a_dry_run_of_bad_data_prints_no_config(cli, folder):
    cli("train", folder, "new", PHANTOM, "--dry-run", "--input-group-name", "signal").check_refusal("'signal'")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "FOLDER", "caf\udce9"),
        ("train", "FOLDER", "new", "caf\udce9.hdf5"),
        ("runs", "caf\udce9"),
        ("caf\udce9",),
    ],
    ids=["name", "dataset", "folder", "command"],
)
def test_bytes_that_are_no_text_are_refused(cli, folder, arguments):
    before = contents(folder)
    named = r"'caf\udce9.hdf5'" if len(arguments) == 4 else r"'caf\udce9'"
    cli(*(text.replace("FOLDER", str(folder)) for text in arguments)).check_refusal(named, "UTF-8")
    assert contents(folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_refused(cli, folder):
    before = contents(folder)
    cli("train", folder, "new", PHANTOM, "--use-gpu").check_refusal("--use-gpu", "no CUDA device")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["FOLDER", "there", "DATA", "--rng", "99"], ["'there' exists in", "training.rng", "dwiml-func resume"]),
        (["FOLDER/nothing", "new", "DATA"], ["FOLDER/nothing", "is not a folder"]),
        (["FOLDER/there/config.json", "new", "DATA"], ["config.json' is not a folder"]),
        (["FOLDER", "..", "DATA"], ["'..'"]),
        (["FOLDER", "a/b", "DATA"], ["'a/b'"]),
        (["FOLDER", "../outside", "DATA"], ["'../outside'"]),
        (["FOLDER", "", "DATA"], ["''"]),
        (["FOLDER", "a\0b", "DATA"], [r"'a\x00b'"]),
        (["FOLDER", "a\nb", "DATA"], [r"'a\nb'"]),
        (["FOLDER", "-dash", "DATA"], ["'experiment-name'"]),
        (["FOLDER", "--", "-dash", "DATA"], ["'-dash'"]),
        (["FOLDER", "x" * 300, "DATA"], ["File name too long", "xxx"]),
        (["FOLDER", "new", "FOLDER/nothing.hdf5"], ["does not exist", "FOLDER/nothing.hdf5"]),
        (["FOLDER", "new", "FOLDER"], ["FOLDER", "not a file"]),
        (["FOLDER", "new", "FOLDER/there/config.json"], ["Expected an HDF5 file", "FOLDER/there/config.json"]),
        (["FOLDER"], ["EXPERIMENT_NAME"]),
        ([], ["EXPERIMENTS_PATH", "EXPERIMENT_NAME"]),
    ],
    ids=lambda value: " ".join(value)[:30].replace("\0", "NUL"),
)
def test_a_bad_place_is_refused_by_name(cli, folder, arguments, named):
    def place(text: str) -> str:
        return text.replace("FOLDER", str(folder)).replace("DATA", str(PHANTOM))

    before = contents(folder.parent)
    cli("train", *map(place, arguments)).check_refusal(*map(place, named))
    assert contents(folder.parent) == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def edit(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return spoil


def set_nan(file: Any) -> None:
    file["subj1/streamlines/data"][100, 1] = np.nan


def shorten(file: Any) -> None:
    file["subj0/streamlines/lengths"][3] = 1


def empty(file: Any) -> None:
    file.attrs["training_subjs"] = np.array([], dtype=float)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (truncate, ["truncated"]),
        (edit(set_nan), ["NaN", "'subj1'", "1 of 48 streamlines"]),
        (edit(shorten), ["fewer than two points", "'subj0'", "number 3"]),
        (edit(empty), ["no training subjects"]),
        (edit(lambda file: file.pop("subj2/input")), ["'input'", "'subj2'", "does not exist"]),
        (edit(lambda file: file.pop("subj1/streamlines")), ["'streamlines'", "'subj1'", "does not exist"]),
        (edit(lambda file: file.pop("subj0")), ["'subj0'"]),
    ],
    ids=["truncated", "nan", "one point", "no training subjects", "no input", "no streamlines", "no subject"],
)
def test_bad_data_is_refused_by_name(cli, folder, tmp_path, spoil, named):
    path = tmp_path / "data.hdf5"
    shutil.copy(PHANTOM, path)
    spoil(path)
    before = contents(folder)
    cli("train", folder, "new", path).check_refusal(str(path), *named)
    assert contents(folder) == before


@pytest.mark.parametrize("command", ["example-data", "create-hdf5"])
@pytest.mark.parametrize("path", [".", "/"])
def test_a_path_without_a_name_is_nothing_to_write(cli, tmp_path, monkeypatch, command, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    arguments = [tmp_path, tmp_path / "config.json"] if command == "create-hdf5" else []
    cli(command, *arguments, path).check_refusal(f"the name of a file or folder to write. Received: {path!r}")


def test_an_empty_argument_is_refused_and_not_taken_for_the_current_folder(cli, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = contents(folder)
    cli("train", "", "new", PHANTOM).check_refusal("Expected no empty argument. Received: '' new", "not set?")
    cli("runs", "").check_refusal("no empty argument")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("benchmark", "OUT", "--seeds", 1, 2, 1), "--seeds: expected each seed once. Received: 1 2 1."),
        (("benchmark", "OUT", "--people", "sub_1", "sub_1"), "--people: expected each of sub_1, "),
        (("benchmark", "OUT", "--people", "sub_9"), "at most once. Received: 'sub_9'."),
        (("benchmark", "OUT", "--data", "none"), "--data: expected each of "),
        (("benchmark", "OUT", "--processes", 0), "processes: expected"),
        (("benchmark", "OUT", "--max-epochs", 0), "max_epochs: expected"),
        (("create-hdf5", "OUT", "a.json", "b.hdf5", "--enforce-files-presence", "maybe"), "maybe"),
        (("track", "m", "d.hdf5", "o.trk", "--processes", 2, "--use-gpu"), "processes: expected 1 with --use-gpu"),
        (("track", "m", "d.hdf5", "o.trk", "--npv", 1, "--nt", 2), "npv: not allowed with nt. Received both."),
        (("track", "m", "d.hdf5", "o.trk", "--nt", 1, "--in-custom-seeds", "s.npy"), "nt: not allowed with in_custom"),
        (("track", "m", "d.hdf5", "o.trk"), "subject: expected the name of a subject"),
        (("track", "m", "o.trk", "--subject", "a"), "Expected HDF5_FILE and OUT"),
        (("track", "m", "d.hdf5", "o.trk", "--input", "a.nii"), "Expected OUT, as --input is given"),
        (("track", "m", "d.hdf5", "o.trk", "--subject", "a", "--skip", -1), "skip: expected"),
        (("track", "m", "d.hdf5", "o.trk", "--subject", "a", "--compress", 0), "compress: expected"),
        (
            ("track", "m", "d.hdf5", "o.trk", "--subject", "a", "--tracking-mask", "b"),
            "tracking_mask: requires --in",
        ),
        (
            ("track", "m", "o.trk", "--input", "a.nii", "--subject", "a"),
            "subject: requires a dataset, not --input",
        ),
        (("visualize-loss", "m", "d", "o", "--subject", "a", "--best-and-worst", 0), "best_and_worst: expected"),
        (("visualize-loss", "m", "d", "o", "--subject", "a", "--best-and-worst", 101), "received 101"),
        (("visualize-loss", "m", "d", "o", "--subject", "a", "--displacement", -1), "displacement: expected"),
        (("runs", "OUT", "--json", "--csv"), "Expected --json or --csv. Received: both."),
        (("plot", "OUT", "--drift", "--csv", "a.csv"), "--drift: not allowed with --panels"),
        (("plot", "OUT", "--tracking", "--drift"), "--tracking: requires one experiment"),
        (("plot", "OUT", "--correlate", "loss"), "--correlate: expected NAME NAME. Received: loss."),
        (("plot", "OUT", "--correlate", "loss", "lr", "--csv", "a.csv"), "--correlate: not allowed with --panels"),
        (("page", "OUT", "a.txt"), "Expected a name that ends in .html. Received: 'a.txt'."),
        (("page", "OUT", "a.html", "--sample", 0), "sample: expected"),
    ],
    ids=lambda value: " ".join(map(str, value[:1] + value[-2:])) if isinstance(value, tuple) else "",
)
def test_options_that_need_no_file_are_checked_first_and_nothing_is_written(cli, tmp_path, arguments, named):
    out = tmp_path / "out"
    cli(*(out if each == "OUT" else each for each in arguments)).check_refusal(named)
    assert not out.exists()


def test_a_link_to_nothing_is_a_file_that_exists(cli, tmp_path):
    (tmp_path / "data.hdf5").symlink_to("nowhere")
    cli("example-data", tmp_path / "data.hdf5").check_refusal("The file exists")
    assert (tmp_path / "data.hdf5").is_symlink()
    for target in ("nowhere", "run"):  # the second is a circle
        (tmp_path / "run").unlink(missing_ok=True)
        (tmp_path / "run").symlink_to(target)
        cli("train", tmp_path, "run", PHANTOM).check_refusal("broken link, to " + target)


@pytest.mark.parametrize("options", [["--num-models", 10**9], ["--num-models", 5000, "--sweep", "learning-rate=1,2,3"]])
def test_an_ensemble_that_no_disk_could_hold_is_refused_early(cli, folder, options):
    cli("train", folder, "new", PHANTOM, *options).check_refusal("at most 10000 members")


@pytest.mark.parametrize("arguments", [["fly"], ["Train"], ["fly", "-q"], [""]])
def test_an_unknown_command_is_refused(cli, arguments):
    cli(*arguments).check_refusal(repr(arguments[0]), ", ".join(COMMANDS))


def test_a_real_process_refuses_in_one_line_too(folder, tmp_path):
    truncate(Path(shutil.copy(PHANTOM, tmp_path / "data.hdf5")))
    before = contents(folder)
    arguments = ["train", folder, "new", tmp_path / "data.hdf5"]
    done = finished(start_command(*arguments))
    assert (done.returncode, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert "data.hdf5" in line
    other = finished(start_command(*arguments, "--optimizer", "Foo"))
    assert (other.returncode, other.out) == (2, "")
    assert "invalid choice 'Foo' for argument '--optimizer'" in other.err
    assert "Traceback" not in other.err
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["early stopping", "patience 1", "--new-patience of at least 2"]),
        (["--new-max-epochs", "20"], ["early stopping"]),
        (["--new-patience", "1"], ["patience 1", "at least 2"]),
        (["--new-patience", "9", "--new-max-epochs", "3"], ["the maximum is 3", "at least 4"]),
        (["--new_max_epochs", "0"], ["max_epochs", "received 0"]),
        (["--new-patience", "x"], ["--new-patience", "'x'"]),
        (["--hdf5-file", "/no/such/file"], ["does not exist", "/no/such/file"]),
        (["--colour", "red"], ["--colour"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_resume_refuses_in_one_line_and_changes_nothing(cli, experiments, arguments, named):
    before = contents(experiments)
    cli("resume", experiments, "run", *arguments).check_refusal(*named)
    assert contents(experiments) == before


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", ["invalid JSON"]),
        (b"\xff", ["invalid JSON"]),
        (b'{"hdf5_file": "a", "colour": 1}', ["colour", "unexpected"]),
        (b'{"hdf5_file": 3}', ["hdf5_file", "received 3"]),
        (b"[" * 100_000, ["recursion limit"]),
        (b'{"hdf5_file": "a", "training": {"rng": 1' + b"0" * 400 + b"}}", ["rng", "received 1000"]),
        (b'{"hdf5_file": "a", "training": {"rng": 1' + b"0" * 9000 + b"}}", ["out of range"]),
    ],
    ids=["empty", "no text", "unknown", "type", "deep", "huge", "longer"],
)
def test_a_corrupt_config_is_refused_on_resume(cli, experiments, content, named):
    (experiments / "run" / "config.json").write_bytes(content)
    before = contents(experiments)
    cli("resume", experiments, "run", "--new-patience", "9").check_refusal(
        str(experiments / "run" / "config.json"), *named
    )
    assert contents(experiments) == before


def test_a_config_that_a_windows_editor_wrote_is_read(cli, experiments):
    """It writes a byte order mark."""
    path = experiments / "run" / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert cli("digest", experiments / "run").code == 0
    cli("resume", experiments, "run").check_refusal("No epoch is left to train")


def test_a_run_whose_checkpoints_are_all_corrupt_is_refused_on_resume_and_by_digest(cli, experiments):
    for name in ("2", "3"):
        (data,) = (experiments / "run" / "checkpoint" / name / "leaves" / "d").iterdir()
        data.write_bytes(data.read_bytes()[:-1])
    before = contents(experiments)
    cli("resume", experiments, "run", "--new-patience", "9").check_refusal(
        "Every checkpoint is corrupt", "checkpoint/2 is corrupt", "checkpoint/3 is corrupt"
    )
    cli("digest", experiments / "run").check_refusal("checkpoint/3 is corrupt")
    assert contents(experiments) == before


def test_a_folder_that_is_not_an_experiment_is_refused(cli, folder):
    cli("resume", folder, "nothing").check_refusal(str(folder / "nothing"), "not an experiment")
    cli("resume", folder / "nothing", "there").check_refusal(str(folder / "nothing"), "not a folder")
    cli("resume", folder, "../there").check_refusal("'../there'")
    cli("digest", folder / "there").check_refusal("No checkpoint", str(folder / "there"))
    cli("digest", folder / "nothing").check_refusal("No checkpoint", str(folder / "nothing"))
    cli("digest").check_refusal("EXPERIMENT_DIR")
