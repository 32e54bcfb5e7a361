"""Kills at random moments, on demand: `python tests/kills.py --kills 60`. Not part of the suite, which has few.

Single runs, ensembles, forks and runs of two processes are killed with SIGKILL again and again, put back by the same
command until their end, and compared with a run that nobody killed: digest, history, logs, best model, evaluation, and
every file of the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from preloaded import Fork, start_command, start_ranks
from reproduction_cases import DATA, WITH_FIGURES, differences, files, results

OPTIONS = (*WITH_FIGURES, "--max-epochs", 4)
OFTEN = ("--checkpoint-every", "1batches")
KILLS = 6
"""Of one run, before it is resumed to its end."""


@dataclass(frozen=True)
class Kind:
    """How a run of a kind begins, how many processes train it, and the folders of its members."""

    begin: Callable[[Path], tuple[object, ...]]
    num_processes: int = 1
    members: tuple[str, ...] = ("",)


KINDS = {
    "single": Kind(lambda folder: ("train", folder, "run", DATA, *OPTIONS, *OFTEN)),
    "ensemble": Kind(
        lambda folder: ("train", folder, "run", DATA, *OPTIONS, *OFTEN, "--num-models", 2), members=("0", "1")
    ),
    "fork": Kind(lambda folder: ("fork", folder / "source", "run", "--max-epochs", 4, *OFTEN)),
    "two processes": Kind(
        lambda folder: ("train", folder, "run", DATA, *OPTIONS, *OFTEN, "--num-shards", 2), num_processes=2
    ),
}


def start(kind: Kind, arguments: tuple[object, ...]) -> list[Fork]:
    """Start the processes of a command."""
    if kind.num_processes == 1:
        return [start_command(*arguments)]
    return start_ranks(kind.num_processes, *arguments)


def next_command(kind: Kind, folder: Path) -> tuple[object, ...]:
    """What a scheduler gives after a kill: the same again; of a fork that has begun, `resume`."""
    begin = kind.begin(folder)
    has_begun = (folder / "run" / "config.json").is_file()
    return ("resume", folder, "run") if has_begun and begin[0] == "fork" else begin


def run_to_end(kind: Kind, folder: Path) -> None:
    """Give commands until one ends well, or finds nothing left to do."""
    told = ""
    for _ in range(3):
        processes = start(kind, next_command(kind, folder))
        codes = [process.wait(300) for process in processes]
        told = " ".join(process.err for process in processes)
        if codes == [0] * len(processes) or "epoch left" in told or "No epoch is left" in told:
            return
    raise AssertionError(told)


def kill_at_random(kind: Kind, folder: Path, rng: random.Random, seconds: float) -> bool:
    """Kill the processes of a command, one of them first; returns whether they still ran."""
    processes = start(kind, next_command(kind, folder))
    rng.shuffle(processes)
    with contextlib.suppress(subprocess.TimeoutExpired):
        processes[0].wait(rng.uniform(0, seconds))
    has_run = processes[0].poll() is None
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(300)
    return has_run


def check(kind: Kind, folder: Path, whole: Path) -> list[str]:
    """What differs from the run that nobody killed."""
    found = []
    for member in kind.members:
        one, other = folder / "run" / member, whole / "run" / member
        found += differences(results(one), results(other))
        if files(one) != files(other):
            found.append(f"files: {sorted(set(files(one)) ^ set(files(other)))}")
        for name in ("evaluation.json", "../ensemble.json"):
            if (other / name).is_file() and (one / name).read_bytes() != (other / name).read_bytes():
                found.append(name)
    left = {path.name for path in folder.iterdir()} - {"run", "source"}
    return [*found, *sorted(left)]


def main() -> int:
    """Kill until each kind has its kills or the time is over; returns how many runs came to another end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="of each kind")
    parser.add_argument("--seconds", type=float, default=3600, help="at most, and a run that has begun ends")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    rng, until = random.Random(options.seed), time.monotonic() + options.seconds
    counts = {name: [0, 0, 0] for name in options.kinds}  # kills, runs, runs with another end
    start_command("--version").wait(300)  # else the first duration has that of all imports in it, and no kill would hit
    with tempfile.TemporaryDirectory() as temporary:
        wholes, durations = {}, {}
        for name in options.kinds:
            kind, folder = KINDS[name], Path(temporary, name, "whole")
            folder.mkdir(parents=True)
            if name == "fork":
                assert start_command("train", folder, "source", DATA, *WITH_FIGURES, "--max-epochs", 2).wait(300) == 0
            began = time.monotonic()
            run_to_end(kind, folder)
            wholes[name], durations[name] = folder, time.monotonic() - began
        number = 0
        while time.monotonic() < until:
            name, number = min(counts, key=lambda name: counts[name][0]), number + 1
            if counts[name][0] >= options.kills:
                break
            kind, folder = KINDS[name], Path(temporary, name, str(number))
            folder.mkdir()
            if name == "fork":
                (folder / "source").symlink_to(wholes[name] / "source")
            for _ in range(KILLS):
                counts[name][0] += kill_at_random(kind, folder, rng, durations[name])
            run_to_end(kind, folder)
            problems = check(kind, folder, wholes[name])
            counts[name][1] += 1
            counts[name][2] += bool(problems)
            print(f"{name}: {counts[name][0]} kills in {counts[name][1]} runs {problems or ''}", flush=True)
    for name, (num_kills, num_runs, num_other) in counts.items():
        print(f"{name}: {num_kills} kills in {num_runs} runs, {num_runs - num_other} of them with the same end")
    return sum(num_other for _, _, num_other in counts.values())


if __name__ == "__main__":
    sys.exit(main())
