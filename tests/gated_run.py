"""Real training processes that stop at a gate, for a test to do something at that very moment."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from reproduction_cases import DATA, STOCHASTIC, differences, files, results

OPTIONS = (*STOCHASTIC, "--max-epochs", "2")
"""Of runs of 2 epochs of 4 training and 2 validation batches each."""

GATED = """
import signal, sys, threading
from dwiml_func.checkpoint import background
from dwiml_func.cli.main import main
from dwiml_func.experiment import setup

place, number, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
count = 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it

def gated(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == number:
            print("gate", flush=True)
            sys.stdin.readline()
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
"""The program. It prints `gate` and waits for a line, in the middle of a call or as soon as its workers were started;
or it hangs in its first save; or it sends itself the signal of Ctrl-C while it opens the data."""


def read_to(pipe: IO[str] | None, text: str) -> str:
    """Read lines up to one that has the text; returns it."""
    assert pipe is not None
    for line in pipe:
        if text in line:
            return line
    raise AssertionError(f"the process ended without {text!r}")


@contextmanager
def gated(
    folder: Path, place: str, number: int, *options: str, prefix: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A training process, in its own process group, that has reached its gate."""
    command = [*prefix, sys.executable, "-c", GATED, place, str(number)]
    with subprocess.Popen(
        [*command, "train", str(folder), "run", str(DATA), *OPTIONS, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        watchdog = threading.Timer(120, process.kill)  # a failure, instead of a test without an end
        watchdog.start()
        try:
            read_to(process.stdout, "gate")
            yield process
        finally:
            process.kill()
            watchdog.cancel()


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
