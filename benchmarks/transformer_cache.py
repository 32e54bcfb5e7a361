"""Tracking with a transformer: keys and values kept, beside running the whole sequences at each step.

Then lines that turn: all of their points read at once, a line at a time, beside a point of all lines a step.

Only the model is timed: 200 lines of 100 steps on random inputs, the same for both.
"""

from __future__ import annotations

import argparse
import sys

import torch
from timing import interleaved, medians_of
from torch import Tensor
from verdicts import conclude

from dwiml_func.data import StreamlineBatch
from dwiml_func.models import Transformer
from dwiml_func.models.transformers.cache import CacheState

FEATURES, SIZE, HEADS = 45, 128, 8
CACHED, WHOLE, LIMIT = "keys and values kept", "whole sequences", 15.0
AT_ONCE, AT_ONCE_LIMIT = "points at once", 1.5


def main() -> int:
    """Print the times and whether the limit holds. Exit code 1 when it does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--lines", type=int, default=200, help="lines tracked at once (default: 200)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each line (default: 100)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the encoder (default: 2)")
    parser.add_argument(
        "--model", choices=["tts", "ttst", "tto"], default="tts", help="which transformer (default: tts)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="rounds of each variant (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    model = Transformer(
        FEATURES, model=options.model, input_embedded_size=SIZE, nheads=HEADS, n_layers_e=options.layers
    ).eval()
    dirs = torch.zeros(options.lines, 3 * model.nb_previous_dirs)
    inputs = torch.randn(options.lines, options.steps, FEATURES)
    results: dict[str, Tensor] = {}
    states: list[CacheState] = []

    def cached() -> None:
        state: CacheState | None = None
        outputs = []
        for step in range(options.steps):
            output, state = model.run_step_in_place(inputs[:, step], dirs, state)
            outputs.append(output)
        results[CACHED] = torch.stack(outputs, dim=1)
        assert state is not None
        states.append(state)

    def whole() -> None:
        outputs = [model(batch_of(inputs[:, : step + 1]))[step :: step + 1] for step in range(options.steps)]
        results[WHOLE] = torch.stack(outputs, dim=1)

    def at_once() -> None:
        state = states[-1]
        for line in range(options.lines):
            state = model.prefill(inputs[line], dirs[:1].expand(options.steps, -1), state, line)

    with torch.inference_mode():
        medians = medians_of(interleaved({CACHED: cached, WHOLE: whole, AT_ONCE: at_once}, options.rounds, warm_up=0))
    torch.testing.assert_close(results[CACHED], results[WHOLE], atol=1e-5, rtol=1e-4)
    what = f"{options.model}, {options.lines} lines, {options.steps} steps, {options.layers} layers"
    print(f"{what}, {options.threads} threads")
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items()))
    ratio = medians[WHOLE] / medians[CACHED]
    again = medians[CACHED] / medians[AT_ONCE]
    return conclude(
        [
            (ratio >= LIMIT, f"{ratio:.1f} times faster, at least {LIMIT:g} required"),
            (again >= AT_ONCE_LIMIT, f"read again {again:.1f} times faster, at least {AT_ONCE_LIMIT:g} required"),
        ]
    )


def batch_of(inputs: Tensor) -> StreamlineBatch:
    """Lines with inputs (S, L, F) at all points but the last of each."""
    num, length, _ = inputs.shape
    zeros = torch.zeros(num, dtype=torch.int64)
    return StreamlineBatch(
        points=torch.zeros(num * (length + 1), 3),
        offsets=torch.arange(num + 1) * (length + 1),
        subject=zeros,
        ids=zeros,
        inputs=inputs.flatten(0, 1),
    )


if __name__ == "__main__":
    sys.exit(main())
