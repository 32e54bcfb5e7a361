"""Real training processes that stop at a gate, for a test to do something at that very moment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from preloaded import Fork, start_program
from reproduction_cases import DATA, STOCHASTIC, differences, files, results

OPTIONS = (*STOCHASTIC, "--max-epochs", "2")
"""Of runs of 2 epochs of 4 training and 2 validation batches each."""

GATED = """
import os, signal, sys, threading, time
from dwiml_func.checkpoint import background
from dwiml_func.cli.main import main
from dwiml_func.experiment import setup

gate, place, number, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
count = 0
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so would a job of nohup

def gated(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == number:
            print("gate", flush=True)
            while not os.path.exists(gate):  # not the opening of a pipe, in which a signal just before it is lost
                time.sleep(0.01)
        return function(*args, **kwargs)
    return call

def starting(batches):
    def start(*args):
        loader = batches(*args)
        return (batch for batch in gated(lambda workers: workers)(iter(loader)))
    return start

def hang(*args, **kwargs):
    print("gate", flush=True)
    threading.Event().wait()

def interrupted(*args, **kwargs):
    print("gate", flush=True)
    signal.raise_signal(signal.SIGINT)  # at this very moment, wherever the process is in its work

make_batches, make_steps = setup.make_batches, setup.make_steps

def gated_batches(*args, **kwargs):
    train, *others = make_batches(*args, **kwargs)
    return starting(train), *others

def gated_steps(*args, **kwargs):
    steps = dict(zip(("step", "eval_step"), make_steps(*args, **kwargs), strict=True))
    return tuple((steps | {place: gated(steps[place])}).values())

if place == "interrupt":
    setup.open_data = interrupted
elif place == "save":
    background.save = hang
elif place == "train":
    setup.make_batches = gated_batches
else:
    setup.make_steps = gated_steps
sys.exit(main(arguments))
"""
"""The program. It prints `gate` and waits for a file, in the middle of a call or as soon as its workers
were started; or it hangs in its first save; or it sends itself the signal of Ctrl-C while it opens the data."""


REPLACED = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"


class Gated:
    """A training process that has reached its gate. It leads a process group of its own."""

    def __init__(self, process: Fork, gate: Path) -> None:
        self._process, self._gate = process, gate
        self._num_read = 0  # characters of standard error

    def signal(self, number: int) -> None:
        """Send a signal to the whole group, as Ctrl-C on a terminal and many schedulers' SIGTERM do."""
        os.killpg(self._process.pid, number)

    def read_out(self, text: str) -> None:
        """Wait for a line of standard output that has the text."""
        self._end_of_line(text, lambda: self._process.out)

    def read_err(self, text: str) -> None:
        """Wait for a line of standard error that has the text; `end` returns what follows it."""
        self._num_read += self._end_of_line(text, lambda: self._process.err[self._num_read :])

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the process does in its background."""
        while not condition():
            assert self._process.poll() is None, f"the process ended: {self._process.err}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.01)

    def end(self, *, through_gate: bool = False) -> tuple[int, str, str]:
        """Let it through the gate, or not, and wait for its end.

        Returns its exit code, what it printed, and what is left to read of its standard error.
        """
        if through_gate:
            self._gate.touch()
        code = self._process.wait(300)
        return code, self._process.out, self._process.err[self._num_read :]

    def _end_of_line(self, text: str, read: Callable[[], str]) -> int:
        while True:
            ended = self._process.poll() is not None
            printed = read()
            if text in printed and (end := printed.find("\n", printed.index(text))) >= 0:
                return end + 1
            assert not ended, f"the process ended without {text!r}: {self._process.err}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.01)


@contextmanager
def gated(folder: Path, place: str, number: int, *options: str, prefix: Sequence[str] = ()) -> Iterator[Gated]:
    """A training process that has reached its gate. With `prefix`, a command, it is a new one which that starts."""
    with tempfile.TemporaryDirectory() as own:
        gate = Path(own) / "gate"
        arguments = (gate, place, number, "train", folder, "run", DATA, *OPTIONS, *options)
        if prefix:
            process = start_program(REPLACED, *prefix, sys.executable, "-c", GATED, *arguments)
        else:
            process = start_program(GATED, *arguments)
        try:
            run = Gated(process, gate)
            run.read_out("gate")
            yield run
        finally:
            process.kill()


def train_whole(folder: Path) -> Path:
    """The same run without a gate, in this process."""
    from dwiml_func.cli.main import main

    assert main(["train", str(folder), "run", str(DATA), *OPTIONS]) == 0
    return folder / "run"


def check_same_end(directory: Path, uninterrupted: Path) -> None:
    """A run has come to the same end as another one, and nothing is left beside it."""
    assert differences(results(directory), results(uninterrupted)) == []
    assert files(directory) == files(uninterrupted)  # no lock, and nothing half-written
    assert list(directory.parent.iterdir()) == [directory]
