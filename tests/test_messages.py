"""Claims about messages of commands: quiet, verbose, warnings of one line, and outputs that take no more."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from preloaded import finished, start_program

from dwiml_func.checkpoint.manifest import CorruptError
from dwiml_func.cli._messages import Verbosity, is_quiet, messages, print_progress, set_verbosity
from dwiml_func.cli._training import _stop_at_once
from dwiml_func.core.checked_step import StepMismatchError
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.distributed.process_group import ProcessLostError
from dwiml_func.experiment.signals import TrainingStopped
from dwiml_func.writers.progress import Progress

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
TINY = ("--rnn-layer-sizes", "4", "--batch-size-training", "40", "--max-epochs", "1", "--skip-figures")


def test_quiet_prints_only_results(cli, tmp_path: Path) -> None:
    outcome = cli("train", tmp_path, "quiet", PHANTOM, *TINY, "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Finished after 1 epoch, ")
    normal = cli("train", tmp_path, "normal", PHANTOM, *TINY)
    assert normal.out.endswith(outcome.out.partition("\n")[2])
    assert "Epoch 1/1" in normal.out
    assert cli("--quiet", "digest", tmp_path / "quiet").out == cli("digest", tmp_path / "normal").out


def test_quiet_makes_no_bars_on_a_terminal_either(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Bars(Progress):
        def __init__(self, *, max_epochs: int) -> None:
            made.append(max_epochs)
            super().__init__(max_epochs=max_epochs)

    monkeypatch.setattr("dwiml_func.cli._training.Progress", Bars)
    for number, more in enumerate(((), ("--quiet",), ("--verbose",))):
        assert cli("train", tmp_path, number, PHANTOM, *TINY, "--stop-after", "0s", *more).code == 142
    assert made == [1, 1]


def test_verbose_prints_the_environment_and_the_traceback_of_an_error(cli, tmp_path: Path) -> None:
    outcome = cli("train", tmp_path, "new", PHANTOM, *TINY, "--verbose")
    assert outcome.code == 0
    assert re.search(r"^dwiml-func train: \d\d:\d\d:\d\d debug dwiml_func\S*: .*torch \d", outcome.err, re.MULTILINE)
    assert re.search(r"debug dwiml_func.checkpoint.background: Checkpoint 1 saved in ", outcome.err)
    failed = cli("digest", tmp_path / "nothing", "-v")
    assert failed.code == 2
    assert "Traceback" in failed.err
    assert failed.err.splitlines()[-1] == cli("digest", tmp_path / "nothing").err.strip()


def test_a_warning_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with messages("dwiml-func train"):
            set_verbosity(Verbosity.QUIET)
            warnings.warn("the noise is\nlarge", stacklevel=1)
            logging.getLogger("dwiml_func.checkpoint.background").warning("The disk is %s.", "full")
            logging.getLogger("dwiml_func.checkpoint.background").debug("not shown")
            print_progress("not shown")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "dwiml-func train: warning: the noise is large\ndwiml-func train: warning: The disk is full.\n"
    )


def test_messages_restores_the_loggers() -> None:
    root, package = logging.getLogger(), logging.getLogger("dwiml_func")
    before = (list(root.handlers), package.level, warnings.showwarning)
    with messages("dwiml-func"):
        set_verbosity(Verbosity.VERBOSE)
        assert len(root.handlers) == len(before[0]) + 1
    assert (list(root.handlers), package.level, warnings.showwarning) == before


def test_an_output_without_unicode_shows_everything(tmp_path: Path) -> None:
    (tmp_path / "r\u00e9sum\u00e9").mkdir()
    (tmp_path / "r\u00e9sum\u00e9" / "config.json").write_text("{}")
    program = (
        "import sys; from dwiml_func.cli.main import main\n"
        "for stream in (sys.stdout, sys.stderr): stream.reconfigure(encoding='ascii', errors='strict')\n"
        "main(sys.argv[1:]); main(['--help'])"
    )
    done = finished(start_program(program, "runs", tmp_path))
    assert (done.returncode, done.err) == (0, "")
    assert r"r\xe9sum\xe9" in done.out
    assert "send-to-comet" in done.out


ENDS = {
    "not finite": (NonFiniteError("a loss"), 1, "a loss"),
    "two results": (StepMismatchError("a leaf"), 1, "a leaf"),
    "lost": (ProcessLostError("gone"), 1, "gone"),
    "corrupt": (CorruptError("a file\nis corrupt"), 2, "a file is corrupt"),
    "missing": (FileNotFoundError(2, "No such file", "a"), 2, "[Errno 2] No such file: 'a'"),
    "no module": (ModuleNotFoundError("No module named 'comet_ml'"), 2, "No module named 'comet_ml'"),
    "memory": (MemoryError("8 GB"), 2, "not enough memory. 8 GB"),
    "torch": (RuntimeError("can't allocate memory: 8 GB"), 2, "not enough memory. can't allocate memory: 8 GB"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted."),
    "stopped": (
        TrainingStopped(signal.SIGTERM, Path("a b/run"), "3-2"),
        143,
        "stopped by SIGTERM and saved as checkpoint 3-2. To resume: dwiml-func resume 'a b' run",
    ),
    "stopped before": (
        TrainingStopped(signal.SIGALRM, Path("a/run"), None),
        142,
        "stopped by --stop-after before the first batch. To resume: dwiml-func resume a run",
    ),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", ["digest", "resume"])
@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_command_is_one_line_and_an_exit_code(cli, monkeypatch, name, command, rank) -> None:
    error, code, told = ENDS[name]

    def run(options: object) -> int:
        raise error

    monkeypatch.setattr(f"dwiml_func.cli.{command}.run", run)
    monkeypatch.setenv("RANK", str(rank))
    told += " The last checkpoint is kept." if (name, command) == ("Ctrl-C", "resume") else ""
    line = f"dwiml-func {command}{' (process 1)' if rank else ''}: {told}\n"
    outcome = cli(command, "experiments")
    is_told = not (rank and isinstance(error, TrainingStopped))  # by the first process
    assert (outcome.code, outcome.out, outcome.err) == (code, "", line if is_told else "")


@pytest.mark.parametrize(
    ("rank", "options", "quiet"), [(0, (), False), (0, ("-q",), True), (1, (), True), (1, ("-v",), True)]
)
def test_of_several_processes_only_the_first_prints_progress(cli, monkeypatch, rank: int, options, quiet: bool) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("dwiml_func.cli.digest.run", lambda _: seen.append(is_quiet()) or 0)
    monkeypatch.setenv("RANK", str(rank))
    assert cli("digest", "experiments", *options).code == 0
    assert seen == [quiet]


def test_an_error_that_is_no_users_is_raised(cli, monkeypatch) -> None:
    def run(options: object) -> int:
        raise RuntimeError("shapes")

    monkeypatch.setattr("dwiml_func.cli.digest.run", run)
    with pytest.raises(RuntimeError, match="shapes"):
        cli("digest", "experiments")


@pytest.mark.parametrize(
    ("error", "arguments", "code", "told"),
    [
        (BrokenPipeError(32, "Broken pipe"), ("--version",), 141, ""),
        (OSError(28, "No space left on device"), ("--version",), 2, "cannot be written to: No space left on device"),
        (OSError(28, "No space left on device"), ("diggest",), 2, "diggest"),  # of two errors the first is told
        (None, ("--version",), 0, ""),
    ],
)
def test_an_output_that_cannot_be_written_ends_a_command(cli, monkeypatch, error, arguments, code, told) -> None:
    monkeypatch.setattr("dwiml_func.cli.main.drop_unwritable_output", lambda: error)
    outcome = cli(*arguments)
    assert (outcome.code, len(outcome.err.splitlines())) == (code, int(told != ""))
    assert told in outcome.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGALRM, 142)])
@pytest.mark.parametrize("is_closed", [False, True])
def test_a_second_signal_ends_a_training_at_once(monkeypatch, number, code, is_closed) -> None:
    written, codes = [], []

    def write(file: int, text: bytes) -> None:
        written.append((file, text))
        if is_closed:
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("dwiml_func.cli._training.os", SimpleNamespace(write=write, _exit=codes.append))
    _stop_at_once(number)
    assert (written, codes) == ([(2, b"dwiml-func: stopped immediately. The last checkpoint is kept.\n")], [code])


def test_an_output_that_is_closed_ends_a_command_without_a_traceback() -> None:
    command = f"{sys.executable} -m dwiml_func train --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
