"""Which number of a validation ranks recipes as their tracking does: Spearman's correlation over small trainings.

Each recipe trains on the example data. Loss, mean angle and window lag are those of the validation at the best epoch,
the one with the least loss; the lag after 80 mm and the valid streamlines are those of its model in the same subject.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from verdicts import conclude

from dwiml_func.cli.main import main as dwiml_func
from dwiml_func.data.example.dataset import make_example_data

COMMON = "--batch-size-training 10 --step-size 2 --clip-grad 1 --num-threads 1"
BASE = {"max-epochs": "15", "learning-rate": "0.002*10 0.0005", "weight-decay": "0", "nb-previous-dirs": "1"}
NOISE, REVERSED = {"noise-gaussian-size-forward": "1"}, {"reverse-ratio": "0.5"}
RECIPES: dict[str, dict[str, str]] = {
    "plain": {},
    "plain, 40 epochs": {"max-epochs": "40", "learning-rate": "0.002*30 0.0005"},
    "reversed": REVERSED,
    "noise 0.3": {"noise-gaussian-size-forward": "0.3"},
    "noise 1": NOISE,
    "noise 0.3, reversed": {"noise-gaussian-size-forward": "0.3"} | REVERSED,
    "noise 1, reversed": NOISE | REVERSED,
    "noise 1, reversed, 4 epochs": NOISE | REVERSED | {"max-epochs": "4"},
    "noise 1, reversed, ema 0.99": NOISE | REVERSED | {"ema": "0.99"},
    "noise 1, reversed, rate 0.0003": NOISE | REVERSED | {"learning-rate": "0.0003"},
    "noise 1, reversed, rate 0.01": NOISE | REVERSED | {"learning-rate": "0.01"},
    "noise 1, reversed, weight decay 0.3": NOISE | REVERSED | {"weight-decay": "0.3"},
    "noise 1, reversed, no previous direction": NOISE | REVERSED | {"nb-previous-dirs": "0"},
    "noise 0.3, reversed, 4 previous directions": {"noise-gaussian-size-forward": "0.3", "nb-previous-dirs": "4"}
    | REVERSED,
    "noise 1, reversed, l2-regression": NOISE | REVERSED | {"dg-key": "l2-regression"},
    "noise 1, reversed, LSTM 20": NOISE | REVERSED | {"rnn-layer-sizes": "20"},
}
MEASURES = ("loss", "angle", "window lag", "lag 80 mm")
PROTOCOLS = ("continue", "free", "core")
LIMIT = -0.5


def main() -> int:
    """Print the tables of recipes and of correlations. Exit code 1 if the window lag ranks recipes too badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=Path, help="keep the runs in this folder; those that are there are read")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.experiments or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "example.hdf5").exists():
            make_example_data(folder / "example.hdf5")
        rows = {name: measure(folder, name) for name in RECIPES}
    print("| recipe | " + " | ".join((*MEASURES, *(f"valid: {name}" for name in PROTOCOLS))) + " |")
    print("|---" * (1 + len(MEASURES) + len(PROTOCOLS)) + "|")
    digits = (4, 2, 2, 1, 2, 2, 2)
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{x:.{n}f}" for x, n in zip(row, digits, strict=True)) + " |")
    columns = list(zip(*rows.values(), strict=True))
    shares = columns[len(MEASURES) :]
    valid = [*shares, [sum(row) / len(row) for row in zip(*shares, strict=True)]]
    print("\n| Spearman's correlation with valid streamlines | " + " | ".join((*PROTOCOLS, "mean")) + " |")
    print("|---" * (2 + len(PROTOCOLS)) + "|")
    found = {}
    for name, values in zip(MEASURES, columns, strict=False):
        found[name] = [float(np.corrcoef(rankdata(values), rankdata(share))[0, 1]) for share in valid]
        print(f"| {name} | " + " | ".join(f"{value:+.2f}" for value in found[name]) + " |")
    lag = found["window lag"][-1]
    return conclude([(lag <= LIMIT, f"window lag {lag:+.2f} over {len(rows)} recipes, at most {LIMIT} required")])


def measure(folder: Path, name: str) -> tuple[float, ...]:
    """Train a recipe, unless it is there, and read what its validation and its tracking gave."""
    run = name.replace(" ", "_").replace(",", "")
    if not (folder / run / "tracking.json").exists():
        arguments = ["train", str(folder), run, str(folder / "example.hdf5"), *COMMON.split(), "--quiet"]
        for option, value in (BASE | RECIPES[name]).items():
            arguments += [f"--{option}", value]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = dwiml_func(arguments)
        if code != 0:
            raise RuntimeError(f"{name}: exit code {code}\n{printed.getvalue()}")
        print(f"trained: {name}", file=sys.stderr)
    tracking = json.loads((folder / run / "tracking.json").read_text())
    scores = tracking["scores"]["model"]
    lines = (folder / run / "logs" / "metrics.jsonl").read_text().splitlines()
    best = json.loads(lines[tracking["epoch"] - 1])
    validation = [best[f"valid_{metric}"] for metric in ("loss", "angular_error", "tracking_window_lag")]
    return (*validation, scores["continue"]["lag_mm"][-1], *(scores[protocol]["valid"] for protocol in PROTOCOLS))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
