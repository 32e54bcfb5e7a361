"""Claims about TensorBoard's event files, as TensorBoard reads them: every epoch once, also in a resumed run."""

from __future__ import annotations

import builtins
import math
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from report_cases import report

from dwiml_func.core.report import EpochReport
from dwiml_func.writers.tensorboard import scalars, tensorboard

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def displayed(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard displays them."""
    accumulator = event_accumulator.EventAccumulator(str(directory / "logs" / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def expected(*reports: EpochReport) -> dict[str, Any]:
    tags = {tag: [(one.epoch, scalars(one)[tag]) for one in reports] for tag in scalars(reports[0])}
    return {tag: [(step, pytest.approx(value, rel=1e-6)) for step, value in rows] for tag, rows in tags.items()}


def test_other_event_files_in_the_folder_stay(tmp_path):
    other = tmp_path / "logs" / "tensorboard" / "events.out.tfevents.1.mine"
    other.parent.mkdir(parents=True)
    other.touch()
    tensorboard(tmp_path)(report(1))
    assert other.exists()


def test_every_metric_of_every_epoch_is_there_once(tmp_path):
    one, two, three = report(1), report(2), report(3)
    write = tensorboard(tmp_path)
    write(one)
    write(two, three)
    assert displayed(tmp_path) == expected(one, two, three)
    assert set(displayed(tmp_path)) == {
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


def test_a_resumed_run_counts_nothing_twice_whatever_a_killed_process_left(tmp_path):
    write = tensorboard(tmp_path)
    write(report(1), report(2), report(3))
    (path,) = (tmp_path / "logs" / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-7])  # cut off in the middle of an epoch
    resumed = tensorboard(tmp_path)
    resumed(report(1), report(2))
    resumed(report(3))
    assert displayed(tmp_path) == expected(report(1), report(2), report(3))


def test_a_repeated_epoch_replaces_all_after_it(tmp_path):
    write, again = tensorboard(tmp_path), report(2, learning_rate=5.0)
    write(report(1), report(2), report(3))
    write(again)
    assert displayed(tmp_path) == expected(report(1), again)


# TensorBoard's own thread prints the error too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_an_error_the_file_is_rewritten(tmp_path):
    others = set(threading.enumerate())
    write = tensorboard(tmp_path)
    write(report(1))
    (path,) = (tmp_path / "logs" / "tensorboard").iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(report(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for thread in set(threading.enumerate()) - others:  # its error would else be the next test's
        thread.join(60)
        assert not thread.is_alive()
    write(report(3))
    assert displayed(tmp_path) == expected(report(1), report(2), report(3))


def test_wall_times_are_those_of_the_training(tmp_path):
    before = time.time()
    tensorboard(tmp_path)(report(1), report(2))
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    accumulator.Reload()
    first, second = (event.wall_time for event in accumulator.Scalars("loss/train"))
    assert second - first == pytest.approx(60 * (0.5 + 0.125), abs=1e-3)
    assert before - 1e-3 <= second <= time.time()


def test_a_value_that_is_not_finite_is_displayed_as_such(tmp_path):
    tensorboard(tmp_path)(report(1, valid={"loss": math.nan}))
    ((_, value),) = displayed(tmp_path)["loss/valid"]
    assert math.isnan(value)


def test_without_the_package_the_error_tells_how_to_install_it(tmp_path, monkeypatch):
    load = builtins.__import__

    def fail(name: str, *rest: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .dwiml_func\[tensorboard\]"):
        tensorboard(tmp_path)(report(1))
