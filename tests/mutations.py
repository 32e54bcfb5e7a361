"""Which small changes of behaviour the suite does not notice, on demand: `python tests/mutations.py core --count 30`.

Mutations of one room are drawn from a seed, each is written into a copy of the tree, and the tests that reach the line
run on the copy until one fails. Which test reaches which line is recorded once (`--record`), by coverage.py.

mutmut and cosmic-ray do less: neither draws from a seed, and both start torch again for each mutation or rewrite every
function, which compiled steps and tests of signatures notice.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import coverage
from mutation_edits import PARTS, TREE, draw

PYTEST = ("-m", "not soak", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
SHARED = ("h5py", "nibabel", "scipy.ndimage", "dipy.data", "matplotlib.backends.backend_agg", "matplotlib.figure")
SHARED += ("orbax.checkpoint", "pydantic", "tyro", "torch._dynamo", "hypothesis.strategies", "pytest")
"""What the tests import: the forks need not do it again."""
_FEWEST_TESTS = 3  # for a mutation, however long they take


def room_tests(room: str) -> list[str]:
    """The test files that name a module of the room, or are named after one."""
    names = [part.partition("/")[0] for part in PARTS.get(room, (room,))]
    modules = {path.stem.strip("_") for name in names for path in (TREE / "dwiml_func" / name).rglob("*.py")}
    named = re.compile("|".join(rf"dwiml_func\.{name}\b" for name in names))
    files = sorted((TREE / "tests").glob("test_*.py"), key=lambda file: (file.stem[5:] not in modules, file))
    return [file.name for file in files if file.stem[5:] in modules or named.search(file.read_text())]


class Recorder:
    """A plugin of pytest that records which lines each test reaches, and how long it takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.coverage = coverage.Coverage(data_file=None, source=["dwiml_func"], config_file=False, messages=False)
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration if report.outcome == "passed" else 1e6

    def lines(self) -> dict[str, Any]:
        self.coverage.stop()
        data, tests = self.coverage.get_data(), {test: [took, {}] for test, took in self.seconds.items() if took < 1e5}
        for file in data.measured_files():
            name = file[file.rindex("dwiml_func/") :]
            for line, contexts in data.contexts_by_lineno(file).items():
                for test in set(contexts) & set(tests):
                    tests[test][1].setdefault(name, []).append(line)
        return tests


def run_here(copy: Path, tests: list[str], output: Path, recorder: type[Recorder] | None) -> int:
    """Exit code of pytest in this process, which ends after it."""
    os.setsid()
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    os.environ |= {"PYTHONPATH": str(copy)}
    import pytest

    plugins = [recorder()] if recorder else []
    first = [] if recorder else ["-x"]
    code = pytest.main([*tests, *PYTEST, *first], plugins)
    for plugin in plugins:
        (copy.parent / "recorded.json").write_text(json.dumps(plugin.lines()))
    sys.stdout.flush()
    return code


def run_tests(copy: Path, tests: list[str], limit: float, recorder: type[Recorder] | None = None) -> tuple[str, str]:
    """How the tests end in a fork of this process that works in the copy, and what it printed."""
    output = copy.parent / "output.txt"
    output.write_text("")  # a fork that is stopped at once writes none
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = run_here(copy, tests, output, recorder)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    until = time.monotonic() + limit
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # also what a mutation has left running, such as loading processes
        os.killpg(child, signal.SIGKILL)
    if ended[0] == 0:
        os.waitpid(child, 0)
        return "too long", output.read_text()
    return ("survived" if os.waitstatus_to_exitcode(ended[1]) in (0, 5) else "found"), output.read_text()


def tests_of(change: dict[str, Any], recorded: dict[str, Any], budget: float) -> list[str]:
    """Tests of the lines, then of their function, then of the module, then those named after it (what runs in processes
    of its own is not recorded), as time allows: its own first, then of each test function one case, then the second."""
    name, chosen, total = Path(change["file"]).stem, [], 0.0
    own = f"test_{name.strip('_').removesuffix('_process')}.py"
    for first, last in (change["lines"], change["scope"], (1, 10**6), (0, 0)):
        hits = ((test, hit.get(change["file"], [0] if own in test else ())) for test, (_, hit) in recorded.items())
        reach = [test for test, lines in hits if any(first <= line <= last for line in lines) and test not in chosen]
        cases, order = Counter[str](), []
        for test in sorted(reach, key=lambda test: recorded[test][0]):
            cases[test.partition("[")[0]] += 1
            order.append((own not in test, cases[test.partition("[")[0]], recorded[test][0], test))
        for *_, seconds, test in sorted(order):
            # Besides, fixtures that are made once, and pytest.
            if total + seconds + 0.05 < budget or len(chosen) < _FEWEST_TESTS:
                chosen, total = [*chosen, test], total + seconds + 0.05
    return chosen


def record(copy: Path, names: list[str], cache: Path) -> None:
    """Record which lines each test of these files reaches, a file of the cache for each."""
    for name in names:
        started = time.monotonic()
        end, output = run_tests(copy, [f"tests/{name}"], 600, Recorder)
        if (made := copy.parent / "recorded.json").exists():
            shutil.move(made, cache / f"{name}.json")
        print(name, end, f"{time.monotonic() - started:.0f} s", output.splitlines()[-1:], flush=True)


def rewrite(path: Path, source: str) -> None:
    """Write a module and remove its bytecode, which Python would take for that of another of its size and second."""
    path.write_text(source)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def judge(copy: Path, change: dict[str, Any], recorded: dict[str, Any], budget: float) -> tuple[str, str]:
    """How the tests that reach a change end on it, and the first that failed, or how many there were.

    A change is found when a test fails on it that passes without it: on a busy machine, others fail too.
    """
    tests, path = tests_of(change, recorded, budget), copy / change["file"]
    original = path.read_text()
    while True:
        rewrite(path, change["source"])
        end, output = run_tests(copy, tests, 10 * budget + 60) if tests else ("survived", "")
        rewrite(path, original)
        gone = set(re.findall(r"not found: (?:.*/)?(tests/.+)$", output, re.M))
        if gone:  # since they were recorded; pytest names a function also where one of its cases is gone
            tests = [test for test in tests if not {test, test.partition("[")[0], test.partition("::")[0]} & gone]
            continue
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+\.py(?:::.+?)?)(?: - .*)?$", output, re.M)
        if end != "found" or not failed or run_tests(copy, failed[:1], 10 * budget + 60)[0] == "survived":
            return end, " ".join(failed)[:90] or f"{len(tests)} tests"
        name = failed[0].partition("[")[0]  # of a test, or of a file that cannot be read
        tests = [test for test in tests if name not in (test.partition("[")[0], test.partition("::")[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", help="a folder of dwiml_func, or `parallel` or `figures`")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="recorded time of the tests for one mutation")
    parser.add_argument("--record", nargs="*", metavar="FILE", help="first record these tests (none: the room's)")
    parser.add_argument("--only", nargs="*", type=int, metavar="NUMBER", help="only these of the mutations drawn")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "dwiml_func_mutations")
    options = parser.parse_args()

    for name in SHARED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    torch.func.vmap(torch.neg)(torch.ones(2))  # what torch imports at its first use
    gc.freeze()
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(TREE, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "shared", "*.egg-info"))
        if options.record is not None:
            names = [name for name in room_tests(options.room) if not (options.cache / f"{name}.json").exists()]
            record(copy, options.record or names, options.cache)
        recorded, ends = {}, defaultdict(int)
        for file in sorted(options.cache.glob("test_*.json")):
            recorded |= json.loads(file.read_text())
        for number, change in enumerate(draw(options.room, options.count, options.seed), 1):
            if options.only and number not in options.only:
                continue
            end, by = judge(copy, change, recorded, options.seconds)
            ends[end] += 1
            print(f"{number} {end} by {by}: {change['file']}:{change['lines'][0]} {change['kind']}", flush=True)
            if end != "found":
                print(f"  - {change['before']}\n  + {change['after']}", flush=True)
        print(f"{options.room}: {dict(ends)} of {sum(ends.values())}")


if __name__ == "__main__":
    main()
