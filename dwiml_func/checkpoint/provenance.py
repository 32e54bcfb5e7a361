"""What computes: the versions, the source and the processor on which bitwise identical results depend."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dwiml_func.checkpoint.digest import state_leaves
from dwiml_func.core.state import TrainState

__all__ = ["environment", "environment_differences", "environment_of"]


_PACKAGE = Path(__file__).parent.parent
_LATER = {"source", "git", "packages"}
"""What earlier versions did not record."""


def environment(devices: Iterable[str] = ("cpu",)) -> dict[str, Any]:
    """Describe what computes at this moment.

    Args:
        devices: the devices of the run's tensors.

    Returns:
        JSON data: versions, processor, number of threads, devices; SHA-256 of this package's source and of the lists
        of files that torch and numpy installed; in a git checkout the commit, and "changed" where files differ.

    Example:
        >>> sorted(environment())[:4]
        ['cpu', 'cpu_capability', 'devices', 'dwiml_func']
    """
    from dwiml_func import __version__

    return {
        "dwiml_func": __version__,
        "source": _source_digest(),
        **({"git": commit} if (commit := _git_commit()) else {}),
        "packages": {name: found for name in ("torch", "numpy") if (found := _record_digest(name))},
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


def environment_of(state: TrainState) -> dict[str, Any]:
    """`environment` on the devices of a state's tensors."""
    return environment({str(leaf.device) for leaf in state_leaves(state).values()})


def environment_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments.

    Args:
        recorded: the first.
        now: the second.

    Returns:
        A text for each difference, with both values, sorted by name. What an earlier version did not record is left
        out.

    Example:
        >>> environment_differences({"torch": "2.12.0"}, {"torch": "2.13.0"})
        ["torch: '2.12.0', now '2.13.0'"]
    """
    names = sorted(recorded.keys() | (now.keys() - _LATER))
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


@functools.cache
def _source_digest() -> str:
    """SHA-256 of the names and the bytes of this package's modules."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(
            f"{path.relative_to(_PACKAGE).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


@functools.cache
def _git_commit() -> str | None:
    """The commit that this package was checked out from, and whether it was changed since; None without git."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    commands = (("rev-parse", "HEAD"), ("status", "--porcelain", "--", _PACKAGE.name))
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(_PACKAGE.parent), *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} changed" if changed else commit


@functools.cache
def _record_digest(name: str) -> str | None:
    """SHA-256 of the list of files, with their hashes, that a package has installed."""
    try:
        record = distribution(name).read_text("RECORD")
    except PackageNotFoundError:
        return None
    return hashlib.sha256(record.encode()).hexdigest() if record else None
