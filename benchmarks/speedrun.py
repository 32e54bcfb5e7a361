"""The speedrun: from the example data to a tracking score in the shortest time on this machine.

A run counts where the valid streamlines of its best model in the validation subject, the mean of the three protocols,
have a mean over seeds that is above the target: one-sided t-test, p < 0.01. Its time is the mean of the training alone
(epochs with their validation, of `logs/metrics.jsonl`), without imports, data and scores. Everything is allowed that
keeps the promises: bitwise identical results for one seed, resume after a kill, no data of the people who are held out.

`python benchmarks/speedrun.py --options "--max-epochs 30"` tries other options of `dwiml-func train`. Fewer than 10
seeds make no record: what comes out is called preliminary. On a shared machine, compare the seconds of the processor,
which have the evaluation in them; runs that were there have none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp
from verdicts import conclude

from dwiml_func.cli.main import main as dwiml_func
from dwiml_func.data.example.dataset import make_example_data

TARGET, LEVEL, SEEDS = 0.60, 0.01, 10
PROTOCOLS = ("continue", "free", "core")


def main() -> int:
    """Train with each seed and test the scores. Exit code 1 if they are not above the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds, from 1 on (default: {SEEDS})")
    parser.add_argument("--options", default="", help="options of `dwiml-func train` besides the recipe's")
    parser.add_argument("--experiments", type=Path, help="keep the runs in this folder; those that are there are read")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.experiments or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "example_data.hdf5").exists():
            make_example_data(folder / "example_data.hdf5")
        found = [measure(folder, seed, shlex.split(options.options)) for seed in range(1, options.seeds + 1)]
    print("| seed | " + " | ".join(f"valid: {name}" for name in PROTOCOLS) + " | seconds | processor's |")
    print("|---" * (3 + len(PROTOCOLS)) + "|")
    for seed, (valid, seconds, of_processor) in enumerate(found, start=1):
        cells = [*(f"{share:.3f}" for share in valid), f"{seconds:.0f}", f"{of_processor:.0f}"]
        print(f"| {seed} | " + " | ".join(cells) + " |")
    means = [float(np.mean(valid)) for valid, *_ in found]
    test: Any = ttest_1samp(means, TARGET, alternative="greater") if len(means) > 1 else None
    p = float("nan") if test is None else float(test.pvalue)
    text = f"{np.mean([seconds for _, seconds, _ in found]):.0f} s of training, {np.mean(means):.3f} valid over"
    kind = "a record" if len(means) >= SEEDS else f"preliminary, no record with fewer than {SEEDS} seeds"
    text = f"{text} {len(means)} seeds ({kind}), p {p:.2g}; must be above {TARGET} with p below {LEVEL}"
    return conclude([(p < LEVEL, text)])


def measure(folder: Path, seed: int, options: list[str]) -> tuple[list[float], float, float]:
    """Train with a seed, unless it is there: the valid shares, the seconds of its epochs, those of the processor."""
    run, of_processor = folder / f"seed_{seed}", float("nan")
    if not (run / "tracking.json").exists():
        printed, started = io.StringIO(), time.process_time()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = dwiml_func(["train", str(folder), run.name, *options, "--rng", str(seed), "--quiet"])
        if code != 0:
            raise RuntimeError(f"seed {seed}: exit code {code}\n{printed.getvalue()}")
        of_processor = time.process_time() - started  # with the evaluation
    scores = json.loads((run / "tracking.json").read_text())["scores"]["model"]
    epochs = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    seconds = 60 * sum(epoch["train_minutes"] + epoch["valid_minutes"] for epoch in epochs)
    return [scores[name]["valid"] for name in PROTOCOLS], seconds, of_processor


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
