"""A server that speaks as much of Comet's protocol as its client needs, and keeps what it is sent."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit


class CometServer:
    """What experiments the server has, by key: their metrics, parameters and name, in the order of arrival."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[dict[str, Any]]] = {}
        self.parameters: dict[str, dict[str, Any]] = {}
        self.names: dict[str, str] = {}
        self.projects: dict[str, tuple[str, str]] = {}
        self.handshakes: list[tuple[str, str]] = []
        self.refuses = False
        self.address = ""

    def answer(self, path: str, query: dict[str, str], body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        key = body.get("experimentKey", query.get("experimentKey", ""))
        if self.refuses:
            return 403, {}
        if path.endswith("add/run"):
            self.metrics[key], self.parameters[key] = [], {}
            self.projects[key] = (body["teamName"], body["projectName"])
        if path.endswith(("add/run", "get/run")):
            self.handshakes.append((key, path.rpartition("logger/")[2]))
            return 200, {"runId": "1", "project_id": "1", "focusUrl": f"{self.address}/", "lastOffset": 0}
        if path.endswith("isAlive/ver"):
            return 200, {"version": "4.0.0"}
        if path.endswith("status-report/update"):
            return 200, {"is_alive_beat_duration_millis": 10000}
        if path.endswith("experiment/metadata"):
            found = key in self.metrics
            return (200, {"workspaceName": "w", "projectName": "p", "experimentKey": key}) if found else (404, {})
        if path.endswith("logger/experiment/metric"):
            self.metrics[key] += body["values"]
        if path.endswith("logger/experiment/parameter"):
            self.parameters[key] |= {row["parameterName"]: row["parameterValue"] for row in body["values"]}
        if path.endswith("write/experiment/log-other"):
            self.names[key] = body["value"]
        if path.endswith("metrics/get-all"):
            return 200, {"metrics": [self._read(row) for row in self.metrics[key]]}
        return 200, {}

    @staticmethod
    def metric_messages(rows: Iterable[tuple[str | None, str, float, int]]) -> list[dict[str, Any]]:
        """Metrics as the client sends them: context, name, value, and the epoch, which is the step too."""
        keys = ("context", "metricName", "metricValue", "step", "epoch")
        return [dict(zip(keys, (*row, row[-1]), strict=True)) for row in rows]

    @staticmethod
    def _read(row: dict[str, Any]) -> dict[str, Any]:
        """A metric as Comet gives it: the context is part of the name, and numbers are text."""
        name = f"{row['context']}_{row['metricName']}" if row["context"] else row["metricName"]
        place = {"step": row["step"], "epoch": row["epoch"], "runContext": row["context"], "timestamp": 0}
        return {"metricName": name, "metricValue": str(row["metricValue"]), **place}


@contextmanager
def comet_server() -> Iterator[CometServer]:
    """Run a server in a thread."""
    comet = CometServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *_: Any) -> None:
            pass

        def handle_one(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            code, message = comet.answer(url.path, query, json.loads(content or b"{}"))
            text = json.dumps(message).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = handle_one

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        comet.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield comet
        finally:
            server.shutdown()
            thread.join()
