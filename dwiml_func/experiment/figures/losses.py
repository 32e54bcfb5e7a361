"""Histograms of losses and of ends along streamlines, and colours of values that colour-blind readers can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dwiml_func.experiment.figures.panel import COLOURS, GREY
from dwiml_func.experiment.figures.plots import without_formulas
from dwiml_func.experiment.point_losses import PointLosses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Colormap", "colours_of", "draw_eos", "draw_losses"]

Colormap = Literal["viridis", "cividis", "plasma", "inferno", "magma"]
"""Gradients of matplotlib whose lightness rises evenly: colour-blind readers, and prints in grey, keep the order."""

_FEWEST_BINS, _MOST_BINS = 10, 200


def colours_of(values: ArrayLike, low: float, high: float, colormap: Colormap) -> NDArray[np.float32]:
    """(N, 3) red, green and blue, 0 to 255, of N values; those outside of `low` to `high` have the colours there."""
    from matplotlib import colormaps

    share = (np.asarray(values, dtype=np.float64) - low) / (high - low if high > low else 1.0)
    return np.round(255 * colormaps[colormap](share)[:, :3]).astype(np.float32)


def draw_losses(losses: PointLosses, low: float, high: float, colormap: Colormap, *, title: str) -> Figure:
    """Histograms of the loss by point, also with logarithmic counts, and by streamline; and what colours mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9.5))
    panels = figure.subplots(4, 1, height_ratios=(1, 1, 1, 0.12))
    by_streamline = losses.by_streamline
    _histogram(panels[0], losses.loss, "Loss by point", "points")
    _histogram(panels[1], losses.loss, "Loss by point, counts on a logarithmic scale", "points", is_log=True)
    _histogram(panels[2], by_streamline, "Mean loss by streamline", "streamlines")
    scale = ScalarMappable(Normalize(low, high), colormap)
    bar = figure.colorbar(scale, cax=panels[3], orientation="horizontal", extend="both")
    bar.set_label("loss, in the colours of the tractograms")
    return _titled(figure, title)


def draw_eos(losses: PointLosses, *, title: str) -> Figure:
    """Histograms of the error of EOS, and of its probability in each third of the streamlines and at their ends."""
    from matplotlib.figure import Figure

    error, probability = losses.eos_error, losses.eos
    if error is None or probability is None:
        raise ValueError("Expected a model with EOS. Received: one without.")
    figure = Figure(figsize=(9, 11))
    panels = figure.subplots(5, 1)
    _histogram(panels[0], error, "Error of EOS: distance of its probability from the truth", "points", within=(0, 1))
    third = thirds(losses)
    for row, name in enumerate(("first third", "second third", "last third, without the last point", "last points")):
        _histogram(panels[row + 1], probability[third == row], f"Probability of EOS: {name}", "points", within=(0, 1))
    return _titled(figure, title)


def _titled(figure: Figure, title: str) -> Figure:
    figure.suptitle(title, x=0.01, ha="left")
    without_formulas(figure)
    figure.tight_layout()
    return figure


def thirds(losses: PointLosses) -> NDArray[np.int64]:
    """(N,) 0, 1 or 2 by the third of the streamline in which a point is, 3 at last points."""
    lengths = losses.lines.lengths.numpy()
    place = np.arange(len(losses.loss)) - np.repeat(losses.lines.offsets.numpy()[:-1], lengths)
    return np.where(losses.is_last, 3, 3 * place // np.repeat(lengths, lengths))


def _histogram(
    axes: Axes,
    values: NDArray[np.floating],
    title: str,
    unit: str,
    *,
    is_log: bool = False,
    within: tuple[float, float] | None = None,
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    if len(values) == 0:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    num_bins = int(np.clip(2 * np.sqrt(len(values)), _FEWEST_BINS, _MOST_BINS))
    if np.ptp(values) < 2 * num_bins * np.spacing(np.abs(values).max()):  # of float32, without room for bins
        values = values.astype(np.float64)
    counts, edges = np.histogram(values, bins=num_bins, range=within)
    axes.stairs(counts, edges, fill=True, color=COLOURS[0])
    if is_log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))  # they are counts
    axes.axvline(float(values.mean()), color=COLOURS[1], linestyle="--", label=f"mean {values.mean():.4g}")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.97))  # above the bars
