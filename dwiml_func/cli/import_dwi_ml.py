"""`dwiml-func import-dwi-ml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._output import new_folder
from dwiml_func.cli._parsing import parse
from dwiml_func.core.state import init_state
from dwiml_func.dwi_ml.models import read_dwi_ml_model
from dwiml_func.experiment.model_store import save_model
from dwiml_func.optim.optimizers import sgd

__all__ = ["ImportOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Make a model directory of a Learn2Track model that dwi_ml trained. It reads volumes as dwi_ml does
    (trilinear-corner), so that it gives dwi_ml's losses.

    Example: dwiml-func import-dwi-ml dwi_ml_experiment/best_model imported
    """

    best_model_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BEST_MODEL_DIR")]
    """dwi_ml's folder best_model, with parameters.json and model_state.pkl."""
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")]
    """The new folder; those above it are made too."""


def run(arguments: Sequence[str], program: str) -> int:
    """Run the command.

    Args:
        arguments: the command line.
        program: the program's name in messages.

    Returns:
        The exit code, 0.

    Raises:
        ValueError, OSError: there is no such model, it does not fit together, or the new folder cannot be made.

    Example:
        >>> run(["best_model", "imported"], "dwiml-func import-dwi-ml")  # doctest: +SKIP
    """
    options = parse(ImportOptions, arguments, program)
    with new_folder(options.out_dir) as out_dir:
        imported = read_dwi_ml_model(options.best_model_dir)
        state = init_state(imported.module, sgd(), seed=0)
        facts = {"epoch": None, "dwi_ml_parameters": dict(imported.parameters)}
        save_model(out_dir, state, imported.config, nb_features=imported.module.nb_features, facts=facts)
    model = imported.config.model
    num_parameters = sum(parameter.numel() for parameter in imported.module.parameters())
    print(f"{out_dir}: {model.dg_key}{' with EOS' if model.add_eos else ''}, {num_parameters} parameters")
    return 0
