"""Figures of experiments, from the history in their checkpoints. The panels are in `run_panels`.

matplotlib is used without `pyplot`, so nothing global is touched.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.experiment.comparison.run_labels import loss_kind, run_labels, run_names
from dwiml_func.experiment.evaluation import read_evaluation
from dwiml_func.experiment.figures.graphs import Graph, graph_drawings
from dwiml_func.experiment.figures.panel import COLOURS, DrawnValue, Panel, PlottedRun, marker_of
from dwiml_func.experiment.figures.run_panels import PANELS, PanelName, panel_drawings
from dwiml_func.experiment.folder import recorded_config
from dwiml_func.experiment.tracking.recorded import read_scores
from dwiml_func.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "check_format",
    "draw_experiments",
    "draw_runs",
    "read_runs",
    "run_figure_path",
    "save_figure",
    "save_run_figure",
    "without_formulas",
    "write_table",
]

_FORMATS = ("png", "svg", "pdf")
_log = logging.getLogger(__name__)


def draw_runs(
    runs: Sequence[PlottedRun], *, panels: Sequence[PanelName] = (), graphs: Sequence[Graph] = ()
) -> tuple[Figure, list[DrawnValue]]:
    """Draw runs over each other, and tell all that was drawn; with several runs, there is a legend below the panels.

    `panels` chooses among them, all of which there is something to show in being the choice without it; `graphs` are
    added, or are all there is without `panels`.
    """

    runs = [run for run in runs if run.history]
    if not runs:
        raise ValueError("Expected a run with a finished epoch. Received none.")
    drawings = [] if graphs and not panels else panel_drawings(runs, panels)
    if missing := [name for name in panels if name not in {drawing.name for drawing in drawings}]:
        found = dict.fromkeys(drawing.name for drawing in panel_drawings(runs, PANELS))
        raise ValueError(
            f"--panels: expected some of {', '.join(found)}, of which these runs have values. Received: "
            f"{', '.join(missing)}."
        )
    drawings += [drawing for graph in graphs for drawing in graph_drawings(graph, runs)]
    legend = 0.15 + 0.22 * len(runs) if len(runs) > 1 else 0.0  # its height in inches
    figure, axes = _grid(len(drawings), legend)
    rows: list[DrawnValue] = []
    for each, place in zip(drawings, axes, strict=True):
        panel = Panel(place, is_alone=len(runs) == 1)
        each.draw(panel, each.runs)
        if each.name != "tracking":
            panel.finish(num_epochs=max(run.history[-1].epoch for run in runs), limits=each.limits)
        rows += panel.rows
    if len(runs) == 1:
        figure.suptitle(runs[0].label)
    else:
        from matplotlib.lines import Line2D

        lines = [
            Line2D(
                [], [], color=COLOURS[n % len(COLOURS)], linewidth=3, marker="" if n < len(COLOURS) else marker_of(n)
            )
            for n in range(len(runs))
        ]
        figure.legend(lines, [run.label for run in runs], loc="lower left", frameon=False)
    return figure, rows


def write_table(rows: Sequence[DrawnValue], path: str | Path) -> None:
    """Write all that was drawn as CSV, a row for each value."""
    content = io.StringIO()
    table = csv.writer(content, lineterminator="\n")
    table.writerows([DrawnValue._fields, *rows])
    atomic_write(Path(path), content.getvalue())


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, complete or not at all; the format is the ending of the path: .png, .svg or .pdf."""
    without_formulas(figure)
    content, kind = io.BytesIO(), check_format(path)
    fast: dict[str, Any] = {"pil_kwargs": {"compress_level": 1}} if kind == "png" else {}  # a tenth more bytes
    figure.savefig(content, format=kind, dpi=110, **fast)
    atomic_write(Path(path), content.getvalue())


def without_formulas(figure: Figure) -> None:
    """Let names with dollar signs stand as they are; only ticks, of logarithmic axes, hold formulas."""
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    children = [child for part in (figure, *figure.axes) for child in part.get_children()]
    for child in children:
        if isinstance(child, Axis):
            child.label.set_parse_math(False)
        elif not isinstance(child, Axes):
            for text in child.findobj(Text):
                text.set_parse_math(False)


def check_format(path: str | Path) -> str:
    """The format of a figure by its path; ValueError for another ending than .png, .svg or .pdf."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise ValueError(f"{str(path)!r}: expected a name that ends in .png, .svg or .pdf.")
    return kind


def _grid(num_panels: int, legend: float) -> tuple[Figure, list[Axes]]:
    """Rows of at most three panels that leave no place empty, at fixed positions: fitting them to texts is slower."""
    from matplotlib.figure import Figure

    num_rows = -(-num_panels // 3)
    each, more = divmod(num_panels, num_rows)
    columns = [each + (row >= num_rows - more) for row in range(num_rows)]
    top, bottom, high, between = 0.4 if legend else 0.7, 0.55 + legend, 2.725, 0.8
    height = top + num_rows * high + (num_rows - 1) * between + bottom
    width = 12.0 if num_panels > 1 else 8.0
    figure = Figure(figsize=(width, height))
    axes: list[Axes] = []
    for row, count in enumerate(columns):
        upper = height - top - row * (high + between)
        left = 0.9 / width
        grid = figure.add_gridspec(
            *(1, count),
            left=left,
            right=0.985,
            top=upper / height,
            bottom=(upper - high) / height,
            wspace=0.28 if count == 3 else 0.15,
        )
        axes += [figure.add_subplot(place) for place in grid]
    return figure, axes


def read_runs(directories: Sequence[str | Path]) -> list[PlottedRun]:
    """Experiments to draw; each label has the name and the options that differ and can matter."""
    paths = [Path(directory) for directory in directories]
    checkpoints = [newest(path) for path in paths]
    configs = [recorded_config(path, checkpoint) for path, checkpoint in zip(paths, checkpoints, strict=True)]
    runs = []
    names, labels = run_names(paths), run_labels(paths, configs)
    for path, checkpoint, config, name, label in zip(paths, checkpoints, configs, names, labels, strict=True):
        if checkpoint is None or not checkpoint.history:
            raise ValueError(f"{str(path)!r} has no finished epoch yet. Expected at least one.")
        for sentence in checkpoint.corrupt.values():
            _log.warning("%s The figure shows checkpoint %s.", sentence, checkpoint.name)
        runs.append(
            PlottedRun(
                label=label,
                name=name,
                history=checkpoint.history,
                evaluation=read_evaluation(path),
                loss_kind=loss_kind(config),
                tracking=read_scores(path),
            )
        )
    return runs


def draw_experiments(directories: Sequence[str | Path]) -> Figure:
    """Draw experiments over each other."""
    return draw_runs(read_runs(directories))[0]


def run_figure_path(directory: Path) -> Path:
    """Where an experiment has its figure."""
    return directory / "plots" / "training.png"


def save_run_figure(directory: Path) -> None:
    """Draw an experiment into its `plots/training.png`; an error is only a warning."""
    try:
        figure, path = draw_experiments([directory]), run_figure_path(directory)
        path.parent.mkdir(exist_ok=True)
        save_figure(figure, path)
    except Exception as error:
        _log.warning("The figure of %s was not drawn: %s", directory, error)
