"""Comet: a writer that hands every report to a process of its own, which logs it online or keeps it for an archive."""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwiml_func.core.loop import EpochReport

__all__ = ["Comet", "comet_key", "comet_metrics"]

_log = logging.getLogger(__name__)


class Comet:
    """A writer that logs a run as a Comet experiment.

    Online with an API key (COMET_API_KEY, or comet's config) and a network; else the run's end leaves an archive
    `logs/comet/<key>.zip` for `comet upload`, and a warning says so at the start. Nothing of Comet runs in this
    process: its failure costs one warning, its slowness nothing, and only the end of the run waits for it, for a while.

    A run that goes on is the same Comet experiment, since the key of that is made of the first report of all, see
    `comet_key`, which every checkpoint has. What the server has already is not sent twice, and an archive always holds
    the whole run.

    Args:
        directory: the run's experiment.
        workspace: the Comet workspace; None is the account's own.
        project: the Comet project; None is Comet's project for what has none.
        parameters: the run's options, logged once.
        branch: tells a fork from the run whose first epochs it shares.
        offline: write an archive, even where it could be sent.
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
        self._talk: _Talk | None = None

    def __call__(self, *reports: EpochReport) -> None:
        """Hand on reports; after the last one of the run, wait until all is sent or archived.

        Args:
            *reports: of epochs, in order.

        Raises:
            ValueError: the first of all is not that of epoch 1.
        """
        if not reports:
            return
        if not self._metrics and reports[0].epoch != 1:
            raise ValueError(
                f"the first report was that of epoch {reports[0].epoch}. Expected that of epoch 1: when a run goes on "
                f"from a checkpoint, give the writer its history first, write(*history)"
            )
        metrics = [row for report in reports for row in comet_metrics(report)]
        if not self._metrics:
            self._run["key"] = comet_key(reports[0], branch=self._branch)
        self._metrics += metrics
        if self._talk is None:
            self._talk = _Talk(self._run)
            weakref.finalize(self, self._talk.hang_up)
            metrics = self._metrics
        self._talk.say({"metrics": metrics})
        if reports[-1].stop is not None:
            self._finish()

    def send(self, *history: EpochReport) -> str | None:
        """Log a whole run, finished or not, and wait until it is done. Raises no error of Comet's.

        Args:
            *history: the reports of all epochs.

        Returns:
            The experiment's address, or the archive's path; None when it failed, or took too long: a warning says why.
        """
        self(*(replace(report, stop=None) for report in history))
        return self._finish()

    def _finish(self) -> str | None:
        talk, self._talk = self._talk, None
        return None if talk is None else talk.end(self._patience)


def comet_key(first: EpochReport, *, branch: str = "") -> str:
    """The key of a run's Comet experiment.

    It is made of the report of the first epoch, whose durations no other run has to the last bit. So it is on record in
    every checkpoint, needs no server to be given, and the logs of a finished run can be sent again and again.

    Args:
        first: the report of the run's first epoch.
        branch: tells a fork from the run whose first epochs it shares.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> comet_key(report) == comet_key(report)  # doctest: +SKIP
        True
    """
    facts = [branch, first.learning_rate, first.train, first.valid, first.train_minutes, first.valid_minutes]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def comet_metrics(report: EpochReport) -> list[tuple[str | None, str, float, int]]:
    """What Comet gets of an epoch, under dwi_ml's names and contexts.

    Args:
        report: the epoch's report.

    Returns:
        Context ("train", "validate" or None), name, value, and the epoch, which is Comet's step too. Losses are means
        weighted by points, durations in minutes, angular errors in degrees.

    Example:
        >>> comet_metrics(report)[0]  # doctest: +SKIP
        ('train', 'train_loss_monitor', 0.5, 1)
    """
    rows: list[tuple[str | None, str, float]] = [(None, "learning_rate", report.learning_rate)]
    names = {"loss": "train_loss_monitor", "grad_norm": "grad_norm_monitor"}
    names["unclipped_grad_norm"] = "unclipped_grad_norm_monitor"
    rows += [("train", names.get(name, f"train_{name}_monitor"), value) for name, value in report.train.items()]
    rows += [("train", "training_time_monitor", report.train_minutes)]
    if report.valid:
        names = {"loss": "valid_local_loss_monitor"}
        rows += [("validate", names.get(name, f"valid_{name}_monitor"), value) for name, value in report.valid.items()]
        rows += [("validate", "validation_time_monitor", report.valid_minutes)]
    if report.best.epoch is not None:
        rows += [(None, "best_epoch", report.best.epoch), (None, "best_loss", report.best.value)]
    return [(context, name, value, report.epoch) for context, name, value in rows]


class _Talk:
    """The process, and two threads that speak with it: a pipe may be full, an answer may take long or never come."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        script = Path(__file__).with_name("comet_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],  # -P: the modules beside it are not for it to import
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the training
        )
        self._messages: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._directory = Path(run["directory"])
        self._is_archive_wanted = run["offline"]
        self._has_warned = False
        self._place: str | None = None
        self._is_done = (
            threading.Event()
        )  # comet_ml takes a while at its process's exit, which nobody needs to wait for
        for work in (self._speak, self._listen):
            threading.Thread(target=work, name="comet", daemon=True).start()
        self.say(run)

    def say(self, message: Mapping[str, Any]) -> None:
        self._messages.put(message)

    def hang_up(self) -> None:
        self._messages.put(None)

    def end(self, patience: float) -> str | None:
        self.say({"end": True})
        self.hang_up()
        if not self._is_done.wait(patience):
            self._warn_of_failure(f"it did not end within {patience:g} seconds")
            self._process.kill()
        return self._place

    def _speak(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # why the process is gone, `_listen` hears
            for message in iter(self._messages.get, None):
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._hear(json.loads(line))
        code = self._process.wait()
        if code != 0 and self._place is None:
            self._warn_of_failure(f"its process ended with code {code}")
        self._is_done.set()

    def _hear(self, answer: Mapping[str, str]) -> None:
        if "online" in answer:
            _log.info("Comet: %s", answer["online"])
        elif "done" in answer:
            self._place = answer["done"]
            self._is_done.set()
        elif "error" in answer:
            self._warn_of_failure(answer["error"])
        elif not self._is_archive_wanted:
            self._warn(f"{answer['offline']}. At the end the logs are archived in {self._directory}, for comet upload")

    def _warn_of_failure(self, reason: str) -> None:
        experiment = self._directory.parent.parent
        self._warn(f"{reason}. Training goes on; to send its logs again: dwiml-func send-to-comet {experiment}")

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            _log.warning("Comet: %s.", text)
        self._has_warned = True
