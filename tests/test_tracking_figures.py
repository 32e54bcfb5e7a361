"""Claims about the figures of tracking: which lines are drawn, in which colour and where, and the curves' values."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from experiment_cases import PHANTOM
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.image import imread

from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.figures.panel import COLOURS
from dwiml_func.experiment.figures.streamline_views import VIEWS, bundle_colours, view_limits
from dwiml_func.experiment.figures.tracking import (
    NOT_VALID,
    _some,
    draw_drift,
    draw_drifts,
    draw_tracked,
    save_tracking_figures,
)
from dwiml_func.experiment.finish import is_whole
from dwiml_func.experiment.tracking.evaluation import ORACLE, TrackingEvaluation
from dwiml_func.experiment.tracking.recorded import Drift, ShownLines, TrackedLines, read_drift
from dwiml_func.tracking.protocols import DRIFT_MM, LAG_MM, ProtocolScores

BLUE, ORANGE = COLOURS[:2]


def walks(num: int, seed: int) -> Streamlines:
    rng = np.random.default_rng(seed)
    return Streamlines.from_list([rng.normal(size=(rng.integers(2, 9), 3)).cumsum(axis=0) for _ in range(num)])


def evaluation(tracked: dict[Any, ShownLines], names: tuple[str, ...] = ("CST", "AF")) -> TrackingEvaluation:
    real = ShownLines(walks(5, 0), np.array([0, 0, 0, 1, 1]), np.ones(5, dtype=bool))
    scores: Any = {
        protocol: ProtocolScores(9, 8, float(shown.valid.mean()) if len(shown.valid) else 0.0, 1.0, None)
        for protocol, shown in tracked.items()
    }
    return TrackingEvaluation(
        subject="anna", subset="validation", step_size=1.0, has_mask=True, scores={"model": scores},
        ceiling_valid=None, ceiling_both_ends=None, lines=TrackedLines(names, real, tracked),
    )  # fmt: skip


def drawn(panel: Any) -> dict[str, list[np.ndarray]]:
    """The lines of a panel by colour."""
    found: dict[str, list[np.ndarray]] = {}
    for collection in panel.collections:
        assert isinstance(collection, LineCollection)
        colour = to_hex(np.asarray(collection.get_colors())[0]).upper()
        found.setdefault(colour, []).extend(np.asarray(path.vertices) for path in collection.get_paths())
    return found


def test_real_streamlines_are_above_tracked_ones_in_the_colours_of_bundles_and_what_is_wrong_is_black() -> None:
    free = ShownLines(walks(6, 1), np.array([0, 1, 1, 1, 0, 0]), np.array([True, True, False, True, False, False]))
    found = evaluation({"free": free})
    assert found.lines is not None
    figure = draw_tracked(found.scores["model"], found.lines, title="a title")
    real_row, free_row = figure.axes[:3], figure.axes[3:]
    assert len(free_row) == 3
    for panel, (_, right, up) in zip(real_row, VIEWS, strict=True):
        lines = drawn(panel)
        assert {colour: len(each) for colour, each in lines.items() if each} == {BLUE: 3, ORANGE: 2}
        expected = [line[:, [right, up]].numpy() for line in found.lines.real.lines.to_list()]
        for received, line in zip(lines[BLUE] + lines[ORANGE], expected, strict=True):
            np.testing.assert_array_equal(received, line)
    for panel, (_, right, up) in zip(free_row, VIEWS, strict=True):
        lines = drawn(panel)
        assert {colour: len(each) for colour, each in lines.items()} == {BLUE: 1, ORANGE: 2, NOT_VALID: 3}
        for received, row in zip(lines[NOT_VALID], (2, 4, 5), strict=True):
            np.testing.assert_array_equal(received, free.lines.to_list()[row][:, [right, up]].numpy())
    for column, panel in enumerate(real_row):  # the same mm in both rows, as long to the right as up
        assert panel.get_xlim() == free_row[column].get_xlim()
        assert panel.get_ylim() == free_row[column].get_ylim()
        assert np.ptp(panel.get_xlim()) == pytest.approx(np.ptp(panel.get_ylim()))
        for points in (point for lines in drawn(free_row[column]).values() for point in lines):
            assert points[:, 0].min() > panel.get_xlim()[0]
            assert points[:, 1].max() < panel.get_ylim()[1]
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles[0] == "real streamlines"
    assert titles[3] == "tracked, free (seeds anywhere in the mask): 50 % of 8 valid, 6 drawn"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["CST", "AF", "not valid"]
    assert [line.get_color() for line in legend.get_lines()] == [BLUE, ORANGE, NOT_VALID]
    assert figure.get_suptitle() == "a title"


def test_a_row_of_a_model_that_tracked_nothing_says_so() -> None:
    none = ShownLines(Streamlines.from_list([]), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))
    found = evaluation({"core": none})
    assert found.lines is not None
    figure = draw_tracked(found.scores["model"], found.lines, title="")
    assert [text.get_text() for panel in figure.axes[3:] for text in panel.texts] == ["none"]
    assert sum(len(lines) for panel in figure.axes[3:] for lines in drawn(panel).values()) == 0
    assert view_limits([none.lines]) == pytest.approx(np.array([[-0.03, 1.03]] * 3))  # a cube of 1 mm, with margins


def test_a_title_says_how_many_are_drawn_where_not_all_are() -> None:
    shown = ShownLines(walks(6, 1), np.zeros(6, dtype=np.int64), np.ones(6, dtype=bool))
    assert [_some(shown, num) for num in (None, 6, 7)] == ["", "", ", 6 drawn"]


def test_of_many_bundles_the_largest_have_their_own_colours() -> None:
    assert bundle_colours([1, 2]) == [BLUE, ORANGE]
    colours = bundle_colours([5, 1, 9, 9, 9, 1, 9, 9, 9])
    assert Counter(colours) == {colours[0]: 3, **dict.fromkeys(COLOURS[:6], 1)}
    assert [row for row, colour in enumerate(colours) if colour == colours[0]] == [0, 1, 5]
    assert not {NOT_VALID, colours[0]} & set(COLOURS[:6])
    names = ("a_bundle_of_a_very_long_name_on_the_left", *"bcdefghi")
    shown = ShownLines(walks(9, 0), np.arange(9), np.ones(9, dtype=bool))
    found = evaluation({}, names)
    (legend,) = draw_tracked(found.scores["model"], TrackedLines(names, shown, {}), title="").legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("a_bundle_of_a...n_the_left", *"bcdef", "3 other bundles", "not valid"),
    ]


def test_the_drift_is_drawn_by_the_distance_gone_and_what_is_not_known_is_a_gap() -> None:
    same = {ORACLE: (0.0, 0.5, 1.0), "keep going straight": (0.0, 40.0, 90.0)}
    first = Drift((0.0, 2.0, 4.0), {"model": (0.0, 1.0, 2.0), **same})
    second = Drift((0.0, 2.0, 4.0), {"model": (0.0, 1.5, None), **same})
    figure = draw_drift({"a": first, "b": second})
    (axes,) = figure.axes
    curves = {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()}
    assert list(curves) == [
        *("a (2.0 mm after 4 mm)", "b (1.5 mm after 2 mm)"),
        *("keep going straight (90.0 mm after 4 mm)", "nearest real direction (1.0 mm after 4 mm)"),
    ]
    np.testing.assert_array_equal(curves["a (2.0 mm after 4 mm)"], [0, 1, 2])
    np.testing.assert_array_equal(curves["b (1.5 mm after 2 mm)"], [0, 1.5, np.nan])
    assert axes.get_lines()[0].get_xdata().tolist() == [0, 2, 4]  # pyright: ignore
    assert axes.get_ylim() == (0, 2.5)  # what never turns leaves the figure
    assert len({line.get_color() for line in axes.get_lines()}) == 4
    lines = draw_drift({str(number): first for number in range(9)}).axes[0].get_lines()
    colours = [line.get_color() for line in lines[:9]]
    assert colours == [*COLOURS[:-1], *COLOURS[:-1]][:9]  # without black, which others have
    (axes,) = draw_drift({"a": Drift((0.0, 2.0), {"model": (None, None)})}).axes
    assert (axes.get_xlim(), axes.get_ylim(), len(axes.get_lines())) == ((0, 1), (0, 1), 0)


def test_a_legend_names_models_whose_names_begin_with_an_underscore() -> None:
    figure = draw_drift({"_a$b_{$": Drift((0.0, 2.0, 4.0), {"model": (0.0, 1.0, None)})})
    assert figure.axes[0].get_xlim() == (0, 2)  # as far as something is known
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["_a$b_{$ (1.0 mm after 2 mm)"]


def with_bundles(folder: Path) -> Path:
    """Data with two bundles, of 30 and 18 streamlines a subject."""
    data = Path(shutil.copy(PHANTOM, folder / "data.hdf5"))
    with h5py.File(data, "r+") as file:
        for subject in ("subj0", "subj1", "subj2"):
            group = file.require_group(f"{subject}/streamlines")
            group["bundle_ids"] = np.repeat([0, 1], [30, 18])
            group.attrs["bundle_names"] = ["CST", "AF"]
    return data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data with bundles."""
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("with_bundles")
    data = with_bundles(folder)
    options = ("--rnn-layer-sizes", "4", "--nb-previous-dirs", "1", "--max-epochs", "1", "--batch-size-training", "96")
    assert main(["train", str(folder), "run", str(data), *options]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


FIGURES = ("plots/tracking.png", "plots/drift.png")


def test_a_finished_run_has_both_figures_and_the_drift_of_all_trackers(finished: Path) -> None:
    for name in FIGURES:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    text = (finished / "tracking.json").read_text()
    assert "NaN" not in text
    recorded = json.loads(text)
    drift = read_drift(finished)
    assert drift is not None
    assert drift.gone_mm == DRIFT_MM
    assert set(drift.lag_mm) == set(recorded["scores"]) == {"model", "keep going straight", ORACLE}
    for name, curve in drift.lag_mm.items():
        at = [curve[drift.gone_mm.index(way)] for way in LAG_MM]
        assert at == recorded["scores"][name]["continue"]["lag_mm"]
        assert curve[0] == pytest.approx(0.0, abs=1e-6)
        assert None not in curve[:5]
        assert curve[-1] is None  # no real streamline is 80 mm longer
    lag = {name: scores["continue"]["lag_mm"][1] for name, scores in recorded["scores"].items()}
    assert lag[ORACLE] < 0.8 * min(lag["model"], lag["keep going straight"])  # it knows the way
    assert "lines" not in recorded


def test_a_figure_that_is_missing_is_made_by_a_resume(cli: Any, run: Path) -> None:
    assert is_whole(run)
    before = {name: (run / name).read_bytes() for name in ("tracking.json", *FIGURES)}
    for name in FIGURES:
        (run / name).unlink()
        assert not is_whole(run)
        (run / name).write_bytes(before[name])
    (run / FIGURES[0]).unlink()
    done = cli("resume", run.parent, "run")
    assert (done.code, done.err) == (0, "")
    assert {name: (run / name).read_bytes() for name in before} == before
    cli("resume", run.parent, "run").check_refusal("No epoch is left to train")


def test_without_figures_the_streamlines_are_written_which_plot_draws(cli: Any, run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["logging"]["skip_figures"] = True
    (run / "config.json").write_text(json.dumps(config))
    before = (run / "plots" / "tracking.npz").read_bytes()
    assert cli("evaluate", run, "--write").code == 0
    assert [path.name for path in run.glob("plots/*")] == ["tracking.npz"]
    assert (run / "plots" / "tracking.npz").read_bytes() == before
    assert is_whole(run)


def test_what_an_earlier_version_left_gets_its_figures_from_evaluate(cli: Any, run: Path) -> None:
    recorded = json.loads((run / "tracking.json").read_text())
    complete = (run / "tracking.json").read_bytes()
    del recorded["drift"], recorded["checksum"]
    (run / "tracking.json").write_text(json.dumps(recorded))
    for name in FIGURES:
        (run / name).unlink()
    cli("plot", run, "--drift").check_refusal(str(run), "--write")
    assert cli("evaluate", run, "--write").code == 0
    assert (run / "tracking.json").read_bytes() == complete
    assert all((run / name).is_file() for name in FIGURES)


def test_plot_draws_the_drift_that_is_recorded(cli: Any, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    figure = (run / "plots" / "drift.png").read_bytes()
    assert cli("plot", run, "--drift").out == f"{run / 'plots' / 'drift.png'}\n"
    assert (run / "plots" / "drift.png").read_bytes() != figure  # it has the run's name
    shutil.copytree(run, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert cli("plot", run, tmp_path / "other", "--drift").out == "drift.png\n"
    shutil.copytree(run, tmp_path / "again" / run.name)
    lines = draw_drifts([run, tmp_path / "again" / run.name, tmp_path / "other"]).axes[0].get_lines()
    labels = [str(line.get_label()).partition(" (")[0] for line in lines]
    assert labels[:3] == [run.name, str(tmp_path / "again" / run.name), "other"]
    for lags in ('"far"', '{"model": [1, 2]}', '{"keep going straight": [1]}'):
        (run / "tracking.json").write_text(f'{{"drift": {{"gone_mm": [1], "lag_mm": {lags}}}}}')
        cli("plot", run, "--drift").check_refusal("tracking.json")
    cli("plot", tmp_path / "none", "--drift").check_refusal("is not an experiment")


def test_plot_draws_the_recorded_streamlines_again(cli: Any, run: Path) -> None:
    figure = run / "plots" / "tracking.png"
    before = imread(figure)
    figure.unlink()
    assert cli("plot", run, "--tracking").out == f"{figure}\n"
    assert np.abs(imread(figure) - before).mean() < 1e-3  # the recorded points are rounded to 0.01 mm
    cli("plot", run, "--tracking", "--csv", "a.csv").check_refusal("--tracking: not allowed with --panels")
    cli("plot", run, run, "--tracking").check_refusal("--tracking: requires one experiment", "2 experiments")
    (run / "plots" / "tracking.npz").unlink()
    cli("plot", run, "--tracking").check_refusal("plots/tracking.npz of one epoch", "--write")


def test_a_drift_alone_is_drawn_into_a_folder_of_its_own(tmp_path: Path) -> None:
    scores: Any = {"model": {"continue": ProtocolScores(9, 8, 0.5, 0.5, None)}}
    evaluation = TrackingEvaluation(
        subject="anna", subset="validation", step_size=2.0, has_mask=True, scores=scores, ceiling_valid=0.875,
        ceiling_both_ends=0.9, drift=Drift((0.0, 2.0), {"model": (0.0, 1.0)}), lines=None,
    )  # fmt: skip
    save_tracking_figures(tmp_path, evaluation, epoch=1)
    assert [path.name for path in tmp_path.glob("plots/*")] == ["drift.png"]


def test_figures_that_cannot_be_drawn_are_a_warning(cli: Any, run: Path) -> None:
    shutil.rmtree(run / "plots")
    (run / "plots").write_text("in the way")
    (run / "evaluation.json").unlink()
    done = cli("evaluate", run, "--write")
    assert done.code == 0
    assert "The figures of tracking of" in done.err


def test_a_transformer_that_reads_less_than_300_mm_is_scored_on_lines_that_it_can_read(cli, tmp_path) -> None:
    """The longest line of a tracking has 300 mm by default, 600 points of these data."""
    options = ("--model", "tts", "--max-len", "65", "--nheads", "2", "--n-layers-e", "1", "--max-epochs", "1")
    options += ("--input-embedding-key", "nn_embedding", "--input-embedded-size", "4", "--batch-size-training", "96")
    options += ("--neighborhood-type", "axes", "--neighborhood-radius", "1", "--neighborhood-resolution", "1")
    data = with_bundles(tmp_path)
    with h5py.File(data, "r+") as file:
        for subject in file.values():
            subject["input"].attrs["sh_order"] = 2  # with a neighbourhood, the principal direction is that at the point
    outcome = cli("train", tmp_path, "run", data, *options)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Tracking on validation subject subj2" in outcome.out
    assert "principal direction" in json.loads((tmp_path / "run" / "tracking.json").read_text())["scores"]
