"""Which bundle each streamline belongs to: a number a streamline, and the names of the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bundles", "join_bundles"]


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
