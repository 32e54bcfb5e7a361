"""What `import dwiml_func` costs beside `import torch`, each in a new interpreter."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch
from verdicts import conclude

TORCH, OURS = "import torch", "import dwiml_func"
LIMIT = 1.3


def main() -> int:
    """Print medians and their ratio, and whether the limit holds. Exit code 1 when it does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="interpreters started for each (default: 11)")
    options = parser.parse_args()

    times: dict[str, list[float]] = {TORCH: [], OURS: []}
    for index in range(-1, options.rounds):  # the first round fills the disk cache and writes the byte code
        order = (TORCH, OURS) if index % 2 else (OURS, TORCH)
        for statement in order:
            elapsed = run(statement)
            if index >= 0:
                times[statement].append(elapsed)

    for statement, seconds in times.items():
        lower, median, upper = statistics.quantiles(seconds, n=4)
        print(f'python -c "{statement}"'.ljust(32) + f"{median:6.2f} s   quartiles {lower:.2f} to {upper:.2f} s")
    ratio = statistics.median(times[OURS]) / statistics.median(times[TORCH])
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {options.rounds} interleaved rounds")
    return conclude(
        [(ratio <= LIMIT, f"import dwiml_func takes {ratio:.2f} times import torch, at most {LIMIT} required")]
    )


def run(statement: str) -> float:
    """Seconds that a new interpreter takes to start, to run a statement and to end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
