"""Optimizers as pairs of pure functions, transformations of gradients, and schedules of the learning rate.

To add an optimizer, write its formula as `lion` does; `dwiml_func.experiment.optimizers` names it for `--optimizer`.
"""

from dwiml_func.optim.averaging import ema, lookahead
from dwiml_func.optim.by_name import by_name
from dwiml_func.optim.chain import chain
from dwiml_func.optim.gates import accumulate, skip_not_finite, skipped_too_often
from dwiml_func.optim.muon import muon
from dwiml_func.optim.optimizers import adam, adamw, lion, nadam, radam, rmsprop, sgd
from dwiml_func.optim.schedule_free import schedule_free_adamw, schedule_free_sgd
from dwiml_func.optim.schedules import (
    constant,
    cosine,
    one_cycle,
    per_epoch,
    per_step,
    reduce_on_plateau,
    warm_up,
    warmup_stable_decay,
)
from dwiml_func.optim.transformations import add_decayed_weights, clip_by_global_norm, clip_by_value, clip_grad_norm
from dwiml_func.types import Gate, Optimizer, Schedule, Transform

__all__ = [
    "Gate",
    "Optimizer",
    "Schedule",
    "Transform",
    "accumulate",
    "adam",
    "adamw",
    "add_decayed_weights",
    "by_name",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "clip_grad_norm",
    "constant",
    "cosine",
    "ema",
    "lion",
    "lookahead",
    "muon",
    "nadam",
    "one_cycle",
    "per_epoch",
    "per_step",
    "radam",
    "reduce_on_plateau",
    "rmsprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "skip_not_finite",
    "skipped_too_often",
    "warm_up",
    "warmup_stable_decay",
]
