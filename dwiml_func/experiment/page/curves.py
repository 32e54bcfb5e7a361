"""The curves of a page: the panels of `dwiml-func plot`, each a drawing of its own, and what they show as text."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dwiml_func.experiment.figures.panel import Panel, PlottedRun
from dwiml_func.experiment.figures.run_panels import panel_drawings
from dwiml_func.experiment.figures.tracking import draw_drift
from dwiml_func.experiment.tracking.recorded import Drift

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawing", "curves", "drift_curve"]

_SIZE = (4.4, 3.3)  # inches: about the width of a phone
_PLACE = (0.19, 0.145, 0.785, 0.76)  # of the axes: fitting them to their texts is slower


class Drawing(NamedTuple):
    """A drawing as SVG, and a sentence that says what it shows."""

    svg: bytes
    text: str


def curves(run: PlottedRun) -> Iterator[Drawing]:
    """The panels of one run with at least one finished epoch."""
    from matplotlib.figure import Figure

    for each in panel_drawings([run]):
        with _style(each.name):
            figure = Figure(figsize=_SIZE)
            panel = Panel(figure.add_axes(_PLACE), is_alone=True)
            each.draw(panel, each.runs)
            panel.finish(num_epochs=run.history[-1].epoch)
            yield _drawing(figure, panel.axes)


def drift_curve(drift: Drift) -> Drawing:
    """The drift of the best model, beside the baselines."""
    with _style("drift"):
        figure = draw_drift({"model": drift})
        return _drawing(figure, figure.axes[0])


def _style(salt: str) -> contextlib.AbstractContextManager[None]:
    """Names of metrics are no formulas, and a drawing has the same bytes each time."""
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": salt})


def _drawing(figure: Figure, axes: Axes) -> Drawing:
    content = io.BytesIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return Drawing(content.getvalue(), _described(axes))


def _described(axes: Axes) -> str:
    parts = []
    for line in axes.get_lines():
        y = np.asarray(line.get_ydata(), dtype=np.float64)
        y, label = y[np.isfinite(y)], str(line.get_label())
        if len(y):
            name = "" if label.startswith("_") else f"{label} "
            parts.append(
                f"{name}{y[0]:.4g}" if len(y) == 1 or y[0] == y[-1] else f"{name}from {y[0]:.4g} to {y[-1]:.4g}"
            )
    return f"{axes.get_title(loc='left')}, {axes.get_ylabel()}: {'; '.join(parts) or 'not recorded'}."
