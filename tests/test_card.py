"""Claims about model cards: they say what the run itself recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from experiment_cases import CONFIG, latest_digest
from test_page import add_tracking

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.experiment.folder import create_experiment, read_config


def test_a_card_names_model_data_recipe_scores_and_versions(cli, experiments):
    directory = experiments / "run"
    outcome = cli("card", directory)
    assert (outcome.code, outcome.err) == (0, "")
    lines, checkpoint = outcome.out.splitlines(), read(directory)
    assert lines[0] == "# run"
    state, best = checkpoint.state, checkpoint.history[1]
    data = Path(read_config(directory).hdf5_file)
    for row in [
        "| kind | Learn2Track |",
        f"| parameters | {sum(leaf.numel() for leaf in state.params.values())} |",
        "| sh_order | 2 |",
        f"| sha256 | {hashlib.sha256(data.read_bytes()).hexdigest()} |",
        '| training.learning_rate | ["0.01*2 1e-30"] |',
        f"| valid loss | {json.dumps(best.valid['loss'])} |",
        f"| torch | {checkpoint.environment['torch']} |",
        f"| state | {latest_digest(directory)} |",
    ]:
        assert row in lines
    assert "## Scores of epoch 2, the best of 3 by loss" in lines
    assert not any(line.startswith("## Tracking") for line in lines)
    add_tracking(directory)
    assert (
        """
## Tracking of epoch 2, validation subject anna, steps of 2 mm

| valid (both ends) | continue | core |
| --- | --- | --- |
| model | 0.250 (0.260) | 0.250 (0.260) |
| principal direction | 0.500 (0.510) | 0.500 (0.510) |
| nearest real direction | 0.750 (0.760) | 0.750 (0.760) |
| half of the real streamlines | 0.875 (0.900) |  |
"""
        in cli("card", directory).out
    )
    assert not any("--max-epochs" in line or "dropout" in line for line in lines)  # defaults are left out


def test_a_run_without_an_epoch_has_no_card(cli, tmp_path):
    create_experiment(tmp_path, "new", CONFIG)
    cli("card", tmp_path / "new").check_refusal("has no recorded epoch yet")
