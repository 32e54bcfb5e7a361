"""Comet: a writer that passes every report to a separate process, which logs it online or keeps it for an archive."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwiml_func.core.report import EpochReport
from dwiml_func.types import Number
from dwiml_func.writers.npy import monitor_name
from dwiml_func.writers.steps import read_scalars
from dwiml_func.writers.writer import whole_epochs

__all__ = ["Comet", "comet_key", "comet_metrics"]

_log = logging.getLogger(__name__)


class Comet:
    """A writer that logs a run as a Comet experiment.

    With an API key (COMET_API_KEY, or comet's config) and a network it logs online. Otherwise it warns at the start and
    the end of the run writes an archive `logs/comet/<key>.zip` for `comet upload`. Comet runs in a separate process: if
    it fails, training continues with a warning, and only the end of the run waits for it.

    A resumed run continues the same Comet experiment, whose key is made of the run's first report, see `comet_key`.
    Metrics that the server has already are not sent twice, and an archive holds the whole run.

    Args:
        directory: the experiment.
        workspace: the Comet workspace; None takes the account's default.
        project: the Comet project; None takes Comet's default project.
        parameters: the run's options, logged once.
        branch: distinguishes a fork from the run whose first epochs it shares.
        offline: write an archive even if Comet can be reached.
        patience: seconds that the end of the run waits.

    Example:
        >>> write = fan_out(npy(directory), Comet(directory, project="tracking"))  # doctest: +SKIP
        >>> write(*history)  # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        workspace: str | None = None,
        project: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        branch: str = "",
        offline: bool = False,
        patience: float = 60.0,
    ) -> None:
        self._run = {
            "directory": str(Path(directory) / "logs" / "comet"),
            "name": Path(directory).absolute().name,
            "workspace": workspace,
            "project": project,
            "parameters": dict(parameters or {}),
            "offline": offline,
        }
        self._branch = branch
        self._patience = patience
        self._metrics: list[tuple[str | None, str, float, int]] = []
        self._scalars: list[tuple[object, ...]] = []  # of steps before the first report, which the key needs
        self._process: _CometProcess | None = None
        self._lock = threading.RLock()  # steps come from the training's thread, reports from that of the checkpoints

    def __call__(self, *reports: EpochReport) -> None:
        """Send reports in order; after the last epoch of the run, wait until all is sent or archived.

        Raises ValueError if the first of all reports is not that of epoch 1.
        """
        if reports := whole_epochs(reports):
            with self._lock:
                self._send_reports(*reports)

    def _send_reports(self, *reports: EpochReport) -> None:
        if not self._metrics and reports[0].epoch != 1:
            raise ValueError(
                f"Expected the report of epoch 1 first. Received: epoch {reports[0].epoch}. "
                f"To resume from a checkpoint, call write(*history) first."
            )
        metrics = [row for report in reports for row in comet_metrics(report)]
        if not self._metrics:
            self._run["key"] = comet_key(reports[0], branch=self._branch)
        self._metrics += metrics
        if self._process is None:
            self._process = _CometProcess(self._run)
            weakref.finalize(self, self._process.close)
            metrics = [*self._metrics, *self._steps_so_far()]
        self._process.send({"metrics": metrics})
        if reports[-1].stop is not None:
            self._finish()

    def write_scalars(self, step: int, values: Mapping[str, Number]) -> None:
        """Send values of a step, under names that end in `_per_step`; in the first epoch, with its report.

        Args:
            step: number of steps done, Comet's step.
            values: by name.
        """
        rows = _step_rows(step, values)
        with self._lock:
            if self._process is None:
                self._scalars += rows
            elif rows:
                self._process.send({"metrics": rows})

    def _steps_so_far(self) -> list[tuple[object, ...]]:
        """Those that were not sent yet, and those in `logs/steps.jsonl`: an archive holds the whole run."""
        waiting, self._scalars = self._scalars, []
        recorded = read_scalars(Path(self._run["directory"]).parent.parent)
        rows = [_step_rows(row.pop("step"), row) for row in recorded]
        return list(dict.fromkeys([*(row for own in rows for row in own), *waiting]))

    def send(self, *history: EpochReport) -> str | None:
        """Log a whole run, finished or not, and wait until it is done. Comet's errors are only warned of.

        Args:
            *history: the reports of all epochs.

        Returns:
            The experiment's address or the archive's path; None if it failed or took too long.
        """
        self(*(replace(report, stop=None) for report in history))
        return self._finish()

    def _finish(self) -> str | None:
        process, self._process = self._process, None
        return None if process is None else process.finish(self._patience)


def comet_key(first: EpochReport, *, branch: str = "") -> str:
    """The key of a run's Comet experiment: 32 hexadecimal digits made of the first epoch's report.

    No other run has bitwise identical durations, and every checkpoint holds the report, so any later process finds the
    same key without asking a server.
    """
    facts = [branch, first.learning_rate, first.train, first.valid, first.train_minutes, first.valid_minutes]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def comet_metrics(report: EpochReport) -> list[tuple[str | None, str, float, int]]:
    """An epoch's metrics under dwi_ml's names: context ("train", "validate" or None), name, value, epoch.

    Losses are means weighted by points, durations in minutes, angular errors in degrees.
    """
    rows: list[tuple[str | None, str, float]] = [(None, "learning_rate", report.learning_rate)]
    rows += [("train", monitor_name("train", name), value) for name, value in report.train.items()]
    rows += [("train", "training_time_monitor", report.train_minutes)]
    if report.valid:
        rows += [("validate", monitor_name("valid", name), value) for name, value in report.valid.items()]
        rows += [("validate", "validation_time_monitor", report.valid_minutes)]
    if report.best.epoch is not None:
        rows += [(None, "best_epoch", report.best.epoch), (None, f"best_{report.monitor}", report.best.value)]
    return [(context, name, value, report.epoch) for context, name, value in rows]


def _step_rows(step: int, values: Mapping[str, Number | None]) -> list[tuple[object, ...]]:
    """Values of a step: context, name, value, step, and that it is no epoch."""
    return [
        ("train", f"{name}_per_step", float(value), step, True) for name, value in values.items() if value is not None
    ]


class _CometProcess:
    """The running process, and a thread that listens to its answers."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        script = Path(__file__).with_name("_comet_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],  # -P: it must not import the modules beside it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the training
        )
        self._directory = Path(run["directory"])
        self._is_archive_wanted = run["offline"]
        self._has_warned = False
        self._location: str | None = None
        self._is_done = threading.Event()  # before the process ends: comet_ml takes a while at its exit
        threading.Thread(target=self._listen, name="comet", daemon=True).start()
        self.send(run)

    def send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # `_listen` reports why the process has ended
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def finish(self, patience: float) -> str | None:
        self.send({"end": True})
        self.close()
        if not self._is_done.wait(patience):
            self._warn_of_failure(f"it did not end within {patience:g} seconds")
            self._process.kill()
        return self._location

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._handle(json.loads(line))
        code = self._process.wait()
        if code != 0 and self._location is None:
            self._warn_of_failure(f"its process ended with code {code}")
        self._is_done.set()

    def _handle(self, answer: Mapping[str, str]) -> None:
        if "online" in answer:
            _log.info("Comet: %s", answer["online"])
        elif "done" in answer:
            self._location = answer["done"]
            self._is_done.set()
        elif "error" in answer:
            self._warn_of_failure(answer["error"])
        elif not self._is_archive_wanted:
            self._warn(f"{answer['offline']}. The run's end archives the logs in {self._directory} for comet upload")

    def _warn_of_failure(self, reason: str) -> None:
        experiment = self._directory.parent.parent
        self._warn(f"{reason}. Training continues. To send the logs again: dwiml-func send-to-comet {experiment}")

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            _log.warning("Comet: %s.", text)
        self._has_warned = True
