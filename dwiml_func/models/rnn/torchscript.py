"""Loops of many short operations without Python between them, by TorchScript.

Python takes and gives back its lock around each operation of torch. A time step has a dozen operations of some
microseconds, so two threads in two such loops spend most of their time waiting for each other. TorchScript's
interpreter calls the same operations in the same order without the lock: results are bitwise identical, two threads run
at once, and one runs a little faster. torch calls TorchScript deprecated; where it is missing, and from Python 3.14
on, for which torch does not support it, the loops run in Python.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from threading import Lock
from typing import ParamSpec, TypeVar

import torch

__all__ = ["without_python"]

P = ParamSpec("P")
R = TypeVar("R")

_ONE_AT_A_TIME = Lock()


def without_python(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors, numbers and lists of such, run by TorchScript as it stands, without its optimizations."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ONE_AT_A_TIME:
            scripted = _scripted(function)
        with torch.jit.optimized_execution(False):
            return scripted(*args, **kwargs)

    return run


@cache
def _scripted(function: Callable[P, R]) -> Callable[P, R]:
    if sys.version_info >= (3, 14):  # "not supported and may break", says torch
        return function
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        try:
            return torch.jit.script(function)
        except (AttributeError, OSError, RuntimeError):
            return function
