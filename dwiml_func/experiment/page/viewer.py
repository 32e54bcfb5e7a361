"""The part of a page in which tracked and real streamlines are turned by hand; `viewer.js` draws it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from dwiml_func.experiment.page.html import json_block, tag
from dwiml_func.experiment.page.lines import legend, viewer_data
from dwiml_func.experiment.page.scores import GIVEN
from dwiml_func.experiment.tracking.recorded import has_tracking_evaluation, read_tracking
from dwiml_func.experiment.tracking.tracked_lines import RecordedLines, read_tracked_lines

__all__ = ["viewer"]

_HINT = (
    "Drag to turn, pinch or Ctrl and the wheel to zoom; or, after Tab to the picture, the arrow keys turn, + and - "
    "zoom, 0 resets."
)
_VIEWS = ("right", "behind", "above")


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
