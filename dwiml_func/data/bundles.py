"""Which bundle each streamline belongs to: a number a streamline, and the names of the numbers."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bundles", "bundles_of_files", "join_bundles"]


class Bundles(NamedTuple):
    """The bundles of a set of streamlines: streamline `s` is of the bundle `names[ids[s]]`; `ids` is (S,) int64."""

    names: tuple[str, ...]
    ids: NDArray[np.int64]


def join_bundles(parts: Sequence[Bundles]) -> Bundles:
    """The bundles of several sets one after the other; bundles of the same name become one."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    row = {name: number for number, name in enumerate(names)}
    ids = [np.array([row[name] for name in part.names], dtype=np.int64)[part.ids] for part in parts]
    return Bundles(names, np.concatenate([np.empty(0, dtype=np.int64), *ids]))


def bundles_of_files(files: Sequence[Path], sizes: Sequence[int]) -> Bundles:
    """The bundles of files of `sizes` streamlines: each file is one, of its name, unless it has no streamline.

    Where several files have one name, the folders in which they differ stand before it, or else the suffix after it.
    """
    names = dict[Path, str]()
    of_stem: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        of_stem[path.stem].append(path)
    for alike in of_stem.values():
        common = os.path.commonpath([path.parent for path in alike])
        in_folder = Counter(path.parent for path in alike)
        for path in alike:
            own = path.relative_to(common) if len(alike) > 1 else Path(path.name)
            names[path] = str(own if in_folder[path.parent] > 1 else own.with_suffix(""))
    filled = [(names[path], size) for path, size in zip(files, sizes, strict=True) if size > 0]
    return join_bundles([Bundles((name,), np.zeros(size, dtype=np.int64)) for name, size in filled])
