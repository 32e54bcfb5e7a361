"""Claims about `train --num-models` and `--sweep`: members are the ordinary runs of their own configs."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from experiment_cases import latest_digest

from dwiml_func.checkpoint.checkpoint import restore
from dwiml_func.checkpoint.digest import state_leaves
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.experiment import ensemble_resume, ensemble_run
from dwiml_func.experiment.config import CheckpointConfig, RunConfig
from dwiml_func.experiment.ensemble_resume import resume_ensemble
from dwiml_func.experiment.ensemble_run import _holds, prepare_ensemble, run_ensemble
from dwiml_func.experiment.folder import create_ensemble, read_config, read_ended, write_ended
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.run_files import HASH_PATIENCE
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.signals import StopRequest, TrainingStopped
from dwiml_func.experiment.sweep import member_configs

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OPTIONS = (
    *("--rnn-layer-sizes", "5", "4", "--dropout", "0.2", "--nb-previous-dirs", "1", "--reverse-ratio", "0.5"),
    *("--batch-size-training", "30", "--batch-size-validation", "20", "--max-epochs", "2", "--clip-grad", "1"),
    "--skip-figures",
)


def assert_close(one: Path, other: Path) -> None:
    """Two experiments of the same config have the same history and, up to rounding, the same latest state.

    Float32 rounds to 6e-8; Adam divides by the root of the second moment, and 8 steps of 0.01 may carry a rounding of
    a small gradient into a parameter, so states may differ by a hundredth of a step.
    """
    parts = prepare(read_config(one))
    assert read_config(one) == read_config(other)
    a, b = restore(one, parts.first_state()), restore(other, parts.first_state())
    assert (a.state.step, a.state.epoch, a.state.best.epoch) == (b.state.step, b.state.epoch, b.state.best.epoch)
    for report, own in zip(a.history, b.history, strict=True):
        assert report.num_points == own.num_points
        assert report.train == pytest.approx(own.train, rel=1e-4)
        assert report.valid == pytest.approx(own.valid, rel=1e-4)
    theirs = state_leaves(b.state)
    for name, leaf in state_leaves(a.state).items():
        torch.testing.assert_close(leaf, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with an ensemble `seeds`: two seeds."""
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("ensembles")
    command = ["train", str(folder), "seeds", str(PHANTOM), *OPTIONS, "--learning-rate", "0.01", "--num-models", "2"]
    assert main(command) == 0
    return folder


def test_members_are_ordinary_runs(trained, tmp_path, cli):
    for number, rng in enumerate(("1234", "1235")):
        seeds = ("--rng", rng, "--data-rng", "1234", "--learning-rate", "0.01")
        assert cli("train", tmp_path, str(number), PHANTOM, *OPTIONS, *seeds).code == 0
        assert_close(trained / "seeds" / str(number), tmp_path / str(number))
    assert latest_digest(trained / "seeds" / "0") != latest_digest(trained / "seeds" / "1")


def test_a_folder_holds_a_state_whose_checkpoint_has_its_digest(trained, tmp_path):
    folder = Path(shutil.copytree(trained / "seeds" / "0", tmp_path / "0"))
    name = list_checkpoints(folder)[-1]
    state = restore(folder, prepare(read_config(folder)).first_state()).state
    other = state.replace(params={name: 2 * leaf for name, leaf in state.params.items()})
    assert [_holds(folder, each, may_differ=True) for each in (state, other)] == [True, False]
    assert _holds(folder, other, may_differ=False)
    assert not _holds(folder, state.replace(epoch=7), may_differ=False)
    (folder / "checkpoint" / name / "manifest.json").write_text("{}")
    assert not _holds(folder, state, may_differ=True)


def test_a_member_is_an_experiment_for_other_commands(trained, tmp_path, cli):
    seeds = Path(shutil.copytree(trained / "seeds", tmp_path / "seeds"))
    assert load_model(seeds / "1" / "best_model").module is not None
    assert len(np.load(seeds / "1" / "logs" / "train_loss_monitor_per_epoch.npy")) == 2
    assert cli("evaluate", seeds / "1", PHANTOM, "--subset", "validation").code == 0
    assert cli("resume", seeds, "1", "--new-max-epochs", "3").code == 0
    assert list_checkpoints(seeds / "1")[-1] == "3"


def test_learning_rates_and_decays_are_swept(tmp_path, cli):
    sweep = ("--sweep", "learning-rate=0.01,0.002*1 0.001", "weight-decay=0,0.1")
    done = cli("train", tmp_path, "sweep", PHANTOM, *OPTIONS, *sweep)
    assert done.code == 0, done.err
    assert "3: learning rate 0.002*1 0.001, weight decay 0.1, rng 1234" in done.out
    heading, *rows = [re.split("  +", line) for line in done.out.splitlines()[-5:]]
    assert heading[:3] == ["name", "learning_rate", "weight_decay"]
    assert ["3", "0.002*1 0.001", "0.1"] in [row[:3] for row in rows]
    numbers = ("--learning-rate", "0.002*1 0.001", "--weight-decay", "0.1")
    assert cli("train", tmp_path, "alone", PHANTOM, *OPTIONS, *numbers).code == 0
    (tmp_path / "sweep" / "3").rename(tmp_path / "moved")
    alone, moved = read_config(tmp_path / "alone"), read_config(tmp_path / "moved")
    schedules: list[Any] = [own.training.schedule for own in (alone, moved)]
    alone_rates, moved_rates = ([schedule(epoch) for epoch in range(3)] for schedule in schedules)
    assert alone_rates == moved_rates == [0.002, 0.001, 0.001]
    same = replace(moved, training=replace(moved.training, learning_rate=alone.training.learning_rate))
    (tmp_path / "moved" / "config.json").write_text(same.to_json())
    assert_close(tmp_path / "moved", tmp_path / "alone")


def small(**training) -> list[RunConfig]:
    config = RunConfig(hdf5_file=str(PHANTOM))
    model = replace(config.model, rnn_layer_sizes=(4,), dropout=0.2, nb_previous_dirs=1)
    batches = replace(config.batches, batch_size_training=30, batch_size_validation=20)
    options = {"max_epochs": 4, "learning_rate": ("0.01",), **training}
    config = replace(config, model=model, batches=batches, training=replace(config.training, **options))
    return member_configs(config, num_models=3)


def create(folder: Path, configs: list[RunConfig]) -> Path:
    return create_ensemble(folder, "run", configs)


def logging_steps(every: str) -> list[RunConfig]:
    configs = small(patience=1, learning_rate=("0.05",), validate_every=every)
    return [replace(config, logging=replace(config.logging, log_every=1)) for config in configs]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An ensemble that logs steps, and validates so often."""

    @cache
    def run(every: str) -> Path:
        whole = create(tmp_path_factory.mktemp("whole"), logging_steps(every))
        list(run_ensemble(whole, prepare_ensemble(logging_steps(every))))
        return whole

    return run


@pytest.mark.parametrize(
    ("batches", "every"),
    [(2, "1epoch"), (5, "1epoch"), (4, "2batches")],
    ids=["within the first epoch", "within the second", "within a validation within an epoch"],
)
def test_a_stopped_and_resumed_run_is_identical_to_the_uninterrupted_run(uninterrupted, tmp_path, batches, every):
    configs = logging_steps(every)
    whole, stopped = uninterrupted(every), create(tmp_path, configs)
    with pytest.raises(TrainingStopped):
        list(run_ensemble(stopped, prepare_ensemble(configs), stop=StopAfter(batches)))
    members, ensemble, histories = resume_ensemble(stopped)
    assert ensemble.batch > 0
    list(run_ensemble(stopped, members, ensemble=ensemble, histories=histories))

    for number in map(str, range(3)):
        assert latest_digest(whole / number) == latest_digest(stopped / number)
        assert list_checkpoints(whole / number) == list_checkpoints(stopped / number)
        for logs in ("logs/valid_local_loss_monitor_per_epoch.npy", "logs/steps.jsonl"):
            assert (whole / number / logs).read_bytes() == (stopped / number / logs).read_bytes()
        assert ('"valid_loss"' in (whole / number / logs).read_text()) == (every == "2batches")
    assert read_ended(whole) == read_ended(stopped)


def test_a_run_of_an_ensemble_logs_what_was_before_and_saves_where_a_member_is_best_ends_or_fails(
    tmp_path, monkeypatch
):
    configs, logged, saved = small(max_epochs=3), [], []

    def reports(*ends: dict[str, Any]) -> dict[int, Any]:
        return {number: SimpleNamespace(**({"is_best": False, "stop": None} | end)) for number, end in enumerate(ends)}

    def loop(_: object, state: Any, *, save: Any, must_save: Any, **options: Any):
        assert (options["on_batch"], options["on_report"], options["directory"]) == ((), None, directory)
        for batch, failed, ends, must in (
            (0, {}, ({}, {}), False),
            (3, {}, ({}, {}), True),
            (0, {1: "nan"}, ({}, {}), True),
            (0, {}, ({}, {"is_best": True}), True),
            (0, {}, ({"stop": "patience"}, {}), True),
        ):
            assert must_save(SimpleNamespace(batch=batch, failed=failed, members=reports(*ends))) is must
        assert logged == [("0", ("a", "b")), ("1", ()), ("2", ("c",))]
        logged.clear()
        for ends in (({}, {}, {}), ({}, {"stop": "patience"}, {}), ({"is_best": True},)):
            save(state, (SimpleNamespace(members=reports(*ends)),))
        yield from ()

    for name in ("remove_old", "write_ended"):
        monkeypatch.setattr(ensemble_run, name, lambda *_: None)
    for name in ("one_an_epoch", "fill_digests"):
        monkeypatch.setattr(ensemble_run, name, lambda reports, *_: reports)
    monkeypatch.setattr(ensemble_run, "save_best_model", lambda folder, *_: saved.append(folder.name))
    monkeypatch.setattr(ensemble_run, "write", lambda *_, data, **__: saved.append(data))
    monkeypatch.setattr(ensemble_run, "data_in_background", lambda *_: lambda **waits: waits)
    monkeypatch.setattr(ensemble_run, "train_and_save", loop)
    monkeypatch.setattr(
        ensemble_run, "experiment_writer", lambda folder, _: lambda *reports: logged.append((folder.name, reports))
    )
    directory, histories = create(tmp_path, configs), [("a", "b"), (), ("c",)]
    assert list(run_ensemble(directory, prepare_ensemble(configs), histories=cast(Any, histories))) == []
    assert [(name, len(own)) for name, own in logged] == [*((name, 1) for name in "0120120"), ("1", 0), ("2", 0)]
    soon, late = {"patience": HASH_PATIENCE}, {"patience": None}  # the last save of a member waits for the data's hash
    assert saved == [soon] * 3 + [late] * 3 + [soon] * 3 + ["0"]


@pytest.mark.parametrize(("step", "is_logged"), [(6, True), (7, False)])
def test_the_rate_in_a_log_of_steps_is_that_of_the_step_before_the_state(monkeypatch, step, is_logged):
    logged: list[Any] = []
    members: Any = [SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(schedule=own))) for own in "ab"]
    writers: Any = [SimpleNamespace(write_scalars=lambda *given, own=own: logged.append((own, *given))) for own in "cd"]
    active = torch.tensor([False, True])
    ensemble: Any = MagicMock(step=step, epoch=2, active=active, plateau=("e", "f"), __len__=lambda _: 2)
    monkeypatch.setattr(ensemble_run, "member_sums", lambda metrics, num: [f"{metrics} of {n}" for n in range(num)])
    monkeypatch.setattr(ensemble_run, "step_scalars", lambda *given, **position: (given, position))
    ensemble_run._log_step(members, writers, 3, ensemble, cast(Any, "sums"))
    position = {"epoch": 2, "step": step - 1, "plateau": "f"}
    assert logged == ([("d", step, (("sums of 1", "b"), position))] if is_logged else [])


def test_a_member_that_was_saved_ahead_of_the_others_keeps_its_digests(tmp_path):
    keep_all = CheckpointConfig(keep="all")
    configs = [replace(config, checkpoints=keep_all) for config in small(max_epochs=3)]
    (tmp_path / "whole").mkdir()
    whole = create(tmp_path / "whole", configs)
    list(run_ensemble(whole, prepare_ensemble(configs)))

    killed = Path(shutil.copytree(whole, tmp_path / "killed"))
    for number, last in enumerate((2, 1, 1)):  # as a kill between two members' saves of epoch 2 leaves them
        for epoch in range(last + 1, 4):
            shutil.rmtree(killed / str(number) / "checkpoint" / str(epoch))
    members, ensemble, histories = resume_ensemble(killed)
    assert ensemble.epoch == 1
    list(run_ensemble(killed, members, ensemble=ensemble, histories=histories))

    for number, parts in enumerate(members):
        expected, found = (
            restore(directory / str(number), parts.first_state()).history for directory in (whole, killed)
        )
        assert [report.digest for report in found] == [report.digest for report in expected]
        assert None not in {report.digest for report in found}


class StopAfter(StopRequest):
    """Asks to stop when it was looked at some times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def agreed(self) -> bool:
        import signal

        self.times -= 1
        if self.times <= 0:
            self.signal = signal.SIGTERM
        return self.signal is not None


def test_an_ensemble_that_was_cut_off_between_members_resumes_from_what_they_share(tmp_path):
    configs = small(max_epochs=3)
    directory = create(tmp_path, configs)
    list(run_ensemble(directory, prepare_ensemble(configs)))
    digests = [latest_digest(directory / str(number)) for number in range(3)]
    shutil.rmtree(directory / "1" / "checkpoint" / "3")
    members, ensemble, histories = resume_ensemble(directory)
    assert ensemble.epoch == 2
    list(run_ensemble(directory, members, ensemble=ensemble, histories=histories))
    assert [latest_digest(directory / str(number)) for number in range(3)] == digests


@pytest.mark.parametrize(
    ("names", "is_refused"),
    [
        ([[], []], False),
        ([["0"], []], False),  # the very first save was cut off
        ([[], ["0-2"]], False),
        ([["0", "1"], []], True),
        ([[], ["0", "1"]], True),
        ([["1"], ["2"]], True),
        ([["1"], ["1"]], True),  # both corrupt
    ],
)
def test_an_ensemble_starts_again_only_where_its_very_first_save_was_cut_off(monkeypatch, names, is_refused):
    def corrupt(*_, **__):
        raise CorruptError("a corrupt file")

    folders = [Path("run", str(number)) for number in range(2)]
    monkeypatch.setattr(ensemble_resume, "list_checkpoints", lambda folder: names[int(folder.name)])
    monkeypatch.setattr(ensemble_resume, "restore", corrupt)
    like: Any = [None, None]
    if not is_refused:
        assert ensemble_resume._newest_of_all(folders, like, {}) == (None, [])
        return
    with pytest.raises(CorruptError, match=r"run have no valid checkpoint of the same .*: dwiml-func resume run 0\."):
        ensemble_resume._newest_of_all(folders, like, {})


@pytest.mark.parametrize(
    ("names", "ended", "corrupt", "found", "problems"),
    [
        ("12 12", {}, "", "2 2", ""),
        ("12 1", {}, "", "1 1", ""),
        ("12 12", {}, "0/2", "1 1", "0/2"),
        ("12 1", {}, "0/2", "1 1", "0/2"),  # it was saved ahead of the others
        ("123 123", {}, "0/3 1/2", "1 1", "0/3 1/2"),
        ("1 123", {0: "1"}, "", "1 3", ""),
        ("1 123", {0: "1"}, "1/3", "1 2", "1/3"),
        ("12 123", {0: "1"}, "0/2", "1 3", ""),  # of a member that has stopped only the last counts
        ("1 2", {0: "1", 1: "2"}, "", "1 2", ""),
        ("12 12", {0: "3"}, "", "2 2", ""),  # the list is ahead of the checkpoints
        ("12 12", {0: "2"}, "0/2", "1 1", "0/2"),
    ],
)
def test_an_ensemble_resumes_from_the_newest_that_all_have(monkeypatch, names, ended, corrupt, found, problems):
    folders = [Path("run", str(number)) for number in range(2)]

    def restored(folder: Path, like: object, *, name: str) -> Any:
        assert like == f"like {folder.name}"
        if f"{folder.name}/{name}" in corrupt.split():
            raise CorruptError("a corrupt file")
        return SimpleNamespace(name=name, state=SimpleNamespace(epoch=int(name), batch=0))

    monkeypatch.setattr(ensemble_resume, "list_checkpoints", lambda folder: [*names.split()[int(folder.name)]])
    monkeypatch.setattr(ensemble_resume, "restore", restored)
    like: Any = ["like 0", "like 1"]
    checkpoints, spoilt = ensemble_resume._newest_of_all(folders, like, ended)
    assert [checkpoint.name for checkpoint in checkpoints or ()] == found.split()
    assert sorted(f"{path.parent.parent.name}/{path.name}" for path in spoilt) == problems.split()


def test_members_that_have_ended_leave_the_others_their_epochs(tmp_path):
    configs = small(max_epochs=1)
    directory = create(tmp_path, configs)
    list(run_ensemble(directory, prepare_ensemble(configs)))
    write_ended(directory, 3, {0: "1", 2: "1"})
    members, ensemble, _ = resume_ensemble(directory, new_max_epochs=2)
    assert list(ensemble.active) == [False, True, False]
    assert [parts.config.training.max_epochs for parts in members] == [2, 2, 2]
    write_ended(directory, 3, dict.fromkeys(range(3), "1"))
    with pytest.raises(ValueError, match=r"No member of .*run has an epoch left to do after epoch 1"):
        resume_ensemble(directory, new_max_epochs=2)


def test_the_command_resumes_an_ensemble(trained, tmp_path, cli):
    seeds = Path(shutil.copytree(trained / "seeds", tmp_path / "seeds"))
    assert "--new-max-epochs" in cli("resume", tmp_path, "seeds").err
    options = ("--new-max-epochs", "4", "--new-patience", "3", "--keep", "all", "--checkpoint-every", "3batches")
    assert cli("resume", tmp_path, "seeds", *options, "--processes", "0").code == 0
    for folder in (seeds / "0", seeds / "1"):
        assert list_checkpoints(folder) == ["1", "2", "2-3", "3", "3-3", "4"]
        config = read_config(folder)
        assert (config.training.max_epochs, config.training.patience) == (4, 3)
        assert (config.checkpoints.keep, config.checkpoints.checkpoint_every) == ("all", "3batches")


def test_the_folder_of_an_ensemble_stands_for_its_members(trained, tmp_path, cli):
    seeds = Path(shutil.copytree(trained / "seeds", tmp_path / "seeds"))
    names = [line.split()[0] for line in cli("runs", tmp_path, "--members").out.splitlines()]
    assert names == ["name", "seeds/0", "seeds/1"]
    assert [line.split()[0] for line in cli("runs", seeds).out.splitlines()] == ["name", "0", "1"]
    assert cli("digest", seeds).out.split() == [latest_digest(seeds / "0"), latest_digest(seeds / "1")]
    assert cli("plot", seeds).out == f"{seeds / 'plots' / 'training.png'}\n"
    assert (seeds / "plots" / "training.png").stat().st_size > 10_000
    everything = [path for path in seeds.iterdir() if path.name != "plots"]  # as the shell gives for seeds/*
    assert cli("plot", *everything, "--out", tmp_path / "all.png").code == 0


@pytest.mark.parametrize("command", ["evaluate", "fork", "diff", "export-dwi-ml"])
def test_commands_on_one_experiment_ask_for_a_member(trained, tmp_path, cli, command):
    second = {"evaluate": [PHANTOM], "fork": ["new"], "diff": [trained / "seeds" / "0"], "export-dwi-ml": ["out"]}
    cli(command, trained / "seeds", *second.get(command, [])).check_refusal("is an ensemble", str(trained / "seeds/0"))


def test_verify_says_why_a_member_is_not_bitwise_identical(trained, cli):
    done = cli("verify", trained / "seeds" / "1")
    assert done.code == 1
    assert "member of an ensemble: its common step is not bitwise identical" in done.out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--sweep", "dropout=1,2"), "dropout"),
        (("--sweep", "learning-rate"), "learning-rate"),
        (("--sweep", "weight-decay=a,b"), "'a'"),
        (("--sweep", "learning-rate=0.1,-1"), "-1"),
        (("--sweep", "rng=1,2", "--num-models", "2"), "both give seeds"),
        (("--num-models", "0"), "num_models"),
        (("--num-models", "2", "--num-shards", "2"), "--num-shards"),
        (("--num-models", "2", "--compile"), "--compile"),
    ],
)
def test_what_cannot_be_an_ensemble_is_refused_before_anything_is_written(tmp_path, cli, options, named):
    cli("train", tmp_path, "bad", PHANTOM, *OPTIONS, *options).check_refusal(named)
    assert not list(tmp_path.glob("bad"))


@pytest.mark.parametrize(
    "content",
    [
        {"num_members": "x"},
        {"num_members": 1_000_000_000, "ended": {}},
        {"num_members": 1, "ended": {}},
        {"num_members": True, "ended": {}},
        {"num_members": 2, "ended": {"5": "1"}},
        {"num_members": 2, "ended": {"0": "../../0"}},
        {"num_members": 2, "ended": {"0": 1}},
        {"num_members": 2, "ended": [], "more": 1},
        {"num_members": 2, "ended": {}, "checksum": "0" * 64},
        [],
    ],
)
def test_a_corrupt_file_is_named(trained, tmp_path, cli, content):
    seeds = Path(shutil.copytree(trained / "seeds", tmp_path / "seeds"))
    (seeds / "ensemble.json").write_text(json.dumps(content))
    cli("resume", tmp_path, "seeds").check_refusal("ensemble.json is corrupt")


def test_every_flipped_bit_of_the_list_of_members_is_refused_or_changes_nothing(trained, tmp_path):
    seeds = Path(shutil.copytree(trained / "seeds", tmp_path / "seeds"))
    write_ended(seeds, 2, {1: "2"})
    original, draws = (seeds / "ensemble.json").read_bytes(), random.Random(23)
    assert original.startswith(b'{\n  "')  # for people to read
    for place in range(len(original)):
        flipped = bytearray(original)
        flipped[place] ^= 1 << draws.randrange(8)
        (seeds / "ensemble.json").write_bytes(flipped)
        try:
            assert read_ended(seeds) == (2, {1: "2"}), bytes(flipped)
        except ValueError as error:
            assert "ensemble.json" in str(error)  # noqa: PT017


def test_a_list_without_a_checksum_of_an_earlier_version_is_read(trained, tmp_path):
    seeds = Path(shutil.copytree(trained / "seeds", tmp_path / "seeds"))
    (seeds / "ensemble.json").write_text(json.dumps({"num_members": 2, "ended": {"1": "2-3"}}))
    assert read_ended(seeds) == (2, {1: "2-3"})


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keep_all = CheckpointConfig(keep="all")
    configs = [replace(config, checkpoints=keep_all) for config in small(max_epochs=3)]
    directory = create(tmp_path_factory.mktemp("three_epochs"), configs)
    list(run_ensemble(directory, prepare_ensemble(configs)))
    return directory


@pytest.fixture
def whole(three_epochs: Path, tmp_path: Path) -> Path:
    """An ensemble of three members that has ended after three epochs, with all checkpoints."""
    return Path(shutil.copytree(three_epochs, tmp_path / "run"))


def spoil_checkpoint(folder: Path, name: str) -> None:
    """Flip a bit in the middle of the largest file of its tensors; beside them are files that only orbax reads."""
    leaves = (folder / "checkpoint" / name / "leaves" / "d").iterdir()
    file = max(leaves, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("spoilt", [("1", "3"), ("0", "3"), ("1", "manifest")])
def test_corrupt_checkpoints_of_members_are_named_set_aside_and_written_again(whole, cli, spoilt):
    digests = [latest_digest(whole / str(number)) for number in range(3)]
    member, what = spoilt
    if what == "manifest":
        (whole / member / "checkpoint" / "3" / "manifest.json").write_text("{}")
    else:
        spoil_checkpoint(whole / member, what)
    done = cli("resume", whole.parent, whole.name)
    assert done.code == 0, done.err
    assert f"Checkpoint {whole / member / 'checkpoint' / '3'} is corrupt. Resuming from checkpoint 2." in done.err
    assert (whole / member / "checkpoint" / "3.corrupt").is_dir()
    assert [latest_digest(whole / str(number)) for number in range(3)] == digests
    assert list_checkpoints(whole / member) == ["1", "2", "3"]


def test_a_corrupt_checkpoint_that_was_saved_ahead_of_the_others_is_written_again(whole, cli):
    digest = latest_digest(whole / "0")
    spoil_checkpoint(whole / "0", "3")
    for number in "12":
        shutil.rmtree(whole / number / "checkpoint" / "3")
    done = cli("resume", whole.parent, whole.name)
    assert (done.code, "checkpoint/3 is corrupt" in done.err) == (0, True)
    assert latest_digest(whole / "0") == digest


def test_what_a_kill_after_the_last_checkpoint_left_behind_is_brought_up_to_date(whole, cli):
    """Best models, logs and the list of members that have stopped are written after the checkpoints."""
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    write_ended(whole, 3, {})
    for number in "012":
        (whole / number / "logs" / "metrics.jsonl").unlink()
        shutil.rmtree(whole / number / "best_model")
    cli("resume", whole.parent, whole.name)
    assert read_ended(whole) == (3, json.loads(before[whole / "ensemble.json"])["ended"])
    for number in "012":
        name = whole / number / "logs" / "metrics.jsonl"
        assert name.read_bytes() == before[name]
        assert (
            load_model(whole / number / "best_model").facts["epoch"]
            == json.loads(before[whole / number / "best_model" / "model.json"])["epoch"]
        )
