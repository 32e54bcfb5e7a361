"""Claims about TensorBoard's event files, as TensorBoard reads them: every epoch once, also when a run goes on."""

from __future__ import annotations

import builtins
import math
import time
from pathlib import Path
from typing import Any

import pytest
from report_cases import report

from dwiml_func.core.loop import EpochReport
from dwiml_func.writers.tensorboard import scalars, tensorboard

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard shows them."""
    accumulator = event_accumulator.EventAccumulator(str(directory / "logs" / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def expected(*reports: EpochReport) -> dict[str, Any]:
    tags = {tag: [(one.epoch, scalars(one)[tag]) for one in reports] for tag in scalars(reports[0])}
    return {tag: [(step, pytest.approx(value, rel=1e-6)) for step, value in rows] for tag, rows in tags.items()}


def test_every_metric_of_every_epoch_is_there_once(tmp_path):
    one, two, three = report(1), report(2), report(3)
    write = tensorboard(tmp_path)
    write(one)
    write(two, three)
    assert shown(tmp_path) == expected(one, two, three)
    assert set(shown(tmp_path)) == {
        *("learning_rate", "best_loss", "loss/train", "loss/valid", "angular_error/train", "angular_error/valid"),
        *("grad_norm/train", "unclipped_grad_norm/train", "minutes/train", "minutes/valid"),
    }


def test_new_epochs_are_appended_so_that_a_running_tensorboard_sees_them(tmp_path):
    write = tensorboard(tmp_path)
    write(report(1))
    (path,) = (tmp_path / "logs" / "tensorboard").iterdir()
    before = path.read_bytes()
    write(report(2))
    assert path.read_bytes()[: len(before)] == before
    assert len(path.read_bytes()) > len(before)


def test_a_resumed_run_counts_nothing_twice_whatever_the_killed_one_left(tmp_path):
    write = tensorboard(tmp_path)
    write(report(1), report(2), report(3))
    (path,) = (tmp_path / "logs" / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-7])  # cut off in the middle of an epoch
    resumed = tensorboard(tmp_path)
    resumed(report(1), report(2))
    resumed(report(3))
    assert shown(tmp_path) == expected(report(1), report(2), report(3))


def test_an_epoch_that_is_done_again_replaces_all_after_it(tmp_path):
    write, again = tensorboard(tmp_path), report(2, learning_rate=5.0)
    write(report(1), report(2), report(3))
    write(again)
    assert shown(tmp_path) == expected(report(1), again)


def test_after_an_error_the_file_is_written_anew(tmp_path, monkeypatch):
    write = tensorboard(tmp_path)
    write(report(1))
    with monkeypatch.context() as patch:

        def fail(path: Path, mode: str) -> None:
            raise OSError("No space left on device")

        patch.setattr(Path, "open", fail)
        with pytest.raises(OSError, match="No space"):
            write(report(2))
    write(report(3))
    assert shown(tmp_path) == expected(report(1), report(2), report(3))


def test_times_are_those_of_the_training(tmp_path):
    before = time.time()
    tensorboard(tmp_path)(report(1), report(2))
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    accumulator.Reload()
    first, second = (event.wall_time for event in accumulator.Scalars("loss/train"))
    assert second - first == pytest.approx(60 * (0.5 + 0.125), abs=1e-3)
    assert before - 1e-3 <= second <= time.time()


def test_what_is_not_finite_is_shown_as_such(tmp_path):
    tensorboard(tmp_path)(report(1, valid={"loss": math.nan}))
    ((_, value),) = shown(tmp_path)["loss/valid"]
    assert math.isnan(value)


def test_without_the_package_one_is_told_how_to_get_it(tmp_path, monkeypatch):
    load = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .dwiml_func\[tensorboard\]"):
        tensorboard(tmp_path)(report(1))
