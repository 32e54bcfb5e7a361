"""Two experiments side by side: what differs in config, environment and data, and from where on in the runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwiml_func.checkpoint.checkpoint import Checkpoint, newest
from dwiml_func.checkpoint.history import history_to_json
from dwiml_func.core.loop import EpochReport
from dwiml_func.experiment.folder import read_config

__all__ = ["Comparison", "compare_experiments", "differences", "distinguishing", "report_differences"]

_NOT_COMPARED = {"train_minutes", "valid_minutes", "timed_points", "stop", "digest"}
"""When a run was interrupted, and when it ended, is no matter of its numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What differs between two experiments, A and B.

    Args:
        config: a text for each difference between the configs.
        environment: the same for what wrote the newest checkpoints; None where one is not on record.
        data: the same for the fingerprints of the data; None where one is not on record.
        num_epochs: epochs on record in A and in B.
        num_digests: epochs that both have, with a digest on record in both.
        first_state: the first epoch after which the states differ; None where those of all common epochs are equal.
        first_metrics: the first epoch in which metrics differ; None where those of all common epochs are equal.
        metrics: a text for each metric that differs in that epoch.
        notes: what could not be compared.

    Example:
        >>> compare_experiments("experiments/a", "experiments/b").is_equal  # doctest: +SKIP
        True
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
    """Compare what two experiments have on record.

    Args:
        a: an experiment's directory.
        b: another one.

    Returns:
        What differs. Durations do not count, nor why a run ended.

    Raises:
        FileNotFoundError: one is no experiment.
        ValueError: a `config.json`, or every checkpoint of one, is corrupt.

    Example:
        >>> compare_experiments("/no/such/experiment", "/nor/this")
        Traceback (most recent call last):
        ...
        FileNotFoundError: '/no/such/experiment' is not an experiment: it has no config.json.
    """
    config_a, config_b = (read_config(Path(directory)).to_dict() for directory in (a, b))
    checkpoints = [newest(directory) for directory in (a, b)]
    histories = [checkpoint.history if checkpoint else () for checkpoint in checkpoints]
    common = list(zip(*histories, strict=False))
    with_digest = [pair for pair in common if pair[0].digest is not None and pair[1].digest is not None]
    first_metrics = next((pair for pair in common if report_differences(*pair)), None)
    known = [checkpoint for checkpoint in checkpoints if checkpoint]
    return Comparison(
        config=tuple(differences(config_a, config_b)),
        environment=_compared([checkpoint.environment for checkpoint in known]),
        data=_compared([_content(checkpoint.data) for checkpoint in known if checkpoint.data]),
        num_epochs=(len(histories[0]), len(histories[1])),
        num_digests=len(with_digest),
        first_state=next((pair[0].epoch for pair in with_digest if pair[0].digest != pair[1].digest), None),
        first_metrics=first_metrics[0].epoch if first_metrics else None,
        metrics=tuple(report_differences(*first_metrics)) if first_metrics else (),
        notes=tuple(_notes(checkpoints, num_without=len(common) - len(with_digest))),
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any], labels: tuple[str, str] = ("in A", "in B")) -> list[str]:
    """Compare JSON data, bit for bit.

    Args:
        a: nested dicts; lists are compared as one value.
        b: the same.
        labels: what to say after the values.

    Returns:
        A text for each difference: the keys with dots between them, and both values. An absent value is like None.

    Example:
        >>> differences({"model": {"dropout": 0.5, "size": 3}}, {"model": {"dropout": 0.25, "size": 3}})
        ['model.dropout: 0.5 in A, 0.25 in B']
    """
    flat_a, flat_b = _flatten(a), _flatten(b)
    lines = []
    for name in {**flat_a, **flat_b}:
        shown = _shown(flat_a.get(name)), _shown(flat_b.get(name))  # as text, since NaN is not equal to itself
        if shown[0] != shown[1]:
            place = name if name.isprintable() else ascii(name)
            lines.append(f"{place}: {shown[0]} {labels[0]}, {shown[1]} {labels[1]}")
    return lines


def distinguishing(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What sets each of several configs apart.

    Args:
        configs: nested dicts; lists are compared as one value.

    Returns:
        For each config, the values that not all share, as text, by their keys with dots between them.

    Example:
        >>> distinguishing([{"model": {"dropout": 0.5, "size": 3}}, {"model": {"dropout": 0.25, "size": 3}}])
        [{'model.dropout': '0.5'}, {'model.dropout': '0.25'}]
    """
    flat = [_flatten(config) for config in configs]
    names = {name: None for config in flat for name in config}
    different = [name for name in names if len({_shown(config.get(name)) for config in flat}) > 1]
    return [{name: _plain(config.get(name)) for name in different} for config in flat]


def report_differences(a: EpochReport, b: EpochReport, labels: tuple[str, str] = ("in A", "in B")) -> list[str]:
    """Compare what two epochs brought, bit for bit; durations, digests and why a run ended do not count.

    Args:
        a: an epoch's report.
        b: another one.
        labels: what to say after the values.

    Returns:
        A text for each difference, with both values.

    Example:
        >>> report_differences(report, report)  # doctest: +SKIP
        []
    """
    return differences(report_values(a), report_values(b), labels)


def report_values(report: EpochReport) -> dict[str, Any]:
    """What `report_differences` compares, one value a key."""
    (data,) = history_to_json([report])
    return _flatten({name: value for name, value in data.items() if name not in _NOT_COMPARED})


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)  # floats to the last bit, control characters escaped


def _plain(value: Any) -> str:
    """Without quotes and brackets."""
    values = value if isinstance(value, list) else [value]
    return " ".join(item if isinstance(item, str) else _shown(item) for item in values)


def _compared(both: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    return tuple(differences(both[0], both[1])) if len(both) == 2 else None


def _content(data: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without the time of the last change, which copies do not share."""
    return {name: data.get(name) for name in ("sha256", "size")}


def _notes(checkpoints: Sequence[Checkpoint | None], *, num_without: int) -> list[str]:
    notes = []
    for label, checkpoint in zip("AB", checkpoints, strict=True):
        if checkpoint is None:
            notes.append(f"{label} has no checkpoint yet")
            continue
        if not checkpoint.data:
            notes.append(f"{label} does not have on record what its data were")
        notes += [f"{label}: {sentence}" for sentence in checkpoint.corrupt.values()]
    if num_without:
        notes.append(f"{num_without} of the common epochs have no digest on record: no checkpoint was due there")
    return notes
