"""The leaderboard: for each kind of data and each tracker, means over people and seeds, their spread, and the coverage.

The coverage is the share of the distance between the principal direction and the true field that a tracker goes: (its
valid streamlines - those of the principal direction) / (those of the true field - those of the principal direction), of
means over the people that it has scores of.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwiml_func.benchmark.settings import DATA
from dwiml_func.benchmark.tasks import CEILING, read_scores
from dwiml_func.experiment.tracking.case import KEEP_STRAIGHT, ORACLE, PRINCIPAL_DIRECTION
from dwiml_func.files.atomic import atomic_write
from dwiml_func.files.json import null_if_not_finite

__all__ = ["PROTOCOLS", "as_markdown", "leaderboard", "write_leaderboard"]

PROTOCOLS = ("continue", "free", "core")
"""What a tracker is given; see `dwiml_func.tracking.protocols`."""

_LEAST_DISTANCE = 0.05  # between oracle and principal direction, of which a share means something
_DIGITS = 6
_BASELINES = (CEILING, ORACLE, PRINCIPAL_DIRECTION, KEEP_STRAIGHT)

_Scores = Mapping[str, Any]


def leaderboard(scores: Iterable[_Scores]) -> list[dict[str, Any]]:
    """A row for each kind of data and tracker: in the order of `DATA`, those with the largest coverage first."""
    groups: dict[tuple[str, str], list[_Scores]] = defaultdict(list)
    for each in scores:
        groups[each["data"], each["tracker"]].append(each)
    rows = []
    for (data, tracker), of_tracker in groups.items():
        if tracker == CEILING:
            continue
        baselines = {name: groups.get((data, name), []) for name in (PRINCIPAL_DIRECTION, ORACLE, CEILING)}
        rows.append(_row(data, tracker, of_tracker, baselines))
    order = {name: number for number, name in enumerate(DATA)}
    return sorted(rows, key=lambda row: (order[row["data"]], -(row["coverage"]["all"] or 0), row["tracker"]))


def write_leaderboard(out: Path) -> list[dict[str, Any]]:
    """Write `leaderboard.jsonl` and `leaderboard.md` from the scores in a folder; returns the rows."""
    try:
        rows = leaderboard(read_scores(out))
    except (KeyError, TypeError, IndexError) as error:  # scores without a checksum: of an earlier version, or edited
        raise ValueError(f"{out / 'scores'}: expected scores of a benchmark. Received: without {error}.") from None
    lines = [json.dumps(null_if_not_finite(row)) for row in rows]
    atomic_write(out / "leaderboard.jsonl", "".join(f"{line}\n" for line in lines))
    atomic_write(out / "leaderboard.md", as_markdown(rows))
    return rows


def as_markdown(rows: Sequence[_Scores]) -> str:
    """A table for each kind of data."""
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in own[0]["data_options"].items())
        ceiling = own[0]["ceiling_valid"]
        text = "" if ceiling is None else f"; half of the real streamlines beside the other half: {ceiling:.2f} valid"
        parts += [
            f"### {data}\n",
            f"{options}{text}\n",
            "| tracker | covered | valid: " + " | valid: ".join(PROTOCOLS) + " | lag after 80 mm | people, seeds |",
            "|---" * 7 + "|",
            *(_markdown_row(row) for row in own),
            "",
        ]
    return "\n".join(parts)


def _markdown_row(row: _Scores) -> str:
    spread = row["spread"]
    valid = [
        f"{row['valid'][name]:.3f} ± {spread['people'][name]:.3f}"
        + ("" if spread["seeds"] is None else f" ± {spread['seeds'][name]:.3f}")
        for name in PROTOCOLS
    ]
    covered = "" if row["coverage"]["all"] is None else f"{100 * row['coverage']['all']:.0f} %"
    lag = "" if row["lag_80_mm"] is None else f"{row['lag_80_mm']:.1f} mm"
    count = f"{row['num_people']}" + (f", {row['num_seeds']}" if row["num_seeds"] else "")
    return f"| {row['tracker']} | {covered} | " + " | ".join((*valid, lag, count)) + " |"


def _row(data: str, tracker: str, scores: list[_Scores], baselines: Mapping[str, list[_Scores]]) -> dict[str, Any]:
    people = sorted({each["person"] for each in scores})
    seeds = sorted({each["seed"] for each in scores if each["seed"] is not None})
    valid = {name: _table(scores, people, seeds, name) for name in PROTOCOLS}
    valid["all"] = np.mean([valid[name] for name in PROTOCOLS], axis=0)
    reached = {
        name: {protocol: _table(found, people, [], protocol) for protocol in PROTOCOLS}
        for name, found in baselines.items()
        if name != CEILING and {each["person"] for each in found} >= set(people)
    }
    for tables in reached.values():
        tables["all"] = np.mean(list(tables.values()), axis=0)
    ceilings = [each["valid"] for each in baselines[CEILING] if each["person"] in people]
    lags = [each["scores"]["continue"]["lag_mm"][-1] for each in scores]
    return {
        "data": data,
        "data_options": scores[0]["data_options"],
        "tracker": tracker,
        "num_people": len(people),
        "num_seeds": len(seeds),
        "people": people,
        "seeds": seeds,
        "coverage": {name: _coverage(table, name, reached) for name, table in valid.items()},
        "valid": {name: _rounded(np.nanmean(table)) for name, table in valid.items()},
        "spread": {
            "people": {name: _spread(np.nanmean(table, axis=1)) for name, table in valid.items()},
            "seeds": {name: _spread(np.nanmean(table, axis=0)) for name, table in valid.items()}
            if len(seeds) > 1
            else None,
        },
        "lag_80_mm": None if None in lags else _rounded(np.mean(lags)),
        "ceiling_valid": _rounded(np.mean(ceilings)) if ceilings and None not in ceilings else None,
        "config": scores[0].get("config"),
    }


def _table(scores: list[_Scores], people: list[str], seeds: list[int], protocol: str) -> NDArray[np.float64]:
    """(people, seeds) shares of valid streamlines; NaN where a person has no score of a seed."""
    table = np.full((len(people), max(1, len(seeds))), np.nan)
    for each in scores:
        if each["person"] in people:
            column = seeds.index(each["seed"]) if seeds else 0
            table[people.index(each["person"]), column] = each["scores"][protocol]["valid"]
    return table


def _coverage(
    table: NDArray[np.float64], name: str, reached: Mapping[str, Mapping[str, NDArray[np.float64]]]
) -> float | None:
    """None where a baseline is missing, or the oracle is hardly above the principal direction."""
    if len(reached) < 2:
        return None
    low, high = (float(reached[who][name].mean()) for who in (PRINCIPAL_DIRECTION, ORACLE))
    if high - low < _LEAST_DISTANCE:
        return None
    return _rounded((float(np.nanmean(np.nanmean(table, axis=1))) - low) / (high - low))


def _spread(values: NDArray[np.float64]) -> float:
    """The standard deviation of one or more values; 0 of one."""
    return _rounded(values.std(ddof=1)) if len(values) > 1 else 0.0


def _rounded(value: Any) -> float:
    return round(float(value), _DIGITS)
