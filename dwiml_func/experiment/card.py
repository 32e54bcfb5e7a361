"""A model card in Markdown: what a run trained, on which data, with which recipe, scores and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.manifest import read_manifest
from dwiml_func.experiment.audit.consistency import record_digest
from dwiml_func.experiment.audit.replay import recorded_run
from dwiml_func.experiment.comparison.compare import differing
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.evaluation import read_evaluation
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.model_store import MANIFEST
from dwiml_func.experiment.tracking.recorded import RecordedTracking, read_tracking
from dwiml_func.experiment.training_facts import TRAINED_ON
from dwiml_func.files.fingerprint import content

__all__ = ["model_card"]


def model_card(directory: str | Path) -> str:
    """The card of an experiment. ValueError where no epoch is recorded, FileNotFoundError without a best model."""
    directory = Path(directory)
    config = read_config(directory)
    latest, reports = recorded_run(directory)
    best = reports.get(latest.state.best.epoch or 0)
    if best is None:
        raise ValueError(f"{directory} has no best epoch. Expected one whose {config.training.monitor} is finite.")
    model = read_manifest(directory / "best_model", MANIFEST)
    num_parameters = sum(leaf.numel() for leaf in latest.state.params.values())
    changed = differing(RunConfig(hdf5_file=config.hdf5_file).to_dict(), config.to_dict())
    options = {
        name: text if text == "none" else json.loads(text)
        for name, (_, text) in changed.items()
        if not name.startswith(("checkpoints.", "logging."))
    }
    architecture = {"kind": model["class"], "parameters": num_parameters, "features": model["nb_features"]}
    subsets = {"train": best.train, "valid": best.valid}
    scores = {f"{subset} {name}": value for subset, means in subsets.items() for name, value in means.items()}
    sections = {
        "Model": architecture,
        "Input": model.get(TRAINED_ON) or {},
        "Data": {"file": Path(config.hdf5_file).name, **content(latest.data)},
        "Recipe (other options have their defaults)": options,
        f"Scores of epoch {best.epoch}, the best of {max(reports)} by {config.training.monitor}": scores,
    }
    if angles := read_evaluation(directory):
        sections["Angular error of the best model and of baselines, degrees"] = asdict(angles)
    tracking = read_tracking(directory)
    sections["Computed by"] = dict(latest.environment)
    sections["What was recorded"] = {
        "state": latest.digest,
        "SHA-256 of the run": record_digest(latest),
        "to check": "dwiml-func verify EXPERIMENT_DIR --all",
    }
    parts = [f"# {directory.resolve().name}", *(_table(title, rows) for title, rows in sections.items() if rows)]
    if tracking is not None:
        parts.insert(-2, _tracking_table(tracking))
    return "\n\n".join(parts)


def _table(title: str, rows: Mapping[str, Any]) -> str:
    flat = {name: text.strip('"').replace("|", "\\|") for name, (text, _) in differing(rows, {}).items()}
    lines = [f"| {name} | {cell} |" for name, cell in flat.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _tracking_table(found: RecordedTracking) -> str:
    """Who tracks how well, by protocol: shares of valid streamlines, and of those that join both ends."""
    ceiling = {} if found.ceiling is None else {"half of the real streamlines": {"continue": found.ceiling}}
    protocols = list(found.shares["model"])
    cells = [
        [who, *("{:.3f} ({:.3f})".format(*by[name]) if name in by else "" for name in protocols)]
        for who, by in {**found.shares, **ceiling}.items()
    ]
    rows = [["valid (both ends)", *protocols], ["---"] * (len(protocols) + 1), *cells]
    title = (
        f"## Tracking of epoch {found.epoch}, {found.subset} subject {found.subject}, steps of {found.step_size:g} mm"
    )
    return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows)])
