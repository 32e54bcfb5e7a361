"""A figure of a connectivity matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_connectivity"]

_MOST_NAMES = 60  # that can be read side by side


def draw_connectivity(counts: NDArray[np.int64], names: Sequence[str], *, title: str) -> Figure:
    """Draw counts (N, N) of connections, both triangles alike, on a logarithmic scale; what is 0 stays white."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    whole = counts + np.triu(counts, 1).T
    figure = Figure(figsize=(8, 7))
    axes = figure.add_subplot()
    norm = LogNorm(1, max(2, int(whole.max(initial=0))))
    shown = axes.imshow(np.ma.masked_equal(whole, 0), norm=norm, cmap="viridis_r", interpolation="none")
    figure.colorbar(shown, ax=axes, label="streamlines")
    if len(names) <= _MOST_NAMES:
        size = min(9.0, 300 / len(names))
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        what = "region"
    else:
        what = f"row ({names[0]} to {names[-1]})"
    axes.set_xlabel(what)
    axes.set_ylabel(what)
    axes.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    return figure
