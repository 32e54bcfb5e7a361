"""Claims about figures: what is drawn, where, and how it is labelled."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.cli import plot
from dwiml_func.cli.plot import _has_epochs
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import EpochReport
from dwiml_func.data.config import BatchConfig, DataConfig
from dwiml_func.experiment.comparison.correlation import pearson, spearman
from dwiml_func.experiment.comparison.run_labels import kind_names, loss_kind, run_labels
from dwiml_func.experiment.config import CheckpointConfig, LoggingConfig, RunConfig
from dwiml_func.experiment.evaluation import Evaluation, read_evaluation, write_evaluation
from dwiml_func.experiment.figures.graphs import parse_graph
from dwiml_func.experiment.figures.panel import COLOURS, PlottedRun
from dwiml_func.experiment.figures.plots import (
    draw_experiments,
    draw_runs,
    read_runs,
    save_figure,
    save_run_figure,
)
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig

EVALUATION = Evaluation(model=9.0, keep_straight=4.0, principal_direction=11.5, num_points=7, num_streamlines=2)


def history(num_epochs: int, *, factor: float = 1.0, clip: float = 0.5, **changes: Any) -> tuple[EpochReport, ...]:
    """Losses that halve at each epoch; the second to last is the best."""
    best = max(1, num_epochs - 1)
    return tuple(
        EpochReport(
            epoch=epoch,
            learning_rate=0.001 if epoch < 3 else 0.0001,
            train={
                "loss": factor / 2**epoch,
                "angular_error": 90 / epoch,
                "unclipped_grad_norm": 2.0,
                "grad_norm": clip,
            },
            valid={"loss": 2 * factor / 2**epoch, "angular_error": 100 / epoch} | changes,
            num_batches=3,
            num_points=600.0,
            best=Best(2 * factor / 2 ** min(epoch, best), min(epoch, best)),
            is_best=epoch <= best,
            stop=None,
            train_minutes=0.05 * epoch,
            valid_minutes=0.01,
        )
        for epoch in range(1, num_epochs + 1)
    )


def lines(axes: Any) -> dict[str, np.ndarray]:
    """What the legend names, with its data."""
    handles, labels = axes.get_legend_handles_labels()
    return {label: np.asarray(handle.get_ydata(), dtype=float) for handle, label in zip(handles, labels, strict=True)}


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def plotted(label: str, **changes: Any) -> PlottedRun:
    return PlottedRun(**{"label": label, "history": history(4)} | changes)


def test_one_run_has_five_axes_with_titles_units_and_data() -> None:
    run = PlottedRun(label="first_run", history=history(5), evaluation=EVALUATION)
    figure = draw_runs([run])[0]
    loss, angle, norm, rate, speed = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        *("Loss", "Angular error", "Gradient", "Learning rate", "Speed of training")
    ]
    assert [axes.get_ylabel() for axes in figure.axes] == [
        *("loss (mean over points)", "mean angle (degrees)", "norm (mean over batches)", "learning rate"),
        "points per second",
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    assert figure.get_suptitle() == "first_run"

    assert list(lines(loss)) == ["training", "validation", "best epoch (4)"]
    np.testing.assert_array_equal(lines(loss)["training"], [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])
    np.testing.assert_array_equal(lines(loss)["validation"], [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16])
    assert lines(loss)["best epoch (4)"] == [1 / 8]
    assert loss.get_yscale() == "log"
    assert list(lines(angle)) == [
        *("training", "validation", "best model (9.00°)"),
        *("keep going straight (4.00°)", "principal direction (11.50°)"),
    ]
    assert lines(angle)["keep going straight (4.00°)"].tolist() == [4.0, 4.0]
    assert {name: set(values) for name, values in lines(norm).items()} == {
        "before clipping": {2.0},
        "after clipping": {0.5},
    }
    (rates,), (speeds,) = rate.get_lines(), speed.get_lines()
    assert np.asarray(rates.get_ydata()).tolist() == [0.001, 0.001, 0.0001, 0.0001, 0.0001]
    np.testing.assert_allclose(
        np.asarray(speeds.get_ydata(), dtype=float), [600 / (3 * epoch) for epoch in range(1, 6)]
    )
    assert speed.get_ylim()[0] == 0


def test_several_runs_have_a_colour_each_and_one_legend() -> None:
    labels = ["a: dropout 0", "b: dropout 0.2", "c: dropout 0.4"]
    runs = [
        PlottedRun(label=label, history=history(3 + n, factor=n + 1.0), evaluation=EVALUATION)
        for n, label in enumerate(labels)
    ]
    figure = draw_runs(runs)[0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    colours = [line.get_color() for line in legend.get_lines()]
    assert len(set(colours)) == 3
    validation = [
        line for line in figure.axes[0].get_lines() if line.get_linestyle() == "-" and np.size(line.get_xdata())
    ]
    assert [line.get_color() for line in validation] == colours
    assert [np.size(line.get_xdata()) for line in validation] == [3, 4, 5]
    assert list(lines(figure.axes[0])) == ["training", "validation", "best epoch"]
    assert list(lines(figure.axes[1]))[-2:] == ["keep going straight (4.00°)", "principal direction (11.50°)"]
    edge = figure.axes[2].get_position().y0 * figure.get_figheight()
    assert edge > legend.get_window_extent().height / figure.dpi  # it lies below the axes


def test_a_single_epoch_shows_as_points() -> None:
    figure = draw_runs([PlottedRun(label="a", history=history(1))])[0]
    for axes in figure.axes:
        for line in axes.get_lines():
            assert line.get_marker() in ("o", "D")
            assert line.get_markevery() in (None, [True])
        assert [tick for tick in axes.get_xticks() if axes.get_xlim()[0] < tick < axes.get_xlim()[1]] == [1]


def test_where_colours_repeat_curves_have_marks_however_long_they_are() -> None:
    def marks(runs: list[PlottedRun]) -> dict[object, int]:
        """Marks of the curves of losses by their colour and shape."""
        lines = draw_runs(runs)[0].axes[0].get_lines()
        curves = [(line, every) for line in lines if isinstance(every := line.get_markevery(), list)]
        return {(line.get_color(), line.get_marker()): sum(every) for line, every in curves}

    runs = [PlottedRun(label=str(number), history=history(64)) for number in range(9)]
    numbers = list(marks(runs).values())
    assert numbers == [0] * len(COLOURS) + [8] * (9 - len(COLOURS))
    assert set(marks(runs[:1]).values()) == {0}


def test_the_axis_of_losses_down_to_zero_begins_there() -> None:
    reports = tuple(dataclasses.replace(each, train={"loss": each.epoch - 1.0}, valid={}) for each in history(3))
    assert draw_runs([PlottedRun(label="a", history=reports)])[0].axes[0].get_ylim()[0] == 0


def test_what_is_not_finite_is_a_gap_and_a_point_between_gaps_is_marked() -> None:
    reports = list(history(60))
    for epoch in (20, 22):
        reports[epoch - 1] = dataclasses.replace(
            reports[epoch - 1], valid={"loss": math.inf if epoch == 20 else math.nan}
        )
    axes = draw_runs([PlottedRun(label="a", history=tuple(reports))])[0].axes[0]
    validation = axes.get_lines()[1]
    assert np.flatnonzero(np.isnan(validation.get_ydata())).tolist() == [19, 21]
    assert np.flatnonzero(np.asarray(validation.get_markevery())).tolist() == [20]


def test_what_a_run_lacks_is_left_out() -> None:
    bare = tuple(dataclasses.replace(report, train={"loss": -0.5}, valid={}) for report in history(3))
    figure = draw_runs([PlottedRun(label="a", history=bare)])[0]
    loss, *_ = figure.axes
    assert titles(figure) == ["Loss", "Learning rate", "Speed of training"]  # no panel is empty
    assert "validation" not in lines(loss)
    assert loss.get_yscale() == "linear"
    unclipped = draw_runs([PlottedRun(label="a", history=history(3, clip=2.0))])[0].axes[2]
    assert list(lines(unclipped)) == ["not clipped"]


def test_a_run_that_was_saved_within_its_first_epoch_has_nothing_to_draw(stopped_early: Path, monkeypatch) -> None:
    record = newest(stopped_early / "run")
    assert record is not None
    monkeypatch.setattr("dwiml_func.experiment.figures.plots.newest", lambda _: dataclasses.replace(record, history=()))
    with pytest.raises(ValueError, match="run' has no finished epoch yet"):
        read_runs([stopped_early / "run"])


def test_training_writes_a_figure_and_its_evaluation(stopped_early: Path) -> None:
    run = stopped_early / "run"
    assert (run / "plots" / "training.png").read_bytes().startswith(b"\x89PNG")
    evaluation = read_evaluation(run)
    assert evaluation is not None
    assert evaluation.num_streamlines == 48
    assert evaluation.principal_direction is not None
    figure = draw_experiments([run])
    record = newest(run)
    assert record is not None
    assert lines(figure.axes[0])["validation"].tolist() == [report.valid["loss"] for report in record.history]
    assert figure.get_suptitle() == "run"


def test_plot_writes_what_it_is_asked_for(cli, experiments: Path, tmp_path: Path, monkeypatch) -> None:
    run = experiments / "run"
    (run / "plots" / "training.png").unlink()
    assert cli("plot", run).out == f"{run / 'plots' / 'training.png'}\n"
    assert (run / "plots" / "training.png").is_file()
    for name, start in [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.PNG", b"\x89PNG")]:
        assert cli("plot", run, "--out", tmp_path / name).code == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    other = run.rename(run.with_name("other"))
    config = read_config(other)
    training = dataclasses.replace(config.training, clip_grad=0.5, learning_rate=("0.1*2", "0.01"))
    run.mkdir()
    (run / "checkpoint").symlink_to(other / "checkpoint")
    (run / "config.json").write_text(dataclasses.replace(config, training=training).to_json())
    (legend,) = draw_experiments([run, other]).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "run: learning_rate 0.1*2 0.01, clip_grad 0.5",
        "other: learning_rate 0.01*2 1e-30, clip_grad none",
    ]
    monkeypatch.chdir(tmp_path)
    assert cli("plot", run, other).out == "runs.png\n"


def test_the_legend_says_where_a_fork_comes_from(cli, experiments: Path) -> None:
    arguments = ("--learning-rate", "0.02", "--patience", "2", "--max-epochs", "4")
    assert cli("fork", experiments / "run", "other", *arguments).code == 0
    figure = draw_experiments([experiments / "run", experiments / "other"])
    source, fork = (text.get_text() for text in figure.legends[0].get_texts())
    assert source == "run: learning_rate 0.01*2 1e-30, max_epochs 9, patience 1"
    assert fork == "other: forked from run at 3, learning_rate 0.02, max_epochs 4, patience 2"
    curves = {line.get_color(): line.get_zorder() for line in figure.axes[0].get_lines() if np.size(line.get_xdata())}
    assert list(curves.values()) == sorted(curves.values(), reverse=True)  # so that the fork leaves its source visibly


def test_plot_takes_a_folder_of_experiments_and_passes_over_what_is_none(
    cli, experiments: Path, tmp_path: Path, monkeypatch
) -> None:
    drawn: list[list[str]] = []

    def read(directories: list[Path]) -> Any:
        drawn.append([path.name for path in directories])
        return read_runs(directories)

    monkeypatch.setattr("dwiml_func.cli.plot.read_runs", read)
    monkeypatch.chdir(tmp_path)
    (experiments / "data.hdf5").touch()
    (experiments / "notes").mkdir()
    (experiments / "again").symlink_to(experiments / "run")
    (experiments / "swept").mkdir()
    (experiments / "swept" / "sweep.json").touch()
    (experiments / "swept" / "a").symlink_to(experiments / "run")
    (experiments / "bad").mkdir()
    (experiments / "bad" / "checkpoint").symlink_to(experiments / "run" / "checkpoint")
    (experiments / "bad" / "config.json").write_text("{")
    (experiments / "new" / "checkpoint").mkdir(parents=True)  # a run that has not saved yet
    shutil.copy(experiments / "run" / "config.json", experiments / "new")
    outcome = cli("plot", experiments)
    assert outcome.out == "runs.png\n"
    assert f"Passed over {experiments / 'bad'}. " in outcome.err
    outcome = cli("plot", *(path for path in sorted(experiments.iterdir()) if path.name not in ("bad", "new")))
    assert "Passed over, as they hold no experiment" in outcome.err
    assert outcome.err.count("data.hdf5") == outcome.err.count("notes") == 1
    assert drawn == [["again", "run", "a"]] * 2


def test_plot_refuses_what_it_cannot_draw(cli, experiments: Path, tmp_path: Path) -> None:
    run = experiments / "run"
    cli("plot").check_refusal("Expected at least one EXPERIMENT_DIR")
    cli("plot", run, "--out", tmp_path / "a.bmp").check_refusal("a.bmp", ".png, .svg or .pdf")
    (tmp_path / "notes").mkdir()
    for option in ((), ("--tracking",), ("--drift",)):
        cli("plot", tmp_path / "notes", *option).check_refusal("notes", "not an experiment")
    cli("plot", run, run, "--tracking").check_refusal("--tracking: requires one experiment", "Received: 2 experiments.")
    cli("plot", run, "--tracking", "--drift").check_refusal("--tracking: requires one experiment", "Received: --drift.")
    for name in ("drift", "tracking"):
        for other in (("--panels", "loss"), ("--graph", "A", "loss"), ("--csv", "a"), ("--correlate", "a", "b")):
            cli("plot", run, f"--{name}", *other).check_refusal(f"--{name}: not allowed with --panels")
    for other in (("--panels", "loss"), ("--graph", "A", "loss"), ("--csv", "a")):
        cli("plot", run, "--correlate", "a", "b", *other).check_refusal(
            "--correlate: not allowed with --panels, --graph or"
        )
    cli("plot", run, tmp_path / "nothing").check_refusal("nothing", "not an experiment")
    cli("plot", run, "--out", run / "config.json" / "a.png").check_refusal("config.json' is not a folder", "'a.png'")
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    cli("plot", tmp_path).check_refusal("no finished epoch")


@pytest.mark.parametrize("mixes_losses", [True, False])
def test_a_correlation_of_losses_of_several_kinds_is_warned_of(monkeypatch, capsys, caplog, mixes_losses: bool) -> None:
    found, runs = SimpleNamespace(text="r 0.5", mixes_losses=mixes_losses), [SimpleNamespace(name="n", label="l")]
    monkeypatch.setattr(plot, "read_runs", lambda _: runs)
    monkeypatch.setattr(plot, "run_overview", lambda folder, name: f"{name} in {folder}")
    monkeypatch.setattr(plot, "correlate", lambda overviews, names: found if overviews == ["n in a"] else names)
    monkeypatch.setattr(plot, "draw_correlation", lambda given, labels: (given, labels))
    assert plot._correlation([Path("a")], ["loss", "lr"]) == (found, ["l"])
    assert capsys.readouterr().out == "r 0.5\n"
    told = ["Losses of different direction getters cannot be compared: correlate those of one getter."]
    assert [record.getMessage() for record in caplog.records] == told * mixes_losses


@pytest.mark.parametrize(("history", "has"), [(None, False), ((), False), (("a report",), True)])
def test_a_run_has_something_to_show_from_its_first_epoch_on(monkeypatch, history, has: bool) -> None:
    record = None if history is None else SimpleNamespace(history=history)
    monkeypatch.setattr("dwiml_func.cli.plot.newest", lambda _: record)
    monkeypatch.setattr("dwiml_func.cli.plot.recorded_config", lambda *_: None)
    assert _has_epochs.__wrapped__(Path("run")) is has


def test_a_figure_that_cannot_be_drawn_is_a_warning(experiments: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = experiments / "run"
    (run / "plots" / "training.png").unlink()
    (run / "plots").rmdir()
    (run / "plots").write_text("in the way")
    save_run_figure(run)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(run) in record.getMessage()


def test_the_evaluation_comes_back_as_it_was_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for evaluation in (EVALUATION, dataclasses.replace(EVALUATION, principal_direction=None)):
        write_evaluation(tmp_path, evaluation, epoch=3, subset="validation")
        assert read_evaluation(tmp_path) == evaluation
    write_evaluation(tmp_path, dataclasses.replace(EVALUATION, model=math.nan), epoch=3, subset="validation")
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    found = read_evaluation(tmp_path)
    assert found is not None
    assert math.isnan(found.model)
    path = tmp_path / "evaluation.json"
    write_evaluation(tmp_path, EVALUATION, epoch=3, subset="validation")
    altered = path.read_bytes().replace(b'"epoch": 3', b'"epoch": 7')
    for corrupt in (b"", b"[]", b'{"model": "9"}', b"\xff", altered):
        path.write_bytes(corrupt)
        caplog.clear()
        assert read_evaluation(tmp_path) is None
        assert corrupt == b'{"model": "9"}' or f"{path} is corrupt" in caplog.text
    path.unlink()
    os.mkfifo(path)
    assert read_evaluation(tmp_path) is None


def test_losses_that_cannot_be_compared_are_on_axes_of_their_own() -> None:
    getters = ("cosine-regression", "l2-regression", "cosine-regression", "gaussian")
    runs = [plotted(f"r{n}", loss_kind={"dg_key": getter}) for n, getter in enumerate(getters)]
    figure, rows = draw_runs(runs)
    assert titles(figure)[:3] == ["Loss of cosine-regression", "Loss of l2-regression", "Loss of gaussian"]
    shown = {title: {row.run for row in rows if row.panel == title} for title in titles(figure)}
    assert shown["Loss of cosine-regression"] == {"r0", "r2"}
    assert shown["Loss of gaussian"] == {"r3"}
    assert shown["Angular error"] == {"r0", "r1", "r2", "r3"}
    for title, axes in zip(titles(figure), figure.axes, strict=True):
        colours = {line.get_color() for line in axes.get_lines() if np.size(line.get_xdata())}
        assert colours == {COLOURS[int(label[1:])] for label in shown[title]}  # those of the runs, in all panels


def test_the_kind_of_a_loss_is_what_decides_its_values() -> None:
    def kind(**changes: Any) -> dict[str, str]:
        config = RunConfig(hdf5_file="a").to_dict()
        for name, value in changes.items():
            part = next(part for part in ("model", "batches", "training") if name in config[part])
            config[part][name] = value
        return loss_kind(config)

    assert kind() == kind(dropout=0.5, dg_dropout=0.5, step_size=2.0, max_epochs=3, learning_rate=["1"])
    distinct = [kind(), kind(dg_key="l2-regression"), kind(dg_key="l2-regression", step_size=2.0), kind(add_eos=True)]
    distinct += [kind(dg_key="l2-regression", normalize_targets=1.0), kind(model="autoencoder")]
    assert all(a != b for n, a in enumerate(distinct) for b in distinct[:n])
    unit_length = {"dg_key": "l2-regression", "normalize_targets": 1.0}
    assert kind(**unit_length) == kind(**unit_length, step_size=2.0)
    assert kind_names(distinct[:3]) == [
        *("cosine-regression", "l2-regression, without step_size", "l2-regression, step_size 2.0")
    ]
    assert loss_kind({"width": 3}) == {}  # of a script


def test_labels_leave_out_what_cannot_matter_and_name_the_getter_first(tmp_path: Path) -> None:
    config = RunConfig(hdf5_file="a").to_dict()
    other = RunConfig(
        hdf5_file="a",
        data=DataConfig(lazy=True, cache_size="1GB"),
        batches=BatchConfig(processes=3, batch_size_validation=7),
        model=ModelConfig(dg_key="gaussian"),
        training=TrainingConfig(max_epochs=3, learning_rate=("0.1",), num_threads=2, skip_window_lag=True),
        checkpoints=CheckpointConfig(keep="all"),
        logging=LoggingConfig(log_every=3),
    ).to_dict()
    assert run_labels([tmp_path / "a", tmp_path / "b"], [config, other]) == [
        "a: dg_key cosine-regression, learning_rate 0.001, max_epochs 100",
        "b: dg_key gaussian, learning_rate 0.1, max_epochs 3",
    ]
    seeds = [
        RunConfig(hdf5_file="a", training=TrainingConfig(rng=rng, max_epochs=n), model=ModelConfig(dropout=0.1 * n))
        for n, rng in ((1, 1), (2, 2), (2, 3))
    ]
    labels = run_labels([tmp_path / "a"] * 3, [own.to_dict() for own in seeds])
    assert [label.partition(": ")[2].partition(",")[0] for label in labels] == ["rng 1", "rng 2", "rng 3"]
    names = run_labels([tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "ens" / "0"], [config] * 3)
    assert names == ["x/run", "y/run", "ens/0"]


@pytest.mark.parametrize("is_flat", [True, False])
def test_no_curve_crosses_a_legend(is_flat: bool) -> None:
    train = [0.11, 1.0] * 30  # wherever the legend lies, it would cross this one
    valid = [0.5] * 60 if is_flat else train
    reports = tuple(
        dataclasses.replace(each, train={"loss": own}, valid={"loss": other}, best=Best(0.5, 1))
        for each, own, other in zip(history(60), train, valid, strict=True)
    )
    (axes,) = draw_runs([plotted("a", history=reports)], panels=["loss"])[0].axes
    legend: Any = axes.get_legend()
    box, curves = legend.get_window_extent(), axes.get_lines()
    paths = [line.get_transform().transform_path(line.get_path()) for line in curves if np.size(line.get_xdata()) > 2]
    assert len(paths) == 2
    assert not any(path.intersects_bbox(box, filled=False) for path in paths)
    assert axes.get_ylim()[1] > 1.2  # room was made above


@pytest.mark.parametrize("number", range(1, 10))
def test_panels_leave_no_place_empty(number: int) -> None:
    runs = [plotted("a"), *(plotted(f"r{n}", loss_kind={"dg_key": str(n)}) for n in range(1, number))]
    figure, _ = draw_runs(runs, panels=["loss"])
    assert len(figure.axes) == number
    rows: dict[float, list[Any]] = {}
    for axes in figure.axes:
        rows.setdefault(round(axes.get_position().y0, 6), []).append(axes.get_position())
    assert all(row[-1].x1 == pytest.approx(0.985) for row in rows.values())
    assert all(left.x1 < right.x0 for row in rows.values() for left, right in pairwise(row))
    assert all(len(row) <= 3 for row in rows.values())
    inches = figure.get_figheight()
    edges = [(row[0].y1 * inches, row[0].y0 * inches) for row in rows.values()]  # from above
    assert inches - edges[0][0] == pytest.approx(0.4 if number > 1 else 0.7)  # a single run has a title there
    assert [upper - lower for upper, lower in edges] == pytest.approx([2.725] * len(rows))
    assert [lower - upper for (_, lower), (upper, _) in pairwise(edges)] == pytest.approx([0.8] * (len(rows) - 1))
    assert edges[-1][1] >= 0.54  # for the names of the x axes


def test_panels_are_chosen_by_name(cli, experiments: Path, tmp_path: Path) -> None:
    run = experiments / "run"
    assert titles(draw_runs(read_runs([run]), panels=["rate", "loss"])[0]) == ["Loss", "Learning rate"]
    assert cli("plot", run, "--panels", "loss", "rate", "--out", tmp_path / "a.png").code == 0
    cli("plot", run, "--panels", "monitored").check_refusal(
        "--panels: expected some of loss, angle, gradient", "monitored"
    )
    cli("plot", run, "--panels", "nothing").check_refusal("nothing")
    cli("plot", run, "--drift", "--panels", "loss").check_refusal("--drift: not allowed with --panels")


def test_graphs_draw_logs_by_name_and_what_is_computed_of_them(cli, experiments: Path, tmp_path: Path) -> None:
    run, out, table = experiments / "run", tmp_path / "graph.png", tmp_path / "new" / "graph.csv"
    graph = ("--graph", "Gap", "diff(valid_loss, train_loss)", "sum(loss, sum(lr,lr))")
    other = ("--graph", "dwi_ml's name", "valid_local_loss_monitor_per_epoch.npy", "0", "2.5")
    outcome = cli("plot", run, *graph, *other, "--out", out, "--csv", table)
    assert outcome.out == f"{out}\n{table}\n", outcome.err
    checkpoint = newest(run)
    assert checkpoint is not None
    reports = checkpoint.history
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in csv.DictReader(table.read_text().splitlines()):
        assert row["run"] == "run"
        found.setdefault((row["panel"], row["curve"]), {})[int(float(row["epoch"]))] = float(row["value"])
    assert found == {
        ("Gap", "diff(valid_loss, train_loss)"): {r.epoch: r.valid["loss"] - r.train["loss"] for r in reports},
        ("Gap", "sum(loss, sum(lr, lr))"): {r.epoch: r.valid["loss"] + 2 * r.learning_rate for r in reports},
        ("dwi_ml's name", "valid_local_loss_monitor_per_epoch.npy"): {r.epoch: r.valid["loss"] for r in reports},
    }
    axes = draw_runs(read_runs([run]), graphs=[parse_graph(other[1:])])[0].axes
    assert [(each.get_title(loc="left"), each.get_ylim()) for each in axes] == [("dwi_ml's name", (0.0, 2.5))]


def test_a_graph_of_losses_is_one_for_each_kind_and_passes_over_runs_without_the_log() -> None:
    lag = plotted("a", history=history(4, tracking_window_lag=3.0), loss_kind={"dg_key": "gaussian"})
    runs = [lag, plotted("b", loss_kind={"dg_key": "l2-regression"})]
    figure, rows = draw_runs(runs, graphs=[parse_graph(["L", "loss", "train_loss"]), parse_graph(["W", "lag"])])
    assert titles(figure) == ["L: gaussian", "L: l2-regression", "W"]
    assert {row.run for row in rows if row.panel == "W"} == {"a"}


@pytest.mark.parametrize(
    ("graph", "named"),
    [
        (["Loss"], ['expected "TITLE" LOG']),
        (["Loss", "1", "2", "3"], ['expected "TITLE" LOG']),
        (["Loss", "2", "1"], ['expected "TITLE" LOG']),
        (["Loss", "loss", "3"], ['expected "TITLE" LOG']),
        (["Loss", "loss", "3", "2"], ["YMIN below YMAX"]),
        (["Loss", "diff(loss)"], ["expected diff(LOG, LOG)"]),
        (["Loss", "mean(loss, lr)"], ["diff(LOG, LOG) or sum(LOG, LOG)", "mean(loss, lr)"]),
        (["Loss", "valid_los"], ["'valid_los'", "Did you mean valid_loss"]),
        (["Loss", "loss", "experiments/run"], ["EXPERIMENT_DIRs stand before --graph"]),
    ],
)
def test_graphs_that_cannot_be_drawn_are_refused(cli, stopped_early: Path, tmp_path: Path, graph, named) -> None:
    outcome = cli(
        "plot", stopped_early / "run", "--out", tmp_path / "a.png", "--csv", tmp_path / "a.csv", "--graph", *graph
    )
    outcome.check_refusal("--graph", *named)
    assert not any(tmp_path.iterdir())


def test_how_the_best_models_of_several_runs_track_is_drawn_in_bars() -> None:
    scores = {"continue": {"valid": 0.5}, "core": {"valid": 0.25}}
    runs = [
        plotted("a", tracking={"model": scores, "principal direction": {"core": {"valid": 0.75}}}),
        plotted("b", tracking={"model": {"core": {"valid": 0.125}}}),
        plotted("c"),
    ]
    figure, rows = draw_runs(runs)
    assert [(row.run, row.curve, row.epoch, row.value) for row in rows if row.panel.startswith("Tracking")] == [
        *(("a", "continue", 3, 0.5), ("a", "core", 3, 0.25), ("b", "core", 3, 0.125)),
        ("principal direction", "core", None, 0.75),
    ]
    assert {row.curve for row in rows if row.panel == "Speed of training"} == {"speed of training"}
    axes: Any = figure.axes[-1]
    assert sorted(bar.get_height() for bar in axes.patches) == [0.125, 0.25, 0.5]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2
    assert not any(title.startswith("Tracking") for title in titles(draw_runs(runs[:1])[0]))


def test_scores_that_are_not_known_are_not_drawn() -> None:
    unknown = dataclasses.replace(EVALUATION, model=math.nan, keep_straight=math.nan, principal_direction=None)
    scores = {"core": {"valid": 0.25}, "ball": {"valid": None}}
    runs = [
        plotted("a", evaluation=unknown, tracking={"model": scores, "principal direction": scores}),
        plotted("b", evaluation=EVALUATION, tracking={"model": scores}),
    ]
    figure, rows = draw_runs(runs)
    assert all(math.isfinite(row.value) for row in rows)
    bars: Any = figure.axes[-1]
    assert [bar.get_height() for bar in bars.patches] == [0.25, 0.25]
    assert [np.asarray(line.get_ydata()).tolist() for line in bars.get_lines()] == [[0.25, 0.25]]
    assert [row.curve for row in rows if row.panel.startswith("Tracking")] == ["core"] * 3
    angles = dict.fromkeys(row.curve for row in rows if row.panel == "Angular error")
    assert list(angles) == ["training", "validation", "best model", "baseline"]
    alone, rows = draw_runs(runs[:1])
    assert {row.curve for row in rows if row.panel == "Angular error"} == {"training", "validation"}
    assert not any("nan" in text for axes in alone.axes for text in lines(axes))


@pytest.mark.parametrize("name", ["a$b_{$", "$x$"])
def test_names_are_no_formulas_and_powers_of_ten_are(tmp_path: Path, name: str) -> None:
    import matplotlib

    runs = [PlottedRun(label=label, history=history(2)) for label in (name, "other")]
    figure = draw_runs(runs)[0]
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(1, 1000)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        save_figure(figure, tmp_path / "runs.svg")
    text = (tmp_path / "runs.svg").read_text()
    assert f">{name}</text>" in text
    assert "mathdefault{10^{1}}$</text>" not in text


def test_a_correlation_is_that_of_scipy_over_epochs_and_over_runs(cli, experiments: Path, tmp_path: Path) -> None:
    from scipy import stats

    for n in (1, 2):
        shutil.copytree(experiments / "run", experiments / f"other{n}")
        scores = {"scores": {"model": {"core": {"valid": 0.25 * n}}}}
        (experiments / f"other{n}" / "tracking.json").write_text(json.dumps(scores))
        config = read_config(experiments / f"other{n}")
        training = dataclasses.replace(config.training, ema=0.5 * n - 0.1)
        (experiments / f"other{n}" / "config.json").write_text(dataclasses.replace(config, training=training).to_json())
    out = tmp_path / "c.png"
    outcome = cli("plot", experiments, "--correlate", "train_loss", "valid_loss", "--out", out)
    checkpoint = newest(experiments / "run")
    assert checkpoint is not None
    a, b = ([getattr(r, part)["loss"] for r in checkpoint.history] for part in ("train", "valid"))
    lines = {line[:23].rstrip(): line[23:].split() for line in outcome.out.splitlines()}
    assert lines["run"] == ["values", "r", "rank"] or lines["run"] == ["3", f"{stats.pearsonr(a, b)[0]:.3f}"]
    assert lines["other1"] == ["3", f"{stats.pearsonr(a, b)[0]:.3f}"]
    rank = stats.spearmanr(a * 3, b * 3)[0]
    assert lines["all epochs of all runs"] == ["9", f"{stats.pearsonr(a, b)[0]:.3f}", f"{rank:.3f}"]
    assert lines["best epochs of the runs"] == ["3", "-", "-"]  # equal in all
    assert out.read_bytes().startswith(b"\x89PNG")
    over_runs = cli("plot", experiments, "--correlate", "tracking", "ema", "--out", out).out.splitlines()
    assert [line.split()[-3:] for line in over_runs[1:-1]] == [["2", "1.000", "1.000"]]  # of two values over runs
    values, others = [1.0, 2.0, 2.0, 5.0, -3.0], [3.0, 1.0, 4.0, 4.0, 0.5]
    assert spearman(values, others) == pytest.approx(stats.spearmanr(values, others)[0], abs=1e-15)
    assert pearson(values, others) == pytest.approx(stats.pearsonr(values, others)[0], abs=1e-15)
    cli("plot", experiments, "--correlate", "loss", "nothing").check_refusal("--correlate", "'nothing'")
    cli("plot", experiments, "--correlate", "loss").check_refusal("--correlate: expected NAME NAME. Received: loss.")
    cli("plot", experiments, "--csv", tmp_path, "--out", out).check_refusal("Expected a file name. Received a folder")
    cli("plot", experiments, "--correlate", "loss", "dg-key").check_refusal("two numbers of the same runs")
    cli("plot", experiments, "--correlate", "loss", "lr", "--csv", "a").check_refusal("--correlate: not allowed")
