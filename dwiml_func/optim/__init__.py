"""Optimizers as pairs of pure functions, and schedules of the learning rate."""

from dwiml_func.optim.optimizers import Optimizer, adam, adamw, radam, sgd

__all__ = ["Optimizer", "adam", "adamw", "radam", "sgd"]
