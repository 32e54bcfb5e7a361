"""What the logs of an epoch cost, beside an epoch of the default example run.

The writers are called with the last epoch of a run's whole history. In a run they work in a thread while training goes
on, so what counts is the processor's time that they take from it; the time that passes is mostly the disk's.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from verdicts import conclude

from dwiml_func import EpochReport
from dwiml_func.cli._run_options import example_options
from dwiml_func.data.example.dataset import make_example_data
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.writers import Comet, Writer, fan_out, jsonl, npy, tensorboard

LOCAL_LIMIT, COMET_LIMIT = 0.01, 0.02


def main() -> int:
    """Print medians and shares, and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="epochs that are trained (default: 5)")
    parser.add_argument("--rounds", type=int, default=21, help="calls of each writer (default: 21)")
    parser.add_argument("--comet-runs", type=int, default=3, help="runs that Comet archives (default: 3)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        reports, num_epochs = train(Path(folder), options.epochs)
        epoch = statistics.median(60 * (report.train_minutes + report.valid_minutes) for report in reports)
        history = [replace(reports[-1], epoch=number + 1, stop=None) for number in range(num_epochs)]
        factories: dict[str, Callable[[Path], Writer]] = {"npy": npy, "jsonl": jsonl, "tensorboard": tensorboard}
        times = time_writers(Path(folder), factories, history, options.rounds)
        blocked, waited, used = map(
            statistics.median,
            zip(*(archive(Path(folder) / f"comet{run}", history) for run in range(options.comet_runs)), strict=True),
        )

    print(f"an epoch of the default example run     {1000 * epoch:8.1f} ms   (median of {options.epochs})")
    for name, calls in times.items():
        lower, median, upper = (1000 * seconds for seconds in statistics.quantiles([used for used, _ in calls], n=4))
        passed = 1000 * statistics.median(passed for _, passed in calls)
        print(f"{name:<40}{median:8.1f} ms   quartiles {lower:.1f} to {upper:.1f} ms, {passed:.1f} ms passed")
    print(f"{'Comet, an archive: a report':<40}{1000 * blocked / num_epochs:8.1f} ms   (mean of {num_epochs} epochs)")
    print(
        f"{'Comet, an archive: the end of a run':<40}{1000 * waited:8.1f} ms   in another process, {used:.1f} s of CPU"
    )
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, after {num_epochs} epochs of history")
    local = sum(statistics.median(used for used, _ in calls) for calls in times.values()) / epoch
    comet = (blocked + waited) / num_epochs / epoch
    return conclude(
        (share <= limit, f"{name} cost {share:.2%} of an epoch, at most {limit:.0%} allowed")
        for name, share, limit in (("all local writers", local, LOCAL_LIMIT), ("Comet offline", comet, COMET_LIMIT))
    )


def train(folder: Path, epochs: int) -> tuple[list[EpochReport], int]:
    """Some epochs of the default example run, without logs; and how many it has in all."""
    path = folder / "data.hdf5"
    make_example_data(path)
    config = example_options().to_config(path)
    few = replace(config, training=replace(config.training, max_epochs=epochs))
    directory = create_experiment(folder, "run", few)
    return list(run_experiment(directory, prepare(few), write=fan_out())), config.training.max_epochs


def time_writers(
    folder: Path, factories: dict[str, Callable[[Path], Writer]], history: list[EpochReport], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each call with a run's last epoch, of the processor and passed, the writers in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in factories}
    for index in range(-1, rounds):  # the first round imports
        for name, make in factories.items():
            write = make(folder / name)
            write(*history[:-1])
            start, processor_start = time.perf_counter(), time.thread_time()
            write(history[-1])
            if index >= 0:
                times[name].append((time.thread_time() - processor_start, time.perf_counter() - start))
    return times


def archive(directory: Path, history: list[EpochReport]) -> tuple[float, float, float]:
    """A run with Comet offline: seconds within all reports but the last, within the last, and of CPU elsewhere."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    comet = Comet(directory, offline=True)
    blocked = 0.0
    for report in history[:-1]:
        start = time.perf_counter()
        comet(report)
        blocked += time.perf_counter() - start
    time.sleep(5)  # as a training would: the process is ready long before the end
    start = time.perf_counter()
    comet(replace(history[-1], stop="max_epochs"))
    waited = time.perf_counter() - start
    assert list(directory.rglob("*.zip")), "no archive was written"
    time.sleep(3)  # the process ends by itself
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return blocked, waited, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
