"""Claims about the summary at the end of a training."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from dwiml_func.cli._summary import format_summary
from dwiml_func.core.report import EpochReport
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.streamlines import directions
from dwiml_func.experiment.evaluation import Evaluation
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.model_store import load_model
from dwiml_func.models.baselines import principal_direction


def test_the_summary_equals_an_independent_computation(cli, experiments):
    outcome = cli("resume", experiments, "run", "--new-patience", "5", "--new-max-epochs", "4")
    assert outcome.code == 0

    dataset = open_dataset(read_config(experiments / "run").hdf5_file, "validation")
    batch = load_batch(BatchRequest(np.arange(48), None, 0, 0), dataset=dataset, spec=LoaderSpec())
    targets = directions(batch.points, batch.offsets)
    first = (batch.offsets[:-1] - torch.arange(48)).numpy()
    counted = np.ones(len(targets), dtype=bool)
    counted[first] = False

    def mean_error(predicted: torch.Tensor, rows: np.ndarray = counted) -> float:
        a, b = predicted.double().numpy()[rows], targets.double().numpy()[rows]
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())

    with torch.no_grad():
        predicted = load_model(experiments / "run" / "best_model").module(batch)
    model, at_first = mean_error(predicted), mean_error(predicted, first)
    straight = mean_error(torch.cat([targets[:1], targets[:-1]]))
    principal = principal_direction(batch, {"sh_order": 2})
    assert principal is not None
    along = mean_error(principal[0])

    history = json.loads((experiments / "run" / "checkpoint" / "4" / "manifest.json").read_text())["history"]
    text = outcome.out.split("\n\n")[1]
    assert text.splitlines()[0].startswith("Finished after 4 epochs, ")
    best = history[1]
    assert f"Best epoch 2: training loss {best['train']['loss']:.4f}, " in text
    assert f"validation loss {best['valid']['loss']:.4f}\n" in text
    assert f"on the validation subjects,\nat the {counted.sum()} points of 48 streamlines" in text
    shown = {name: float(value) for name, value in re.findall(r"^  ([a-z, ]+?) +([\d.]+) deg", text, re.MULTILINE)}
    assert shown == pytest.approx(
        {
            "model": model,
            "principal direction": along,
            "keep going straight": straight,
            "model, first points": at_first,
        },
        abs=0.006,
    )
    gains = [float(gain) for gain in re.findall(r"the model is ([\d.]+) deg (?:better|worse)", text)]
    assert gains == pytest.approx([abs(along - model), abs(straight - model)], abs=0.006)


def report(**changes: Any) -> EpochReport:
    from dwiml_func.core.early_stopping import Best

    values: dict[str, Any] = {
        "epoch": 1,
        "learning_rate": 0.1,
        "train": {"loss": 0.25},
        "valid": {},
        "num_batches": 3,
        "num_points": 30.0,
        "best": Best(0.25, 1, 0),
        "is_best": True,
        "stop": "max_epochs",
        "train_minutes": 1.25,
        "valid_minutes": 0.5,
    }
    return EpochReport(**values | changes)


def evaluation(**changes: Any) -> Evaluation:
    values = {
        "model": 10.0,
        "keep_straight": 4.0,
        "principal_direction": 15.5,
        "num_points": 7,
        "num_streamlines": 2,
    }
    return Evaluation(**values | changes)


def test_without_a_third_point_no_angle_is_told():
    nothing = evaluation(model=float("nan"), keep_straight=float("nan"), num_points=0)
    text = format_summary([report()], nothing, subset="validation")
    assert "nan" not in text
    assert text.count("unknown: there are none") == 2


def test_the_summary_says_when_the_window_lag_would_have_chosen_another_epoch():
    from dwiml_func.core.early_stopping import Best

    def with_lag(epoch: int, lag: float, loss: float = 0.5) -> EpochReport:
        return report(epoch=epoch, best=Best(0.5, 2), valid={"loss": loss, "tracking_window_lag": lag})

    other = format_summary([with_lag(1, 3.0, 0.6), with_lag(2, 4.5)], evaluation(), subset="validation")
    assert "Window lag of epoch 2: 4.50 mm" in other
    assert "The least window lag is that of epoch 1, window lag 3.00 mm, 1.50 mm less" in other
    assert "validation loss is" not in other
    by_loss = format_summary([with_lag(1, 6.0, 0.4), with_lag(2, 4.5)], evaluation(), subset="validation")
    assert "The least validation loss is that of epoch 1, window lag 6.00 mm, 1.50 mm more" in by_loss
    assert "least window lag" not in by_loss
    same = format_summary([with_lag(1, 3.0, 0.6), with_lag(2, 2.0)], evaluation(), subset="validation")
    assert "Window lag of epoch 2: 2.00 mm" in same
    assert "least window lag" not in same
    assert "indow lag" not in format_summary([report(), report(epoch=2)], evaluation(), subset="training")


def test_the_summary_says_better_worse_or_unknown():
    text = format_summary([report(), report(epoch=2)], evaluation(), subset="training")
    assert "Finished after 2 epochs, 3.5 minutes." in text
    assert "Best epoch 1: training loss 0.2500\n" in text
    assert "on the training subjects,\nat the 7 points of 2 streamlines" in text
    assert re.search(r"principal direction +15\.50 deg  \(the model is 5\.50 deg better\)", text)
    assert re.search(r"keep going straight +4\.00 deg  \(the model is 6\.00 deg worse\)", text)
    assert text.endswith("for short steps; a tracker that did this would never turn.")
    assert format_summary([report()], evaluation(keep_straight=12.0), subset="training").endswith("2.00 deg better)")
    unknown = format_summary([report(stop="patience")], evaluation(principal_direction=None), subset="validation")
    assert unknown.strip().startswith("Stopped early after 1 epoch")
    assert "principal direction  unknown" in unknown


def test_a_run_without_a_finite_metric_has_no_best_model_and_says_so(capsys, tmp_path):
    from types import SimpleNamespace

    from dwiml_func.cli._training import print_end
    from dwiml_func.core.early_stopping import Best

    parts: Any = SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(monitor="overlap")))
    print_end(tmp_path, parts, [report(best=Best())])
    assert capsys.readouterr().out == "No epoch had a finite overlap, so there is no best model.\n"
    assert list(tmp_path.iterdir()) == []


def test_validations_within_epochs_are_no_epochs_of_the_summary(cli, tmp_path):
    from pathlib import Path

    data = Path(__file__).parent / "data" / "phantom.hdf5"
    options = ("--validate-every", "1batches", "--batch-size-training", 40, "--rnn-layer-sizes", 2, "--max-epochs", 2)
    text = cli("train", tmp_path, "run", data, *options, "--skip-figures").out
    losses = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    best = int(losses[-1]["best_epoch"])
    loss = losses[best - 1]["train_loss"]
    assert len(losses) == 2
    assert re.search(rf"^Best epoch {best}(, batch \d)?: training loss {loss:.4f}, ", text, re.MULTILINE)
