"""The summary at the end of a training: the best epoch, and how its model compares with the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dwiml_func.cli.messages import say
from dwiml_func.evaluation import Evaluation, evaluate_directions
from dwiml_func.loop import EpochReport
from dwiml_func.models.model_directory import load_model
from dwiml_func.wiring import Setup

__all__ = ["format_summary", "print_summary"]


def print_summary(directory: Path, setup: Setup, history: Sequence[EpochReport]) -> None:
    """Evaluate the best model on the validation subjects, or else the training ones, and print the summary.

    Args:
        directory: the experiment.
        setup: its parts.
        history: the reports of all epochs.

    Example:
        >>> print_summary(directory, setup, history)  # doctest: +SKIP
    """
    if history[-1].best.epoch is None:
        print("No epoch had a finite loss: there is no best model.")
        return
    dataset = setup.evaluation_set
    model = load_model(directory / "best_model").module  # on the CPU, wherever it was trained
    batches = (batch.to(torch.device("cpu")) for batch in setup.evaluation(setup.state.key, 0, 0))
    evaluation = evaluate_directions(
        model.directions, batches, dataset.input_attributes, num_features=dataset.num_features
    )
    say("")
    print(format_summary(history, evaluation, subset=dataset.subset))


def format_summary(history: Sequence[EpochReport], evaluation: Evaluation, *, subset: str) -> str:
    """The summary's text.

    Args:
        history: the reports of all epochs.
        evaluation: the best model's, on `subset`.
        subset: "validation" or "training".

    Returns:
        Lines of text.

    Example:
        >>> format_summary(history, evaluation, subset="validation")  # doctest: +SKIP
    """
    last, best = history[-1], history[(history[-1].best.epoch or 1) - 1]
    minutes = sum(report.train_minutes + report.valid_minutes for report in history)
    reason = {"patience": "stopped early", "max_epochs": "finished", None: "stopped"}[last.stop]
    lines = [
        f"{reason.capitalize()} after {last.epoch} epochs, {minutes:.1f} minutes.",
        f"Best epoch {best.epoch}: training loss {best.train['loss']:.4f}"
        + (f", validation loss {best.valid['loss']:.4f}" if best.valid else ""),
        f"Mean angular error of the best model on the {subset} subjects,",
        f"at the {evaluation.num_points} points of {evaluation.num_streamlines} streamlines that have a previous "
        "direction:",
        f"  model                {evaluation.model:6.2f} deg",
    ]
    for name, value in (
        ("principal direction", evaluation.principal_direction),
        ("keep going straight", evaluation.keep_straight),
    ):
        if value is None:
            lines.append(f"  {name}  not known: the input does not say that it holds spherical harmonics of a signal")
        else:
            gain = value - evaluation.model
            verdict = f"the model is {abs(gain):.2f} deg {'better' if gain > 0 else 'worse'}"
            lines.append(f"  {name}  {value:6.2f} deg  ({verdict})")
    return "\n".join(lines)
