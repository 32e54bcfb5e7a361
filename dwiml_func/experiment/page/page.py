"""The page of a run: its streamlines in 3-D, scores, curves, config, provenance and audit, in one HTML file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest
from dwiml_func.checkpoint.manifest import CheckpointError, read_manifest
from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.audit.consistency import best_model_problems, record_digest, record_problems
from dwiml_func.experiment.comparison.compare import differing
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.evaluation import read_evaluation
from dwiml_func.experiment.figures.panel import PlottedRun
from dwiml_func.experiment.folder import is_ensemble, is_run, read_config
from dwiml_func.experiment.model_store import MANIFEST
from dwiml_func.experiment.page.curves import curves
from dwiml_func.experiment.page.html import document, image, rows_table, tag
from dwiml_func.experiment.page.scores import score_sections
from dwiml_func.experiment.page.viewer import viewer
from dwiml_func.files.fingerprint import content

__all__ = ["run_page"]

_FOLDER = Path(__file__).parent
_MOST_ROWS = 200  # of the table of epochs
_TYPICAL = ("loss", "angular_error", "tracking_window_lag")


def run_page(directory: str | Path, *, audit: Sequence[str] | None = None) -> str:
    """The page of an experiment, or of a run that a script saved, as HTML; the same text for the same files.

    `audit` has the lines of an audit that was made for the page. Nothing is trained or tracked, and no dataset is read.
    FileNotFoundError for what is no run, ValueError where no epoch is recorded.
    """
    directory = Path(directory)
    if is_ensemble(directory) or not is_run(directory):
        read_config(directory)  # which says what it is
    config = read_config(directory) if (directory / "config.json").is_file() else None
    latest = newest(directory)
    if latest is None or not latest.history:
        raise ValueError(f"{directory} has no finished epoch yet. Expected at least one.")
    name = directory.resolve().name
    if is_ensemble(directory.resolve().parent):
        name = f"{directory.resolve().parent.name}/{name}"
    sections = (
        viewer(directory, latest.history[-1].best.epoch),
        *score_sections(directory, latest.history),
        _curves(directory, latest),
        _config(latest, config),
        _provenance(latest),
        _audit(directory, latest, config, audit),
    )
    links = [tag("a", section[0].text or "", href=f"#{section.get('id')}") for section in sections]
    body = (
        tag(
            "header",
            tag("h1", name),
            tag("p", _first_sentence(directory, latest, config)),
            tag("nav", *links, aria_label="Sections"),
        ),
        tag("main", *sections),
    )
    style, script = ((_FOLDER / file).read_text(encoding="ascii") for file in ("page.css", "viewer.js"))
    return document(name, body, style=style, script=script)


def _first_sentence(directory: Path, latest: Checkpoint, config: RunConfig | None) -> str:
    last, parts = latest.history[-1], []
    with contextlib.suppress(CheckpointError, OSError, KeyError):
        parts.append(str(read_manifest(directory / "best_model", MANIFEST)["class"]))
    parts.append(f"{sum(leaf.numel() for leaf in latest.state.params.values()):,} parameters")
    if config is not None:
        parts.append(f"trained on {Path(config.hdf5_file).name}")
    within = f", batch {last.batch}" if last.batch else ""
    state = {"patience": "stopped early after", "max_epochs": "finished after", None: "recorded up to"}[last.stop]
    parts.append(f"{state} epoch {last.epoch}{within}")
    if last.best.epoch is not None:
        parts.append(f"best epoch {last.best.epoch} by {last.monitor}, {last.best.value:.4g}")
    return "; ".join(parts) + "."


def _curves(directory: Path, latest: Checkpoint) -> Element:
    run = PlottedRun(label="", history=latest.history, evaluation=read_evaluation(directory))
    drawings = [tag("figure", image(drawing.svg, text=drawing.text)) for drawing in curves(run)]
    return tag(
        "section", tag("h2", "Curves"), tag("div", *drawings, class_="grid"), _epochs(latest.history), id="curves"
    )


def _epochs(history: Sequence[EpochReport]) -> Element:
    """The numbers of the curves; of a long run some epochs, evenly spaced, and the best one."""
    every = -(-len(history) // _MOST_ROWS)
    best = history[-1].best.epoch
    shown = [each for each in history if (each.epoch - 1) % every == 0 or each in (history[-1],) or each.epoch == best]
    metrics = [
        (part, name)
        for part in ("train", "valid")
        for name in dict.fromkeys(n for each in history for n in getattr(each, part))
    ]
    metrics.sort(key=lambda pair: _TYPICAL.index(pair[1]) if pair[1] in _TYPICAL else len(_TYPICAL))
    titles = {"train": "training", "valid": "validation"}
    head = ["epoch", *(f"{titles[part]} {name}" for part, name in metrics), "learning rate", "minutes"]
    rows = [
        [
            f"{each.epoch}{' (best)' if each.epoch == best else ''}",
            *(_number(getattr(each, part).get(name)) for part, name in metrics),
            _number(each.learning_rate),
            f"{each.train_minutes + each.valid_minutes:.2f}",
        ]
        for each in shown
    ]
    title = f"The numbers of {len(shown)} of {len(history)} epochs" if every > 1 else "The numbers, epoch by epoch"
    return tag("details", tag("summary", title), rows_table(head, rows, kind="wide numbers"))


def _config(latest: Checkpoint, config: RunConfig | None) -> Element:
    recorded = latest.config if config is None else config.to_dict()
    if "hdf5_file" in recorded:
        recorded = {**recorded, "hdf5_file": Path(str(recorded["hdf5_file"])).name}  # not where it lies
    if isinstance(recorded.get("origin"), Mapping):
        recorded = {
            **recorded,
            "origin": {**recorded["origin"], "experiment": Path(recorded["origin"]["experiment"]).name},
        }
    full = [(name, pair[0]) for name, pair in differing(recorded, {}).items()]
    details = tag(
        "details", tag("summary", f"All {len(full)} options that are set"), rows_table(("option", "value"), full)
    )
    if config is None:
        text = (
            "A script saved this run: what it recorded of its options is below."
            if full
            else ("A script saved this run, and recorded no options.")
        )
        return tag("section", tag("h2", "Config"), tag("p", text), *([details] if full else []), id="config")
    defaults = RunConfig(hdf5_file="").to_dict()
    rows = [(name, *pair) for name, pair in differing(recorded, defaults).items() if name != "hdf5_file"]
    changed = (
        [rows_table(("option", "value", "default"), rows)] if rows else [tag("p", "Every option has its default.")]
    )
    above = tag("p", "What differs from the defaults, which are those of dwi_ml:")
    return tag("section", tag("h2", "Config"), *([above] if rows else []), *changed, details, id="config")


def _provenance(latest: Checkpoint) -> Element:
    data = content(latest.data)
    rows = [
        *((f"data {name}", value) for name, (value, _) in differing(data, {}).items()),
        *((name, value) for name, (value, _) in differing(latest.environment, {}).items()),
        ("checkpoint", latest.name),
        ("digest of its state", latest.digest),
        ("SHA-256 of the run", record_digest(latest)),
    ]
    lines = [
        ("" if data else "The data were not fingerprinted. ")
        + ("The SHA-256 of the run is one hash of data, config and all epochs: a run that is repeated has the same.")
    ]
    table = rows_table(("", ""), [(name, tag("code", str(value).strip('"'))) for name, value in rows])
    return tag("section", tag("h2", "Provenance"), table, tag("p", *lines), id="provenance")


def _audit(directory: Path, latest: Checkpoint, config: RunConfig | None, audit: Sequence[str] | None) -> Element:
    parts: list[Element] = []
    if audit is None:
        parts.append(tag("p", tag("strong", "Not audited"), ": no epoch was trained again for this page."))
    else:
        parts += [tag("p", "When this page was made, epochs were trained again:"), tag("pre", "\n".join(audit))]
    if config is not None:
        parts += _consistency(directory, latest, config)
        how = "dwiml-func verify EXPERIMENT_DIR --all"
        if is_ensemble(directory.resolve().parent):
            parts.append(tag("p", "An ensemble trains all its members at once, so a member is not audited alone."))
        else:
            parts.append(tag("p", "To audit the run, with its folder and its data: ", tag("code", how)))
    else:
        parts.append(
            tag(
                "p",
                "A script saved this run. To train its epochs again, its functions are needed: ",
                tag("code", "dwiml_func.verify"),
            )
        )
    return tag("section", tag("h2", "Audit"), *parts, id="audit")


def _consistency(directory: Path, latest: Checkpoint, config: RunConfig) -> Iterator[Element]:
    problems = [*record_problems(directory, latest, config), *best_model_problems(directory, latest, config)]
    if not problems:
        yield tag("p", "The checkpoints, config.json and the best model agree with each other, and hold what they say.")
        return
    yield tag("p", tag("strong", "What was recorded contradicts itself:"))
    yield tag("ul", *(tag("li", problem) for problem in problems))


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
