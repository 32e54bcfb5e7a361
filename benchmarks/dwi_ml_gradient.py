"""Why dwi_ml's Learn2Track trains with wrong gradients: it indexes a tensor with a NumPy array, then changes the array.

`tensor[array]` reads the array where it lies, and autograd keeps it for the backward pass. dwi_ml
(`learn2track_model.py`, `faster_unpack_sequence`, at a1ee02d) takes one streamline after another out of a packed
sequence with one array that it counts up in place. So in the backward pass each streamline's gradient goes to where the
array stands at the end: to the last streamline that is long enough. What comes out forwards is right.

`--source FILE` takes that function out of a clone of dwi_ml and measures it too.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from verdicts import conclude

LENGTHS = (40, 30, 20, 10)
Unpack = Callable[[PackedSequence], list[Tensor]]


def main() -> int:
    """Print the gradients beside those of torch's own function. Exit code 1 unless the fault is seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="dwi_ml's learn2track_model.py, in a clone")
    options = parser.parse_args()
    ways: dict[str, Unpack] = {"an array that is copied": copied, "an array that is changed": changed}
    if options.source is not None:
        ways["dwi_ml's function"] = from_source(options.source)
    right_lines, right = gradients(unpack_sequence)
    verdicts = []
    for name, unpack in ways.items():
        lines, gradient = gradients(unpack)
        same = all(torch.equal(line, other) for line, other in zip(lines, right_lines, strict=True))
        cosine = float(torch.cosine_similarity(gradient.flatten(), right.flatten(), dim=0))
        rows = int((gradient - right).abs().amax(dim=1).gt(0).sum())
        print(f"{name}: lines {'equal' if same else 'differ'}, {rows} of {len(right)} rows of the gradient differ")
        wrong = name != "an array that is copied"
        verdicts.append((same and (rows > 0) == wrong, f"{name}: cosine with the right gradient {cosine:.3f}"))
    return conclude(verdicts)


def gradients(unpack: Unpack) -> tuple[list[Tensor], Tensor]:
    """The lines that come out, and the gradient of a weighted sum of them with respect to the packed rows."""
    generator = torch.Generator().manual_seed(0)
    packed = pack_sequence([torch.randn(length, 3, generator=generator) for length in LENGTHS])
    data = packed.data.clone().requires_grad_()
    lines = unpack(PackedSequence(data, packed.batch_sizes))
    weights = [torch.randn(length, 3, generator=generator) for length in LENGTHS]
    loss = torch.stack([(line * weight).sum() for line, weight in zip(lines, weights, strict=True)]).sum()
    (gradient,) = torch.autograd.grad(loss, data)
    return [line.detach() for line in lines], gradient


def changed(packed: PackedSequence) -> list[Tensor]:
    """Each line by one array, which is counted up between them."""
    rows = np.concatenate([[0], np.cumsum(packed.batch_sizes.numpy())[:-1]]) - 1
    lines = []
    for length in LENGTHS:
        rows = rows[:length]  # a view: the same memory
        rows += 1
        lines.append(packed.data[rows])
    return lines


def copied(packed: PackedSequence) -> list[Tensor]:
    """The same, with an array of its own for each line."""
    rows = np.concatenate([[0], np.cumsum(packed.batch_sizes.numpy())[:-1]])
    return [packed.data[rows[:length] + number] for number, length in enumerate(LENGTHS)]


def from_source(path: Path) -> Unpack:
    """dwi_ml's function, which needs nothing else of its module."""
    name = "faster_unpack_sequence"
    found = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name]
    if not found:
        sys.exit(f"{path}: Expected a function {name}. Received: none. Give learn2track_model.py of a clone of dwi_ml.")
    space: dict[str, Any] = {"np": np, "PackedSequence": PackedSequence}
    exec(compile(ast.Module(body=[found[0]], type_ignores=[]), str(path), "exec"), space)
    return space[name]


if __name__ == "__main__":
    sys.exit(main())
