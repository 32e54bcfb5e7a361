"""The part of a page in which tracked and real streamlines are turned by hand; `viewer.js` reads and draws them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from dwiml_func.experiment.figures.streamline_views import bundle_colours, labels_of, view_limits
from dwiml_func.experiment.page.html import json_block, tag
from dwiml_func.experiment.page.scores import GIVEN
from dwiml_func.experiment.tracking.recorded import (
    RecordedLines,
    ShownLines,
    has_tracking_evaluation,
    read_tracked_lines,
    read_tracking,
)

__all__ = ["MOST_POINTS", "NOT_VALID", "LegendEntry", "legend", "viewer", "viewer_data"]

MOST_POINTS = 100_000
"""Of all sets together: with more, some points within streamlines are left out."""

NOT_VALID = "not valid"
"""The bundle of a tracked streamline that runs along none."""

_LARGEST = 2**15 - 1
_HINT = (
    "Drag to turn, pinch or Ctrl and the wheel to zoom; or, after Tab to the view, the arrow keys turn, + and - "
    "zoom, 0 resets."
)
_VIEWS = ("right", "behind", "above")


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
    of_bundle = np.array([rows.index(colour) for colour in colours])
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


def viewer(directory: Path, best: int | None) -> Element:
    """The section of streamlines; where there are none, it says why and what makes them."""
    try:
        recorded = read_tracked_lines(directory)
        parts = _missing(directory) if recorded is None else _parts(directory, recorded, best)
        return tag("section", tag("h2", "Streamlines"), *parts, id="streamlines")
    except ValueError as error:
        return tag("section", tag("h2", "Streamlines"), tag("p", str(error)), id="streamlines")


def _missing(directory: Path) -> Iterator[Element]:
    if not has_tracking_evaluation(directory):
        yield tag(
            "p",
            "No streamlines are recorded. A run tracks at its end where its data say of which bundle each streamline "
            "is.",
        )
        return
    yield tag(
        "p",
        "No streamlines are recorded: an earlier version of dwiml_func tracked. To track again: ",
        tag("code", "dwiml-func evaluate EXPERIMENT_DIR --write"),
    )


def _parts(directory: Path, recorded: RecordedLines, best: int | None) -> Iterator[Element]:
    titles, subject = _titles(directory, recorded)
    tracked = list(recorded.lines.tracked)
    text = f"What the best model (epoch {recorded.epoch}) tracked{subject}, beside the real streamlines, in mm."
    if recorded.epoch != best:
        text += f" The best epoch by now is {best}."
    yield tag("p", text)
    show = [_toggle("show-real", "real", checked=True, swatch=None)]
    show += [_radio(name, name == tracked[0]) for name in tracked]
    show += [_radio("none", not tracked, label="nothing tracked")] if tracked else []
    bundles = [
        _toggle(f"entry-{number}", entry.label, checked=True, swatch=entry.colour or "currentColor")
        for number, entry in enumerate(legend(recorded))
    ]
    views = [
        tag("button", f"from {'the ' if view == 'right' else ''}{view}", type="button", id=f"from-{view}")
        for view in _VIEWS
    ]
    views.append(tag("button", "zoom in", type="button", id="zoom-in"))
    views.append(tag("button", "zoom out", type="button", id="zoom-out"))
    yield tag(
        "div",
        tag("canvas", tabindex="0", role="img", aria_label=text, aria_describedby="hint", id="view"),
        tag("div", id="labels", aria_hidden="true"),
        id="stage",
    )
    yield tag("p", _HINT, id="hint")
    yield tag(
        "p",
        "The view in 3-D needs a browser with JavaScript and WebGL 2. plots/tracking.png shows the same streamlines.",
        id="no-view",
    )
    yield tag(
        "form",
        tag("fieldset", tag("legend", "Show"), *show),
        tag("fieldset", tag("legend", "Bundles"), *bundles),
        tag("fieldset", tag("legend", "View"), *views),
        id="controls",
    )
    yield json_block("lines", viewer_data(recorded, titles))


def _titles(directory: Path, recorded: RecordedLines) -> tuple[dict[str, str], str]:
    """Titles of the sets of streamlines, with scores where they are those of the same epoch; and where was tracked."""
    scores = read_tracking(directory)
    titles = {"real": "real"} | {name: f"tracked, {name}: {GIVEN[name]}" for name in recorded.lines.tracked}
    if scores is None or scores.epoch != recorded.epoch:
        return titles, ""
    for name, shown in recorded.lines.tracked.items():
        if (pair := scores.shares["model"].get(name)) is not None:
            num = scores.num_streamlines[name]
            drawn = "" if num == len(shown.lines) else f", {len(shown.lines)} drawn"
            titles[name] = f"tracked, {name}: {100 * pair[0]:.0f} % of {num} valid{drawn}"
    return titles, f" in {scores.subset} subject {scores.subject}"


def _toggle(name: str, label: str, *, checked: bool, swatch: str | None) -> Element:
    box = tag("input", type="checkbox", id=name, **({"checked": ""} if checked else {}))
    return tag("label", box, *([] if swatch is None else [_swatch(swatch)]), " ", label)


def _radio(name: str, checked: bool, *, label: str | None = None) -> Element:
    button = tag(
        "input", type="radio", name="tracked", value=name, id=f"show-{name}", **({"checked": ""} if checked else {})
    )
    return tag("label", button, " ", label or f"tracked: {name}")


def _swatch(colour: str) -> Element:
    line = tag("path", d="M0 5H22", stroke=colour, stroke_width="4")
    return tag("svg", line, width="22", height="10", aria_hidden="true")
