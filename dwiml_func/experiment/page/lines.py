"""The streamlines of a page, small enough to send, as `viewer.js` reads them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func.experiment.figures.streamline_views import bundle_colours, labels_of, view_limits
from dwiml_func.experiment.tracking.evaluation import ShownLines
from dwiml_func.experiment.tracking.tracked_lines import RecordedLines

__all__ = ["MOST_POINTS", "NOT_VALID", "LegendEntry", "legend", "viewer_data"]

MOST_POINTS = 100_000
"""Of all sets together: with more, some points within streamlines are left out."""

NOT_VALID = "not valid"
"""The bundle of a tracked streamline that runs along none."""

_LARGEST = 2**15 - 1


class LegendEntry(NamedTuple):
    """Streamlines of one colour; that of what is not valid is None, and the page's ink."""

    label: str
    colour: str | None


def legend(recorded: RecordedLines) -> list[LegendEntry]:
    """The entries, in the order in which the viewer's data number them."""
    colours = _colours(recorded)
    labels = labels_of(recorded.lines.names, colours, kind="bundles")
    return [*(LegendEntry(label, colour) for colour, label in labels.items()), LegendEntry(NOT_VALID, None)]


def viewer_data(recorded: RecordedLines, titles: Mapping[str, str]) -> dict[str, Any]:
    """JSON data: the entries of the legend, and for each set, by name, its title and arrays in base64.

    `points` are (P, 3) little-endian int16 in units of `unit` mm from `centre`, `lengths` (S,) uint32, and `entries`
    (S,) uint8, rows of the legend. `radius` is that of a sphere around all points, in units.
    """
    entries, colours = legend(recorded), _colours(recorded)
    rows = [entry.colour for entry in entries]
    of_bundle = np.array([rows.index(colour) for colour in colours], dtype=np.int64)
    shown = {"real": recorded.lines.real, **recorded.lines.tracked}
    every = max(1, -(-sum(len(each.lines.points) for each in shown.values()) // MOST_POINTS))
    centre = view_limits([each.lines for each in shown.values()]).mean(axis=1)
    radius = max((_radius(each, centre) for each in shown.values()), default=1.0) or 1.0
    unit = radius / _LARGEST
    sets = {}
    for name, each in shown.items():
        points, lengths = _thinned(each, every)
        number = np.where(each.valid, of_bundle[each.bundle.clip(0, len(of_bundle) - 1)], len(entries) - 1)
        sets[name] = {
            "title": titles[name],
            "points": _base64(((points - centre) / unit).round(), "<i2"),
            "lengths": _base64(lengths, "<u4"),
            "entries": _base64(number, "u1"),
        }
    legend_data = [{"label": entry.label, "colour": entry.colour} for entry in entries]
    return {"unit": unit, "radius": _LARGEST, "legend": legend_data, "sets": sets}


def _colours(recorded: RecordedLines) -> list[str]:
    names, real = recorded.lines.names, recorded.lines.real
    return bundle_colours(np.bincount(real.bundle, minlength=len(names)).tolist())


def _radius(shown: ShownLines, centre: NDArray[np.float64]) -> float:
    points = shown.lines.points.numpy()
    return float(np.linalg.norm(points - centre, axis=1).max()) if len(points) else 0.0


def _thinned(shown: ShownLines, every: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Each streamline's points 0, every, 2 every, ..., and its last; and how many these are."""
    lengths = shown.lines.lengths.numpy()
    line = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(line)) - shown.lines.offsets.numpy()[:-1][line]
    kept = (place % every == 0) | (place == lengths[line] - 1)
    return shown.lines.points.numpy()[kept].astype(np.float64), np.bincount(line[kept], minlength=len(lengths))


def _base64(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()
