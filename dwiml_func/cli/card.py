"""`dwiml-func card`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.experiment.card import model_card

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Print a model card of an experiment, in Markdown: the model, its input and data with their hash, the recipe, the
    scores, and what computed it.

    Example: dwiml-func card experiments/first_run
    """

    experiment_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT_DIR")]
    """The experiment's folder."""


def run(options: Options) -> int:
    """Print the card."""
    print(model_card(options.experiment_dir))
    return 0
