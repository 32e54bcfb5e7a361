"""Checkpoints of a run on disk: each appears by one rename, and digests prove its content."""

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest, read, restore, restore_or, save
from dwiml_func.checkpoint.digest import state_digest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import CheckpointError, CorruptError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CorruptError",
    "list_checkpoints",
    "newest",
    "read",
    "restore",
    "restore_or",
    "save",
    "state_digest",
]
