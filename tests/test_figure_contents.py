"""Figures, artist by artist: what is drawn where, in which colour and style, and how it is named (`data/figures.txt`).

`python tests/test_figure_contents.py` writes the file again after a change that is meant; read what differs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_cases import PHANTOM
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure
from test_plots import EVALUATION, history, plotted
from test_tracking_figures import evaluation as tracking_evaluation
from test_tracking_figures import walks
from test_visualize_loss import three_lines

from dwiml_func.cli.attention import draw_matrices
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import Validation
from dwiml_func.data.inspection.inspect import inspect_dataset
from dwiml_func.experiment.comparison.correlation import Correlation, Pairs, draw_correlation
from dwiml_func.experiment.figures.autoencoder import latent_figure, reconstruction_figure
from dwiml_func.experiment.figures.connectivity import draw_connectivity
from dwiml_func.experiment.figures.dataset import _draw_lengths, draw_dataset
from dwiml_func.experiment.figures.graphs import parse_graph
from dwiml_func.experiment.figures.losses import draw_eos, draw_losses
from dwiml_func.experiment.figures.plots import draw_runs
from dwiml_func.experiment.figures.tracking import draw_drift, draw_tracked
from dwiml_func.experiment.tracking.evaluation import ORACLE, ShownLines
from dwiml_func.experiment.tracking.recorded import Drift

FILE = Path(__file__).parent / "data" / "figures.txt"


def short(values: Any) -> str:
    """Numbers to three digits; of many, how many, the range and the mean."""
    array = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).ravel()
    if len(array) > 8:
        known = array[np.isfinite(array)]
        return f"{len(array)} [{short([known.min(), known.max(), known.mean(), known[: len(known) // 2].mean()])}]"
    return " ".join("-" if math.isnan(each) else f"{each if abs(each) > 1e-9 else 0.0:.3g}" for each in array)


def of_line(line: Any) -> str:
    marks = [] if line.get_markevery() is None else np.flatnonzero(line.get_markevery()).tolist()
    style = f"{line.get_linestyle()} {line.get_linewidth():g} {line.get_drawstyle()}"
    edge = f"{line.get_markeredgewidth():g} {line.get_fillstyle()}"
    mark = f"{line.get_marker()} {line.get_markersize():g} {edge} at {short(marks)}"
    text = f"{line.get_label()!r} {to_hex(line.get_color())} {style}, {mark}, z {line.get_zorder():g}"
    return f"line {text}: {short(line.get_xdata())} | {short(line.get_ydata())}"


def of_collection(group: Any) -> str:
    kind = type(group).__name__
    if kind == "LineCollection":
        points = [path.vertices for path in group.get_paths()]
        colours, what = (
            group.get_edgecolor(),
            f"{len(points)} paths {short(np.concatenate([*points, np.zeros((0, 2))]))}",
        )
    elif kind == "PathCollection":
        colours, what = group.get_facecolor(), f"{short(group.get_offsets())} size {short(group.get_sizes())}"
    else:  # of a scale of colours
        return f"{kind} {group.get_cmap().name} {short(group.get_clim())}"
    named = sorted({to_hex(colour, keep_alpha=True) for colour in colours})
    return f"{kind} {named} {short(group.get_linewidths())} z {group.get_zorder():g}: {what}"


def of_patch(patch: Any) -> str:
    kind = type(patch).__name__
    edge = f"{to_hex(patch.get_edgecolor())} {patch.get_linewidth():g}"
    if kind == "StepPatch":
        data = patch.get_data()
        return f"steps {edge} {patch.get_fill()}: {short(data.values)} | {short(data.edges)}"
    if kind != "Rectangle":  # an end of a scale of colours
        return f"{kind} {to_hex(patch.get_facecolor())}"
    size = short([*patch.get_xy(), patch.get_width(), patch.get_height()])
    return f"bar {to_hex(patch.get_facecolor())} {edge} {patch.get_hatch()!r}: {size}"


def of_text(text: Any, *, has_place: bool = True) -> str:
    place = f" {short(text.get_position())} {text.get_ha()} {text.get_va()}" if has_place else ""
    style = f"{text.get_fontsize():g} {text.get_fontweight()} {text.get_rotation():g} {to_hex(text.get_color())}"
    return f"{text.get_text()!r} {style}{place}"


def of_legend(legend: Any, what: str) -> Iterator[str]:
    box = legend.get_frame()
    frame = f"{legend.get_frame_on()} {box.get_alpha()} {to_hex(box.get_edgecolor(), keep_alpha=True)}"
    anchor = legend.get_bbox_to_anchor()
    whole = legend.parent.bbox  # by default
    beside = short([(anchor.x0 - whole.x0) / whole.width, (anchor.y0 - whole.y0) / whole.height])
    title = legend.get_title().get_text()
    yield f"{what} {legend._get_loc()} at {beside}, frame {frame} columns {legend._ncols} title {title!r}"
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        named = [name for name in ("get_color", "get_edgecolor") if hasattr(handle, name)]
        colours = np.atleast_2d(to_rgba_array(getattr(handle, named[0])())) if named else []
        line = f" {handle.get_linewidth():g} {handle.get_marker()!r}" if type(handle).__name__ == "Line2D" else ""
        size = f"{text.get_fontsize():g}"
        yield f"  {text.get_text()!r} {size} {type(handle).__name__}{line} {[to_hex(colour) for colour in colours]}"


def ticks_of(locator: Any) -> str:
    """A locator, and how it would mark other ranges than the one drawn, where that does not depend on the font."""
    name = type(locator).__name__
    if name == "MaxNLocator":
        return f"{name} every {short([np.diff(locator.tick_values(0.7, high))[0] for high in (1.4, 8.3, 88, 97)])}"
    return f"{name} {short(locator.tick_values(0.7, 12.3))}" if name == "LogLocator" else name


def of_axes(axes: Any) -> Iterator[str]:
    place = " ".join(f"{part:.2g}" for part in axes.get_position().bounds)
    titles = f"{of_text(axes._left_title, has_place=False)}, {axes.get_title()!r}"
    yield f"axes at {place}: {titles} grid below {axes.get_axisbelow()}"
    for name, axis, limits in (("x", axes.xaxis, axes.get_xlim()), ("y", axes.yaxis, axes.get_ylim())):
        drawn = [key for key, value in axis.get_tick_params().items() if value is True]
        at = axis.get_tick_params()
        look = [
            f"{key} {at[key]}" for key in ("labelsize", "grid_color", "grid_linewidth", "labelrotation") if key in at
        ]
        ticks = f"{ticks_of(axis.get_major_locator())} {' '.join([*drawn, *look])}"
        ends = " ".join(f"{end + 0.0:.2g}" for end in limits)  # room for legends depends on the font
        scale = f"{axis.get_scale()} {ends} {axis.get_major_formatter()(1234.5)!r}"
        yield f"{name} {of_text(axis.label, has_place=False)} {scale} {ticks}"
        if ticks.startswith("FixedLocator") and len(axis.get_ticklocs()) < 9:
            yield f"  {short(axis.get_ticklocs())}: {', '.join(map(of_text, axis.get_ticklabels()))}"
    yield f"spines {[name for name, spine in axes.spines.items() if spine.get_visible()]} aspect {axes.get_aspect()}"
    yield from map(of_line, axes.get_lines())
    yield from map(of_collection, axes.collections)
    yield from map(of_patch, axes.patches)
    for image in axes.images:
        values = np.ma.asarray(image.get_array())
        look = f"{image.get_cmap().name} {image.get_interpolation()} {image.origin} {short(image.get_clim())}"
        yield f"image {look} {short(image.get_extent())}: {short(values)}"
    for text in axes.texts:
        yield f"text {of_text(text)} {'of axes' if text.get_transform() == axes.transAxes else 'of data'}"
    if axes.get_legend():
        yield from of_legend(axes.get_legend(), "legend")


def described(figure: Any) -> str:
    title = of_text(figure._suptitle) if figure.get_suptitle() else ""
    below = of_text(figure._supxlabel) if figure.get_supxlabel() else ""
    lines = [f"size {short(figure.get_size_inches())} {title} {below}".rstrip()]
    for axes in figure.axes:
        lines += of_axes(axes)
    for legend in figure.legends:
        lines += of_legend(legend, "figure's legend")
    return "\n".join(lines) + "\n"


def long_history(number: int) -> Any:
    """50 epochs with a gap, within which a single one is known."""
    found = list(history(50, factor=1 + number / 10))
    for epoch in (20, 22, 23):
        found[epoch] = dataclasses.replace(found[epoch], valid={})
    return tuple(found)


def rich_history() -> Any:
    """Validations within epochs, rates and decays by step, a best state within an epoch, and a monitored metric."""
    inner = (Validation(batch=1, means={"loss": 0.7, "angular_error": 80.0}, learning_rate=0.001),)
    rates = {"learning_rate_min": 0.0005, "learning_rate_max": 0.002}
    found = [dataclasses.replace(each, validations=inner, **rates) for each in history(4, tracking_window_lag=3.0)]
    return tuple(
        dataclasses.replace(
            each,
            monitor="overlap",
            best=Best(0.75, 2, 0, 2),
            train=each.train | {"weight_decay": 0.1 / each.epoch},
            valid=each.valid | {"overlap": each.epoch / 8, "reconstruction_error": 2.0},
        )
        for each in found
    )


SCORES = {"continue": {"valid": 0.5}, "core": {"valid": 0.25}}
TRACKED = [
    plotted("a", tracking={"model": SCORES, "principal direction": {"core": {"valid": 0.75}}}, evaluation=EVALUATION),
    plotted("b", history=history(6, factor=3.0, clip=2.0), tracking={"model": {"core": {"valid": 0.125}}}),
    plotted("c", loss_kind={"dg_key": "l2-regression"}),
]
SHOWN = ShownLines(walks(6, 1), np.array([0, 1, 1, 1, 0, 0]), np.array([True, True, False, True, False, False]))
DRIFTS = {
    "a": Drift((0.0, 2.0, 4.0), {"model": (0.0, 1.0, 2.0), ORACLE: (0.0, 0.5, 1.0)}),
    "b": Drift((0.0, 2.0, 4.0), {"model": (0.0, 1.5, None), "keep going straight": (0.0, 40.0, 90.0)}),
}
RNG = np.random.default_rng
POINTS = RNG(0).normal(size=(70, 5, 3)).cumsum(axis=1)
COUNTS = np.triu(RNG(0).integers(0, 90, (5, 5)))
PAIRS = [
    Pairs("a", np.arange(1.0, 4), np.array([1.0, 2, 3]), np.array([3.0, 5, 4]), (2.0, 5.0)),
    Pairs("b", np.zeros(0), np.zeros(0), np.zeros(0), (4.0, 1.0)),
]


def upright(figure: Any) -> Any:
    """Principal components have no sign."""
    (axes,) = figure.axes
    for group in axes.collections:
        group.set_offsets(np.abs(group.get_offsets()))
    axes.set(xlim=(-9, 9), ylim=(-9, 9))
    return figure


def of_panel(draw: Callable[[Any], object]) -> Any:
    figure = Figure()
    draw(figure.add_subplot())
    return figure


def tracked() -> Any:
    found = tracking_evaluation({"continue": SHOWN, "free": SHOWN})
    assert found.lines is not None
    return draw_tracked(found.scores["model"], found.lines, title="a title")


FIGURES: dict[str, Callable[[], Any]] = {
    "one run": lambda: draw_runs([plotted("a", history=rich_history(), evaluation=EVALUATION)])[0],
    "several runs": lambda: draw_runs(TRACKED)[0],
    "nine long runs": lambda: draw_runs(
        [plotted(str(n), history=long_history(n)) for n in range(9)], panels=["loss", "rate"]
    )[0],
    "graphs": lambda: draw_runs(
        TRACKED[:2],
        graphs=[parse_graph(["Gap", "diff(loss, train_loss)", "lr", "0", "2.5"]), parse_graph(["A", "angle"])],
    )[0],
    "bars of eight runs": lambda: draw_runs(
        [plotted(str(n), tracking={"model": SCORES | {"free": {"valid": n / 8}}}) for n in range(8)],
        panels=["tracking"],
    )[0],
    "rates of which some change within epochs": lambda: draw_runs(
        [plotted("a", history=(*history(2), *rich_history()[2:]))], panels=["rate"]
    )[0],
    "speeds of which one is not known": lambda: draw_runs(
        [plotted("a", history=(dataclasses.replace(history(1)[0], train_minutes=0.0), *history(3)[1:]))],
        panels=["speed"],
    )[0],
    "graphs with limits": lambda: draw_runs(
        [plotted("a")],
        graphs=[
            parse_graph([name, "loss", "lr", low, "2"]) for name, low in (("A", "0"), ("B", "0.0001"), ("C", "-1"))
        ],
    )[0],
    "correlation": lambda: draw_correlation(Correlation(["lr", "loss"], PAIRS, False), ["A", "B"]),
    "tracked": tracked,
    "drift": lambda: draw_drift(DRIFTS),
    "latent space": lambda: upright(latent_figure(POINTS[:, 0], None, title="run")),
    "latent space of one value": lambda: upright(latent_figure(POINTS[:, 0, :1], None, title="run")),
    "latent space of bundles": lambda: upright(
        latent_figure(POINTS[:, 1, :2], [f"b{n % 9 % 8}" for n in range(70)], title="run")
    ),
    "reconstructions": lambda: reconstruction_figure(POINTS, POINTS + 0.1, title="run"),
    "connectivity": lambda: draw_connectivity(COUNTS, list("abcde"), title="a.trk"),
    "connectivity of many": lambda: draw_connectivity(np.eye(61, dtype=int), list(map(str, range(61))), title="a.trk"),
    "losses": lambda: draw_losses(three_lines(eos=False), 0.1, 0.8, "cividis", title="a title"),
    "ends": lambda: draw_eos(three_lines(eos=True), title="a title"),
    "dataset": lambda: draw_dataset(inspect_dataset(PHANTOM)),
    "lengths of nothing": lambda: of_panel(lambda axes: _draw_lengths(axes, [], [], {})),
    "attention": lambda: draw_matrices(
        {"encoder_1": torch.tril(torch.arange(1.0, 19).reshape(2, 3, 3)), "cross_1": torch.eye(3).expand(2, 3, 3)},
        title="a title",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_these_artists(name: str) -> None:
    expected = dict(re.findall(r"^== (.+)\n((?:(?!== ).*\n)*)", FILE.read_text(), re.MULTILINE))
    assert described(FIGURES[name]()) == expected[name]


if __name__ == "__main__":
    FILE.write_text("".join(f"== {name}\n{described(draw())}" for name, draw in FIGURES.items()))
