"""Claims about writers: one that fails stops neither the training nor the others, and the logs are completed later."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from report_cases import report

from dwiml_func import init_state, module_loss, sgd, train_and_validate, train_step
from dwiml_func.checkpoint.checkpoint import restore_or, save
from dwiml_func.core.report import EpochReport
from dwiml_func.writers.jsonl import jsonl
from dwiml_func.writers.npy import npy
from dwiml_func.writers.writer import Writer, fan_out, from_history, whole_epochs


class Failing:
    """A writer that raises an error as long as it is told to."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error
        self.seen: list[int] = []

    def __call__(self, *reports: EpochReport) -> None:
        self.seen += [one.epoch for one in reports]
        if self.error is not None:
            raise self.error


def test_every_writer_gets_every_report_in_order():
    seen: list[tuple[str, list[int]]] = []

    def note(name: str, *reports: EpochReport) -> None:
        seen.append((name, [one.epoch for one in reports]))

    write = fan_out(partial(note, "a"), partial(note, "b"))
    write(report(1), report(2))
    write(report(3))
    assert seen == [("a", [1, 2]), ("b", [1, 2]), ("a", [3]), ("b", [3])]


def test_a_failing_writer_costs_one_warning_and_is_called_again_and_the_others_continue(caplog):
    failing, other = Failing(OSError(28, "No space left on device", "/logs/a.npy")), Failing(RuntimeError("not\nmine"))
    same = Failing(OSError(28, "No space left on device", "/logs/b.jsonl"))
    unknown = Failing(OSError()), Failing(OSError("cannot write"))
    seen: list[int] = []
    write = fan_out(failing, lambda *reports: seen.append(reports[-1].epoch), other, same, *unknown)
    with caplog.at_level(logging.WARNING):
        for epoch in (1, 2, 3):
            write(report(epoch))
    assert failing.seen == other.seen == same.seen == seen == [1, 2, 3]
    first, second, *others = (record.getMessage() for record in caplog.records)
    assert "Logs were not written: [Errno 28] No space left on device: '/logs/a.npy'. Training continues" in first
    assert "RuntimeError: not mine. Training continues" in second
    assert [text.partition(". ")[0] for text in others] == [
        *("Logs were not written: OSError: ", "Logs were not written: cannot write")  # not known to be the same
    ]


def test_ctrl_c_is_not_an_error_of_a_writer():
    def interrupt(*_: EpochReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fan_out(interrupt)(report(1))


@pytest.mark.parametrize("nested", [fan_out(), fan_out(fan_out())])
def test_no_writer_is_a_writer_too(nested: Writer):
    nested(report(1))


def kept(*calls: tuple[EpochReport, ...]) -> list[list[int]]:
    written: list[list[int]] = []
    write = from_history(lambda history: written.append([one.num_batches for one in history]))
    for reports in calls:
        write(*reports)
    return written


def test_a_log_is_rewritten_from_all_epochs():
    one, two, three = (report(epoch, num_batches=epoch) for epoch in (1, 2, 3))
    assert kept((), (one,), (two, three)) == [[1], [1, 2, 3]]


def test_a_repeated_epoch_replaces_its_report_and_all_after_it():
    history = [report(epoch, num_batches=epoch) for epoch in (1, 2, 3)]
    assert kept((*history,), (report(2, num_batches=20),)) == [[1, 2, 3], [1, 20]]
    assert kept((*history,), (*history[:2],)) == [[1, 2, 3], [1, 2]]


def test_a_report_within_an_epoch_counts_where_the_run_has_ended_there():
    within, ended = report(2, batch=3), report(2, batch=3, stop="patience")
    assert whole_epochs([report(1), within, ended, report(2)]) == (report(1), ended, report(2))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_missing_report_is_an_error_and_nothing_is_written(before: int):
    written: list[object] = []
    write = from_history(written.append)
    write(*map(report, range(1, before + 1)))
    written.clear()
    message = rf"Expected the report of epoch {before + 1}\. Received: epoch {before + 2}\. .*write\(\*history\)"
    with pytest.raises(ValueError, match=message):
        write(report(before + 2))
    assert written == []


def test_no_log_of_an_epoch_or_a_step_waits_for_the_disk(tmp_path, monkeypatch):
    """A resumed run writes them again."""
    monkeypatch.setattr(os, "fsync", lambda *_: pytest.fail("waited"))
    for write in (npy(tmp_path), jsonl(tmp_path)):
        write(report(1))
    for step in (1, 2, 1):
        jsonl(tmp_path).write_scalars(step, {"loss": 0.5})


def train(directory: Path, *, killed_after: int | None = None) -> None:
    """The README's loop, killed after an epoch's checkpoint and before its logs."""
    model = torch.nn.Linear(2, 1)
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    start, history = restore_or(directory, init_state(model, sgd(), seed=0))
    write = fan_out(npy(directory), jsonl(directory))
    write(*history)
    for state, one in train_and_validate(
        start,
        train=lambda key, epoch, start_batch: [torch.ones(4, 2)] * (3 - start_batch),
        step=partial(train_step, loss_fn=loss_fn, optimizer=sgd()),
        learning_rate=0.1,
        max_epochs=4,
        clock=lambda: 0.0,
    ):
        history = (*history, one)
        save(directory, state, history)
        if one.epoch == killed_after:
            return
        write(one)


def test_a_loop_in_a_script_that_is_killed_and_restarted_has_complete_logs(tmp_path):
    torch.manual_seed(0)
    train(tmp_path / "whole")
    torch.manual_seed(0)
    for epoch in (1, 3, None):
        train(tmp_path / "killed", killed_after=epoch)
    logs = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "logs").iterdir()} for name in ("whole", "killed")
    ]
    assert len(logs[0]["metrics.jsonl"].splitlines()) == 4
    assert logs[0] == logs[1]
