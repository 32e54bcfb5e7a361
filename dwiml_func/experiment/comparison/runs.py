"""An overview of the experiments in a folder, read from configs and manifests alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dwiml_func._checks import one_line
from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.core.early_stopping import should_stop
from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.folder import is_ensemble, is_run, is_sweep, member_folders, named_in_order, read_config
from dwiml_func.experiment.tracking.recorded import read_scores
from dwiml_func.experiment.training_config import WINDOW_LAG, TrainingConfig
from dwiml_func.files.lock import is_locked

__all__ = ["RunOverview", "RunRecord", "list_runs", "run_overview"]

RunState = Literal["running", "finished", "stopped early", "interrupted", "unfinished", "corrupt"]


class RunRecord(NamedTuple):
    """What is recorded of a run: its config as JSON data, the reports of its epochs, and the scores of tracking."""

    config: Mapping[str, Any] = {}
    history: tuple[EpochReport, ...] = ()
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOverview:
    """The progress of a run. `state` is "running" while a process holds its lock, "corrupt" where it cannot be read.

    A script's run is "unfinished" until it ends: it holds no lock, so it may be running or not.

    `best_value` is that of the metric `monitor`, which decides the best epoch; `best_loss`, `angular_error_deg` and
    `window_lag_mm` are those of the validation there. `valid_share` is the share of valid streamlines that the best
    model tracks, by protocol. `group` is the ensemble or the sweep that the run belongs to.
    `minutes` is the duration of all epochs. `last_change` is the local time of the last change in its folder.
    `problems` has a sentence for each corrupt part.
    """

    name: str
    state: RunState
    epochs: int = 0
    max_epochs: int | None = None
    best_epoch: int | None = None
    best_loss: float | None = None
    monitor: str = "loss"
    best_value: float | None = None
    angular_error_deg: float | None = None
    window_lag_mm: float | None = None
    valid_share: dict[str, float] | None = None
    minutes: float = 0.0
    last_change: datetime
    problems: tuple[str, ...] = ()
    group: str | None = None
    record: RunRecord = field(default_factory=lambda: RunRecord(), repr=False, compare=False)

    def to_row(self) -> dict[str, Any]:
        """The overview as JSON data; `record` apart."""
        row = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "record"}
        return {**row, "last_change": self.last_change.isoformat(timespec="seconds"), "problems": [*self.problems]}


def list_runs(experiments_path: str | Path) -> list[RunOverview]:
    """An overview of each experiment, script's run and member of an ensemble or a sweep in a folder, by name.

    No tensor is read.
    """
    folder = Path(experiments_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"Experiments path {str(experiments_path)!r} is not a folder.")
    runs: list[tuple[str | None, Path]] = []
    for path in named_in_order(folder):
        if is_ensemble(path):
            runs += ((path.name, member) for member in member_folders(path))
        elif is_sweep(path):
            runs += ((path.name, member) for member in named_in_order(path) if is_run(member))
        elif is_run(path):
            runs.append((None, path))
    names = [path.name if group is None else f"{group}/{path.name}" for group, path in runs]
    return [replace(run_overview(path, name), group=group) for name, (group, path) in zip(names, runs, strict=True)]


def run_overview(directory: Path, name: str) -> RunOverview:
    """The overview of one run."""
    is_running = is_locked(directory)
    try:
        config = read_config(directory) if (directory / "config.json").is_file() else None
        checkpoint = newest(directory)
    except (ValueError, OSError) as error:
        return RunOverview(
            name=name,
            state="running" if is_running else "corrupt",
            last_change=_last_change(directory),
            problems=(one_line(error),),
        )
    training = None if config is None else config.training
    history, scores = checkpoint.history if checkpoint else (), read_scores(directory)
    shares = {protocol: found.get("valid") for protocol, found in scores.get("model", {}).items()}
    best = history[-1].best if history else None
    at_best = history[best.epoch - 1].best_means if best and best.epoch else {}
    return RunOverview(
        name=name,
        state="running" if is_running else _state(training, history),
        epochs=sum(not report.batch for report in history),
        max_epochs=training.max_epochs if training else None,
        best_epoch=best.epoch if best else None,
        best_loss=at_best.get("loss"),
        monitor=training.monitor if training else history[-1].monitor if history else "loss",
        best_value=best.value if best and best.epoch else None,
        angular_error_deg=at_best.get("angular_error"),
        window_lag_mm=at_best.get(WINDOW_LAG),
        valid_share={protocol: float(share) for protocol, share in shares.items() if share is not None} or None,
        minutes=sum(report.train_minutes + report.valid_minutes for report in history),
        last_change=_last_change(directory),
        problems=tuple(checkpoint.corrupt.values()) if checkpoint else (),
        record=RunRecord(
            dict(checkpoint.config) if config is None and checkpoint else config.to_dict() if config else {},
            history,
            scores,
        ),
    )


def _state(training: TrainingConfig | None, history: tuple[EpochReport, ...]) -> RunState:
    """From config and history: the last report may be older than a change of max_epochs or of the patience."""
    # Of a script's run only the last report is known; the script may be running.
    if training is None:
        stop = history[-1].stop if history else None
        return "unfinished" if stop is None else "finished" if stop == "max_epochs" else "stopped early"
    if history and history[-1].epoch >= training.max_epochs and not history[-1].batch:
        return "finished"
    if history and should_stop(history[-1].best, training.patience):
        return "stopped early"
    return "interrupted"


def _last_change(directory: Path) -> datetime:
    paths = [directory, *directory.glob("*"), *directory.glob("checkpoint/*")]
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # a running process has just removed it
            continue
    return datetime.fromtimestamp(max(times, default=0.0))
