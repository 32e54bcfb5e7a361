"""Claims about figures: what is drawn, where, and how it is labelled."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.evaluation import Evaluation, read_evaluation, write_evaluation
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.panels import PlottedRun
from dwiml_func.experiment.plots import draw_experiments, plot_runs, save_run_figure

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


def test_one_run_has_five_axes_with_titles_units_and_data() -> None:
    run = PlottedRun(label="first_run", history=history(5), evaluation=EVALUATION)
    figure = plot_runs([run])
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
    figure = plot_runs(runs)
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
    figure = plot_runs([PlottedRun(label="a", history=history(1))])
    for axes in figure.axes:
        for line in axes.get_lines():
            assert line.get_marker() in ("o", "D")
            assert line.get_markevery() in (None, [True])
        assert [tick for tick in axes.get_xticks() if axes.get_xlim()[0] < tick < axes.get_xlim()[1]] == [1]


def test_what_is_not_finite_is_a_gap_and_a_point_between_gaps_is_marked() -> None:
    reports = list(history(60))
    for epoch in (20, 22):
        reports[epoch - 1] = dataclasses.replace(
            reports[epoch - 1], valid={"loss": math.inf if epoch == 20 else math.nan}
        )
    axes = plot_runs([PlottedRun(label="a", history=tuple(reports))]).axes[0]
    validation = axes.get_lines()[1]
    assert np.flatnonzero(np.isnan(validation.get_ydata())).tolist() == [19, 21]
    assert np.flatnonzero(np.asarray(validation.get_markevery())).tolist() == [20]


def test_what_a_run_lacks_is_left_out() -> None:
    bare = tuple(dataclasses.replace(report, train={"loss": -0.5}, valid={}) for report in history(3))
    loss, angle, norm, *_ = plot_runs([PlottedRun(label="a", history=bare)]).axes
    assert "validation" not in lines(loss)
    assert loss.get_yscale() == "linear"
    for axes in (angle, norm):
        assert axes.get_lines()[:] == []
        assert [text.get_text() for text in axes.texts] == ["not recorded"]
    unclipped = plot_runs([PlottedRun(label="a", history=history(3, clip=2.0))]).axes[2]
    assert list(lines(unclipped)) == ["not clipped"]


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
    assert source.startswith("run: max_epochs 9, patience 1, learning_rate 0.01*2 1e-30")
    assert fork == "other: forked from run at 3, max_epochs 4, patience 2, learning_rate 0.02"
    curves = {line.get_color(): line.get_zorder() for line in figure.axes[0].get_lines() if np.size(line.get_xdata())}
    assert list(curves.values()) == sorted(curves.values(), reverse=True)  # so that the fork leaves its source visibly


def test_plot_takes_a_folder_of_experiments_and_passes_over_what_is_none(
    cli, experiments: Path, tmp_path: Path, monkeypatch
) -> None:
    drawn: list[list[str]] = []

    def draw(directories: list[Path]) -> Any:
        drawn.append([path.name for path in directories])
        return draw_experiments(directories)

    monkeypatch.setattr("dwiml_func.cli.plot.draw_experiments", draw)
    monkeypatch.chdir(tmp_path)
    (experiments / "data.hdf5").touch()
    (experiments / "notes").mkdir()
    (experiments / "again").symlink_to(experiments / "run")
    assert cli("plot", experiments).out == "runs.png\n"
    outcome = cli("plot", *sorted(experiments.iterdir()))
    assert "Passed over, as they hold no experiment" in outcome.err
    assert outcome.err.count("data.hdf5") == outcome.err.count("notes") == 1
    assert drawn == [["again", "run"]] * 2


def test_plot_refuses_what_it_cannot_draw(cli, experiments: Path, tmp_path: Path) -> None:
    run = experiments / "run"
    cli("plot").check_refusal("Expected at least one EXPERIMENT_DIR")
    cli("plot", run, "--out", tmp_path / "a.bmp").check_refusal("a.bmp", ".png, .svg or .pdf")
    (tmp_path / "notes").mkdir()
    cli("plot", tmp_path / "notes").check_refusal("notes", "not an experiment")
    cli("plot", run, tmp_path / "nothing").check_refusal("nothing", "not an experiment")
    cli("plot", run, "--out", run / "config.json" / "a.png").check_refusal("config.json' is not a folder", "'a.png'")
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    cli("plot", tmp_path).check_refusal("no finished epoch")


def test_a_figure_that_cannot_be_drawn_is_a_warning(experiments: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = experiments / "run"
    (run / "plots" / "training.png").unlink()
    (run / "plots").rmdir()
    (run / "plots").write_text("in the way")
    save_run_figure(run)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(run) in record.getMessage()


def test_the_evaluation_comes_back_as_it_was_written(tmp_path: Path) -> None:
    for evaluation in (EVALUATION, dataclasses.replace(EVALUATION, principal_direction=None)):
        write_evaluation(tmp_path, evaluation, epoch=3, subset="validation")
        assert read_evaluation(tmp_path) == evaluation
    write_evaluation(tmp_path, dataclasses.replace(EVALUATION, model=math.nan), epoch=3, subset="validation")
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    found = read_evaluation(tmp_path)
    assert found is not None
    assert math.isnan(found.model)
    for corrupt in (b"", b"[]", b"{}", b'{"model": "9"}', b"\xff"):
        (tmp_path / "evaluation.json").write_bytes(corrupt)
        assert read_evaluation(tmp_path) is None
