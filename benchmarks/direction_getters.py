"""What each direction getter learns on the example data, beside the principal direction."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from verdicts import conclude

from dwiml_func.models.direction_getters import DIRECTION_GETTERS


def main() -> int:
    """Train a model with each getter, print a table, and whether each has learned. Exit code 1 when one has not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", nargs="+", choices=list(DIRECTION_GETTERS), default=list(DIRECTION_GETTERS))
    parser.add_argument("--experiments", help="folder to keep the runs in; those that are in it are not trained again")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.experiments or temporary)
        folder.mkdir(exist_ok=True)
        print("| getter | loss, first epoch | last epoch | model | principal direction | minutes |")
        print("|---|---|---|---|---|---|")
        rows = {}
        for key in options.keys:
            rows[key] = row = measure(folder, key)
            print(
                f"| {key} | {row['first']:.4f} | {row['last']:.4f} | "
                f"{row['model']:.2f} deg | {row['principal']:.2f} deg | {row['minutes']:.1f} |",
                flush=True,
            )

    print(f"\ntorch {torch.__version__}; losses and angular errors of the validation subject, these of the best epoch")
    verdicts = []
    for key, row in rows.items():
        loss = f"{key}: validation loss from {row['first']:.4f} to {row['last']:.4f}, must fall"
        error = f"{key}: {row['model']:.2f} deg, must beat the principal direction's {row['principal']:.2f} deg"
        verdicts += [(row["last"] < row["first"], loss), (row["model"] < row["principal"], error)]
    return conclude(verdicts)


def measure(folder: Path, key: str) -> dict[str, float]:
    """Train a model on the example data as `dwiml-func train` does, and evaluate it on the validation subject."""
    directory = folder / key
    if not directory.exists():
        run("train", str(folder), key, "--dg-key", key)
    losses = np.load(directory / "logs" / "valid_local_loss_monitor_per_epoch.npy")
    minutes = sum(
        np.load(directory / "logs" / f"{phase}_time_monitor_duration.npy").sum() for phase in ("training", "validation")
    )
    output = run("evaluate", str(directory), str(folder / "example_data.hdf5"), "--subset", "validation", "--json")
    compared: dict[str, Any] = json.loads(output)["compared"]
    return {
        "first": float(losses[0]),
        "last": float(losses[-1]),
        "model": compared["model"],
        "principal": compared["principal_direction"],
        "minutes": float(minutes),
    }


def run(*arguments: str) -> str:
    """What a command of `dwiml-func` prints."""
    command = [sys.executable, "-m", "dwiml_func", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
