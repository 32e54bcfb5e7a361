"""Claims about the end of a run: evaluation and figure are those of its last epoch, or are made good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from experiment_cases import PHANTOM, contents

from dwiml_func.experiment.finish import is_whole

OPTIONS = ("--rnn-layer-sizes", 4, "--batch-size-training", 96, "--batch-size-validation", 48, "--learning-rate", 0.01)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", str(folder), "run", str(PHANTOM), *map(str, OPTIONS), "--max-epochs", "2"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


EVALUATION, FIGURE = "evaluation.json", "plots/training.png"


@pytest.mark.parametrize("missing", [(EVALUATION, FIGURE), (EVALUATION,), (FIGURE,)], ids=str)
def test_what_a_kill_after_the_last_checkpoint_left_out_is_made_by_a_resume(cli, run, missing):
    before = contents(run)
    for name in missing:
        (run / name).unlink()
    done = cli("resume", run.parent, "run")
    assert (done.code, done.err) == (0, "")
    assert "Nothing is left to train." in done.out
    assert "Resuming from" not in done.out
    after = contents(run)
    assert after.keys() == before.keys()
    assert after[EVALUATION] == before[EVALUATION]
    assert after["checkpoint/2/manifest.json"] == before["checkpoint/2/manifest.json"]
    cli("resume", run.parent, "run").check_refusal("No epoch is left to train")


def test_the_evaluation_of_an_earlier_end_is_made_again(cli, run):
    """As when a run with more epochs is killed before its end."""
    old = {name: (run / name).read_bytes() for name in (EVALUATION, FIGURE)}
    assert cli("resume", run.parent, "run", "--new-max-epochs", 3).code == 0
    new = {name: (run / name).read_bytes() for name in old}
    for name, content in old.items():
        (run / name).write_bytes(content)
    assert not is_whole(run)
    assert cli("resume", run.parent, "run").code == 0
    assert is_whole(run)
    assert (run / EVALUATION).read_bytes() == new[EVALUATION] != old[EVALUATION]


def test_without_figures_a_run_is_whole_and_plot_draws_them(cli, tmp_path):
    train = ("train", tmp_path, "run", PHANTOM, *OPTIONS, "--max-epochs", 1)
    assert cli(*train, "--skip-figures").code == 0
    run = tmp_path / "run"
    assert (run / EVALUATION).is_file()
    assert not list(run.glob("plots/*"))
    assert is_whole(run)
    assert cli("evaluate", run, "--write").code == 0
    assert not list(run.glob("plots/*"))
    assert cli("plot", run).out == f"{run / FIGURE}\n"


def test_evaluate_writes_them_at_any_time(cli, run):
    before = contents(run)
    for name in (EVALUATION, FIGURE):
        (run / name).unlink()
    done = cli("evaluate", run, "--write")
    assert (done.code, done.err) == (0, "")
    assert "Mean angular error of the best model on the validation subjects" in done.out
    assert contents(run).keys() == before.keys()
    assert (run / EVALUATION).read_bytes() == before[EVALUATION]
    assert json.loads(before[EVALUATION])["num_epochs"] == 2


def test_an_evaluation_that_cannot_be_written_is_a_warning_and_the_summary_is_printed(cli, run):
    (run / EVALUATION).unlink()
    (run / EVALUATION / "in the way").mkdir(parents=True)
    done = cli("evaluate", run, "--write")
    assert done.code == 0
    assert "warning: The evaluation was not written: " in done.err
    assert "Mean angular error of the best model" in done.out


def test_evaluate_writes_those_of_the_members_of_an_ensemble(cli, tmp_path):
    assert cli("train", tmp_path, "e", PHANTOM, *OPTIONS, "--max-epochs", 1, "--num-models", 2).code == 0
    assert cli("evaluate", tmp_path / "e", "--write").code == 0
    assert all((tmp_path / "e" / number / name).is_file() for number in "01" for name in (EVALUATION, FIGURE))


def test_evaluate_takes_the_data_of_the_experiment(cli, run):
    assert cli("evaluate", run).out == cli("evaluate", run, PHANTOM).out != ""
    cli("evaluate", run / "best_model").check_refusal("config.json")


@pytest.mark.parametrize("keep", ["2", "all"])
def test_checkpoints_that_a_kill_kept_from_being_removed_go_with_the_next_resume(cli, finished, tmp_path, keep):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert cli("resume", run, "--new-max-epochs", 4, "--checkpoint-every", "1epoch").code == 0
    whole = contents(run)
    kept = {path.name for path in (run / "checkpoint").iterdir()}
    assert "1" not in kept
    shutil.copytree(finished / "checkpoint" / "1", run / "checkpoint" / "1")  # as before the last step of a save
    (run / EVALUATION).unlink()
    assert cli("resume", run, "--keep", keep).code == 0
    assert {path.name for path in (run / "checkpoint").iterdir()} == (kept if keep == "2" else {*kept, "1"})
    if keep == "2":
        assert contents(run).keys() == whole.keys()
