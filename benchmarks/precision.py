"""What bfloat16 costs in accuracy and brings in time: runs on the example data with a few seeds, in both."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from scaling import FEATURES, make_batch
from timing import interleaved, medians_of
from verdicts import conclude

from dwiml_func import adam, init_state, module_loss, train_step
from dwiml_func.cli._parsing import parse
from dwiml_func.cli._run_options import RunOptions
from dwiml_func.data import open_dataset
from dwiml_func.data.example.dataset import make_example_data
from dwiml_func.experiment.evaluation import evaluate_model
from dwiml_func.experiment.folder import create_experiment
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.models import Learn2Track, compute_batch_loss, load_model
from dwiml_func.writers import fan_out

Precision = Literal["float32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
AUTOCAST = {"float32": None, "bf16": torch.bfloat16}
MODELS = {
    "LSTM 100 + 100": {"rnn_layer_sizes": (100, 100)},
    "GRU 100 + 100": {"rnn_layer_sizes": (100, 100), "rnn_key": "gru"},
    "LSTM 512 + 512": {"rnn_layer_sizes": (512, 512)},
}
OPTIONS = (
    *("--nb-previous-dirs", "1"),
    *("--weight-decay", "0"),
    *("--batch-size-training", "50"),  # those of the default run, 10, take longer
    *("--learning-rate", "0.002*20 0.0005"),
    *("--max-epochs", "30"),
)
LARGE, LARGE_LIMIT = "LSTM 512 + 512", 0.8


class Scores(NamedTuple):
    """What a run's best model reaches on the validation subject, evaluated in float32."""

    loss: float
    degrees: float


def main() -> int:
    """Print both tables, and whether the limits hold. Exit code 1 when one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs in each precision, at least 2 (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    print(
        f"torch {torch.__version__}, 1 thread, {os.cpu_count()} cores, products in bfloat16 by hardware: {has_bf16}\n"
    )
    ratios = time_steps(options.rounds)
    scores = train_all(options.seeds)
    print("\n30 epochs on the example data: the best model on the validation subject, evaluated in float32\n")
    print("| seed | loss, float32 | loss, bf16 | error, float32 | error, bf16 |\n|---|---|---|---|---|")
    for seed, (full, low) in enumerate(zip(*scores.values(), strict=True)):
        print(f"| {seed} | {full.loss:.5f} | {low.loss:.5f} | {full.degrees:.3f} deg | {low.degrees:.3f} deg |")
    full, low = (scores[name] for name in PRECISIONS)
    verdicts = [
        cost("loss", [run.loss for run in full], [run.loss for run in low], "", 5),
        cost("angular error", [run.degrees for run in full], [run.degrees for run in low], " deg", 3),
    ]
    if has_bf16:
        text = f"a step of {LARGE} in bf16 takes {ratios[LARGE]:.2f} times its time in float32, at most {LARGE_LIMIT}"
        verdicts.append((ratios[LARGE] <= LARGE_LIMIT, text))
    else:
        print(f"skip: the time of {LARGE}: this processor has no products in bfloat16")
    return conclude(verdicts)


def cost(name: str, full: Sequence[float], low: Sequence[float], unit: str, digits: int) -> tuple[bool, str]:
    """Whether the mean over seeds is worse by no more than what another seed changes, and words for it."""
    differences = [one - other for one, other in zip(low, full, strict=True)]
    worse, limit = statistics.fmean(differences), statistics.stdev(full)
    print(
        f"\n{name}: {statistics.fmean(full):.{digits}f}{unit} in float32, {statistics.fmean(low):.{digits}f}{unit} in "
        f"bf16; standard deviation over seeds {limit:.{digits}f}{unit}, of a seed's difference "
        f"{statistics.stdev(differences):.{digits}f}{unit}"
    )
    text = f"{name}: bf16 adds {worse:+.{digits}f}{unit}, at most {limit:.{digits}f}{unit}, as much as another seed"
    return worse <= limit, text


def time_steps(rounds: int) -> dict[str, float]:
    """Print what a step takes in both precisions; the ratios by model."""
    print("| a step, 100 streamlines of 60 to 180 points | float32 | bf16 | ratio |\n|---|---|---|---|")
    batch, ratios = make_batch(100, 120), {}
    for name, options in MODELS.items():
        torch.manual_seed(0)
        model = Learn2Track(FEATURES, nb_previous_dirs=1, **options)
        state = init_state(model, adam(), seed=0)

        def step(precision: Precision, model: Any = model, state: Any = state) -> object:
            loss_fn = module_loss(model, compute_batch_loss, autocast=AUTOCAST[precision])
            return train_step(state, batch, loss_fn=loss_fn, optimizer=adam(), lr=0.001)

        times = medians_of(interleaved({name: partial(step, name) for name in PRECISIONS}, rounds, warm_up=1))
        ratios[name] = times["bf16"] / times["float32"]
        cells = " | ".join(f"{1e3 * times[precision]:.0f} ms" for precision in PRECISIONS)
        print(f"| {name} | {cells} | {ratios[name]:.2f} |", flush=True)
    return ratios


def train_all(num_seeds: int) -> dict[Precision, list[Scores]]:
    """The scores of runs with the seeds 0, 1, ... in both precisions, two runs at a time."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=context) as pool:
        make_example_data(Path(folder) / "data.hdf5")
        jobs: dict[Precision, list[Any]] = {
            precision: [pool.submit(train, folder, precision, seed) for seed in range(num_seeds)]
            for precision in PRECISIONS
        }
        return {precision: [job.result() for job in own] for precision, own in jobs.items()}


def train(folder: str, precision: Precision, seed: int) -> Scores:
    """Train one model on the example data."""
    data = Path(folder) / "data.hdf5"
    config = parse(RunOptions, OPTIONS, "precision.py").to_config(data)
    training = replace(config.training, rng=seed, precision=precision)
    config = replace(config, training=training)
    directory = create_experiment(folder, f"{precision}_{seed}", config)
    for _ in run_experiment(directory, prepare(config), write=fan_out()):
        pass
    evaluated = evaluate_model(load_model(directory / "best_model"), open_dataset(data, "validation"))
    return Scores(evaluated.loss, evaluated.angular_error)


if __name__ == "__main__":
    sys.exit(main())
