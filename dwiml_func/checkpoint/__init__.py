"""Checkpoints: a run on disk, written by one rename and proved by digests."""

from dwiml_func.checkpoint.checkpoint import Checkpoint, restore, restore_newest, restore_or, save
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CheckpointError, CorruptError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CorruptError",
    "list_checkpoints",
    "restore",
    "restore_newest",
    "restore_or",
    "save",
    "state_digest",
]
