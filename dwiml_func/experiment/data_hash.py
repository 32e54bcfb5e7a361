"""The hash of a run's data, taken in the background and compared with what the newest checkpoint recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.manifest import CheckpointError
from dwiml_func.experiment.batches import RunData
from dwiml_func.files.fingerprint import FingerprintInBackground

__all__ = ["HASH_PATIENCE", "data_in_background"]

HASH_PATIENCE = 1.0
"""Seconds that a save waits for the dataset's SHA-256. The run's last save waits until it is there."""


def data_in_background(directory: Path, data: RunData, hdf5_file: str) -> Callable[..., Mapping[str, Any]]:
    """Begin to hash the data. The result raises ValueError where the newest checkpoint recorded another hash."""
    try:
        checkpoint = newest(directory)
    except CheckpointError:
        checkpoint = None
    recorded = None if checkpoint is None else checkpoint.data
    return FingerprintInBackground(hdf5_file, data.linked, recorded=recorded, read=data.read).result
