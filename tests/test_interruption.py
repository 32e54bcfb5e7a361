"""Claims about signals: the current batch is finished and saved, and the printed command gives identical results."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiment_cases import CONFIG
from gated_run import OPTIONS, check_same_end, gated, train_whole
from reproduction_cases import DATA, differences, files, results
from torch import Tensor

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.cli._several import train_sweep
from dwiml_func.cli._training import new_run
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.signals import TrainingStopped, stop_on_signals


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_whole(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize(
    ("number", "place", "call", "processes", "checkpoint"),
    [
        (signal.SIGTERM, "eval_step", 1, "0", "0-4"),
        (signal.SIGTERM, "step", 6, "2", "1-2"),
        (signal.SIGINT, "train", 1, "2", "0-1"),
        (signal.SIGUSR1, "step", 6, "0", "1-2"),
        (signal.SIGHUP, "step", 3, "0", "0-3"),
    ],
    ids=["SIGTERM in validation", "SIGTERM with workers", "Ctrl-C while workers start", "SIGUSR1", "SIGHUP"],
)
def test_a_signal_saves_the_current_batch_and_the_printed_command_gives_identical_results(
    cli, uninterrupted, tmp_path, number, place, call, processes, checkpoint
):
    with gated(tmp_path, place, call, "--processes", processes) as process:
        process.signal(number)
        process.read_err("Finishing the current batch, then saving")
        code, out, err = process.end(through_gate=True)
    assert code == 128 + number
    (line,) = err.splitlines()
    assert f"stopped by {number.name} and saved as checkpoint {checkpoint}. To resume: dwiml-func resume " in line
    assert "Finished" not in out
    assert list_checkpoints(tmp_path / "run")[-1] == checkpoint
    program, *arguments = shlex.split(line.partition("To resume: ")[2])
    assert program == "dwiml-func"
    resumed = cli(*arguments, "--processes", "0")
    assert resumed.code == 0
    assert f"Resuming from checkpoint {checkpoint}: next is epoch {int(checkpoint[0]) + 1}, batch " in resumed.out
    check_same_end(tmp_path / "run", uninterrupted)


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_stands(cli, uninterrupted, tmp_path):
    with gated(tmp_path, "step", 6, "--checkpoint-every", "1batches") as process:
        process.signal(signal.SIGINT)
        process.read_err("Finishing the current batch, then saving")
        process.signal(signal.SIGINT)  # while the batch is trained: nobody lets it through the gate
        code, _, err = process.end()
    assert code == 130
    assert err == "dwiml-func: stopped immediately. The last checkpoint is kept.\n"
    assert list_checkpoints(tmp_path / "run")[-1] in ("1", "1-1")  # the save of the latter may have begun
    assert cli("resume", tmp_path, "run", "--checkpoint-every", "1epoch").code == 0
    check_same_end(tmp_path / "run", uninterrupted)


def test_a_second_ctrl_c_does_not_wait_for_a_save(tmp_path):
    with gated(tmp_path, "save", 1) as process:  # a disk that never answers
        process.signal(signal.SIGINT)
        process.read_err("Finishing the current batch, then saving")
        process.signal(signal.SIGINT)
        code, _, _ = process.end()
    assert code == 130
    assert list_checkpoints(tmp_path / "run") == []


def test_ctrl_c_before_the_training_is_one_line(tmp_path):
    with gated(tmp_path, "interrupt", 1) as process:
        code, _, err = process.end()
    assert code == 130
    assert err == "dwiml-func train: interrupted. The last checkpoint is kept.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_handlers_of_before_come_back_with_it(capfd, number):
    seen: list[int] = []
    before = signal.signal(number, lambda received, _: seen.append(received))
    try:
        own = signal.getsignal(number)
        with stop_on_signals() as stop:
            assert stop.signal is None
            signal.raise_signal(number)
            assert (stop.signal, seen) == (number, [])
            signal.raise_signal(number)
            assert seen == [number]
        assert signal.getsignal(number) is own
        with stop_on_signals() as again:
            pass
        assert (again.signal, signal.getsignal(number)) == (None, own)
    finally:
        signal.signal(number, before)
    assert capfd.readouterr().err.count("Finishing the current batch, then saving") == 1


def test_outside_the_main_thread_the_handlers_are_left_alone():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inside: list[object] = []

    def work() -> None:
        with stop_on_signals() as stop:
            inside.extend([stop.signal, *(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [None, *handlers]


def test_the_exit_codes_are_those_a_shell_expects(tmp_path):
    stopped = [TrainingStopped(number, tmp_path, None) for number in (signal.SIGINT, signal.SIGTERM)]
    assert [error.exit_code for error in stopped] == [130, 143]


def test_the_same_command_again_resumes_a_run_and_sums_up_one_that_has_ended(cli, uninterrupted, tmp_path):
    with gated(tmp_path, "step", 6) as process:
        process.signal(signal.SIGTERM)
        process.read_err("Finishing the current batch, then saving")
        process.end(through_gate=True)
    command = ("train", tmp_path, "run", DATA, *OPTIONS)
    again = cli(*command)
    assert again.code == 0
    assert "exists, with this config: resuming it" in again.out
    assert "Finished after 2 epochs" in again.out
    check_same_end(tmp_path / "run", uninterrupted)
    before = files(tmp_path / "run")
    ended = cli(*command)
    assert ended.code == 0
    assert "Finished after 2 epochs" in ended.out
    assert "Epoch 2/2" not in ended.out
    assert files(tmp_path / "run") == before
    assert differences(results(tmp_path / "run"), results(uninterrupted)) == []
    changed = cli(*command, "--keep", "all", "--checkpoint-every", "2epochs", "--lazy", "--processes", "1")
    assert changed.code == 0
    config = read_config(tmp_path / "run")
    assert (config.checkpoints.keep, config.data.lazy, config.batches.processes) == ("all", True, 1)
    assert differences(results(tmp_path / "run"), results(uninterrupted)) == []
    assert cli(*command).code == 0
    before = files(tmp_path / "run")
    other = cli(*command, "--dropout", "0.4", "--rng", "5")
    other.check_refusal("'run' exists in", "with another config", "model.dropout", "dwiml-func resume")
    cli(*command, "--max-epochs", "99").check_refusal("99 here", "train on: dwiml-func resume", "--new-max-epochs 99")
    assert files(tmp_path / "run") == before


def test_the_folder_of_an_experiment_names_it_for_resume(cli, uninterrupted, tmp_path):
    copy = Path(shutil.copytree(uninterrupted, tmp_path / "copy"))
    epochs = str(read_config(copy).training.max_epochs + 1)
    outcome = cli("resume", copy, "--new-max-epochs", epochs)
    assert (outcome.code, outcome.err) == (0, "")
    assert read(copy).state.epoch == int(epochs)
    cli("resume", tmp_path).check_refusal(str(tmp_path), "not an experiment")


def test_the_same_command_again_resumes_an_ensemble_and_sums_up_one_that_has_ended(cli, tmp_path):
    command = ("train", tmp_path, "both", DATA, *OPTIONS, "--num-models", "2")
    first = cli(*command)
    assert first.code == 0
    ended = cli(*command, "--keep", "all")
    assert (ended.code, ended.err) == (0, "")
    assert "exists, with these configs: resuming it" in ended.out
    assert ended.out.splitlines()[-2:] == first.out.splitlines()[-2:]
    assert [read_config(tmp_path / "both" / number).checkpoints.keep for number in "01"] == ["all", "all"]
    cli(*command, "--dropout", "0.4").check_refusal("'both' exists in", "with another config", "model.dropout")
    cli(*command[:-1], "3").check_refusal("'both' exists in", "with 2 members. Received: 3")
    cli(*command[:-2]).check_refusal("'both' exists in")


def test_a_signal_without_standard_error_stops_and_saves():
    with stop_on_signals() as stop:
        kept = os.dup(2)
        os.close(2)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        assert stop.signal is signal.SIGTERM


def test_a_hang_up_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            signal.raise_signal(signal.SIGHUP)
        assert request.signal is None
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGXCPU])
def test_the_warnings_of_other_schedulers_ask_for_a_stop_too(number):
    with stop_on_signals() as request:
        signal.raise_signal(number)
    assert request.signal == number


def test_with_an_answer_to_the_second_signal_those_that_do_not_end_a_program_are_ignored_after_the_first():
    answered: list[signal.Signals] = []
    own: list[int] = []
    gentle = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
    previous = {number: signal.signal(number, lambda received, _: own.append(received)) for number in gentle}
    try:
        with stop_on_signals(at_second=answered.append) as stop:
            for number in (signal.SIGUSR1, *gentle):
                signal.raise_signal(number)
            assert (stop.signal, answered, own) == (signal.SIGUSR1, [], [])
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert answered == [signal.SIGTERM, signal.SIGINT]
            assert stop.signal == signal.SIGUSR1  # the first is told
        signal.raise_signal(signal.SIGHUP)
        assert own == [signal.SIGHUP]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _GroupWithASignalInside:
    """A process of two that gets a signal while the processes tell each other whether they were asked to stop."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.signals = [signal.SIGTERM]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        while self.signals:
            os.kill(os.getpid(), self.signals.pop())
        return [tensor, torch.zeros_like(tensor)]


class _Second:
    """The second process of two; the first one tells what `first` says."""

    rank, size = 1, 2

    def __init__(self, first: int) -> None:
        self.first = first

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [torch.full_like(tensor, self.first), tensor]


@pytest.mark.parametrize("exists", [0, 1])
def test_a_process_that_does_not_write_resumes_where_the_first_one_does(monkeypatch, tmp_path, exists):
    """The folder may have appeared since the first one looked, or not yet where the disk is shared."""
    config = replace(CONFIG, training=replace(CONFIG.training, num_shards=2))
    resumed: list[object] = []
    trained: list[tuple[object, ...]] = []

    @contextlib.contextmanager
    def resume(directory: Path, _: object, *, given: object, may_have_ended: bool) -> Iterator[str]:
        resumed.append((directory, given, may_have_ended))
        yield "resumed"

    monkeypatch.setattr("dwiml_func.cli._training.resumed_run", resume)
    for _ in range(2):  # without and with a folder that this process sees
        with new_run(tmp_path, "run", config, _Second(exists)) as start:
            assert (start == "resumed") == bool(exists)
            assert exists or start[1:] == (None, ())
        (tmp_path / "run").mkdir(exist_ok=True)
    assert resumed == [(tmp_path / "run", config, True)] * 2 * exists
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setattr("dwiml_func.cli._several.join_process_group", lambda _: contextlib.nullcontext(_Second(exists)))
    monkeypatch.setattr("dwiml_func.cli._several.train_with_progress", lambda *given: trained.append(given))
    assert train_sweep(tmp_path / "all", {"a": config, "b": config}, ["dropout=0,1"], deadline=6.0) == 0
    assert [(each[0], each[-1]) for each in trained] == (
        [] if exists else [(tmp_path / "all" / name, 6.0) for name in "ab"]  # the first one knows what is done
    )
    assert not (tmp_path / "all").exists()


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost():
    with stop_on_signals(_GroupWithASignalInside()) as stop:
        assert not stop.agreed()  # no process has told of it yet
        assert stop.agreed()
    assert stop.signal == signal.SIGTERM
