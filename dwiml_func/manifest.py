"""The manifest of a directory of tensors: what it must hold to be believed.

A manifest is JSON with a SHA-256 of itself, of every file and of every leaf. A checksum finds damage, not malice; so
all that the readers use is checked for type and range as well, before any other file is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwiml_func._checks import shown
from dwiml_func.manifest_schema import check_manifest, first_problem

__all__ = [
    "FORMAT",
    "DamagedError",
    "SnapshotError",
    "first_problem",
    "manifest_checksum",
    "manifest_text",
    "read_manifest",
]

FORMAT = 1
"""Version of the layout; readers refuse a later one."""

_MAX_BYTES = 1 << 25  # some 100,000 leaves, or 40,000 epochs
_MAX_NESTED = 1 << 19  # lists and dicts: text of any length could make a thousand times its size of them


class SnapshotError(ValueError):
    """A snapshot that is damaged, or does not fit the state it is restored into.

    Example:
        >>> raise SnapshotError("params/weight: float32 (2,) in the snapshot, not expected")
        Traceback (most recent call last):
        ...
        dwiml_func.manifest.SnapshotError: params/weight: float32 (2,) in the snapshot, not expected
    """


class DamagedError(SnapshotError):
    """A snapshot that does not hold what was written.

    Example:
        >>> raise DamagedError("experiments/a/checkpoint/3 is damaged: it has no manifest.json.")
        Traceback (most recent call last):
        ...
        dwiml_func.manifest.DamagedError: experiments/a/checkpoint/3 is damaged: it has no manifest.json.
    """


def read_manifest(path: Path, manifest_name: str = "manifest.json", *, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Read a manifest, without the tensors and without orbax.

    Args:
        path: the directory.
        manifest_name: the manifest's file name.
        needs: keys that it must have besides those that every manifest has.

    Returns:
        The manifest, as JSON data: `format`, `digest`, `environment`, `leaves`, `files`, and what else was recorded.
        Where they are there, `numbers`, `history`, `config` and `data` have the types and ranges that they are
        written with.

    Raises:
        FileNotFoundError: there is no such directory.
        DamagedError: it has no manifest, or not the one that was written.
        SnapshotError: it was written by a later version.

    Example:
        >>> read_manifest(Path("/no/such/snapshot"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: No manifest.json in /no/such/snapshot.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"No {manifest_name} in {path}.")
    content = _read(path, manifest_name)
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {manifest_name} is no JSON ({error}).") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise DamagedError(f"{path} is damaged: {manifest_name} lacks what a manifest holds.")
    is_whole = manifest.pop("checksum", None) == _checksum_or_none(manifest)
    if manifest["format"] != FORMAT:
        text = f"{path} has format {shown(manifest['format'])}; this version reads format {FORMAT}."
        raise SnapshotError(text) if is_whole else DamagedError(f"{text} Or it is damaged.")
    if not is_whole:
        raise DamagedError(f"{path} is damaged: {manifest_name} does not hold what was written.")
    try:
        check_manifest(manifest, content, needs)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {manifest_name}: {first_problem(error)}.") from None
    return manifest


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as it is written: with its checksum, and only if `read_manifest` takes it.

    Args:
        manifest: JSON data.

    Returns:
        JSON text with a line for each key.

    Raises:
        TypeError, ValueError: it is no JSON, or no manifest.

    Example:
        >>> manifest_text({"format": 1, "digest": 3, "environment": {}, "leaves": [], "files": {}})
        Traceback (most recent call last):
        ...
        ValueError: Cannot be recorded: digest: input should be a valid string, received 3.
    """
    manifest = json.loads(json.dumps(manifest))  # as it will be read, for the checksum
    rows = {**manifest, "checksum": manifest_checksum(manifest)}.items()
    # A line for each key, since an indent makes Python's encoder ten times slower, with the interpreter locked
    text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rows) + "\n}"
    content = text.encode()
    try:
        if _is_too_large(content):
            raise ValueError(f"{len(content)} bytes are too many")
        check_manifest(manifest, content, ())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Cannot be recorded: {first_problem(error)}.") from None
    return text


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its checksum, whatever its layout.

    Args:
        manifest: JSON data as it was read.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> manifest_checksum({"a": 1})[:8]
        'f9d86028'
    """
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read(path: Path, name: str) -> bytes:
    file = path / name
    if not file.is_file():  # to open a pipe would wait for ever
        raise DamagedError(f"{path} is damaged: it has no {name}.")
    with file.open("rb") as opened:
        content = opened.read(_MAX_BYTES + 1)
    if _is_too_large(content):
        raise DamagedError(f"{path} is damaged: {name} is larger than any manifest.")
    return content


def _is_too_large(content: bytes) -> bool:
    return len(content) > _MAX_BYTES or content.count(b"[") + content.count(b"{") > _MAX_NESTED


def _checksum_or_none(manifest: Mapping[str, Any]) -> str | None:
    try:
        return manifest_checksum(manifest)
    except (ValueError, RecursionError):
        return ""
