"""Claims about Comet: every metric once, online and offline, also after a kill; failures do not affect training."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comet_server import CometServer, comet_server
from experiment_cases import latest_digest
from preloaded import finished, start_program
from report_cases import report

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.data.config import BatchConfig
from dwiml_func.experiment.config import LoggingConfig, RunConfig
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.logs import experiment_comet
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig
from dwiml_func.writers import _comet_process, jsonl
from dwiml_func.writers.comet import Comet, _CometProcess, _log, comet_key, comet_metrics

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
CONFIG = RunConfig(
    hdf5_file=str(PHANTOM),
    model=ModelConfig(rnn_layer_sizes=(4,), dropout=0.0),
    batches=BatchConfig(batch_size_training=40, batch_size_validation=48),
    training=TrainingConfig(max_epochs=3, learning_rate=("0.01*2", "0.001")),
    logging=LoggingConfig(comet_workspace="lab", comet_project="tracking"),
)
PATIENCE = 300.0  # a busy machine may take long to start a process

Row = tuple[str | None, str, float, int, int]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("COMET_API_KEY", "COMET_WORKSPACE", "COMET_PROJECT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMET_CONFIG", str(tmp_path / "no.comet.config"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CometServer]:
    with comet_server() as comet:
        monkeypatch.setenv("COMET_API_KEY", "k" * 25)
        monkeypatch.setenv("COMET_URL_OVERRIDE", f"{comet.address}/clientlib/")
        yield comet


def rows(*history: Any) -> Counter[Row]:
    """What must have been logged: each metric once, the epoch being the step too."""
    return Counter((*row, row[-1]) for one in history for row in comet_metrics(one))


def logged(metrics: list[dict[str, Any]]) -> Counter[Row]:
    """What was logged, but for the one metric that Comet adds itself."""
    names = [(m.get("context"), m["metricName"], m["metricValue"], m["step"], m["epoch"]) for m in metrics]
    return Counter(row for row in names if row[1] != "process duration")


def read_archive(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An archive's description and messages."""
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("messages.json").decode().splitlines()
        return json.loads(archive.read("experiment.json")), [json.loads(line) for line in lines]


def archived(path: Path) -> tuple[Counter[Row], dict[str, Any], dict[str, Any]]:
    """Metrics, parameters and description of an archive."""
    facts, messages = read_archive(path)
    payloads = [(message["type"], message["payload"]) for message in messages]
    metrics = [row["metric"] | {"context": row.get("context")} for kind, row in payloads if kind == "metric_msg"]
    given = [row.get("param") or row["params"] for kind, row in payloads if kind == "parameter_msg"]
    parameters = {row["paramName"]: row["paramValue"] for row in given if row["source"] == "manual"}
    others = {row["key"]: row["value"] for kind, row in payloads if kind == "log_other"}
    return logged(metrics), parameters, facts | others


def wait_for_the_end() -> None:
    """The processes end, and what listens to them, well before they would be ended for taking too long."""
    for thread in threading.enumerate():
        if thread.name == "comet":
            assert thread.daemon  # the end of a training does not wait for it
            thread.join(50)
            assert not thread.is_alive()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_epochs_metrics_have_dwi_mls_names_contexts_and_units():
    assert comet_metrics(report(3)) == [
        (None, "learning_rate", 0.1 / 3, 3),
        ("train", "train_loss_monitor", 1 / 3, 3),
        ("train", "unclipped_grad_norm_monitor", 15.0, 3),
        ("train", "grad_norm_monitor", 1.0, 3),
        ("train", "train_angular_error_monitor", 30.0, 3),
        ("train", "training_time_monitor", 0.75, 3),
        ("validate", "valid_local_loss_monitor", 2 / 3, 3),
        ("validate", "valid_angular_error_monitor", 40.0, 3),
        ("validate", "validation_time_monitor", 0.125, 3),
        (None, "best_epoch", 3, 3),
        (None, "best_loss", 2 / 3, 3),
    ]
    assert [context for context, *_ in comet_metrics(report(1, valid={}))].count("validate") == 0


def test_the_key_of_a_run_never_changes_and_no_other_run_has_it():
    key = comet_key(report(1))
    assert comet_key(report(1, digest="0" * 64, stop="max_epochs")) == key  # as a checkpoint has it
    others = [comet_key(report(1, train_minutes=0.25 + 1e-12)), comet_key(report(1), branch="fork")]
    assert len({key, *others}) == 3
    assert key.isalnum()
    assert 32 <= len(key) <= 50


KILLED = """
import os, signal, sys
from pathlib import Path
from dwiml_func.experiment.resume import resume_experiment
from dwiml_func.experiment.run import run_experiment

def kill(state, metrics):
    if (state.epoch, state.batch) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)

directory = Path(sys.argv[1])
parts, state, history = resume_experiment(directory, checkpoint_every="1batches")
for report in run_experiment(directory, parts, state=state, history=history, on_batch=kill):
    pass
"""


@pytest.mark.soak
def test_the_archive_of_a_run_that_was_killed_within_an_epoch_and_resumed(tmp_path, caplog):
    directory = create_experiment(tmp_path, "run", CONFIG)
    assert finished(start_program(KILLED, directory)).returncode == -9
    assert not list((directory / "logs").rglob("*.zip"))  # the run is not over
    parts, state, history = resume_experiment(directory)
    assert (state.epoch, bool(state.batch)) == (1, True)
    reports = list(run_experiment(directory, parts, state=state, history=history))
    history = (*history, *reports)
    (archive,) = (directory / "logs" / "comet").iterdir()
    metrics, parameters, facts = archived(archive)
    assert metrics == rows(*history)
    assert set(metrics.values()) == {1}
    assert (facts["offline_id"], archive.stem) == (comet_key(history[0]), comet_key(history[0]))
    assert (facts["workspace"], facts["project_name"], facts["Name"]) == ("lab", "tracking", "run")
    assert parameters["learning_rate"] == "0.01*2 0.001"
    assert parameters["batch_size_training"] == 40
    assert parameters["rnn_layer_sizes"] == "4"
    (warning,) = warnings_of(caplog)
    assert "no API key was found" in warning
    assert str(archive.parent) in warning
    assert "comet_ml" not in sys.modules
    check_send_again(directory, archive)


def check_send_again(directory: Path, archive: Path) -> None:
    """The archive of the recorded history is the one that the run left."""
    before = archived(archive)[:2]
    archive.unlink()
    record = newest(directory)
    assert record is not None
    place = experiment_comet(directory, read_config(directory), offline=True, patience=PATIENCE).send(*record.history)
    assert place == str(archive)
    assert archived(archive)[:2] == before


def test_online_a_resumed_run_continues_the_same_experiment_and_nothing_is_sent_twice(tmp_path, server, caplog):
    one, two, three = report(1), report(2), report(3, stop="max_epochs")
    first = Comet(tmp_path, workspace="lab", project="tracking", parameters={"a": 1}, patience=PATIENCE)
    key = comet_key(one)
    assert first.send(one, two) == f"{server.address}/{key}"
    assert logged(server.metrics[key]) == rows(one, two)
    assert (server.projects[key], server.names[key]) == (("lab", "tracking"), tmp_path.name)
    assert server.parameters[key]["a"] == 1
    server.metrics[key] += server.metric_messages(comet_metrics(three)[:4])  # a kill came while epoch 3 was sent

    resumed = Comet(tmp_path, workspace="lab", project="tracking", patience=PATIENCE)
    resumed(one, two)
    resumed(three)  # the last: it waits
    assert logged(server.metrics[key]) == rows(one, two, three)
    assert [kind for _, kind in server.handshakes] == ["add/run", "get/run"]
    assert warnings_of(caplog) == []
    assert not list(tmp_path.rglob("*.zip"))


def test_without_a_network_an_archive_has_the_key_that_the_run_has_online(tmp_path, monkeypatch, caplog):
    with comet_server() as gone:
        address = gone.address
    monkeypatch.setenv("COMET_API_KEY", "k" * 25)
    monkeypatch.setenv("COMET_URL_OVERRIDE", f"{address}/clientlib/")
    place = Comet(tmp_path, patience=PATIENCE).send(report(1))
    assert place is not None
    assert archived(Path(place))[0] == rows(report(1))
    assert Path(place).stem == comet_key(report(1))
    (warning,) = warnings_of(caplog)
    assert "127.0.0.1 cannot be reached" in warning


def test_an_api_key_that_comet_refuses_makes_an_archive(tmp_path, server, caplog):
    server.refuses = True
    place = Comet(tmp_path, patience=PATIENCE).send(report(1))
    assert place == str(tmp_path / "logs" / "comet" / f"{comet_key(report(1))}.zip")
    (warning,) = warnings_of(caplog)
    assert "Comet refused" in warning


def test_a_report_given_twice_counts_once_in_an_archive(tmp_path, caplog):
    comet = Comet(tmp_path, offline=True, patience=PATIENCE)
    comet(report(1), report(2))
    assert comet._process is not None
    assert os.getsid(comet._process._process.pid) != os.getsid(0)  # Ctrl-C is for the training
    place = comet.send(report(1), report(2), report(3))
    assert place is not None
    assert archived(Path(place))[0] == rows(report(1), report(2), report(3))
    wait_for_the_end()
    assert list((tmp_path / "logs" / "comet").iterdir()) == [Path(place)]
    assert warnings_of(caplog) == []


def test_values_of_steps_wait_for_the_first_report_and_each_is_sent_once(tmp_path, monkeypatch):
    sent: list[Any] = []
    names: list[str] = []

    class Process:
        """Keeps what it is sent."""

        def __init__(self, run: dict[str, Any]) -> None:
            sent.append(run["key"])
            names.append(run["name"])

        def send(self, message: dict[str, Any]) -> None:
            sent.append(message["metrics"])

        def close(self) -> None: ...

        def finish(self, patience: float) -> str:
            return f"after {patience:g} s"

    monkeypatch.setattr("dwiml_func.writers.comet._CometProcess", Process)
    monkeypatch.chdir(tmp_path)
    comet = Comet(".", branch="fork", patience=7.0)
    jsonl(tmp_path).write_scalars(1, {"loss": 3.0})  # by a process before
    comet.write_scalars(2, {"loss": 1.0})
    assert sent == []
    comet(report(1), report(1, batch=2))  # a validation within the epoch is none of Comet's epochs
    first = [("train", "loss_per_step", value, step, True) for step, value in ((1, 3.0), (2, 1.0))]
    assert names == [tmp_path.name]
    assert sent == [comet_key(report(1), branch="fork"), [*comet_metrics(report(1)), *first]]
    comet.write_scalars(3, {"loss": 0.5, "size": 2})
    comet.write_scalars(4, {})
    comet(report(2), report(3))
    rest = [("train", "loss_per_step", 0.5, 3, True), ("train", "size_per_step", 2.0, 3, True)]
    assert sent[2:] == [rest, [*comet_metrics(report(2)), *comet_metrics(report(3))]]
    assert comet.send(report(4)) == "after 7 s"
    assert sent[4:] == [comet_metrics(report(4))]
    comet(report(5))  # after the end: another process gets all of them
    history = [row for epoch in range(1, 6) for row in comet_metrics(report(epoch))]
    assert sent[5:] == [sent[0], [*history, *first[:1]]]


def test_the_first_report_must_be_that_of_epoch_1(tmp_path):
    with pytest.raises(ValueError, match=r"Expected the report of epoch 1 .*: epoch 2\. .*write\(\*history\)"):
        Comet(tmp_path)(report(2))


BROKEN = {
    "fails to import": "raise ImportError('broken')",
    "raises": "class OfflineExperiment:\n    def __init__(self, **_):\n        raise RuntimeError('broken')",
    "dies": "import os\nos._exit(3)",
    "hangs at the end": (
        "import threading\nclass OfflineExperiment:\n    streamer = None\n    def __init__(self, **_): pass\n"
        "    def end(self):\n        threading.Event().wait()\n"
        "    set_name = log_parameters = log_metric = train = validate = "
        "lambda self, *_, **__: __import__('contextlib').nullcontext()"
    ),
}


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the run without Comet."""
    config = replace(CONFIG, logging=LoggingConfig())
    directory = create_experiment(tmp_path_factory.mktemp("plain"), "run", config)
    list(run_experiment(directory, prepare(config)))
    assert not (directory / "logs" / "comet").exists()
    return latest_digest(directory)


def comet_ml_of(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put another package in place of comet_ml."""
    package = tmp_path / "broken" / "comet_ml"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    (package / "config.py").write_text(
        "get_config = get_backend_address = lambda *_: None\nget_api_key = lambda *_: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def test_a_run_is_sent_at_once_and_one_that_is_interrupted_ends_the_process_without_a_word(tmp_path, monkeypatch):
    comet_ml_of(tmp_path, "", monkeypatch)
    warned, is_told = [], threading.Event()
    monkeypatch.setattr(_log, "warning", lambda *args: warned.append(str(args)) or is_told.set())
    comet = Comet(tmp_path)
    comet(report(1))
    assert is_told.wait(PATIENCE)
    del comet
    gc.collect()
    wait_for_the_end()
    assert ["no API key was found" in text for text in warned] == [True]
    assert not list(tmp_path.rglob("*.zip"))


WITHOUT_A_TRAINING = """
import runpy, sys, threading
Timer = threading.Timer
threading.Timer = lambda seconds, *how: Timer(seconds / 600, *how)  # a tenth of a second
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_a_process_that_hangs_after_the_training_ends_by_itself(tmp_path, monkeypatch):
    comet_ml_of(tmp_path, BROKEN["hangs at the end"], monkeypatch)
    run = {"directory": str(tmp_path / "run"), "key": "key", "name": "run", "parameters": {}, "offline": True}
    lines = [json.dumps(line) for line in (run | {"workspace": None, "project": None}, {"end": True})]
    command = [sys.executable, "-c", WITHOUT_A_TRAINING, _comet_process.__file__]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (1, "")
    assert "error" not in done.stdout


def test_what_comet_has_is_known_whichever_way_its_server_names_it(monkeypatch):
    inside = {"metricName": "train_loss", "runContext": "train", "step": 3}
    beside = {"metricName": "loss", "runContext": "train", "step": 4}
    rows = [inside, beside, {"metricName": "rate", "step": 5}, {"metricName": "duration", "step": None}]
    runs = {"run": SimpleNamespace(get_metrics=lambda: rows), "empty": SimpleNamespace(get_metrics=lambda: None)}
    api = SimpleNamespace(get_experiment_by_key=runs.get)
    monkeypatch.setitem(sys.modules, "comet_ml", SimpleNamespace(API=lambda: api, ExistingExperiment=dict))
    settings, known = _comet_process._open({"key": "run"})
    assert known >= {("train_loss", 3), ("train_loss", 4), ("rate", 5)}
    assert {step for _, step in known} == {3, 4, 5}
    assert settings.pop("experiment_key") == "run"
    assert set(map(int, settings.values())) == {0}  # it logs nothing by itself
    assert _comet_process._open({"key": "empty"})[1] == set()
    described: list[Any] = []
    comet_ml = SimpleNamespace(API=lambda: api, Experiment=dict)
    monkeypatch.setitem(sys.modules, "comet_ml", comet_ml)
    monkeypatch.setattr(_comet_process, "_describe", lambda *both: described.append(both))
    new = {"key": "new", "workspace": "lab", "project": "tracking"}
    made, known = _comet_process._open(new)
    assert made == {"experiment_key": "new", "workspace": "lab", "project_name": "tracking", **settings}
    assert (described, known) == ([(made, new)], set())


@pytest.mark.parametrize(
    ("code", "answers", "warned"),
    [
        (0, [], []),
        (1, [{"done": "https://comet/run"}], []),
        (3, [], ["its process ended with code 3. "]),
    ],
)
def test_a_process_that_ends_with_an_error_before_it_is_done_is_told(tmp_path, caplog, code, answers, warned):
    process = object.__new__(_CometProcess)
    process._process = SimpleNamespace(stdout=io.StringIO("".join(f"{json.dumps(a)}\n" for a in answers)))  # type: ignore[assignment]
    process._process.wait = lambda: code  # type: ignore[method-assign, assignment]
    process._directory, process._location, process._is_done = tmp_path, None, threading.Event()
    process._has_warned = process._is_archive_wanted = False
    process._listen()
    assert process._is_done.is_set()
    assert len(warnings_of(caplog)) == len(warned)
    assert all(text in told for text, told in zip(warned, warnings_of(caplog), strict=True))


def test_an_error_is_answered_in_a_line_and_by_the_exit_code(monkeypatch, capfd):
    monkeypatch.setattr(_comet_process, "_SETTINGS", {})
    monkeypatch.setattr(_comet_process, "_messages", lambda: 1 // 0)
    saved = os.dup(1)
    try:
        assert _comet_process.main() == 1
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert "by zero" in json.loads(capfd.readouterr().out)["error"]


@pytest.mark.parametrize("is_delivered", [True, False])
def test_online_what_is_new_is_logged_once_and_what_did_not_arrive_is_an_error(monkeypatch, is_delivered):
    logged_rows, answers, ended = [], [], []
    online = SimpleNamespace(url="https://comet/run", flush=lambda: is_delivered, end=lambda: ended.append(True))
    online.train, online.validate = nullcontext, nullcontext
    online.log_metric = lambda name, value, step, epoch: logged_rows.append((name, value, step, epoch))
    monkeypatch.setattr(_comet_process, "_why_offline", lambda run: None)
    monkeypatch.setattr(_comet_process, "_open", lambda run: (online, {("train_loss", 1)}))
    first, again = (
        [["train", "loss", 1.5, 1], [None, "rate", 0.1, 1]],
        [[None, "rate", 0.1, 1], ["train", "b", 2.0, 9, True]],
    )
    messages = iter([{"metrics": first}, {"metrics": again}, {"end": True}, {"metrics": [[None, "late", 1.0, 2]]}])
    with nullcontext() if is_delivered else pytest.raises(ConnectionError, match="did not receive all metrics"):
        _comet_process._log({}, messages, lambda **answer: answers.append(answer))
    assert logged_rows == [("rate", 0.1, 1, 1), ("b", 2.0, 9, None)]
    assert answers == [{"online": "https://comet/run"}, {"done": "https://comet/run"}][: 1 + is_delivered]
    assert ended == [True]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_comet_costs_one_warning_and_changes_nothing(tmp_path, monkeypatch, caplog, digest, broken):
    comet_ml_of(tmp_path, BROKEN[broken], monkeypatch)
    directory = create_experiment(tmp_path, "run", CONFIG)
    comet = experiment_comet(directory, CONFIG, patience=2.0 if broken == "hangs at the end" else PATIENCE)
    reports = list(run_experiment(directory, prepare(CONFIG), write=comet))
    assert [one.epoch for one in reports] == [1, 2, 3]
    assert latest_digest(directory) == digest
    wait_for_the_end()
    assert len(warnings_of(caplog)) == 1
    assert not list(directory.rglob("*.zip"))


def test_the_command_sends_a_finished_run(stopped_early, tmp_path, cli, server):
    done = cli("send-to-comet", stopped_early / "run", "--comet-project", "tracking")
    record = newest(stopped_early / "run")
    assert record is not None
    key = comet_key(record.history[0])
    assert (done.code, done.out) == (0, f"{server.address}/{key}\n")
    assert logged(server.metrics[key]) == rows(*record.history)


def test_the_command_refuses_an_experiment_without_an_epoch(tmp_path, cli):
    create_experiment(tmp_path, "run", CONFIG)
    cli("send-to-comet", tmp_path / "run").check_refusal("no saved epoch yet")
