"""Claims about `metrics.jsonl`: one object per epoch, strict JSON, always all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from report_cases import report

from dwiml_func.core.early_stopping import Best
from dwiml_func.writers.jsonl import jsonl


def rows(directory: Path) -> list[dict[str, object]]:
    def fail(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (directory / "logs" / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=fail) for line in text.splitlines()]


def test_a_line_holds_all_values_of_a_report_bitwise(tmp_path):
    jsonl(tmp_path)(report(1), report(2), report(3))
    assert rows(tmp_path)[2] == {
        "epoch": 3,
        "learning_rate": 0.1 / 3,
        "train_loss": 1 / 3,
        "train_unclipped_grad_norm": 15.0,
        "train_grad_norm": 1.0,
        "train_angular_error": 30.0,
        "valid_loss": 2 / 3,
        "valid_angular_error": 40.0,
        "num_batches": 3,
        "num_points": 30.0,
        "best_epoch": 3,
        "best_loss": 2 / 3,
        "is_best": True,
        "train_minutes": 0.75,
        "valid_minutes": 0.125,
        "points_in_train_minutes": 30.0,
    }


def test_the_speed_of_an_epoch_that_was_resumed_can_be_computed(tmp_path):
    resumed = report(1, timed_points=12.0)
    jsonl(tmp_path)(resumed)
    row = json.loads((tmp_path / "logs" / "metrics.jsonl").read_text())
    assert row["num_points"] == 30.0
    assert not any(name.startswith("learning_rate_") for name in row)
    assert row["points_in_train_minutes"] / row["train_minutes"] / 60 == resumed.points_per_second


def test_the_range_of_a_rate_that_changes_within_an_epoch_is_there(tmp_path):
    jsonl(tmp_path)(report(1, learning_rate=0.25, learning_rate_min=0.125, learning_rate_max=0.5))
    (row,) = rows(tmp_path)
    assert [row[f"learning_rate{each}"] for each in ("", "_min", "_max")] == [0.25, 0.125, 0.5]


def test_there_is_one_line_per_epoch(tmp_path):
    write = jsonl(tmp_path / "new")
    write(report(1), report(2))
    write(report(3))
    assert [row["epoch"] for row in rows(tmp_path / "new")] == [1, 2, 3]


def test_what_is_not_finite_is_null(tmp_path):
    jsonl(tmp_path)(report(1, train={"loss": math.inf}, valid={"loss": math.nan}, best=Best(), is_best=False))
    (row,) = rows(tmp_path)
    assert [row[name] for name in ("train_loss", "valid_loss", "best_loss", "best_epoch")] == [None] * 4
    assert row["is_best"] is False
