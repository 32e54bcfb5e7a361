"""`dwiml-func import-dwi-ml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from dwiml_func.cli._output import new_folder
from dwiml_func.cli._parsing import CommandOptions
from dwiml_func.core.state import init_state
from dwiml_func.dwi_ml.models import read_dwi_ml_model
from dwiml_func.experiment.model_store import save_model
from dwiml_func.optim.optimizers import sgd

__all__ = ["Options", "run"]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Make a model directory from a model that dwi_ml trained: Learn2Track, a transformer or an autoencoder. The model
    interpolates as dwi_ml does (trilinear-corner), so its losses are dwi_ml's.

    Example: dwiml-func import-dwi-ml dwi_ml_experiment/best_model imported
    """

    best_model_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BEST_MODEL_DIR")]
    """dwi_ml's folder best_model, with parameters.json and model_state.pkl."""
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")]
    """The new folder; missing folders above it are made."""


def run(options: Options) -> int:
    """Write the model directory."""
    with new_folder(options.out_dir) as out_dir:
        imported = read_dwi_ml_model(options.best_model_dir)
        state = init_state(imported.module, sgd(), seed=0)
        facts = {"epoch": None, "dwi_ml_parameters": dict(imported.parameters)}
        save_model(out_dir, state, imported.config, nb_features=imported.module.nb_features, facts=facts)
    model = imported.config.model
    num_parameters = sum(parameter.numel() for parameter in imported.module.parameters())
    kind = model.model if model.model == "autoencoder" else model.dg_key
    print(f"{out_dir}: {kind}{' with EOS' if model.add_eos else ''}, {num_parameters} parameters")
    return 0
