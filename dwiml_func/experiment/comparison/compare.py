"""The differences between two experiments: in config, environment and data, and the epoch from which results differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest
from dwiml_func.checkpoint.digest import bit_difference, leaf_differences
from dwiml_func.checkpoint.history import history_to_json
from dwiml_func.core.report import EpochReport
from dwiml_func.files.fingerprint import content

__all__ = [
    "Comparison",
    "compare_experiments",
    "differences",
    "differing",
    "distinguishing",
    "flatten",
    "leaf_problems",
    "report_differences",
    "report_values",
]

_NOT_COMPARED = {"train_minutes", "valid_minutes", "timed_points", "stop", "digest"}
"""These depend on interruptions and on the run's end, not on its numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The differences between two experiments, A and B: a text for each.

    `environment` and `data` are None where one of the two is not recorded. `num_digests` epochs have a digest in both.
    `first_state` is the first epoch after which the states differ, `first_metrics` the first whose metrics differ, as
    `metrics` says; None where no common epoch differs. `notes` has what could not be compared.
    """

    config: tuple[str, ...]
    environment: tuple[str, ...] | None
    data: tuple[str, ...] | None
    num_epochs: tuple[int, int]
    num_digests: int
    first_state: int | None
    first_metrics: int | None
    metrics: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        differ = self.config or self.environment or self.data or self.first_state or self.first_metrics
        return not differ and self.num_epochs[0] == self.num_epochs[1]


def compare_experiments(a: str | Path, b: str | Path) -> Comparison:
    """Compare config, environment, data and history of two runs; durations and the reason of the end apart."""
    from dwiml_func.experiment.folder import recorded_config  # `verify` in a script has no need of configs

    checkpoints = [newest(directory) for directory in (a, b)]
    pairs = zip((a, b), checkpoints, strict=True)
    config_a, config_b = (recorded_config(Path(directory), checkpoint) for directory, checkpoint in pairs)
    histories = [checkpoint.history if checkpoint else () for checkpoint in checkpoints]
    common = list(zip(*histories, strict=False))
    with_digest = [pair for pair in common if pair[0].digest is not None and pair[1].digest is not None]
    first_metrics = next((pair for pair in common if report_differences(*pair)), None)
    known = [checkpoint for checkpoint in checkpoints if checkpoint]
    return Comparison(
        config=tuple(differences(config_a, config_b)),
        environment=_differences_of_both([checkpoint.environment for checkpoint in known]),
        data=_differences_of_both([content(checkpoint.data) for checkpoint in known if checkpoint.data]),
        num_epochs=(len(histories[0]), len(histories[1])),
        num_digests=len(with_digest),
        first_state=next((pair[0].epoch for pair in with_digest if pair[0].digest != pair[1].digest), None),
        first_metrics=first_metrics[0].epoch if first_metrics else None,
        metrics=tuple(report_differences(*first_metrics)) if first_metrics else (),
        notes=tuple(_notes(checkpoints, num_without=len(common) - len(with_digest))),
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any], labels: tuple[str, str] = ("in A", "in B")) -> list[str]:
    """Compare nested JSON data bitwise: a text for each difference. An absent value is equal to None."""
    return [f"{name}: {in_a} {labels[0]}, {in_b} {labels[1]}" for name, (in_a, in_b) in differing(a, b).items()]


def differing(a: Mapping[str, Any], b: Mapping[str, Any], *, only_common: bool = False) -> dict[str, tuple[str, str]]:
    """The values that differ, as text, by their names with dots between the parts; `only_common` passes over others."""
    flat_a, flat_b = flatten(a), flatten(b)
    found = {}
    for name in {**flat_a, **flat_b}:
        texts = _to_text(flat_a.get(name)), _to_text(flat_b.get(name))  # NaN is not equal to itself, but its text is
        if texts[0] != texts[1] and not (only_common and (name not in flat_a or name not in flat_b)):
            found[name if name.isprintable() else ascii(name)] = texts
    return found


def distinguishing(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each config, the values that not all of them share, as text, by their names with dots between the parts."""
    flat = [flatten(config) for config in configs]
    names = {name: None for config in flat for name in config}
    different = [name for name in names if len({_to_text(config.get(name)) for config in flat}) > 1]
    return [{name: _to_option(config.get(name)) for name in different} for config in flat]


def report_differences(a: EpochReport, b: EpochReport, labels: tuple[str, str] = ("in A", "in B")) -> list[str]:
    """Compare two reports bitwise; durations, digests and the reason of the end apart."""
    return differences(report_values(a), report_values(b), labels)


def report_values(report: EpochReport) -> dict[str, Any]:
    """The values that `report_differences` compares, by name."""
    (data,) = history_to_json([report])
    return flatten({name: value for name, value in data.items() if name not in _NOT_COMPARED})


def leaf_problems(stored: Mapping[str, Tensor], replayed: Mapping[str, Tensor], name: str) -> list[str]:
    """The first leaf of checkpoint `name` that differs from the replayed one, or differences of names and shapes."""
    table = [{"name": leaf, "shape": list(value.shape), "dtype": str(value.dtype)} for leaf, value in stored.items()]
    if lines := leaf_differences(table, replayed):
        return lines
    found = {leaf: bit_difference(stored[leaf], tensor) for leaf, tensor in replayed.items()}
    differing = [(leaf, difference) for leaf, difference in found.items() if difference is not None]
    if not differing:
        return []
    leaf, one = differing[0]
    return [
        f"first leaf that differs: {leaf}, {one.num_different} of {one.num_values} values, by {one.largest:.3g} "
        f"at most; the first at {list(one.first)}: {one.values[0]} in checkpoint {name}, {one.values[1]} replayed, "
        f"{one.ulps} ulp apart ({len(differing)} of {len(found)} leaves differ)"
    ]


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested JSON data by their names with dots between the parts."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _to_text(value: Any) -> str:
    return "none" if value is None else json.dumps(value)  # floats to the last bit, control characters escaped


def _to_option(value: Any) -> str:
    """As on the command line, without quotes and brackets."""
    values = value if isinstance(value, list) else [value]
    return " ".join(item if isinstance(item, str) else _to_text(item) for item in values)


def _differences_of_both(both: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    return tuple(differences(both[0], both[1])) if len(both) == 2 else None


def _notes(checkpoints: Sequence[Checkpoint | None], *, num_without: int) -> list[str]:
    notes = []
    for label, checkpoint in zip("AB", checkpoints, strict=True):
        if checkpoint is None:
            notes.append(f"{label} has no checkpoint yet")
            continue
        if not checkpoint.data:
            notes.append(f"{label} has no recorded fingerprint of its data")
        notes += [f"{label}: {sentence}" for sentence in checkpoint.corrupt.values()]
    if num_without:
        notes.append(f"{num_without} of the common epochs have no digest: no checkpoint was due there")
    return notes
