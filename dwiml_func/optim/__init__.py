"""Optimizers as pairs of pure functions, and schedules of the learning rate."""

from dwiml_func.optim.optimizers import Optimizer, adam, adamw, radam, sgd
from dwiml_func.optim.schedules import Schedule, constant, cosine, per_epoch, warm_up

__all__ = ["Optimizer", "Schedule", "adam", "adamw", "constant", "cosine", "per_epoch", "radam", "sgd", "warm_up"]
