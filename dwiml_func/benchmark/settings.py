"""What the benchmark runs: on which data, which people and seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dwiml_func.data.example.bundles import SUBJECTS
from dwiml_func.data.example.settings import ExampleSettings

__all__ = ["DATA", "SETTINGS", "BenchmarkSetting", "SettingName", "data_of"]

_HARD = ExampleSettings(crossings=3, distractors=1)

DATA: dict[str, ExampleSettings] = {
    "crossings": _HARD,
    "crossings-snr10": replace(_HARD, snr=10.0),
    "crossings-snr30": replace(_HARD, snr=30.0),
    "crossings-6dir": replace(_HARD, nb_directions=6),
    "example": ExampleSettings(),
    "crossings-trxscan": replace(_HARD, simulator="trxscan"),
}
"""The kinds of data by name; `example` is that of the first run, in which the principal direction tracks as well as the
true field. `crossings-trxscan` needs the package trxscan."""

SettingName = Literal["small", "full"]
"""How much of it to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSetting:
    """Which data, people and seeds; the recipe is the model's own."""

    data: tuple[str, ...]
    people: tuple[str, ...] = SUBJECTS
    seeds: tuple[int, ...] = (1, 2, 3)


SETTINGS: dict[SettingName, BenchmarkSetting] = {
    "small": BenchmarkSetting(data=("crossings",)),
    "full": BenchmarkSetting(data=tuple(name for name, data in DATA.items() if data.simulator == "tensors")),
}
"""Small takes about 27 minutes of one core, full five times as long."""


def data_of(name: str, person: str) -> ExampleSettings:
    """The data of a kind in which a person is left out."""
    return replace(DATA[name], test_subject=person)
