"""Claims about logs by step: each step once, also after a kill; the same rows resumed or not; others cost no wait."""

from __future__ import annotations

import json
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_cases import report

from dwiml_func import adam, eval_step, init_state, module_loss, per_step, train_and_validate, train_step, warm_up
from dwiml_func.checkpoint import list_checkpoints
from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.cli.main import main
from dwiml_func.core.report import Validation
from dwiml_func.core.state import TrainState
from dwiml_func.optim.schedules import constant, cosine
from dwiml_func.types import Sum
from dwiml_func.writers import Comet, fan_out, jsonl, log_steps, npy, read_scalars, tensorboard
from dwiml_func.writers.steps import ScalarLines

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OPTIONS = (
    *("--rnn-layer-sizes", "4", "--nb-previous-dirs", "1", "--batch-size-training", "30", "--clip-grad", "0.1"),
    *("--batch-size-validation", "20", "--max-epochs", "3", "--checkpoint-every", "2batches", "--keep", "all"),
    *("--learning-rate", "warmup 3 cosine 0.01 20 steps", "--log-every", "2", "--skip-figures"),
)


def rows(directory: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_scalars(directory)]


def test_a_scalar_cannot_be_called_as_the_number_of_its_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scalars of other names than 'step'"):
        ScalarLines(tmp_path)(3, {"step": 9.0})
    assert read_scalars(tmp_path) == []


def test_rows_are_appended_and_those_of_a_later_step_are_cut(tmp_path):
    write, tmp_path = jsonl(tmp_path / "a" / "b"), tmp_path / "a" / "b"
    for step in (2, 4, 6):
        write.write_scalars(step, {"loss": step / 2})
    jsonl(tmp_path).write_scalars(8, {"loss": 4.0})
    assert rows(tmp_path) == [(2, 1.0), (4, 2.0), (6, 3.0), (8, 4.0)]
    resumed = jsonl(tmp_path)
    resumed.write_scalars(6, {"loss": 0.5})
    assert rows(tmp_path) == [(2, 1.0), (4, 2.0), (6, 0.5)]
    resumed.write_scalars(8, {"loss": 0.25})
    jsonl(tmp_path).write_scalars(6, {})  # cut back to a checkpoint
    assert rows(tmp_path) == [(2, 1.0), (4, 2.0), (6, 0.5)]
    jsonl(tmp_path).write_scalars(0, {})
    assert rows(tmp_path) == []
    for loss in (1.0, 2.0, 3.0):  # the last step again is the same row, in a new file and in one that it has read
        write = jsonl(tmp_path)
        write.write_scalars(2, {"loss": 0.0})
        for step in (3, 3):
            write.write_scalars(step, {"loss": loss})
    write = jsonl(tmp_path)
    for loss in (4.0, 5.0):
        write.write_scalars(3, {"loss": loss})
    assert rows(tmp_path) == [(2, 0.0), (3, 5.0)]
    assert len((tmp_path / "logs" / "steps.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("rest", ["", '{"step": 6, "lo', "\x00\x00", '{"step": 2, "loss": 9.0}\n', "[]\n"])
def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path, rest):
    write = jsonl(tmp_path)
    write.write_scalars(2, {"loss": 1.0})
    write.write_scalars(4, {"loss": 2.0})
    path = tmp_path / "logs" / "steps.jsonl"
    path.write_text(path.read_text() + rest)
    jsonl(tmp_path).write_scalars(8, {"loss": 4.0})
    assert rows(tmp_path) == [(2, 1.0), (4, 2.0), (8, 4.0)]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 8]


def test_what_is_not_finite_is_null_in_strict_json(tmp_path):
    step: Any = np.int64(1)
    jsonl(tmp_path).write_scalars(step, {"loss": float("nan"), "acc/left": torch.tensor(0.5)})
    assert read_scalars(tmp_path) == [{"step": 1, "loss": None, "acc/left": 0.5}]


def test_a_fan_out_gives_steps_to_the_writers_that_take_them_and_survives_errors(tmp_path, caplog):
    class Failing:
        def __call__(self, *reports: Any) -> None: ...
        def write_scalars(self, step: int, values: Any, /) -> None:
            raise OSError(28, "No space left on device")

    fan_out(Failing(), npy(tmp_path), jsonl(tmp_path)).write_scalars(1, {"loss": 1.0})
    assert rows(tmp_path) == [(1, 1.0)]
    assert "No space left on device" in caplog.text


class Unreadable:
    """Stands for a sum on a device: reading it is an error."""

    def __float__(self) -> float:
        raise AssertionError("a step that is not logged was read")


def test_steps_that_are_not_logged_do_not_wait_for_the_device(tmp_path):
    state: TrainState = init_state(torch.nn.Linear(1, 1), adam(), seed=0)
    unread: Any = {"loss": Sum(Unreadable(), Unreadable())}  # type: ignore[arg-type]
    on_batch = log_steps(jsonl(tmp_path), every=3, learning_rate=0.1)
    for step in (1, 2, 4, 5):
        on_batch(state.replace(step=step), unread)
    with pytest.raises(AssertionError, match="not logged was read"):
        on_batch(state.replace(step=3), unread)
    with pytest.raises(ValueError, match="at least 1 between two rows"):
        log_steps(jsonl(tmp_path), every=0)


def test_a_script_logs_the_batch_and_its_rate_and_slashes_stay(tmp_path):
    model = torch.nn.Linear(2, 1)
    loss_fn = module_loss(model, lambda m, x: (m(x).square().mean(), len(x), {"size/left": x.mean()}))
    seen: list[float] = []

    def step(state: Any, batch: Any, *, lr: float) -> Any:
        state, metrics = train_step(state, batch, loss_fn=loss_fn, optimizer=adam(), lr=lr)
        seen.append(float(metrics["loss"].total) / float(metrics["loss"].weight))
        return state, metrics

    schedule = per_step(warm_up(constant(0.1), length=7))
    write = fan_out(jsonl(tmp_path), npy(tmp_path), tensorboard(tmp_path))
    validated = []
    for state, one in train_and_validate(
        init_state(model, adam(), seed=0),
        train=lambda key, epoch, start: [torch.full((4, 2), float(number)) for number in range(start, 5)],
        step=step,
        valid=lambda *_: [torch.ones(4, 2)],
        eval_step=partial(eval_step, loss_fn=loss_fn),
        validate_every="3batches",
        learning_rate=schedule,
        max_epochs=2,
        on_batch=log_steps(write, every=3, learning_rate=schedule),
    ):
        write(one)
        if one.batch:
            validated.append((state.step, one.valid["loss"]))
    assert [(row["step"], row["valid_loss"]) for row in read_scalars(tmp_path) if "valid_loss" in row] == validated
    assert displayed(tmp_path)["valid_loss"] == [(step, pytest.approx(loss)) for step, loss in validated]
    logged = [row for row in read_scalars(tmp_path) if "loss" in row]
    assert [row["step"] for row in logged] == [3, 6, 9]
    assert [row["loss"] for row in logged] == [seen[2], seen[5], seen[8]]
    assert [row["learning_rate"] for row in logged] == [schedule.rate(number) for number in (2, 5, 8)]
    assert [row["size/left"] for row in logged] == [2.0, 0.0, 3.0]
    assert (tmp_path / "logs" / "train_size%2Fleft_monitor_per_epoch.npy").exists()
    assert displayed(tmp_path)["size/left"] == [(3, 2.0), (6, 0.0), (9, 3.0)]


def displayed(directory: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(directory / "logs" / "tensorboard" / "steps")
    )
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_counts_no_step_twice_after_a_kill(tmp_path):
    killed = tensorboard(tmp_path)
    for step in (2, 4, 6):
        killed.write_scalars(step, {"loss": step / 2})
    resumed = tensorboard(tmp_path)
    resumed.write_scalars(4, {})
    for step in (6, 8):
        resumed.write_scalars(step, {"loss": step / 4})
    assert displayed(tmp_path) == {"loss": [(2, 1.0), (4, 2.0), (6, 1.5), (8, 2.0)]}


def test_tensorboard_replaces_values_of_a_step_by_name_and_all_after_it(tmp_path):
    write = tensorboard(tmp_path)
    write.write_scalars(0, {})
    assert list(tmp_path.iterdir()) == []
    others = threading.active_count()
    for step, values in (
        (2, {"loss": 1.0}),
        (3, {"loss": 2.0}),
        (3, {"acc": 3.0}),
        (3, {"loss": 4.0}),
        (4, {"acc": 5.0}),
    ):
        write.write_scalars(step, values)
    assert displayed(tmp_path) == {"loss": [(2, 1.0), (3, 4.0)], "acc": [(3, 3.0), (4, 5.0)]}
    write.write_scalars(5, {"loss": 6.0})
    write.write_scalars(3, {})
    assert displayed(tmp_path) == {"loss": [(2, 1.0), (3, 4.0)], "acc": [(3, 3.0)]}
    assert threading.active_count() <= others + 1  # of the file that is open
    for loss in (7.0, 8.0):
        write.write_scalars(3, {"loss": loss})
    assert displayed(tmp_path)["loss"] == [(2, 1.0), (3, 8.0)]
    for loss in (9.0, 10.0):
        write(report(1, train={"loss": loss}))
    assert threading.active_count() <= others + 2


def test_a_validation_is_logged_once_by_the_report_or_by_the_next_batch(tmp_path):
    """A resumed run has logged those of its state before it was killed, unless the report of one comes first."""
    state: TrainState = init_state(torch.nn.Linear(1, 1), adam(), seed=0).replace(step=7, batch=3)
    batch, one, two = {"loss": Sum(6.0, 2.0)}, Validation(1, {"loss": 0.5}, 0.1), Validation(3, {"loss": 0.25}, 0.1)
    for first, expected in ((batch, [(7, 0.25)]), (report(1, batch=1), [(5, 0.5), (7, 0.25)])):
        on_batch = log_steps(jsonl(tmp_path / str(len(expected))), every=1)
        for own, values in (((one,), first), ((one,), batch), ((one, two), batch), ((one, two), report(1, batch=3))):
            on_batch(state.replace(validations=own, step=7), values)
        logged = read_scalars(tmp_path / str(len(expected)))
        assert [(row["step"], row["valid_loss"]) for row in logged if "valid_loss" in row] == expected
        assert [(row["step"], row["loss"]) for row in logged if "loss" in row] == [(7, 3.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    assert main(["train", str(folder), "run", str(PHANTOM), *OPTIONS, "--validate-every", "3batches"]) == 0
    return folder


def test_the_command_line_logs_loss_norms_and_rate_of_every_second_batch(folder):
    logged, last = read_scalars(folder / "run"), read(folder / "run").state
    validated = [(row["step"], row["valid_loss"]) for row in logged if "valid_loss" in row]
    assert len(validated) > 2
    ends = [report.num_batches for report in read(folder / "run").history]
    within = [v for report in read(folder / "run").history for v in report.validations]
    assert [mean for _, mean in validated] == [v.means["loss"] for v in within]
    starts = [sum(ends[:number]) for number in range(len(ends))]
    assert [step for step, _ in validated] == [start + batch for start in starts for batch in range(3, ends[0], 3)]
    logged = [row for row in logged if "loss" in row]
    assert [row["step"] for row in logged] == list(range(2, last.step + 1, 2))
    schedule = warm_up(cosine(0.01, length=20), length=3)
    assert [row["learning_rate"] for row in logged] == [schedule(row["step"] - 1) for row in logged]
    assert all({"loss", "grad_norm", "unclipped_grad_norm"} <= row.keys() for row in logged)
    assert any(row["grad_norm"] < row["unclipped_grad_norm"] for row in logged)


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(folder, cli, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    for saved in list_checkpoints(tmp_path / "run"):
        if saved not in ("1", "1-2", "1-3"):
            shutil.rmtree(tmp_path / "run" / "checkpoint" / saved)
    path = tmp_path / "run" / "logs" / "steps.jsonl"
    path.write_text(path.read_text() + '{"step": 1000, "loss": 0}\n{"st')
    assert cli("resume", tmp_path, "run").code == 0
    assert path.read_bytes() == (folder / "run" / "logs" / "steps.jsonl").read_bytes()


def test_members_of_an_ensemble_log_their_own_steps(cli, tmp_path):
    done = cli("train", tmp_path, "members", PHANTOM, *OPTIONS, "--num-models", "2")
    assert done.code == 0, done.err
    first, second = (rows(tmp_path / "members" / number) for number in "01")
    assert [step for step, _ in first] == [step for step, _ in second]
    assert len(first) > 3
    assert first != second


def test_comet_gets_steps_once_and_an_archive_those_of_before_a_resume(tmp_path, monkeypatch):
    from test_comet import read_archive

    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("COMET_CONFIG", str(tmp_path / "none"))
    jsonl(tmp_path).write_scalars(2, {"loss": 1.0})  # by a process that was killed
    comet = Comet(tmp_path, offline=True, patience=300)
    write = fan_out(jsonl(tmp_path), comet)
    write.write_scalars(4, {"loss": 2.0})
    location = comet.send(report(1))
    assert location is not None
    _, messages = read_archive(Path(location))
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    found = [(m["metricName"], m["step"], m["metricValue"]) for m in metrics if "per_step" in m["metricName"]]
    assert sorted(found) == [("loss_per_step", 2, 1.0), ("loss_per_step", 4, 2.0)]
    assert {m["epoch"] for m in metrics if "per_step" in m["metricName"]} <= {None, 1}  # Comet's own: no step is one
    assert {m["payload"]["context"] for m in messages if "loss_per_step" in str(m)} == {"train"}


def test_a_wrong_number_of_steps_is_refused(cli, tmp_path):
    cli("train", tmp_path, "x", PHANTOM, "--log-every", "0").check_refusal("log_every")
    assert list(tmp_path.iterdir()) == []
