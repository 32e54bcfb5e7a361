"""Functional, JAX-style training of tractography models in PyTorch.

A run is an immutable value, the `TrainState`; pure functions map a state and a batch to the next state. The names below
are the trainer core. Data, models and commands live in `dwiml_func.data`, `dwiml_func.models` and `dwiml_func.cli`.
"""

from dwiml_func import optim
from dwiml_func.core.early_stopping import Best, should_stop, update_best
from dwiml_func.core.gradients import clip_by_global_norm, value_and_grad
from dwiml_func.core.loop import EpochReport, epoch_fn, eval_epoch_fn, train_and_validate
from dwiml_func.core.loss import LossFn, LossOut, module_loss
from dwiml_func.core.metrics import Metrics, Sum, read_means
from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng, torch_rng
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import NonFiniteError, eval_step, train_step
from dwiml_func.optim.optimizers import Optimizer, adam, adamw, radam, sgd

__version__ = "0.1.0"

__all__ = [
    "Best",
    "EpochReport",
    "Key",
    "LossFn",
    "LossOut",
    "Metrics",
    "NonFiniteError",
    "Optimizer",
    "Stream",
    "Sum",
    "TrainState",
    "adam",
    "adamw",
    "clip_by_global_norm",
    "epoch_fn",
    "eval_epoch_fn",
    "eval_step",
    "fold_in",
    "init_state",
    "module_loss",
    "numpy_rng",
    "optim",
    "radam",
    "read_means",
    "sgd",
    "should_stop",
    "torch_rng",
    "train_and_validate",
    "train_step",
    "update_best",
    "value_and_grad",
]
