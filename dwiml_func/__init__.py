"""Functional, JAX-style training of tractography models in PyTorch.

A run is an immutable value, the `TrainState`; pure functions map a state and a batch to the next state. The names below
are all that a training loop in a script needs. Data, models, writers and commands live in `dwiml_func.data`,
`dwiml_func.models`, `dwiml_func.writers` and `dwiml_func.cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dwiml_func.core.checked_step import StepMismatchError, checked_step
from dwiml_func.core.early_stopping import Best, should_stop, update_best
from dwiml_func.core.epoch import end_epoch, epoch_fn, eval_epoch_fn, train_steps
from dwiml_func.core.gradients import value_and_grad
from dwiml_func.core.loop import train_and_validate
from dwiml_func.core.loss import LossFn, LossOut, module_loss
from dwiml_func.core.memory import keep_freed_memory
from dwiml_func.core.metrics import read_means
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.rates import with_weight_decay
from dwiml_func.core.report import EpochReport
from dwiml_func.core.rng import Key, Stream, fold_in, numpy_rng, torch_rng
from dwiml_func.core.run_epoch import Interrupted, run_epoch
from dwiml_func.core.skip_batches import skip_batches
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.core.weights import load_into
from dwiml_func.optim import (
    Optimizer,
    Schedule,
    Transform,
    accumulate,
    adam,
    adamw,
    add_decayed_weights,
    by_name,
    chain,
    clip_by_global_norm,
    clip_by_value,
    clip_grad_norm,
    constant,
    cosine,
    ema,
    lion,
    lookahead,
    muon,
    nadam,
    one_cycle,
    per_epoch,
    per_step,
    radam,
    reduce_on_plateau,
    rmsprop,
    schedule_free_adamw,
    schedule_free_sgd,
    sgd,
    skip_not_finite,
    skipped_too_often,
    warm_up,
    warmup_stable_decay,
)
from dwiml_func.types import Buffers, Metrics, OptState, Params, Sum

if TYPE_CHECKING:
    from dwiml_func.checkpoint import list_checkpoints, restore, restore_or, save
    from dwiml_func.compiled import jit_step
    from dwiml_func.data.dataloader import from_loader
    from dwiml_func.ensemble import (
        capture_ensemble_step,
        ensemble_step,
        member,
        stack_states,
        train_and_validate_ensemble,
    )
    from dwiml_func.experiment.audit.replay import verify
    from dwiml_func.experiment.pretrained import load_pretrained

__version__ = "0.1.0"

__all__ = [
    "Best",
    "Buffers",
    "EpochReport",
    "Interrupted",
    "Key",
    "LossFn",
    "LossOut",
    "Metrics",
    "NonFiniteError",
    "OptState",
    "Optimizer",
    "Params",
    "Schedule",
    "StepMismatchError",
    "Stream",
    "Sum",
    "TrainState",
    "Transform",
    "accumulate",
    "adam",
    "adamw",
    "add_decayed_weights",
    "by_name",
    "capture_ensemble_step",
    "chain",
    "checked_step",
    "clip_by_global_norm",
    "clip_by_value",
    "clip_grad_norm",
    "constant",
    "cosine",
    "ema",
    "end_epoch",
    "ensemble_step",
    "epoch_fn",
    "eval_epoch_fn",
    "eval_step",
    "fold_in",
    "from_loader",
    "init_state",
    "jit_step",
    "keep_freed_memory",
    "lion",
    "list_checkpoints",
    "load_into",
    "load_pretrained",
    "lookahead",
    "member",
    "module_loss",
    "muon",
    "nadam",
    "numpy_rng",
    "one_cycle",
    "per_epoch",
    "per_step",
    "radam",
    "read_means",
    "reduce_on_plateau",
    "restore",
    "restore_or",
    "rmsprop",
    "run_epoch",
    "save",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "should_stop",
    "skip_batches",
    "skip_not_finite",
    "skipped_too_often",
    "stack_states",
    "torch_rng",
    "train_and_validate",
    "train_and_validate_ensemble",
    "train_step",
    "train_steps",
    "update_best",
    "value_and_grad",
    "verify",
    "warm_up",
    "warmup_stable_decay",
    "with_weight_decay",
]

_MODULES = {  # loaded at the first use of a name: a loop that saves nothing does not wait for them
    **dict.fromkeys(("list_checkpoints", "restore", "restore_or", "save"), "checkpoint"),
    **dict.fromkeys(("capture_ensemble_step", "ensemble_step", "member", "stack_states"), "ensemble"),
    "train_and_validate_ensemble": "ensemble",
    "from_loader": "data.dataloader",
    "jit_step": "compiled",
    "load_pretrained": "experiment.pretrained",
    "verify": "experiment.audit.replay",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"dwiml_func.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
