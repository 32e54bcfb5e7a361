"""Processes that start at once: forks of one that has imported what a training imports, and filled a few caches.

Each is a process of its own, with memory, files, threads, signals and an end of its own. What they share is what the
interpreter chose at its start, the seed of its hashes. So compare with a run of `reproduction_cases`, which has started
by itself.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "TORCHRUN",
    "Fork",
    "finished",
    "run_command",
    "run_program",
    "run_ranks",
    "start_command",
    "start_program",
    "start_ranks",
]

COMMAND = "import sys; from dwiml_func.cli.main import main; sys.exit(main(sys.argv[1:]))"
TORCHRUN = """
import os, runpy, signal, subprocess, sys, threading, weakref
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main

class Forked(subprocess.Popen):  # of what has imported all, in place of an interpreter
    def __init__(self, args, env, **streams):
        _, unbuffered, *args = args
        assert (unbuffered, streams) == ("-u", {"stdout": None, "stderr": None, "start_new_session": True}), streams
        self.args, self.returncode, self._waitpid_lock = args, None, threading.Lock()
        self.stdin = self.stdout = self.stderr = None
        sys.stdout.flush()
        self.pid = os.fork()
        self._child_created = self.pid > 0
        if not self._child_created:
            os.setsid()
            os.environ.update(env)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # not the launcher's
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            for finalizer in list(weakref.finalize._registry):
                finalizer.atexit = False
            run = runpy.run_path if args[0] != "-m" else runpy.run_module
            sys.argv = args[args[0] == "-m" :]
            ended(lambda: run(sys.argv[0], run_name="__main__"))

subprocess_handler.Popen = Forked
main()
"""
"""`torchrun`."""

SERVER = """
import atexit, gc, json, os, re, signal, socket, sys, threading, weakref
from multiprocessing import util
import h5py, matplotlib.backends.backend_agg, matplotlib.figure, orbax.checkpoint
import dwiml_func.cli.fork, dwiml_func.cli.resume, dwiml_func.cli.train
import nibabel, PIL.BmpImagePlugin, PIL.JpegImagePlugin, PIL.PpmImagePlugin  # what trainings import later
from dwiml_func.checkpoint import provenance
from dwiml_func.experiment import config
from dwiml_func.models.rnn import kernels, torchscript

dwiml_func.cli.train.Options.parse(["folder", "name", "data"], "train")  # fills tyro's caches
config._reader()
provenance.environment()
for function in filter(None, (getattr(kernel, "__wrapped__", None) for kernel in vars(kernels).values())):
    torchscript._scripted(function)

def fork_a_server():  # that becomes multiprocessing's forkserver when one is asked for, and need not import torch
    near, far = socket.socketpair()
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])  # not meant for it yet
    number = os.fork()
    if number == 0:
        near.close()
        try:
            text, files, *_ = socket.recv_fds(far, 1 << 20, 2)
            if text:  # else the other has ended without a forkserver
                code, environment, mask = json.loads(text)
                os.environ.update(environment)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                exec(re.sub(r"main\\(\\d+, \\d+", f"main({files[0]}, {files[1]}", code))
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    far.close()
    start, group = util.spawnv_passfds, os.getpgrp()

    def start_or_take(path, arguments, files):
        is_server = arguments[-1].startswith("from multiprocessing.forkserver")
        if not is_server or near.fileno() < 0 or os.getpgrp() != group:
            return start(path, arguments, files)
        mask = list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        socket.send_fds(near, [json.dumps([arguments[-1], dict(os.environ), mask]).encode()], files)
        near.close()
        return number

    util.spawnv_passfds = start_or_take

def ended(run):
    code = 1
    try:
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120  # the interpreter's own
    os._exit(code)  # the interpreter would take down all its modules one by one, for a quarter of a second


for finalizer in list(weakref.finalize._registry):
    finalizer.atexit = False  # torch would take down its libraries one by one
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
gc.collect()
gc.freeze()  # no fork looks through what all share, not even at its end
gc.set_threshold(20_000, 20, 100)  # as in the tests
for line in sys.stdin:
    order = json.loads(line)
    if "ended" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["ended"], 0)[1]), flush=True)
        continue
    number = os.fork()
    if number > 0:
        print(number, flush=True)
        continue
    for stream, path in enumerate((os.devnull, order["out"], order["err"])):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, stream)
        os.close(file)
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv[1:] = order["arguments"]
    fork_a_server()
    break
else:
    sys.exit()
ended(lambda: exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__", "ended": ended}))
"""


class Fork:
    """A running process, for `subprocess.Popen`'s users."""

    def __init__(self, server: _Server, pid: int, out: Path, err: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._out, self._err = out, err
        self._handle = os.pidfd_open(pid)  # can be read once the process has ended

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._look(0)

    def wait(self, timeout: float) -> int:
        """Wait for its end; returns its exit code."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout)
        return code

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)  # a number that is not waited for stays its own

    @property
    def out(self) -> str:
        """What it has printed."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has printed on standard error."""
        return self._err.read_text()

    def _look(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._handle], [], [], timeout)[0]:
            self.returncode = self._server.ask({"ended": self.pid})
            os.close(self._handle)
        return self.returncode


class _Server:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # none of its threads
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._count = 0
        atexit.register(self._end)

    def ask(self, order: Mapping[str, object]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self,
        program: str,
        arguments: tuple[object, ...],
        environment: Mapping[str, str],
        folder: Path | None,
        err: Path | None,
    ) -> Fork:
        self._count += 1
        out, own = (Path(self._folder.name) / f"{self._count}.{stream}" for stream in ("out", "err"))
        err = err or own
        out.touch()
        err.touch()
        order = {"program": program, "arguments": list(map(str, arguments)), "environment": dict(environment)}
        order["folder"] = str(folder or Path.cwd())
        return Fork(self, self.ask({**order, "out": str(out), "err": str(err)}), out, err)

    def _end(self) -> None:
        self._process.communicate()  # it ends when there are no orders any more
        self._folder.cleanup()


_server = functools.cache(_Server)


def start_program(
    program: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    err: Path | None = None,
) -> Fork:
    """Start a program of Python, in a folder and with a standard error, such as a terminal, if they are given."""
    return _server().start(program, arguments, environment or {}, folder, err)


def start_command(*arguments: object, **where: Any) -> Fork:
    """Start a `dwiml-func` command; `where` is as in `start_program`."""
    return start_program(COMMAND, *arguments, **where)


def run_command(*arguments: object, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a `dwiml-func` command to its end, which must be good; returns what it printed."""
    return run_program(COMMAND, *arguments, environment=environment, folder=folder)


def run_program(
    program: str, *arguments: object, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> str:
    """Run a program to its end, which must be good; returns what it printed."""
    return _ended([start_program(program, *arguments, environment=environment, folder=folder)])[0]


def finished(process: Fork) -> Fork:
    """Wait for the end of a process, good or bad."""
    try:
        process.wait(timeout=300)
    finally:
        process.kill()
    return process


def start_ranks(
    num_processes: int, *arguments: object, environment: Mapping[str, str] | None = None, program: str = COMMAND
) -> list[Fork]:
    """Start a command in several processes that train together, told of each other as `torchrun` tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    shared |= environment or {}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    return [start_program(program, *arguments, environment=rank) for rank in ranks]


def run_ranks(num_processes: int, *arguments: object, **where: Any) -> list[str]:
    """Run a command in several processes that train together, to a good end; returns what each printed."""
    return _ended(start_ranks(num_processes, *arguments, **where))


def _ended(processes: Sequence[Fork]) -> list[str]:
    """What processes printed, each of which must come to a good end."""
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * len(processes), [process.err for process in processes]
    return [process.out for process in processes]
