"""Tensors on disk: a directory with the arrays (by orbax) and a `manifest.json` that says what they must be.

The only module that imports orbax, which brings jax and is imported when first used. Orbax restores other shapes and
dtypes than asked for without a word, does not notice a flipped byte in an array, and about a corrupt file or a full
disk prints tracebacks from its threads. So the disk's space is taken before orbax writes; and the manifest holds a
SHA-256 of every file, checked before orbax sees them, and a table of names, shapes, dtypes and SHA-256 digests, checked
on what orbax gives.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from dwiml_func.checkpoint.digest import combine_digests, leaf_digest, tensor_bytes
from dwiml_func.checkpoint.manifest import FORMAT, CheckpointError, CorruptError, manifest_text, read_manifest
from dwiml_func.checkpoint.provenance import environment
from dwiml_func.files.atomic import atomic_directory

__all__ = ["CheckpointError", "CorruptError", "load_leaves", "read_manifest", "save_leaves"]


def save_leaves(
    path: Path,
    leaves: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    numbers: Mapping[str, Any] | None = None,
    leaf_digests: Mapping[str, str] | None = None,
    manifest_name: str = "manifest.json",
) -> None:
    """Write tensors and facts as one directory: `leaves/` by orbax, and `manifest.json` with a table of the leaves.

    It may run in any thread, and seldom keeps the others from running. The tensors must not change meanwhile.

    Args:
        path: the directory; it appears in one step, after its bytes are on the disk, and replaces what stands there.
        leaves: tensors by name.
        facts: JSON data for the manifest. An `environment` among them replaces that of this process.
        numbers: what enters the digest besides the leaves, as `dwiml_func.checkpoint.digest.state_numbers` gives it.
        leaf_digests: what `dwiml_func.checkpoint.digest.leaf_digest` gives for each leaf, if it is known.
        manifest_name: the manifest's file name.

    Raises:
        OSError: the disk is full, or cannot be written to; nothing is left of the attempt.
        TypeError, ValueError: the facts are no JSON, or cannot be in a manifest.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save_leaves(Path(parent) / "a", {"x/y.z": torch.ones(2)}, {})
        ...     load_leaves(Path(parent) / "a")
        {'x/y.z': tensor([1., 1.])}
    """
    digests = {name: leaf_digest(leaf) for name, leaf in leaves.items()} if leaf_digests is None else leaf_digests
    table = [
        {"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digests[name]}
        for name, leaf in leaves.items()
    ]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "digest": combine_digests({row["name"]: row["sha256"] for row in table}, dict(numbers or {})),
        "environment": environment({str(leaf.device) for leaf in leaves.values()}),
        **facts,
        **({} if numbers is None else {"numbers": numbers}),
        "leaves": table,
    }
    arrays = {_escape(name): tensor_bytes(leaf).view(_Lent) for name, leaf in leaves.items() if leaf.numel()}
    with atomic_directory(path) as temporary:
        _reserve(temporary, sum(array.nbytes for array in arrays.values()) + 2 * len(json.dumps(manifest)))
        if arrays:
            _write_arrays(temporary / "leaves", arrays)
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest["files"] = {file.relative_to(temporary).as_posix(): _file_digest(file) for file in files}
        (temporary / manifest_name).write_text(manifest_text(manifest))


def load_leaves(path: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read the tensors that `save_leaves` wrote and check each against its digest.

    Args:
        path: the directory.
        manifest: its manifest, if already read.

    Returns:
        Tensors by name, on the CPU. Their digests are those of the manifest's table.

    Raises:
        FileNotFoundError: there is no such directory.
        CorruptError: something is missing or corrupt.

    Example:
        >>> load_leaves(Path("/no/such/checkpoint"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: No manifest.json in /no/such/checkpoint.
    """
    manifest = read_manifest(path) if manifest is None else manifest
    table = manifest["leaves"]
    _check_files(path, manifest)
    arrays = _read_arrays(path, [row for row in table if 0 not in row["shape"]])
    leaves = {}
    for row in table:
        leaf = torch.empty(row["shape"], dtype=getattr(torch, row["dtype"].removeprefix("torch.")))
        if leaf.numel():
            tensor_bytes(leaf)[...] = arrays.pop(_escape(row["name"]))  # a copy: torch's own memory is aligned
        if leaf_digest(leaf) != row["sha256"]:
            raise CorruptError(f"{path} is corrupt: {row['name']} does not have the bytes that were saved.")
        leaves[row["name"]] = leaf
    return leaves


class _Lent(np.ndarray):
    """An array that orbax need not copy before it writes: nobody changes it meanwhile."""

    def __deepcopy__(self, memo: dict[int, Any] | None = None, /) -> _Lent:
        return self


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    try:  # what is written are floats that hardly compress: that took most of the time for a tenth of the bytes
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(dict(arrays)))
    except OSError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds, with long texts
        number = re.search(r"os_error_code='([0-9]+)'", str(error))
        text = f"orbax-checkpoint {ocp.__version__} cannot write: {_one_line(error)}"
        raise OSError(int(number[1]) if number else errno.EIO, text, str(path)) from error


def _read_arrays(path: Path, table: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of a table's rows by escaped name, with its shapes, and with its dtypes where numpy has them."""
    if not table:
        return {}
    import orbax.checkpoint as ocp

    expected = {_escape(row["name"]): (tuple(row["shape"]), _stored_dtype(row["dtype"])) for row in table}
    leaves = (path / "leaves").absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(leaves).item_metadata.tree
            stored = {name: (tuple(tree[name].shape), np.dtype(tree[name].dtype)) for name in expected}
            if stored == expected:
                args = ocp.args.PyTreeRestore(
                    item=dict.fromkeys(expected, 0),
                    restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in expected},
                )
                return dict(checkpointer.restore(leaves, args=args))
        name = next(row["name"] for row in table if stored[_escape(row["name"])] != expected[_escape(row["name"])])
        problem = f"{path} is corrupt: {name} does not have the bytes that were saved."
    except MemoryError:
        raise
    except Exception as error:
        problem = f"{path} cannot be read by orbax-checkpoint {ocp.__version__}: {_one_line(error)}"
    _collect_quietly()
    raise CorruptError(problem)


def _collect_quietly() -> None:
    """Orbax leaves tasks behind, whose errors asyncio logs when they happen to be collected: let it be now, unseen."""
    log = logging.getLogger("asyncio")
    was_disabled, log.disabled = log.disabled, True
    try:
        gc.collect()
    finally:
        log.disabled = was_disabled


def _check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Check the digest of every file, and that there are no more bytes than can be of use."""
    needed = sum(math.prod(row["shape"]) * _stored_dtype(row["dtype"]).itemsize for row in manifest["leaves"])
    found = 0
    for name, digest in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CorruptError(f"{path} is corrupt: it has no file {name}.")
        found += file.stat().st_size
        if found > 2 * needed + _SLACK or _file_digest(file) != digest:
            raise CorruptError(f"{path} is corrupt: {name} does not have the bytes that were written.")
    if needed > 1000 * found + _SLACK:  # compressed arrays of an earlier version were never that much smaller
        raise CorruptError(f"{path} is corrupt: its manifest tells of {needed} bytes, its files have {found}.")


_SLACK = 1 << 24


def _reserve(directory: Path, num_bytes: int) -> None:
    """Take the disk's space and give it back: a full disk is noticed here, in one clear error."""
    file = directory / "reserved"
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes + (num_bytes >> 6) + (1 << 17))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that cannot reserve
            raise
    finally:
        os.close(descriptor)
        file.unlink()


def _file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _stored_dtype(name: str) -> np.dtype:
    return tensor_bytes(torch.empty(0, dtype=getattr(torch, name.removeprefix("torch.")))).dtype


def _escape(name: str) -> str:
    """Orbax takes dots and slashes in a name for structure, and lets names that differ only in them collide."""
    return quote(name, safe="").replace(".", "%2E")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
