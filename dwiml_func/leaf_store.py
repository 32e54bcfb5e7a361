"""Tensors on disk: a directory with the arrays (by orbax) and a `manifest.json` that says what they must be.

The only module that imports orbax, which brings jax and is imported when first used. Orbax restores other shapes and
dtypes than asked for without a word, does not notice a flipped byte in an array, and about a damaged file prints
tracebacks from its threads. So the manifest holds a SHA-256 of every file, checked before orbax sees them, a table of
names, shapes, dtypes and SHA-256 digests, checked on what orbax gives, and a SHA-256 of the manifest itself.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from dwiml_func.atomic import atomic_directory
from dwiml_func.digest import combine_digests, leaf_digest, tensor_bytes

__all__ = ["SnapshotError", "load_leaves", "read_manifest", "save_leaves"]

FORMAT = 1
"""Version of the layout; readers refuse a later one."""


class SnapshotError(ValueError):
    """A snapshot that is damaged, or does not fit the state it is restored into.

    Example:
        >>> raise SnapshotError("params/weight is damaged")
        Traceback (most recent call last):
        ...
        dwiml_func.leaf_store.SnapshotError: params/weight is damaged
    """


def save_leaves(
    path: Path,
    leaves: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    numbers: Mapping[str, Any] | None = None,
    manifest_name: str = "manifest.json",
) -> None:
    """Write tensors and facts as one directory: `leaves/` by orbax, and `manifest.json` with a table of the leaves.

    Args:
        path: the directory; it appears by one rename, and replaces one that stands there.
        leaves: tensors by name.
        facts: JSON data for the manifest.
        numbers: what enters the digest besides the leaves.
        manifest_name: the manifest's file name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save_leaves(Path(parent) / "a", {"x/y.z": torch.ones(2)}, {})
        ...     load_leaves(Path(parent) / "a")
        {'x/y.z': tensor([1., 1.])}
    """
    import orbax.checkpoint as ocp

    table = [
        {"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": leaf_digest(leaf)}
        for name, leaf in leaves.items()
    ]
    manifest = {
        "format": FORMAT,
        "digest": combine_digests({row["name"]: row["sha256"] for row in table}, dict(numbers or {})),
        **facts,
        "environment": _environment(ocp.__version__, leaves),
        "leaves": table,
    }
    arrays = {_escape(name): tensor_bytes(leaf) for name, leaf in leaves.items() if leaf.numel()}
    with atomic_directory(path) as temporary:
        if arrays:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save((temporary / "leaves").absolute(), args=ocp.args.PyTreeSave(arrays))
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest["files"] = {file.relative_to(temporary).as_posix(): _file_digest(file) for file in files}
        manifest = json.loads(json.dumps(manifest))  # as it will be read, for the checksum
        content = json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1)
        (temporary / manifest_name).write_text(content)


def load_leaves(path: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read the tensors that `save_leaves` wrote and check each against its digest.

    Args:
        path: the directory.
        manifest: its manifest, if already read.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        SnapshotError: something is missing or damaged.

    Example:
        >>> load_leaves(Path("/no/such/snapshot"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: No manifest.json in /no/such/snapshot.
    """
    manifest = read_manifest(path) if manifest is None else manifest
    table = manifest["leaves"]
    for name, digest in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise SnapshotError(f"{path} is damaged: it has no file {name}.")
        if _file_digest(file) != digest:
            raise SnapshotError(f"{path} is damaged: {name} does not have the bytes that were written.")
    import orbax.checkpoint as ocp

    stored = {_escape(row["name"]): ocp.RestoreArgs(restore_type=np.ndarray) for row in table if 0 not in row["shape"]}
    arrays: Mapping[str, np.ndarray] = {}
    if stored:
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                args = ocp.args.PyTreeRestore(item=dict.fromkeys(stored, 0), restore_args=stored)
                arrays = checkpointer.restore((path / "leaves").absolute(), args=args)
        except Exception as error:  # orbax and tensorstore raise many kinds, with long texts
            raise SnapshotError(f"{path} cannot be read by orbax-checkpoint {ocp.__version__}: {error}") from error
    leaves = {}
    for row in table:
        dtype = getattr(torch, row["dtype"].removeprefix("torch."))
        if 0 in row["shape"]:
            leaf = torch.zeros(row["shape"], dtype=dtype)
        else:
            array = np.array(arrays[_escape(row["name"])])  # a copy: the memory is tensorstore's
            leaf = torch.from_numpy(array).view(dtype).reshape(row["shape"])
        if leaf_digest(leaf) != row["sha256"]:
            raise SnapshotError(f"{path} is damaged: {row['name']} does not have the bytes that were saved.")
        leaves[row["name"]] = leaf
    return leaves


def read_manifest(path: Path, manifest_name: str = "manifest.json") -> dict[str, Any]:
    """Read a manifest, without the tensors and without orbax.

    Args:
        path: the directory.
        manifest_name: the manifest's file name.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: there is none.
        SnapshotError: it is no manifest, or was written by a later version.

    Example:
        >>> read_manifest(Path("/no/such/snapshot"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: No manifest.json in /no/such/snapshot.
    """
    try:
        manifest = json.loads((path / manifest_name).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"No {manifest_name} in {path}.") from None
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path} is damaged: {manifest_name} is no JSON ({error}).") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise SnapshotError(f"{path} is damaged: {manifest_name} lacks what a manifest holds.")
    if manifest["format"] != FORMAT:
        raise SnapshotError(f"{path} has format {manifest['format']!r}; this version reads format {FORMAT}.")
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise SnapshotError(f"{path} is damaged: {manifest_name} does not hold what was written.")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _escape(name: str) -> str:
    """Orbax takes dots and slashes in a name for structure, and lets names that differ only in them collide."""
    return quote(name, safe="").replace(".", "%2E")


def _environment(orbax_version: str, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    from dwiml_func import __version__

    return {
        "dwiml_func": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "orbax-checkpoint": orbax_version,
        "python": platform.python_version(),
        "devices": sorted({str(leaf.device) for leaf in leaves.values()}),
        "num_threads": torch.get_num_threads(),
    }
