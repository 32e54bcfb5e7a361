"""Tensors on disk: a directory with the arrays, written by orbax, and the manifest that says what they must be.

The only module that imports orbax, which brings jax and is imported when first used. Orbax logs tracebacks about a
full disk, so the disk's space is reserved before it writes. What it wrote is read by the library below it, tensorstore:
in a tenth of the time, and without jax. Neither notices a flipped byte in an array, so what is read is checked against
the manifest's table of names, shapes, dtypes and SHA-256 digests.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from dwiml_func._checks import one_line
from dwiml_func.checkpoint.digest import combine_digests, leaf_digest, tensor_bytes
from dwiml_func.checkpoint.manifest import FORMAT, CorruptError, manifest_text, read_manifest
from dwiml_func.checkpoint.provenance import environment
from dwiml_func.files.atomic import atomic_directory

__all__ = ["load_leaves", "save_leaves"]

_MAX_ERROR = 300  # orbax and tensorstore write long ones
_SETTLE_SECONDS = 0.1
_METADATA = "_METADATA"  # orbax's own description of the arrays: other programs read it, and no leaf's digest covers it
_SPECIAL = re.compile(r"[*?\[\\\udc80-\udcff]")  # of patterns, of other systems' paths, and bytes that are no UTF-8
_MOST_COMPRESSED = 64  # times; present versions do not compress
_quiet_lock = threading.RLock()


def save_leaves(
    path: Path,
    leaves: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    numbers: Mapping[str, Any] | None = None,
    leaf_digests: Mapping[str, str] | None = None,
    manifest_name: str = "manifest.json",
) -> None:
    """Write tensors and facts as one directory: `leaves/` by orbax, and a manifest with a table of the leaves.

    Works in any thread; the tensors must not change meanwhile. On an error nothing is left of the attempt.

    Args:
        path: the directory; it appears in one step, after its bytes are on the disk, and replaces what stands there.
        leaves: tensors by name.
        facts: JSON data for the manifest. An `environment` among them replaces that of this process.
        numbers: what enters the digest besides the leaves, as `state_numbers` gives it.
        leaf_digests: the `leaf_digest` of each leaf, where known.
        manifest_name: the manifest's file name.
    """
    digests = {name: leaf_digest(leaf) for name, leaf in leaves.items()} if leaf_digests is None else leaf_digests
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "digest": combine_digests({name: digests[name] for name in leaves}, dict(numbers or {})),
        "environment": environment({str(leaf.device) for leaf in leaves.values()}),
        **facts,
        **({} if numbers is None else {"numbers": numbers}),
        "leaves": [
            {
                "name": name,
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "sha256": digests[name],
                **_layout(leaf),
            }
            for name, leaf in leaves.items()
        ],
    }
    arrays = {_escape(name): tensor_bytes(leaf).view(_Lent) for name, leaf in leaves.items() if leaf.numel()}
    with atomic_directory(path) as temporary:
        _reserve(temporary, sum(array.nbytes for array in arrays.values()) + len(manifest_text(manifest)))
        if arrays:
            _write_arrays(temporary / "leaves", arrays)
            manifest["leaves_metadata_sha256"] = _sha256(temporary / "leaves" / _METADATA)
        (temporary / manifest_name).write_text(manifest_text(manifest))


def load_leaves(path: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read the tensors that `save_leaves` wrote, on the CPU, in their memory format, each checked against its digest.

    `manifest` is that of `path`, if already read. FileNotFoundError if there is no such directory, CorruptError if
    something is missing or corrupt.
    """
    manifest = read_manifest(path) if manifest is None else manifest
    table, metadata = manifest["leaves"], manifest.get("leaves_metadata_sha256")
    arrays = _read_arrays(path, [row for row in table if 0 not in row["shape"]])
    if arrays and metadata is not None and _sha256(path / "leaves" / _METADATA) != metadata:
        raise CorruptError(f"{path} is corrupt: leaves/{_METADATA} does not have the bytes that were saved.")
    leaves = {}
    for row in table:
        order = row.get("dim_order") or list(range(len(row["shape"])))
        leaf = torch.empty_permuted(row["shape"], order, dtype=_dtype(row))
        if leaf.numel():  # a copy: torch's own memory is aligned
            tensor_bytes(leaf.permute(order))[...] = arrays.pop(_escape(row["name"])).transpose(order)
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

    try:  # without compression, which takes most of the time and saves a tenth of the bytes of trained floats
        with (
            _plain_path(path.parent) as folder,
            _quiet(),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer,
        ):
            checkpointer.save(folder / path.name, args=ocp.args.PyTreeSave(dict(arrays)))
    except OSError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds
        number = re.search(r"os_error_code='([0-9]+)'", str(error))
        text = f"orbax-checkpoint {ocp.__version__} cannot write: {one_line(error, max_length=_MAX_ERROR)}"
        raise OSError(int(number[1]) if number else errno.EIO, text, str(path)) from error


def _read_arrays(path: Path, table: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of a table's rows by escaped name, with its shapes, and with its dtypes where numpy has them."""
    if not table:
        return {}
    import tensorstore

    expected = {
        _escape(row["name"]): (tuple(row["shape"]), tensor_bytes(torch.empty(0, dtype=_dtype(row))).dtype)
        for row in table
    }
    leaves = path / "leaves"
    if missing := [name for name in (_METADATA, "manifest.ocdbt") if not (leaves / name).is_file()]:
        raise CorruptError(f"{path} is corrupt: it has no file leaves/{missing[0]}.")
    declared = sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
    stored = sum(file.stat().st_size for file in leaves.rglob("*") if file.is_file())
    if declared > _MOST_COMPRESSED * stored + (1 << 20):  # arrays of which nothing is stored are filled with zeros
        raise CorruptError(f"{path} is corrupt: its leaves have {stored} bytes for tensors of {declared} bytes.")
    context = tensorstore.Context()  # one for all arrays, which then read the index once
    try:
        with _plain_path(leaves) as folder:
            store: dict[str, Any] = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
            opening = {
                name: tensorstore.open(
                    {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}, open=True, read=True, context=context
                )
                for name in expected
            }
            arrays = {name: future.result() for name, future in opening.items()}
            stored = {name: (array.shape, array.dtype.numpy_dtype) for name, array in arrays.items()}
            if stored == expected:
                reading = {name: array.read() for name, array in arrays.items()}
                return {name: future.result() for name, future in reading.items()}
    except MemoryError:
        raise
    except Exception as error:
        problem = f"tensorstore cannot read its leaves: {one_line(error, max_length=_MAX_ERROR).rstrip('.')}"
        raise CorruptError(f"{path} is corrupt: {problem}.") from None
    name = next(row["name"] for row in table if stored[_escape(row["name"])] != expected[_escape(row["name"])])
    raise CorruptError(f"{path} is corrupt: {name} does not have the shape and dtype that were saved.")


@contextmanager
def _plain_path(directory: Path) -> Iterator[Path]:
    """The directory by a path that neither orbax takes for a pattern nor tensorstore for another path."""
    if not _SPECIAL.search(str(directory.absolute())):
        yield directory.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="dwiml-func-") as folder:
        link = Path(folder) / "directory"
        link.symlink_to(directory.absolute())
        yield link


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what orbax logs about a full disk, and what its threads and tasks still raise then."""
    _quiet_lock.acquire()  # hooks that two threads swap would be put back in the wrong order
    logs = [log for log in map(logging.getLogger, ("absl", "asyncio")) if not log.disabled]
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    excepthook = sys.excepthook

    def pass_over_closed_loops(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if str(error) != "Event loop is closed":  # tensorstore's threads print it
            excepthook(kind, error, trace)

    sys.excepthook = pass_over_closed_loops
    for log in logs:
        log.disabled = True
    try:
        yield
    except BaseException:
        time.sleep(_SETTLE_SECONDS)  # writes of other arrays come to their end, and find their event loop closed
        gc.collect()  # asyncio logs the errors of abandoned tasks when they are collected
        raise
    finally:
        sys.unraisablehook, sys.excepthook = hook, excepthook
        for log in logs:
            log.disabled = False
        _quiet_lock.release()


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


def _layout(leaf: Tensor) -> dict[str, list[int]]:
    """The order of the dimensions in memory, where they are not contiguous: kernels are chosen by it."""
    dims = list(range(leaf.dim()))
    order = sorted(dims, key=leaf.stride, reverse=True)  # not `dim_order`, with which torch imports sympy
    return {} if order == dims else {"dim_order": order}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _dtype(row: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, row["dtype"].removeprefix("torch."))


def _escape(name: str) -> str:
    """Orbax takes dots and slashes in a name for structure, and lets names that differ only in them collide."""
    return quote(name, safe="").replace(".", "%2E")
