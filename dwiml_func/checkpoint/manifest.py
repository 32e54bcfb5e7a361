"""The manifest of a directory of tensors: what was saved, as JSON, readable without the tensors.

A manifest holds a table of the tensors with a SHA-256 of each, the digest of the whole state, further facts, and a
SHA-256 of itself. A reader takes it only if it is of this format, has the bytes that were written, and fits the schema;
nothing in it is ever executed. Digests find corruption, not malice: who can write here can write another checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from dwiml_func._checks import error_text, truncated_repr
from dwiml_func.checkpoint.digest import combine_digests
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import EpochReport
from dwiml_func.core.rng import Key
from dwiml_func.types import Plateau

__all__ = [
    "FORMAT",
    "CheckpointError",
    "CorruptError",
    "Serialized",
    "manifest_checksum",
    "manifest_text",
    "read_manifest",
    "report_text",
]

FORMAT = 2
"""Version of the layout. Format 1 had a digest of each file too."""

_MAX_BYTES = 1 << 25  # some 100,000 tensors, or 40,000 epochs


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, or does not fit the state it is restored into.

    Example:
        >>> raise CheckpointError("params/weight: float32 (2,) in the checkpoint, not expected")
        Traceback (most recent call last):
        ...
        dwiml_func.checkpoint.manifest.CheckpointError: params/weight: float32 (2,) in the checkpoint, not expected
    """


class CorruptError(CheckpointError):
    """A checkpoint that does not hold what was written.

    Example:
        >>> raise CorruptError("experiments/a/checkpoint/3 is corrupt: it has no manifest.json.")
        Traceback (most recent call last):
        ...
        dwiml_func.checkpoint.manifest.CorruptError: experiments/a/checkpoint/3 is corrupt: it has no manifest.json.
    """


def read_manifest(path: Path, manifest_name: str = "manifest.json", *, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Read the manifest of the directory `path`, as JSON data.

    It has `format`, `digest`, `environment`, `leaves`, those of `needs`, and whatever else was recorded. Raises
    FileNotFoundError if there is no such directory, CorruptError if its manifest is missing or not the one that was
    written, CheckpointError if another version wrote it.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"No {manifest_name} in {path}.")
    content = _read_bytes(path, manifest_name)
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is corrupt: {manifest_name} is not JSON: {error}.") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CorruptError(f"{path} is corrupt: {manifest_name} is not a manifest.")
    is_whole = manifest.pop("checksum", None) == manifest_checksum(manifest)
    if manifest["format"] != FORMAT:
        error = CheckpointError if is_whole else CorruptError
        raise error(
            f"{path} has format {truncated_repr(manifest['format'])}. Expected format {FORMAT}. "
            f"{'Read it with the version of dwiml_func that wrote it' if is_whole else 'It may be corrupt'}."
        )
    if not is_whole:
        raise CorruptError(f"{path} is corrupt: {manifest_name} does not hold what was written.")
    try:
        _check(manifest, content, needs)
    except ValueError as error:
        raise CorruptError(f"{path} is corrupt: {manifest_name}: {error_text(error)}.") from None
    return manifest


class Serialized(NamedTuple):
    """A part of a manifest that was made JSON text and checked before: as it is written, and with sorted keys."""

    text: str
    canonical: str


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as it is written, with its checksum; ValueError or TypeError if `read_manifest` would not take it."""
    done = {key: value for key, value in manifest.items() if isinstance(value, Serialized)}
    others = json.loads(json.dumps({key: value for key, value in manifest.items() if key not in done}))  # as read
    texts = {key: done[key].text if key in done else json.dumps(others[key]) for key in manifest}
    texts["checksum"] = json.dumps(manifest_checksum({**others, **done}))
    text = _layout(texts)
    try:
        if (size := len(text.encode())) > _MAX_BYTES:
            raise ValueError(f"expected at most {_MAX_BYTES} bytes, received {size}")
        _check(others, _layout({key: value for key, value in texts.items() if key not in done}).encode(), ())
    except ValueError as error:
        raise ValueError(f"Cannot be recorded: {error_text(error)}.") from None
    return text


def report_text(row: Mapping[str, Any]) -> Serialized:
    """A report of a history, checked; ValueError if `read_manifest` would not take it."""
    text = json.dumps(row)
    try:
        _report_schema().validate_json(text)
    except ValueError as error:
        raise ValueError(f"Cannot be recorded: history: {error_text(error)}.") from None
    return Serialized(text, json.dumps(row, sort_keys=True))


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its checksum, whatever its layout."""
    parts = (
        f"{json.dumps(key)}: {part.canonical if isinstance(part, Serialized) else json.dumps(part, sort_keys=True)}"
        for key, part in sorted(manifest.items())
    )
    return hashlib.sha256(f"{{{', '.join(parts)}}}".encode()).hexdigest()


def _layout(texts: Mapping[str, str]) -> str:
    """A line for each key, since an indent makes Python's encoder ten times slower, with the interpreter locked."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {text}" for key, text in texts.items()) + "\n}"


def _read_bytes(path: Path, name: str) -> bytes:
    file = path / name
    if not file.is_file():
        raise CorruptError(f"{path} is corrupt: it has no {name}.")
    with file.open("rb") as opened:
        content = opened.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise CorruptError(f"{path} is corrupt: {name} is larger than any manifest.")
    return content


def _check(manifest: Mapping[str, Any], content: bytes, needs: Sequence[str]) -> None:
    """Check a manifest, whose JSON text is `content`, against the schema and its own digest."""
    _schema().validate_json(content)
    if missing := [key for key in needs if manifest.get(key) is None]:
        raise ValueError(f"expected {', '.join(missing)}, received nothing")
    known = {field.name for field in fields(EpochReport)}
    if unknown := sorted({key for report in manifest.get("history") or () for key in report} - known):
        raise ValueError(f"history: expected no key {truncated_repr(unknown[0])}")
    for row in manifest["leaves"]:
        dims = list(range(len(row["shape"])))
        if sorted(row.get("dim_order") or dims) != dims:
            raise ValueError(f"dim_order: expected each of {len(dims)} dimensions once")
    digests = {row["name"]: row["sha256"] for row in manifest["leaves"]}
    is_of_leaves = manifest["digest"] == combine_digests(digests, manifest.get("numbers") or {})
    if len(digests) < len(manifest["leaves"]) or not is_of_leaves:
        raise ValueError("its digest is not that of its leaves and numbers")


@functools.cache
def _report_schema() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(EpochReport)


@functools.cache
def _schema() -> Any:
    """What the readers rely on; a manifest may hold further facts. pydantic is imported when first needed."""
    from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, create_model

    def model(title: str, /, extra: str, **fields: Any) -> Any:
        config: Any = ConfigDict(extra=extra, strict=True)  # type: ignore[typeddict-item]
        return create_model(title, __config__=config, **fields)

    count, sha256 = Annotated[int, Field(ge=0)], Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    dtype = Annotated[str, AfterValidator(_check_dtype)]
    order = (list[count] | None, None)
    leaf = model("Leaf", extra="forbid", name=str, shape=list[count], dtype=dtype, sha256=sha256, dim_order=order)
    counts = dict.fromkeys(("step", "epoch", "batch"), count)
    sums = dict[str, tuple[float, float]]
    within = (list[tuple[count, dict[str, float], float]], [])
    later: dict[str, Any] = {"plateau": (Plateau | None, None), "validations": within}
    numbers = model("Numbers", extra="forbid", key=Key, **counts, sums=sums, best=Best, **later)
    data = dict[str, Any]
    optional = {"numbers": numbers, "history": list[EpochReport], "config": data, "data": data}
    return TypeAdapter(
        model(
            "Manifest",
            extra="ignore",
            format=int,
            digest=sha256,
            leaves=list[leaf],
            environment=data,
            **{name: (kind | None, None) for name, kind in optional.items()},
        )
    )


_DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}


def _check_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"expected a dtype of torch, received {truncated_repr(name)}")
    return name
