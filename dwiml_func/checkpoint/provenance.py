"""What computes: the versions and the processor on which bitwise identical results depend."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["environment", "environment_differences"]


def environment(devices: Iterable[str] = ("cpu",)) -> dict[str, Any]:
    """Describe what computes at this moment.

    Args:
        devices: the devices of the run's tensors.

    Returns:
        JSON data: versions, processor, number of threads, devices.

    Example:
        >>> sorted(environment())[:4]
        ['cpu', 'cpu_capability', 'devices', 'dwiml_func']
    """
    from dwiml_func import __version__

    return {
        "dwiml_func": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "orbax-checkpoint": version("orbax-checkpoint"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "devices": sorted(set(devices)),
    }


def environment_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments.

    Args:
        recorded: the first.
        now: the second.

    Returns:
        A text for each difference, with both values, sorted by name.

    Example:
        >>> environment_differences({"torch": "2.12.0"}, {"torch": "2.13.0"})
        ["torch: '2.12.0', now '2.13.0'"]
    """
    names = sorted(recorded.keys() | now.keys())
    return [
        f"{name}: {recorded.get(name)!r}, now {now.get(name)!r}"
        for name in names
        if recorded.get(name) != now.get(name)
    ]


@functools.cache
def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor()
