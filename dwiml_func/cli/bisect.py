"""`dwiml-func bisect`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func._checks import at_most_three
from dwiml_func.checkpoint.retention import kept_checkpoints
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.audit.bisect import Bisection, bisect_record, bisect_runs
from dwiml_func.experiment.audit.lockstep import Difference

__all__ = ["Options", "format_bisection", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Find the first epoch, batch, tensor and operation in which two experiments differ: what they recorded tells
    between which checkpoints, and both are trained again from there. With one experiment: find the first epoch in
    which this machine computes something else than was recorded. The exit code is 0 when nothing differs, 1 when
    something does. Nothing is written.

    Example: dwiml-func bisect experiments/first_run experiments/second_run
    """

    dir_a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR_A")]
    """An experiment's folder."""
    dir_b: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR_B]")] = None
    """The other experiment's folder. None: compare the first one with what it recorded."""


def run(options: Options) -> int:
    """Print where the runs first differ. Returns 1 where they do."""
    with ExitStack() as stack:
        for directory in filter(None, (options.dir_a, options.dir_b)):
            stack.enter_context(kept_checkpoints(directory))
        if options.dir_b is None:
            problems, num_epochs = bisect_record(options.dir_a)
            equal = f"{options.dir_a}: this machine computes what was recorded, in all {num_epochs} epochs"
            print("\n".join(problems) or equal)
            return 1 if problems else 0
        bisection = bisect_runs(options.dir_a, options.dir_b)
    print(f"A: {options.dir_a}\nB: {options.dir_b}\n{format_bisection(bisection)}")
    return 0 if bisection.different is None else 1


def format_bisection(found: Bisection) -> str:
    """A bisection as lines of text."""
    equal = "agree nowhere" if found.equal is None else f"agree {_after(found.equal)}"
    if found.different is None:
        return f"The recorded states {equal} and differ nowhere."
    lines = [f"The recorded states {equal} and differ {_after(found.different)}."]
    start = "the first states" if found.start is None else f"checkpoint {found.start}"
    if found.found is not None:
        lines.append(f"Trained again from {start}, the runs first differ in {_where(found.found)}:")
        lines += [f"  {text}" for text in found.found.lines]
        if found.found.leaves:
            lines.append(f"  tensors that differ after it: {at_most_three(found.found.leaves, ', ')}")
    else:
        lines.append(f"Trained again from {start}, the runs do not differ on this machine.")
        lines += [f"  This machine computes something else than {label} recorded." for label in found.unlike]
    return "\n".join([*lines, *found.lines])


def _after(position: tuple[int, int]) -> str:
    epoch, batch = position
    return f"after batch {batch} of epoch {epoch + 1}" if batch else f"after epoch {epoch}"


def _where(found: Difference) -> str:
    if found.batch is not None:
        return f"epoch {found.epoch}, batch {found.batch}"
    return f"epoch {found.epoch}, after its batches" if found.epoch else "the first state"
