"""What a manifest must be: the types and ranges of all that its readers use.

The manifest of a directory of tensors: what it must hold to be believed.

A manifest is JSON with a SHA-256 of itself, of every file and of every leaf. A checksum finds damage, not malice; so
all that the readers use is checked for type and range as well, before any other file is opened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch

from dwiml_func._checks import check_number, truncated_repr
from dwiml_func.checkpoint.digest import combine_digests
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.report import EpochReport
from dwiml_func.core.rng import Key

__all__ = [
    "FORMAT",
    "CheckpointError",
    "CorruptError",
    "check_manifest",
    "first_problem",
    "manifest_checksum",
    "manifest_text",
    "read_manifest",
]

_MAX_DEPTH = 64
_MAX_NUMEL = 1 << 48
_COUNT_END = 1 << 128
_REPORT_KEYS = {field.name for field in fields(EpochReport)}
_STRICT = {"extra": "forbid", "strict": True}


def check_manifest(manifest: Mapping[str, Any], content: bytes, needs: Sequence[str]) -> None:
    """Refuse a manifest that is not as it is written.

    Args:
        manifest: JSON data, with no more keys than `content` has.
        content: its JSON text.
        needs: keys that it must have besides those that every manifest has.

    Raises:
        ValueError: something is missing, or of another type, or out of range; `first_problem` tells it in one line.

    Example:
        >>> try:
        ...     check_manifest({"format": 1}, b'{"format": 1}', ())
        ... except ValueError as error:
        ...     first_problem(error)
        "digest: field required, received {'format': 1}"
    """
    _adapter().validate_json(content)
    missing = [key for key in needs if manifest.get(key) is None]
    if missing:
        raise ValueError(f"expected {', '.join(missing)}, received nothing")
    for report in manifest.get("history") or ():
        if unknown := sorted(report.keys() - _REPORT_KEYS):
            raise ValueError(f"history: expected no key {truncated_repr(unknown[0])}")
    for key, value in manifest.items():
        if key not in ("leaves", "files", "history", "numbers"):
            _check_plain(key, value)
    digests = {row["name"]: row["sha256"] for row in manifest["leaves"]}
    if manifest["digest"] != combine_digests(digests, manifest.get("numbers") or {}):
        raise ValueError("its digest is not that of its leaves and numbers")


def first_problem(error: Exception) -> str:
    """The first problem that an error of pydantic, or another, tells of.

    Args:
        error: the error.

    Returns:
        One line without a full stop.

    Example:
        >>> first_problem(ValueError("a is wrong."))
        'a is wrong'
    """
    import pydantic

    if not isinstance(error, pydantic.ValidationError):
        return " ".join(str(error).split()).rstrip(".")
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        text = str(problem.get("ctx", {}).get("error", problem["msg"]))
    else:
        text = f"{problem['msg'][0].lower()}{problem['msg'][1:]}, received {truncated_repr(problem['input'])}"
    return " ".join(f"{place}: {text}".split() if place else text.split()).rstrip(".")


@dataclass(frozen=True)
class _Leaf:
    __pydantic_config__: ClassVar = _STRICT

    name: str
    shape: list[int]
    dtype: str
    sha256: str

    def __post_init__(self) -> None:
        if len(self.shape) > 64 or not all(0 <= size < _MAX_NUMEL for size in self.shape):
            raise ValueError(f"shape: expected sizes of at least 0, received {truncated_repr(self.shape)}")
        if math.prod(size for size in self.shape if size) >= _MAX_NUMEL:
            raise ValueError(f"shape: expected a tensor that fits into memory, received {truncated_repr(self.shape)}")
        if self.dtype not in _dtypes():
            raise ValueError(f"dtype: expected one of torch's, received {truncated_repr(self.dtype)}")
        _check_digest("sha256", self.sha256)


@dataclass(frozen=True)
class _Numbers:
    __pydantic_config__: ClassVar = _STRICT

    key: Key
    step: int
    epoch: int
    batch: int
    sums: dict[str, tuple[float, float]]
    best: Best

    def __post_init__(self) -> None:
        check_number("key.seed", self.key.seed, at_least=0, below=1 << 64)
        for part in self.key.path:
            check_number("key.path", part, at_least=0, below=_COUNT_END)
        for name in ("step", "epoch", "batch"):
            check_number(name, getattr(self, name), at_least=0, below=_COUNT_END)
        _check_best(self.best)


@dataclass(frozen=True)
class _Manifest:
    """What the readers rely on. A manifest may hold further facts."""

    __pydantic_config__: ClassVar = {"extra": "ignore", "strict": True}

    format: int
    digest: str
    environment: dict[str, Any]
    leaves: list[_Leaf]
    files: dict[str, str]
    numbers: _Numbers | None = None
    history: list[EpochReport] | None = None
    config: dict[str, Any] | None = None
    data: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_digest("digest", self.digest)
        names = [leaf.name for leaf in self.leaves]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"leaves: expected different names, received {truncated_repr(twice)} twice")
        for name, digest in self.files.items():
            if not _is_inside(name):
                raise ValueError(f"files: expected paths below 'leaves/', received {truncated_repr(name)}")
            _check_digest(f"files.{name}", digest)
        if not self.files and any(0 not in leaf.shape for leaf in self.leaves):
            raise ValueError("files: expected those of the leaves, received none")
        for report in self.history or ():
            _check_report(report)


@functools.cache
def _adapter() -> Any:
    import pydantic

    return pydantic.TypeAdapter(_Manifest)


@functools.cache
def _dtypes() -> frozenset[str]:
    return frozenset(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))


def _check_plain(key: str, value: Any) -> None:
    """Free facts: no integer beyond 64 bits and no depth, so that whoever shows or copies them is safe."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"{key}: expected at most {_MAX_DEPTH} levels, received more")
        for item in level:
            if isinstance(item, int) and not -(1 << 63) <= item < 1 << 64:
                raise ValueError(f"{key}: expected integers of at most 64 bits, received {truncated_repr(item)}")
        lists = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in lists for item in items]


def _check_best(best: Best) -> None:
    if math.isnan(best.value):
        raise ValueError("best.value: expected a number, received nan")
    check_number("best.num_bad_epochs", best.num_bad_epochs, at_least=0, below=_COUNT_END)
    if best.epoch is not None:
        check_number("best.epoch", best.epoch, at_least=0, below=_COUNT_END)


def _check_report(report: EpochReport) -> None:
    for name in ("epoch", "num_batches"):
        check_number(f"history.{name}", getattr(report, name), at_least=0, below=_COUNT_END)
    for name in ("learning_rate", "num_points", "train_minutes", "valid_minutes"):
        check_number(f"history.{name}", float(getattr(report, name)))
    if report.timed_points is not None:
        check_number("history.timed_points", float(report.timed_points))
    if report.digest is not None:
        _check_digest("history.digest", report.digest)
    _check_best(report.best)


def _check_digest(name: str, digest: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{name}: expected 64 hexadecimal digits, received {truncated_repr(digest)}")


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    is_plain = name.isprintable() and "\\" not in name and "/".join(parts) == name
    return is_plain and len(parts) > 1 and parts[0] == "leaves" and ".." not in parts


FORMAT = 1
"""Version of the layout; readers refuse a later one."""

_MAX_BYTES = 1 << 25  # some 100,000 leaves, or 40,000 epochs
_MAX_NESTED = 1 << 19  # lists and dicts: text of any length could make a thousand times its size of them


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
        CorruptError: it has no manifest, or not the one that was written.
        CheckpointError: it was written by a later version.

    Example:
        >>> read_manifest(Path("/no/such/checkpoint"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: No manifest.json in /no/such/checkpoint.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"No {manifest_name} in {path}.")
    content = _read(path, manifest_name)
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is corrupt: {manifest_name} is no JSON ({error}).") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CorruptError(f"{path} is corrupt: {manifest_name} lacks what a manifest holds.")
    is_whole = manifest.pop("checksum", None) == _checksum_or_none(manifest)
    if manifest["format"] != FORMAT:
        text = f"{path} has format {truncated_repr(manifest['format'])}; this version reads format {FORMAT}."
        raise CheckpointError(text) if is_whole else CorruptError(f"{text} Or it is corrupt.")
    if not is_whole:
        raise CorruptError(f"{path} is corrupt: {manifest_name} does not hold what was written.")
    try:
        check_manifest(manifest, content, needs)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is corrupt: {manifest_name}: {first_problem(error)}.") from None
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
        raise CorruptError(f"{path} is corrupt: it has no {name}.")
    with file.open("rb") as opened:
        content = opened.read(_MAX_BYTES + 1)
    if _is_too_large(content):
        raise CorruptError(f"{path} is corrupt: {name} is larger than any manifest.")
    return content


def _is_too_large(content: bytes) -> bool:
    return len(content) > _MAX_BYTES or content.count(b"[") + content.count(b"{") > _MAX_NESTED


def _checksum_or_none(manifest: Mapping[str, Any]) -> str | None:
    try:
        return manifest_checksum(manifest)
    except (ValueError, RecursionError):
        return ""
