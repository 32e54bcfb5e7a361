"""What a manifest must be: the types and ranges of all that its readers use."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any, ClassVar

import torch

from dwiml_func._checks import require, shown
from dwiml_func.core.early_stopping import Best
from dwiml_func.core.loop import EpochReport
from dwiml_func.core.rng import Key
from dwiml_func.digest import combine_digests

__all__ = ["check_manifest", "first_problem"]

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
            raise ValueError(f"history: expected no key {shown(unknown[0])}")
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
        text = f"{problem['msg'][0].lower()}{problem['msg'][1:]}, received {shown(problem['input'])}"
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
            raise ValueError(f"shape: expected sizes of at least 0, received {shown(self.shape)}")
        if math.prod(size for size in self.shape if size) >= _MAX_NUMEL:
            raise ValueError(f"shape: expected a tensor that fits into memory, received {shown(self.shape)}")
        if self.dtype not in _dtypes():
            raise ValueError(f"dtype: expected one of torch's, received {shown(self.dtype)}")
        _require_digest("sha256", self.sha256)


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
        require("key.seed", self.key.seed, at_least=0, below=1 << 64)
        for part in self.key.path:
            require("key.path", part, at_least=0, below=_COUNT_END)
        for name in ("step", "epoch", "batch"):
            require(name, getattr(self, name), at_least=0, below=_COUNT_END)
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
        _require_digest("digest", self.digest)
        names = [leaf.name for leaf in self.leaves]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"leaves: expected different names, received {shown(twice)} twice")
        for name, digest in self.files.items():
            if not _is_inside(name):
                raise ValueError(f"files: expected paths below 'leaves/', received {shown(name)}")
            _require_digest(f"files.{name}", digest)
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
                raise ValueError(f"{key}: expected integers of at most 64 bits, received {shown(item)}")
        lists = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in lists for item in items]


def _check_best(best: Best) -> None:
    if math.isnan(best.value):
        raise ValueError("best.value: expected a number, received nan")
    require("best.num_bad_epochs", best.num_bad_epochs, at_least=0, below=_COUNT_END)
    if best.epoch is not None:
        require("best.epoch", best.epoch, at_least=0, below=_COUNT_END)


def _check_report(report: EpochReport) -> None:
    for name in ("epoch", "num_batches"):
        require(f"history.{name}", getattr(report, name), at_least=0, below=_COUNT_END)
    for name in ("learning_rate", "num_points", "train_minutes", "valid_minutes"):
        require(f"history.{name}", float(getattr(report, name)))
    if report.timed_points is not None:
        require("history.timed_points", float(report.timed_points))
    if report.digest is not None:
        _require_digest("history.digest", report.digest)
    _check_best(report.best)


def _require_digest(name: str, digest: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{name}: expected 64 hexadecimal digits, received {shown(digest)}")


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    is_plain = name.isprintable() and "\\" not in name and "/".join(parts) == name
    return is_plain and len(parts) > 1 and parts[0] == "leaves" and ".." not in parts
