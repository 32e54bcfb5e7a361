"""What it costs to compute every 100th step twice and to compare: a checked step of Learn2Track beside a plain one."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import interleaved
from verdicts import conclude

from dwiml_func import checked_step
from dwiml_func.data.config import BatchConfig
from dwiml_func.data.example.dataset import make_example_data
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.setup import prepare
from dwiml_func.models.config import ModelConfig

EVERY, LIMIT = 100, 0.015


def main() -> int:
    """Print the medians and the overhead. Exit code 1 where it is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="steps of each kind (default: 60)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "example.hdf5")
        make_example_data(data)
        config = RunConfig(
            hdf5_file=str(data),
            model=ModelConfig(nb_previous_dirs=1),
            batches=BatchConfig(batch_size_training=10, step_size=2.0),
        )
        parts = prepare(config)
        state = parts.first_state()
        batch = next(iter(parts.train(state.key, 0, 0)))

        def repeated(step: Any) -> Any:
            own = parts.first_state()

            def run() -> None:
                nonlocal own
                own, _ = step(own, batch, lr=1e-4)

            return run

        variants = {"plain": repeated(parts.step), "checked": repeated(checked_step(parts.step, every=1))}
        times = interleaved(variants, options.rounds, warm_up=5)
    plain, checked = (statistics.median(times[name]) for name in ("plain", "checked"))
    overhead = (checked / plain - 1) / EVERY
    print(
        f"a plain step {1000 * plain:.1f} ms, a checked one {1000 * checked:.1f} ms, {options.rounds} of each in turn"
    )
    text = f"checking every {EVERY}th step costs {overhead:.2%} of the training steps, at most {LIMIT:.1%} required"
    return conclude([(overhead <= LIMIT, text)])


if __name__ == "__main__":
    sys.exit(main())
