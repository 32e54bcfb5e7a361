"""Streamlines in three orthogonal views, in RAS mm, as every figure of streamlines draws them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.figures.panel import COLOURS, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["VIEWS", "LineGroup", "bundle_colours", "draw_views", "labels_of", "view_limits", "view_rows"]

VIEWS = (("sagittal", 1, 2), ("coronal", 0, 2), ("axial", 0, 1))
"""Names, and the axes of space that run to the right and up."""

_AXES = ("x (mm), left to right", "y (mm), posterior to anterior", "z (mm), inferior to superior")
_PANEL, _LEFT, _RIGHT, _GAP, _BETWEEN = 2.9, 0.65, 0.25, 0.65, 0.4  # inches
_MOST_LETTERS = 26  # of a label: four stand side by side
_HUES, _OTHERS = COLOURS[:-1], "#999999"  # without black, which is for what is not valid


class LineGroup(NamedTuple):
    """Streamlines in RAS mm that are drawn alike; of a figure's groups the later ones lie above."""

    lines: Streamlines
    colour: str
    alpha: float = 0.7
    width: float = 0.7


def bundle_colours(num_streamlines: Sequence[int]) -> list[str]:
    """A colour for each bundle; where there are more bundles than colours, the smaller ones share grey."""
    largest = np.argsort([-num for num in num_streamlines], kind="stable")
    colours = [_OTHERS] * len(num_streamlines)
    for row, colour in zip(sorted(largest[: len(_HUES)].tolist()), _HUES, strict=False):
        colours[row] = colour
    return colours


def labels_of(names: Sequence[str], colours: Sequence[str], *, kind: str) -> dict[str, str]:
    """Labels by colour, for a legend; what shares a colour has one label. `kind` is what they are, in the plural."""
    by_colour: dict[str, list[str]] = {}
    for name, colour in zip(names, colours, strict=True):
        by_colour.setdefault(colour, []).append(name)
    own = {colour: _short(of[0]) for colour, of in by_colour.items() if len(of) == 1}
    return own | {colour: f"{len(of)} other {kind}" for colour, of in by_colour.items() if len(of) > 1}


def _short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 13]}...{name[-10:]}"


def view_rows(num_rows: int, *, above: float, below: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure with rows of three square panels, and inches of room above and below them."""
    from matplotlib.figure import Figure

    width = _LEFT + 3 * _PANEL + 0.1 + _GAP + _RIGHT
    height = above + num_rows * _PANEL + (num_rows - 1) * _BETWEEN + below
    figure = Figure(figsize=(width, height))
    rows = []
    for row in range(num_rows):
        y = height - above - _PANEL - row * (_PANEL + _BETWEEN)
        lefts = (_LEFT, _LEFT + _PANEL + 0.1, _LEFT + 2 * _PANEL + 0.1 + _GAP)
        rows.append([figure.add_axes((x / width, y / height, _PANEL / width, _PANEL / height)) for x in lefts])
    return figure, rows


def view_limits(sets: Iterable[Streamlines]) -> NDArray[np.float64]:
    """(3, 2) mm: the least and the largest shown along x, y, z; the same range along each, so that panels are alike."""
    points = [lines.points.numpy() for lines in sets if len(lines.points)]
    lower = np.min([found.min(axis=0) for found in points], axis=0) if points else np.zeros(3)
    upper = np.max([found.max(axis=0) for found in points], axis=0) if points else np.ones(3)
    half = 0.53 * max(1.0, float((upper - lower).max()))
    middle = (lower.astype(np.float64) + upper) / 2
    return np.stack([middle - half, middle + half], axis=1)


def draw_views(
    axes: Sequence[Axes], groups: Sequence[LineGroup], limits: NDArray[np.float64], *, is_last: bool
) -> None:
    """Draw groups into a row of three panels; the figure's last row names the axes below."""
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import MaxNLocator

    for number, (panel, (_, right, up)) in enumerate(zip(axes, VIEWS, strict=True)):
        for order, group in enumerate(groups):
            flat = group.lines.points.numpy()[:, [right, up]]
            paths = np.split(flat, group.lines.offsets[1:-1].numpy()) if len(group.lines) else []
            panel.add_collection(
                LineCollection(
                    paths, colors=group.colour, linewidths=group.width, alpha=group.alpha, zorder=2 + order / 1000
                ),
                autolim=False,
            )
        panel.set_xlim(*limits[right])
        panel.set_ylim(*limits[up])
        panel.set_aspect("equal")
        plain_axes(panel, linewidth=0.6)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=4, steps=(1, 2, 5, 10)))
        panel.tick_params(labelsize=8, labelbottom=is_last, labelleft=number != 1)
        if number != 1:
            panel.set_ylabel(_AXES[up], fontsize=8)
        if is_last:
            panel.set_xlabel(_AXES[right], fontsize=8)
