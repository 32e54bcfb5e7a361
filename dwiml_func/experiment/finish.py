"""The end of a run: the evaluation of its best model and its figures, made by the training or at any time after it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.evaluation import Evaluation, evaluate_best_model, is_evaluated, write_evaluation
from dwiml_func.experiment.figures.autoencoder import save_autoencoder_figures
from dwiml_func.experiment.figures.plots import run_figure_path, save_run_figure
from dwiml_func.experiment.figures.tracking import save_tracking_figures, tracking_figures
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.model_store import load_model
from dwiml_func.experiment.reconstruction import Reconstruction, evaluate_reconstruction
from dwiml_func.experiment.setup import RunParts
from dwiml_func.experiment.tracking.evaluation import TrackingEvaluation, evaluate_tracking, write_tracking_evaluation
from dwiml_func.experiment.tracking.recorded import tracked_lines_path, write_tracked_lines
from dwiml_func.models.autoencoder.autoencoder import Autoencoder

__all__ = ["Finished", "finish_run", "is_whole"]


class Finished(NamedTuple):
    """How good the best model is: its directions, or of an autoencoder its reconstructions.

    `tracking` is None where the data do not say of which bundle streamlines are.
    """

    evaluation: Evaluation | Reconstruction
    tracking: TrackingEvaluation | None


def finish_run(directory: Path, parts: RunParts, history: Sequence[EpochReport]) -> Finished:
    """Evaluate the best model of these epochs, and write the results and the figures into the experiment.

    The old figures go first, so that `is_whole` finds out where a kill came in between. What cannot be written is only
    a warning. Runs with `skip_figures` have none.
    """
    module, last = load_model(directory / "best_model").module, history[-1]
    facts: dict[str, Any] = {"epoch": last.best.epoch or 0, "subset": parts.data.evaluation.subset}
    facts["num_epochs"] = last.epoch
    tracking = None
    if isinstance(module, Autoencoder):
        evaluation = evaluate_reconstruction(module, parts)
    else:
        evaluation = evaluate_best_model(module, parts)
        tracking = evaluate_tracking(module, parts.data.evaluation, parts.config)
    try:
        for figure in (run_figure_path(directory), tracked_lines_path(directory), *tracking_figures(directory)):
            figure.unlink(missing_ok=True)
        if tracking is not None:
            write_tracking_evaluation(directory, tracking, epoch=facts["epoch"])
            if tracking.lines is not None:
                write_tracked_lines(directory, tracking.lines, epoch=facts["epoch"])
        write_evaluation(directory, evaluation, **facts)
    except OSError as error:
        logging.getLogger(__name__).warning("The evaluation was not written: %s", error)
    if not parts.config.logging.skip_figures:
        if isinstance(module, Autoencoder):
            save_autoencoder_figures(directory, module, parts)
        if tracking is not None:
            save_tracking_figures(directory, tracking, epoch=facts["epoch"])
        save_run_figure(directory)
    return Finished(evaluation, tracking)


def is_whole(directory: Path) -> bool:
    """Whether an experiment has the evaluation and the figures of the epochs that its newest checkpoint records."""
    checkpoint = newest(directory)
    history = checkpoint.history if checkpoint else ()
    has_best = bool(history) and history[-1].best.epoch is not None
    if not has_best:
        return True
    wanted = not read_config(directory).logging.skip_figures
    figures = (run_figure_path(directory), *tracking_figures(directory)) if wanted else ()
    return all(figure.is_file() for figure in figures) and is_evaluated(directory, history)
