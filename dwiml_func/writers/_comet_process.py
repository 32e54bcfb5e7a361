"""The process that speaks with Comet, so that nothing of it is in the training's; all that imports comet_ml.

It is run as a script, without the package around it, and torch is never imported. It reads messages from standard
input, a JSON object a line: first what the experiment is, then metrics, at last `{"end": true}`. It answers with
`{"offline": reason}` or `{"online": url}` once it knows, with `{"done": place}` at the end, and with `{"error": text}`.
When its input ends without a last message, the training was interrupted or killed: what has been sent stays, and an
archive is not written, for the run is not over.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

__all__ = ["main"]

_SETTINGS = {
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "COMET_DISPLAY_SUMMARY_LEVEL": "0",
    "COMET_DISABLE_ANNOUNCEMENT": "1",
    "COMET_ERROR_TRACKING_ENABLE": "0",
}
_SILENT = {  # nothing but what the training says of itself
    **dict.fromkeys(("log_code", "log_graph", "auto_param_logging", "auto_metric_logging", "parse_args"), False),
    **dict.fromkeys(("log_env_details", "log_git_metadata", "log_git_patch", "auto_output_logging"), False),
    "display_summary_level": 0,
}
_PROBE_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_SECONDS_AFTER_TRAINING = 60.0  # for what is still to be sent when the training has been interrupted


def main() -> int:
    """Log what comes on standard input.

    Returns:
        The exit code: 0, or 1 after an error, which it has told of.

    Example:
        >>> main()  # doctest: +SKIP
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer

    def answer(**message: str) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        os.environ.update(_SETTINGS)
        messages = _messages()
        _log(next(messages), messages, answer)
    except Exception as error:
        answer(error=_one_line(error))
        return 1
    return 0


def _messages() -> Iterator[dict[str, Any]]:
    """The messages as they come; a thread reads them, so that the training never waits for a full pipe."""
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
        except Exception as error:
            reason = f"Comet refused: {_one_line(error)}"
    if experiment is None:
        answer(offline=reason or "")
        metrics, is_over = {}, False
        for message in _until_end(messages):
            is_over = "end" in message
            metrics |= {_place(*row): row for row in message.get("metrics", ())}
        if is_over:
            answer(done=str(_write_archive(run, list(metrics.values()))))
        return
    answer(online=experiment.url or "")
    is_over = False
    for message in _until_end(messages):
        is_over = "end" in message
        new = {_place(*row): row for row in message.get("metrics", ())}
        _log_metrics(experiment, [row for place, row in new.items() if place not in known])
        known |= new.keys()
    is_delivered = experiment.flush()
    experiment.end()
    if not is_delivered:
        raise ConnectionError("not all could be sent")
    if is_over:
        answer(done=experiment.url or "")


def _why_offline(run: dict[str, Any]) -> str | None:
    """Why the run cannot be logged online; None when it can, as far as one can tell before the key is used."""
    from comet_ml.config import get_api_key, get_backend_address, get_config

    if run["offline"]:
        return "as asked for"
    if not get_api_key(None, get_config()):
        return "no API key was found (COMET_API_KEY, or comet's config)"
    address = get_backend_address(get_config())
    return None if _is_reachable(address) else f"{urlsplit(address).hostname} cannot be reached"


def _open(run: dict[str, Any]) -> tuple[Any, set[tuple[str, int]]]:
    """The experiment online, made where it is not there yet, and the places of the metrics that it has already."""
    import comet_ml

    known = comet_ml.API().get_experiment_by_key(run["key"])
    if known is None:
        place = {"workspace": run["workspace"], "project_name": run["project"]}
        experiment = comet_ml.Experiment(experiment_key=run["key"], **place, **_SILENT)
        _describe(experiment, run)
        return experiment, set()
    places = set()
    for row in known.get_metrics() or ():
        if row["step"] is not None:  # the context is part of the name, or stands beside it, as the server's version is
            names = {row["metricName"], _full_name(row.get("runContext"), row["metricName"])}
            places |= {(name, int(row["step"])) for name in names}
    return comet_ml.ExistingExperiment(experiment_key=run["key"], **_SILENT), places


def _is_reachable(address: str) -> bool:
    """Whether a connection can be opened; comet_ml itself finds out only after half a minute."""
    url = urlsplit(address)
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy)
    try:
        with socket.create_connection(
            (url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), timeout=_PROBE_SECONDS
        ):
            return True
    except OSError:
        return False


def _write_archive(run: dict[str, Any], metrics: list[Any]) -> Path:
    """Write the whole run as an archive for `comet upload`; it replaces an earlier one of the same run."""
    import comet_ml

    folder = Path(run["directory"])
    temporary = folder / f".tmp-{run['key']}"
    shutil.rmtree(temporary, ignore_errors=True)
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
        if hasattr(streamer, "queue_timeout"):  # it looks once a second for the end, which the training waits for
            streamer.queue_timeout = _LOOK_SECONDS
        _describe(experiment, run)
        _log_metrics(experiment, metrics)
        experiment.end()
        (archive,) = temporary.glob("*.zip")
        place = folder / f"{run['key']}.zip"
        os.replace(archive, place)
        return place
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _describe(experiment: Any, run: dict[str, Any]) -> None:
    experiment.set_name(run["name"])
    experiment.log_parameters(run["parameters"])


def _log_metrics(experiment: Any, metrics: list[Any]) -> None:
    contexts = {"train": experiment.train, "validate": experiment.validate}
    for context, name, value, epoch in metrics:
        if context is None:
            experiment.log_metric(name, value, step=epoch, epoch=epoch)
        else:
            with contexts[context]():
                experiment.log_metric(name, value, step=epoch, epoch=epoch)


def _until_end(messages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages up to the last one; or up to the last that came, where the training is no more."""
    for message in messages:
        yield message
        if "end" in message:
            return


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def _place(context: str | None, name: str, _: float, epoch: int) -> tuple[str, int]:
    return _full_name(context, name), epoch


def _full_name(context: str | None, name: str) -> str:
    return f"{context}_{name}" if context else name


if __name__ == "__main__":
    sys.exit(main())
