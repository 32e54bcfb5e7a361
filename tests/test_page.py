"""Claims about the page of a run: what it says, that it needs nothing else, and that texts from files cannot act."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser, browser
from experiment_cases import CONFIG, latest_digest
from nibabel.affines import apply_affine
from report_cases import report

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.core.early_stopping import Best
from dwiml_func.data.grid import Grid
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.experiment.figures.panel import COLOURS
from dwiml_func.experiment.figures.plots import read_runs
from dwiml_func.experiment.figures.streamline_views import view_limits
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.page.curves import curves
from dwiml_func.experiment.page.html import json_block, rows_table, tag
from dwiml_func.experiment.page.page import _epochs, run_page
from dwiml_func.experiment.page.scores import score_sections
from dwiml_func.experiment.page.viewer import MOST_POINTS, viewer, viewer_data
from dwiml_func.experiment.tracking.evaluation import ORACLE, TrackingEvaluation, _shown, write_tracking_evaluation
from dwiml_func.experiment.tracking.recorded import (
    Drift,
    ShownLines,
    TrackedLines,
    read_tracked_lines,
    tracked_lines_path,
    write_tracked_lines,
)
from dwiml_func.tracking.protocols import ProtocolScores

HOSTILE = "</script><img src=x>&\"'$^{"


ELEMENTS = {
    *("html", "head", "meta", "title", "style", "script", "body", "main", "nav", "section", "div", "h1", "h2", "h3"),
    *("p", "a", "strong", "b", "span", "code", "pre", "ul", "li", "dl", "dt", "dd", "details", "summary", "img"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "canvas", "svg", "path"),
    *("form", "fieldset", "legend", "label", "input", "button", "header", "footer"),
}
"""What a browser knows, of those that pages have."""


class Page(HTMLParser):
    """The texts of a page by the id of their section, its elements, and the attributes that name another file."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: dict[str, str] = {}
        self.elements: list[str] = []
        self.sources: list[str] = []
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        assert tag in ELEMENTS
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag == "section":
            self._section = dict(attrs)["id"] or ""

    def handle_data(self, data: str) -> None:
        self.texts[self._section] = f"{self.texts.get(self._section, '')}{data}|"


PLACES = np.array([[50, 0, 0], [-50, 0, 0], [0, 50, 0], [0, -50, 0], [0, 0, 50], [0, 0, -50]])
"""Streamlines lie there, one by one: what would join two neighbours would cross the middle."""


def lines_of(num: int, *, seed: int, length: int = 40) -> Streamlines:
    rng = np.random.default_rng(seed)
    walks = [rng.normal(size=(length, 3)).cumsum(axis=0) for _ in range(num)]
    return Streamlines.from_list(
        [walk + place + np.array([20, -30, 10]) for walk, place in zip(walks, PLACES, strict=False)]
    )


def tracked_lines(names: tuple[str, ...] = ("CST", "AF"), *, length: int = 40) -> TrackedLines:
    real = ShownLines(lines_of(6, seed=0, length=length), np.array([0, 0, 0, 0, 1, 1]), np.ones(6, dtype=bool))
    some = np.array([0, 1, 1, 0])
    tracked = ShownLines(lines_of(4, seed=1, length=length), some, np.array([True, True, False, False]))
    return TrackedLines(names, real, {"continue": tracked, "core": tracked})


def add_tracking(directory: Path, names: tuple[str, ...] = ("CST", "AF"), *, epoch: int = 2) -> None:
    """What a run has whose data have bundles."""
    scores: Any = {
        who: {p: ProtocolScores(9, 8, share, share + 0.01, None) for p in ("continue", "core")}
        for who, share in (("model", 0.25), ("principal direction", 0.5), (ORACLE, 0.75))
    }
    evaluation = TrackingEvaluation(
        subject="anna", subset="validation", step_size=2.0, has_mask=True, scores=scores, ceiling_valid=0.875,
        ceiling_both_ends=0.9, drift=Drift((0.0, 2.0), {"model": (0.0, 1.0)}), lines=tracked_lines(names),
    )  # fmt: skip
    write_tracking_evaluation(directory, evaluation, epoch=epoch)
    assert evaluation.lines is not None
    write_tracked_lines(directory, evaluation.lines, epoch=epoch)


@dataclass(frozen=True)
class Made:
    """An experiment whose names are hostile, and its page."""

    directory: Path
    file: Path
    page: Page


@pytest.fixture(scope="module")
def made(stopped_early: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    from dwiml_func.cli.main import main

    directory = tmp_path_factory.mktemp("page") / HOSTILE.replace("/", "")
    shutil.copytree(stopped_early / "run", directory)
    add_tracking(directory, (HOSTILE, "a\u202eb"))
    assert main(["page", str(directory)]) == 0
    file = directory / "page.html"
    return Made(directory, file, Page(file.read_text()))


def text_of(section: Any) -> str:
    assert {element.tag for element in section.iter()} <= ELEMENTS
    return "|".join(section.itertext())


def test_a_page_says_what_the_run_recorded(made: Made) -> None:
    texts, checkpoint = made.page.texts, read(made.directory)
    assert "stopped early after epoch 3; best epoch 2 by loss" in texts[""]
    assert "in validation subject anna" in texts["streamlines"]
    rows = ("model|0.25 (0.26)|0.25 (0.26)|", "principal direction|0.50 (0.51)|", "beside the other half|0.88 (0.90)|")
    for row in rows:
        assert row in texts["scores"]
    assert texts["scores"].index("principal direction|") < texts["scores"].index("oracle (")
    assert texts["scores"].index("oracle (") < texts["scores"].index("beside the other half|")
    best = checkpoint.history[1]
    assert f"loss|{best.train['loss']:.6g}|{best.valid['loss']:.6g}|" in texts["best"]
    assert "training.patience|1|none|" in texts["config"]
    changed = texts["config"].partition("options that are set")[0]
    assert "dropout" not in changed
    assert "dropout" in texts["config"]
    data = Path(read_config(made.directory).hdf5_file)
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    for fact in (sha256, str(checkpoint.environment["torch"]), latest_digest(made.directory)):
        assert f"|{fact}|" in texts["provenance"]
    assert str(data.parent) not in made.file.read_text()  # where the data lie is nobody's business
    assert "Not audited|: no epoch was trained again" in texts["audit"]
    assert "best model agree with each other" in texts["audit"]


def test_no_text_of_a_file_is_markup_or_a_formula(made: Made) -> None:
    assert made.page.elements.count("script") == 2  # the data and the viewer
    assert made.page.elements.count("img") == 6  # five panels and the drift
    assert f"| {HOSTILE}|" in made.page.texts["streamlines"]
    assert "| a\\u202eb|" in made.page.texts["streamlines"]
    assert made.directory.name in made.page.texts[""]


def test_characters_that_are_not_printable_are_shown_and_change_nothing() -> None:
    shown = tag("p", "a\x07\u202eb\nc", "é", tag("b", "\x00"), "\x1b", id="\x7f")
    assert (shown.text, shown[0].text, shown[0].tail) == ("a\\x07\\u202eb\ncé", "\\x00", "\\x1b")
    assert shown.attrib == {"id": "\\x7f"}


@pytest.mark.parametrize(
    ("head", "caption", "label"),
    [(("", ""), "", "names and values"), (("a", "b"), "", "a and b"), (("a", ""), "what", "what")],
)
def test_a_table_has_a_label_and_the_head_and_the_caption_that_it_is_given(head, caption, label) -> None:
    table = rows_table(head, [("x", "1"), ("y", tag("b", "2"))], caption=caption, kind="narrow")
    *captions, region = table
    assert [each.text for each in captions] == [caption] * bool(caption)
    assert (region.attrib["aria-label"], region.attrib["class"]) == (label, "narrow")
    assert [each.text or "" for each in table.iter("th") if each.get("scope") == "col"] == list(head) * any(head)
    assert [each.text for each in table.iter("th") if each.get("scope") == "row"] == ["x", "y"]
    assert [text_of(each) for each in table.iter("td")] == ["1", "2"]


def test_a_page_needs_no_other_file_is_the_same_each_time_and_replaces_nothing(cli, made: Made, tmp_path) -> None:
    assert all(source.startswith(("#", "data:image/svg+xml;base64,")) for source in made.page.sources)
    out = tmp_path / "new" / "a.html"
    cli("page", made.directory, out.with_suffix(".pdf")).check_refusal("ends in .html")
    cli("page", made.directory, out, "--sample", "0").check_refusal("sample")
    cli("page", tmp_path / "none", out).check_refusal("is not an experiment")
    create_experiment(tmp_path, "empty", CONFIG)
    cli("page", tmp_path / "empty", out).check_refusal("has no finished epoch yet")
    assert not out.parent.exists()
    out.parent.mkdir()
    out.write_text("mine")
    cli("page", made.directory, out).check_refusal("The file exists", "--overwrite")
    assert out.read_text() == "mine"
    outcome = cli("page", made.directory, out, "-f")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{out}\n", "")
    assert out.read_bytes() == made.file.read_bytes()


def test_the_guides_command_writes_a_page_with_what_an_audit_found(cli, experiments, monkeypatch) -> None:
    directory = (experiments / "run").rename(experiments / "first_run")
    config = json.loads((directory / "config.json").read_text())
    config["training"]["learning_rate"] = ["0.5"]
    (directory / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(experiments.parent)
    guide = (Path(__file__).parents[1] / "docs" / "page.md").read_text()
    (command,) = guide.split("```sh\n")[1].split("```")[0].splitlines()
    outcome = cli(*command.split()[1:], "--sample", "1")
    assert (outcome.code, outcome.out) == (1, "first_run.html\n")
    audit = Page(Path("first_run.html").read_text()).texts["audit"]
    assert "of 3 epochs trained again, some differ." in audit
    assert "What was recorded contradicts itself:" in audit
    assert "Not audited|" not in audit


def test_members_of_ensembles_and_runs_of_scripts_have_pages(cli, experiments) -> None:
    ensemble = experiments / "many"
    shutil.copytree(experiments / "run", ensemble / "0")
    (ensemble / "ensemble.json").write_text('{"num_members": 1, "ended": {}}')
    cli("page", ensemble).check_refusal("is an ensemble. Name one of its members")
    member = Page(run_page(ensemble / "0")).texts
    assert "many/0|" in member[""]
    assert "a member is not audited alone" in member["audit"]
    (experiments / "run" / "config.json").unlink()
    texts = Page(run_page(experiments / "run")).texts
    assert "A script saved this run" in texts["audit"]
    assert "what it recorded of its options is below" in texts["config"]
    assert "options that are set" in texts["config"]


def test_runs_without_tracking_and_older_ones_say_what_is_missing(experiments) -> None:
    directory, history = experiments / "run", read(experiments / "run").history
    assert "No streamlines are recorded. A run tracks at its end where" in text_of(viewer(directory, 2))
    assert "No tracking is recorded" in text_of(next(score_sections(directory, history)))
    add_tracking(directory)
    tracked_lines_path(directory).unlink()
    text = text_of(viewer(directory, 2))
    assert "an earlier version of dwiml_func tracked. To track again: |dwiml-func evaluate" in text
    add_tracking(directory, epoch=1)
    text = text_of(viewer(directory, 2))
    assert "(epoch 1)" in text
    assert "The best epoch by now is 2." in text
    text = text_of(next(score_sections(directory, history)))
    assert "These are the scores of epoch 1; the best epoch by now is 2." in text


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 of no archive"])
def test_corrupt_files_of_tracking_are_named(experiments, content) -> None:
    directory, history = experiments / "run", read(experiments / "run").history
    add_tracking(directory)
    tracked_lines_path(directory).write_bytes(content)
    assert "tracking.npz is corrupt" in text_of(viewer(directory, 2))
    (directory / "tracking.json").write_bytes(content)
    assert "tracking.json is corrupt" in text_of(next(score_sections(directory, history)))


@pytest.mark.parametrize(("num", "num_rows"), [(200, 200), (201, 102), (399, 201)])
def test_the_table_of_a_long_run_has_some_epochs_the_best_and_the_last(num, num_rows) -> None:
    history = [report(epoch, best=Best(0.5, 152, 0)) for epoch in range(1, num + 1)]
    table = list(_epochs(history).iter("tr"))
    rows = [row[0].text or "" for row in table[1:]]
    names = ("training loss", "validation loss", "training angular_error", "validation angular_error")
    assert [cell.text for cell in table[0]][:6] == ["epoch", *names, "training unclipped_grad_norm"]
    assert len(rows) == num_rows
    assert {"1", "152", str(num)} <= {row.split()[0].strip(",") for row in rows}


def test_of_many_streamlines_300_are_kept_evenly_and_in_ras_mm() -> None:
    sizes, voxels = np.array([2.0, 1.0, 3.0]), np.random.default_rng(0).uniform(0, 9, (700, 4, 3))
    affine = np.array([[0.0, -1, 0, 5], [2, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])
    numbers, grid = np.arange(700), Grid(affine, (9, 9, 9))
    shown = _shown(
        Streamlines.from_list(voxels * sizes), numbers, numbers % 2 == 0, grid, torch.tensor(sizes, dtype=torch.float32)
    )
    rows = shown.bundle
    assert (len(rows), rows[0], rows[-1]) == (300, 0, 699)
    assert set(np.diff(rows)) == {2, 3}
    np.testing.assert_array_equal(shown.valid, rows % 2 == 0)
    in_ras = apply_affine(affine, voxels[rows] - 0.5)  # the affine is of voxel centres
    np.testing.assert_allclose(shown.lines.points, in_ras.reshape(-1, 3), atol=1e-4)


def test_tracked_lines_come_back_as_written(tmp_path) -> None:
    lines = tracked_lines()
    write_tracked_lines(tmp_path, lines, epoch=7)
    found = read_tracked_lines(tmp_path)
    assert found is not None
    assert (found.epoch, found.lines.names, list(found.lines.tracked)) == (7, ("CST", "AF"), ["continue", "core"])
    for written, shown in ((lines.real, found.lines.real), (lines.tracked["core"], found.lines.tracked["core"])):
        np.testing.assert_allclose(shown.lines.points, written.lines.points, atol=0.00501)  # to 0.01 mm
        np.testing.assert_array_equal(shown.lines.offsets, written.lines.offsets)
        np.testing.assert_array_equal(shown.bundle, written.bundle)
        np.testing.assert_array_equal(shown.valid, written.valid)
    assert read_tracked_lines(tmp_path / "plots") is None


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("real.points", lambda points: points.astype("<f4"), "points (P, 3) of 16 bits, received float32 (240, 3)"),
        ("real.points", lambda points: points[:, :2], "points (P, 3) of 16 bits, received int16 (240, 2)"),
        ("real.points", lambda points: points[:-1], "lengths"),
        ("real.lengths", lambda lengths: lengths + np.eye(6, dtype="<i4")[0], "lengths"),
        ("real.lengths", lambda lengths: np.array([80, 0, 40, 40, 40, 40], "<i4"), "lengths"),
        ("core.valid", lambda valid: valid[:-1], "lengths"),
        ("core.bundle", lambda bundle: bundle[:-1], "lengths"),
        ("core.bundle", lambda bundle: bundle + 1, "rows of its bundles"),  # of which there are two
        ("core.bundle", lambda bundle: bundle - 1, "rows of its bundles"),
        ("unit_mm", lambda unit: unit * 0, "a unit above 0"),
        ("unit_mm", lambda unit: unit * np.inf, "a unit above 0"),
    ],
)
def test_tracked_lines_whose_parts_do_not_fit_together_are_refused(tmp_path, name, change, text) -> None:
    write_tracked_lines(tmp_path, tracked_lines(), epoch=7)
    with np.load(tracked_lines_path(tmp_path)) as file:
        arrays = dict(file)
    np.savez(tracked_lines_path(tmp_path), **(arrays | {name: change(arrays[name])}))
    with pytest.raises(ValueError, match=rf"npz is corrupt: .*{re.escape(text)}.*evaluate .* --write"):
        read_tracked_lines(tmp_path)


@pytest.mark.parametrize("length", [40, 40_000])
def test_the_viewer_has_every_streamline_and_at_most_so_many_points(tmp_path, length) -> None:
    from base64 import b64decode

    write_tracked_lines(tmp_path, tracked_lines(length=length), epoch=1)
    recorded = read_tracked_lines(tmp_path)
    assert recorded is not None
    data = viewer_data(recorded, {"real": "r", "continue": "c", "core": "o"})
    assert [entry["colour"] for entry in data["legend"]] == [*COLOURS[:2], None]
    total, middles, farthest = 0, [], []
    for name, shown in (("real", recorded.lines.real), *recorded.lines.tracked.items()):
        points = np.frombuffer(b64decode(data["sets"][name]["points"]), "<i2").reshape(-1, 3)
        lengths = np.frombuffer(b64decode(data["sets"][name]["lengths"]), "<u4")
        assert len(lengths) == len(shown.lines)
        assert lengths.sum() == len(points)
        total += len(points)
        in_mm, ends = points * data["unit"], np.cumsum(lengths.astype(int)) - 1
        for row, line in enumerate(shown.lines.to_list()):  # the same ends, moved to the middle of the view
            middles += [line[-1].numpy() - in_mm[ends[row]], line[0].numpy() - in_mm[ends[row] - int(lengths[row]) + 1]]
        shown_lines = [recorded.lines.real.lines, *(each.lines for each in recorded.lines.tracked.values())]
        from_middle = shown.lines.points.numpy() - view_limits(shown_lines).mean(axis=1)
        farthest.append(np.linalg.norm(from_middle, axis=1).max())
    assert data["radius"] * data["unit"] == pytest.approx(max(farthest))
    assert data["radius"] == np.iinfo(np.int16).max  # the sphere around all points, as far as their numbers reach
    np.testing.assert_allclose(middles, np.broadcast_to(middles[0], (len(middles), 3)), atol=2 * data["unit"])
    assert total <= MOST_POINTS + 2 * 14
    entries = np.frombuffer(b64decode(data["sets"]["continue"]["entries"]), "u1")
    assert entries.tolist() == [0, 1, 2, 2]  # the row of what is not valid is the last


def test_curves_of_a_page_have_their_axes(experiments) -> None:
    (run,) = read_runs([experiments / "run"])
    drawings = list(curves(run))
    assert len(drawings) > 3
    assert all(b"<!-- epoch -->" in drawing.svg for drawing in drawings)  # the label below the axes


def test_a_model_that_tracked_nothing_has_an_empty_set(tmp_path) -> None:
    nothing = ShownLines(Streamlines.from_list([]), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))
    write_tracked_lines(tmp_path, TrackedLines(("CST",), nothing, {"free": nothing}), epoch=1)
    recorded = read_tracked_lines(tmp_path)
    assert recorded is not None
    data = viewer_data(recorded, {"real": "r", "free": "f"})
    assert [each["lengths"] for each in data["sets"].values()] == ["", ""]
    assert data["unit"] > 0


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def num_of(pixels: np.ndarray, colour: str) -> int:
    """Number of pixels that have about the hue of a colour."""
    wanted = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return int((np.abs(pixels - wanted).max(axis=-1) < 0.15).sum())


def test_in_a_browser_the_streamlines_turn_and_nothing_is_asked_for(made: Made, window: Browser) -> None:
    window.open(made.file, width=700)
    first = window.pixels("view")
    blue, orange = COLOURS[:2]
    assert min(num_of(first, blue), num_of(first, orange), num_of(first, "#000000")) > 50
    half = first.shape[1] // 2
    assert num_of(first[:, :half], blue) > num_of(first[:, half:], blue) > 0  # real beside tracked
    assert num_of(first[:, :half], "#000000") < num_of(first[:, half:], "#000000")
    row, column = first.shape[0] // 2, half // 2
    assert (first[row - 9 : row + 9, column - 9 : column + 9] == 1).all()  # no streamline is joined to the next
    window.drag("view", 90, 40)
    dragged = window.pixels("view")
    assert (np.abs(dragged - first).max(axis=-1) > 0.1).mean() > 0.01
    window.key("0")  # the mouse has given the view the focus
    assert np.abs(window.pixels("view") - first).max() < 0.02
    window.key("ArrowLeft")
    assert np.abs(window.pixels("view") - first).max() > 0.3
    window.run("document.getElementById('entry-0').click()")
    assert num_of(window.pixels("view"), blue) == 0
    window.run("document.getElementById('show-none').click()")
    alone = window.pixels("view")
    assert num_of(alone[:, half:], "#000000") < 50  # real streamlines are all valid
    window.run("document.getElementById('show-real').click()")
    assert len(np.unique(window.pixels("view").reshape(-1, 3), axis=0)) < 20  # nothing is left
    assert window.errors == []
    others = [address for address in window.requests if not address.startswith("data:image/svg+xml")]
    assert others == [made.file.resolve().as_uri()]


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_a_page_fits_a_phone_in_both_schemes(made: Made, window: Browser, scheme, is_dark) -> None:
    window.open(made.file, width=360, height=700, scheme=scheme)
    assert window.run("document.documentElement.scrollWidth") == 360
    assert (window.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") is not is_dark
    assert (np.median(window.pixels("view")) < 0.3) == is_dark
    drawn = [image["height"] / image["width"] for image in window.run(
        "[...document.images].map((i) => ({width: i.naturalWidth, height: i.naturalHeight}))"
    )]  # fmt: skip
    assert len(drawn) == 6
    assert all(0.4 < ratio < 1 for ratio in drawn)


def test_a_browser_runs_no_script_that_came_from_a_file(made: Made, window: Browser, tmp_path) -> None:
    """Even if one were not escaped."""
    file = tmp_path / "forged.html"
    file.write_text(made.file.read_text().replace("</body>", "<script>window.ran = 1</script></body>"))
    window.open(file)
    assert window.run("window.ran") is None
    assert any("Content Security Policy" in error for error in window.errors)


def test_data_for_a_script_have_an_id_and_cannot_end_their_element():
    block = json_block("lines", {"a": "</script>"})
    assert (block.tag, block.attrib) == ("script", {"type": "application/json", "id": "lines"})
    assert block.text == '{"a": "\\u003c/script>"}'
