"""The process that logs a run with Comet; the only module that imports comet_ml.

`comet.py` runs it as a script, so that neither comet_ml nor its threads are in the training's process; torch is not
imported here. It reads JSON objects from standard input, one a line: first the run, then metrics, at the end
`{"end": true}`. It answers `{"offline": reason}` or `{"online": url}` once it knows, `{"done": location}` at the end,
and `{"error": text}`. If the input ends without `{"end": true}`, the training was interrupted or killed: metrics that
were sent stay, and no archive is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["main"]

_SETTINGS = {
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "COMET_DISPLAY_SUMMARY_LEVEL": "0",
    "COMET_DISABLE_ANNOUNCEMENT": "1",
    "COMET_ERROR_TRACKING_ENABLE": "0",
}
_SILENT = {  # log nothing but the run's parameters and metrics
    **dict.fromkeys(("log_code", "log_graph", "auto_param_logging", "auto_metric_logging", "parse_args"), False),
    **dict.fromkeys(("log_env_details", "log_git_metadata", "log_git_patch", "auto_output_logging"), False),
    "display_summary_level": 0,
}
_PROBE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_SECONDS_AFTER_TRAINING = 60.0  # to send the rest after the training has ended


def main() -> int:
    """Log what comes on standard input. Returns 0, or 1 after an error, which it has reported."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what comet_ml prints is no answer

        def answer(**message: str) -> None:
            print(json.dumps({name: _masked(text) for name, text in message.items()}), file=answers, flush=True)

        try:
            os.environ.update(_SETTINGS)
            messages = _messages()
            _log(next(messages), messages, answer)
        except Exception as error:
            answer(error=_one_line(error))
            return 1
    return 0


def _masked(text: str) -> str:
    """A text of a server without the secrets that it may echo: the API key, and passwords in addresses."""
    with contextlib.suppress(Exception):  # without comet_ml there is no key either
        from comet_ml.config import get_api_key, get_config

        if key := get_api_key(None, get_config()):
            text = text.replace(key, "***")
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def _messages() -> Iterator[dict[str, Any]]:
    """The messages in order. A thread reads them at once, so that the training never waits for a full pipe."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put("")
        threading.Timer(_SECONDS_AFTER_TRAINING, os._exit, (1,)).start()

    threading.Thread(target=read, daemon=True).start()
    return (json.loads(line) for line in iter(lines.get, ""))


def _log(run: dict[str, Any], messages: Iterator[dict[str, Any]], answer: Callable[..., None]) -> None:
    experiment, known, reason = None, set(), _why_offline(run)
    if reason is None:
        try:
            experiment, known = _open(run)
            answer(online=experiment.url or "")
        except Exception as error:
            reason = f"Comet refused: {_one_line(error)}"
    if reason is not None:
        answer(offline=reason)
    is_over, kept = False, {}
    for message in messages:
        new = {(_full_name(row[0], row[1]), row[3]): row for row in message.get("metrics", ())}
        if experiment is None:
            kept |= new
        else:
            _log_metrics(experiment, [row for key, row in new.items() if key not in known])
            known |= new.keys()
        if is_over := "end" in message:
            break
    if experiment is not None:
        is_delivered = experiment.flush()
        experiment.end()
        if not is_delivered:
            raise ConnectionError("Comet did not receive all metrics")
    if is_over:
        answer(done=str(_write_archive(run, [*kept.values()])) if experiment is None else experiment.url or "")


def _why_offline(run: dict[str, Any]) -> str | None:
    """Why the run cannot be logged online; None if nothing speaks against it before the key is used."""
    from comet_ml.config import get_api_key, get_backend_address, get_config

    if run["offline"]:
        return "offline was requested"
    if not get_api_key(None, get_config()):
        return "no API key was found (COMET_API_KEY, or comet's config)"
    address = get_backend_address(get_config())
    return None if _is_reachable(address) else f"{urlsplit(address).hostname} cannot be reached"


def _is_reachable(address: str) -> bool:
    """Whether a server answers at all; comet_ml itself tries for half a minute."""
    import requests  # which comet_ml uses too: the same proxies and certificates

    try:
        requests.get(address, timeout=_PROBE_SECONDS)
    except requests.RequestException:
        return False
    return True


def _open(run: dict[str, Any]) -> tuple[Any, set[tuple[str, int]]]:
    """The online experiment, created if necessary, and the names and steps of the metrics that it has already."""
    import comet_ml

    recorded = comet_ml.API().get_experiment_by_key(run["key"])
    if recorded is None:
        experiment = comet_ml.Experiment(
            experiment_key=run["key"], workspace=run["workspace"], project_name=run["project"], **_SILENT
        )
        _describe(experiment, run)
        return experiment, set()
    known = set()
    for row in recorded.get_metrics() or ():
        if row["step"] is not None:  # some servers put the context into the name, others beside it
            names = (row["metricName"], _full_name(row.get("runContext"), row["metricName"]))
            known |= {(name, int(row["step"])) for name in names}
    return comet_ml.ExistingExperiment(experiment_key=run["key"], **_SILENT), known


def _write_archive(run: dict[str, Any], metrics: list[Any]) -> Path:
    """Write the whole run as an archive for `comet upload`. It replaces an earlier one of the same run."""
    import comet_ml

    folder = Path(run["directory"])
    # As dwiml_func.files.atomic names its own, whose remove_leftovers takes it away after a crash
    temporary = folder / f".dwiml-tmp-{run['key']}.{os.getpid()}-{os.urandom(4).hex()}"
    temporary.mkdir(parents=True)
    try:
        experiment = comet_ml.OfflineExperiment(
            offline_directory=str(temporary),
            experiment_key=run["key"],
            workspace=run["workspace"],
            project_name=run["project"],
            **_SILENT,
        )
        streamer: Any = experiment.streamer
        if hasattr(streamer, "queue_timeout"):  # one second by default, for which the training's end would wait
            streamer.queue_timeout = _POLL_SECONDS
        _describe(experiment, run)
        _log_metrics(experiment, metrics)
        experiment.end()
        (archive,) = temporary.glob("*.zip")
        return archive.replace(folder / f"{run['key']}.zip")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _describe(experiment: Any, run: dict[str, Any]) -> None:
    experiment.set_name(run["name"])
    experiment.log_parameters(run["parameters"])


def _log_metrics(experiment: Any, metrics: list[Any]) -> None:
    contexts = {None: nullcontext, "train": experiment.train, "validate": experiment.validate}
    for context, name, value, step, *is_no_epoch in metrics:
        with contexts[context]():
            experiment.log_metric(name, value, step=step, epoch=None if is_no_epoch else step)


def _full_name(context: str | None, name: str) -> str:
    return f"{context}_{name}" if context else name


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
