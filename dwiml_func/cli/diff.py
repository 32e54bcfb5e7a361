"""`dwiml-func diff`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.comparison.compare import Comparison, compare_experiments

__all__ = ["Options", "format_comparison", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Print what differs between two experiments in config, environment and data, and the first epoch at which their
    states or metrics differ. The exit code is 0 when nothing differs, 1 when something does.

    Example: dwiml-func diff experiments/first_run experiments/second_run
    """

    dir_a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR_A")]
    """An experiment's folder."""
    dir_b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR_B")]
    """The other experiment's folder."""


def run(options: Options) -> int:
    """Print the differences. Returns 1 when there are any."""
    comparison = compare_experiments(options.dir_a, options.dir_b)
    print(f"A: {options.dir_a}\nB: {options.dir_b}\n{format_comparison(comparison)}")
    return 0 if comparison.is_equal else 1


def format_comparison(comparison: Comparison) -> str:
    """A comparison as lines of text."""
    lines = []
    for name in ("config", "environment", "data"):
        found = getattr(comparison, name)
        lines.append(f"{name}: {'not known' if found is None else 'differs' if found else 'equal'}")
        lines += [f"  {text}" for text in found or ()]
    in_a, in_b = comparison.num_epochs
    lines.append(f"epochs: {in_a}" if in_a == in_b else f"epochs: {in_a} in A, {in_b} in B")
    num_common = min(in_a, in_b)
    if comparison.first_state is not None:
        lines.append(f"states: first differ after epoch {comparison.first_state}")
    else:
        lines.append(_equal("states", "after", comparison.num_digests))
    if comparison.first_metrics is not None:
        lines.append(f"metrics: first differ in epoch {comparison.first_metrics}")
        lines += [f"  {text}" for text in comparison.metrics]
    else:
        lines.append(_equal("metrics", "in", num_common))
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join(lines)


def _equal(what: str, where: str, num_epochs: int) -> str:
    if num_epochs == 0:
        return f"{what}: none to compare"
    epochs = "the one common epoch" if num_epochs == 1 else f"all {num_epochs} common epochs"
    return f"{what}: equal {where} {epochs}"
